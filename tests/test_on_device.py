"""Data sets on the devices: the host's batches to the bit, however many steps are taken at once."""

import dataclasses
import signal
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from flax import linen as nn

from afi_flax import config, evaluate, metrics, on_device, sharding, state, steps, train
from afi_flax.analysis import devices as hardware
from afi_flax.analysis import memory
from afi_flax.data import pipeline, sources
from afi_flax.errors import UserError
from afi_flax.workdir import Workdir
from configs import digits_afi_resnet20 as digits_config
from tests import test_main
from tests.test_nonfinite import assert_same, left, poison, recipe  # noqa: F401

N, SIZE, BATCH, SEED = 50, 8, 16, 3


@pytest.fixture(scope='module')
def source():
  """A set of which the fourth batch is the first that straddles epochs."""
  draw = np.random.default_rng(0)
  images = draw.integers(0, 256, [N, SIZE, SIZE, 3], np.uint8)
  return sources.Arrays(images, draw.integers(0, 10, N).astype(np.int32))


def make_mesh(devices):
  return sharding.make_mesh(jax.devices()[:devices])


def compiled_chunks(body, mesh, *arguments, loops=True):
  """Of the body, compiled for arguments like these."""
  quickly = {'xla_backend_optimization_level': 0}
  chunks = on_device.Chunks(body, sharding.replicated(mesh), quickly, loops)
  chunks.program = chunks.step.lower(*chunks.arguments(*arguments)).compile()
  return chunks


def put(tree, mesh):
  return jax.device_put(tree, sharding.replicated(mesh))


@pytest.mark.parametrize(('devices', 'loops'), [(1, False), (8, True)])
def test_batches_are_the_hosts_to_the_bit(source, devices, loops):
  """In the second window of the stream, across the end of an epoch."""
  mesh, count, augment = make_mesh(devices), 5, 'pad_crop_flip'

  def keep(kept, batch):  # in place of a training step
    at = kept['count'] % on_device.WINDOW
    rows = jax.tree.map(lambda rows, row: rows.at[at].set(row), kept['rows'], batch)
    return {'count': kept['count'] + 1, 'rows': rows}, jnp.zeros([3])

  data_step = on_device.WINDOW
  host = pipeline.train_batches(
    source, seed=SEED, data_step=data_step, batch_size=BATCH, augment=augment, image_size=SIZE
  )
  wanted = [next(host) for _ in range(count)]
  assert np.ptp([batch['epoch'] for batch in wanted]) > 0
  rows = jax.tree.map(lambda x: jnp.zeros([count, *x.shape], x.dtype), wanted[0])
  carry = put(({'count': jnp.int32(0), 'rows': rows}, jnp.zeros([on_device.WINDOW, 3])), mesh)
  inputs = on_device.upload(source, 'train', mesh), on_device.send_order(N, SEED, BATCH, 1, mesh)
  body = on_device.make_train_body(keep, SEED, augment, mesh)
  chunks = compiled_chunks(body, mesh, carry, *inputs, loops=loops)
  kept, _ = chunks(chunks(carry, 0, 2, *inputs), 2, 3, *inputs)
  assert kept['count'] == count
  for k, batch in enumerate(wanted):
    for name, values in batch.items():
      np.testing.assert_array_equal(kept['rows'][name][k], values, err_msg=name)
      assert kept['rows'][name].dtype == values.dtype


class Small(nn.Module):
  """A network that compiles at once, with batch norm."""

  num_classes = 10

  @nn.compact
  def __call__(self, images, train):
    x = nn.Dense(16)(images.reshape(len(images), -1))
    x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
    return nn.Dense(self.num_classes)(x)


DATA = config.resolve(digits_config.get_config()).data


def small_state(mesh):
  return state.Initial(Small(), optax.sgd(0.1, 0.9), SIZE, 0, sharding.replicated(mesh)).state()


@pytest.mark.parametrize('devices', [1, 8])
def test_how_many_steps_are_taken_at_once_changes_no_bit(source, devices):
  mesh = make_mesh(devices)
  step = steps.make_train_step(Small(), optax.sgd(0.1, 0.9), DATA, config.Step())
  body = on_device.make_train_body(step, SEED, 'pad_crop_flip', mesh)
  inputs = on_device.upload(source, 'train', mesh), on_device.send_order(N, SEED, BATCH, 0, mesh)
  start = jax.device_get((small_state(mesh), jnp.zeros([on_device.WINDOW, 3])))
  chunks = compiled_chunks(body, mesh, put(start, mesh), *inputs)
  # Each device makes its own part of a batch: what they exchange is sums.
  assert set(memory.collectives(chunks.program)) == ({'all-reduce'} if devices > 1 else set())
  ends = []
  for lengths in ([8], [1] * 8, [3, 5]):
    carry, first = put(start, mesh), 0
    for length in lengths:
      carry = chunks(carry, first, length, *inputs)
      first += length
    ends.append(jax.device_get(carry))
  for other in ends[1:]:
    jax.tree.map(np.testing.assert_array_equal, ends[0], other)
  made, numbers = ends[0]
  assert made.step == made.data_step == 8
  assert (numbers[:8] != 0).all()
  assert (numbers[8:] == 0).all()


@pytest.mark.parametrize('devices', [1, 8])
def test_evaluation_counts_each_example_once(source, devices):
  """50 pictures in batches of 16: the sums of the host's batches."""
  mesh = make_mesh(devices)
  variables = small_state(mesh).variables
  step = steps.make_eval_step(Small(), DATA)
  sums = put(jax.tree.map(lambda x: jnp.zeros([4], x.dtype), metrics.zeros()), mesh)
  inputs = variables, on_device.upload(source, 'test', mesh)
  body = on_device.make_eval_body(step, BATCH, mesh)
  chunks = compiled_chunks(body, mesh, sums, *inputs)
  sums = chunks(chunks(sums, 0, 1, *inputs), 1, 3, *inputs)
  batches = pipeline.eval_batches(source, batch_size=BATCH, image_size=SIZE)
  jitted = jax.jit(step)
  wanted = [jitted(variables, sharding.put_batch(batch, mesh)) for batch in batches]
  for name, values in sums.items():
    host = [one[name] for one in wanted]
    if name == 'loss':
      np.testing.assert_allclose(values, host, rtol=1e-6)
    else:
      np.testing.assert_array_equal(values, host)
  assert sums['examples'].sum() == N


def test_a_chunk_takes_about_as_long_as_one_waits(monkeypatch):
  chunks = compiled_chunks(lambda k, carry: carry + k, make_mesh(1), jnp.int32(0))
  assert chunks.most == 1
  for patience, least, largest in ((0.0, 1, 1), (1e9, 1000, np.inf)):
    monkeypatch.setattr(on_device, '_PATIENCE', patience)
    assert chunks(jnp.int32(0), 3, 4) == 3 + 4 + 5 + 6
    assert least <= chunks.most <= largest


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('auto_augment', 'rand-m6-mstd0.5-inc1'),
    ('color_jitter', (0.4, 0.4, 0.4, 0.0)),
    ('lighting', 0.1),
    ('augment', 'random_resized_crop_flip'),
  ],
)
def test_what_the_host_does_to_pictures_is_refused(key, value):
  made = digits_config.get_config()
  made.data.on_device = True
  made.data[key] = value
  with pytest.raises(
    UserError, match=f'data.on_device True: data.{key} .*on_device=False'
  ) as error:
    config.resolve(made)
  assert '\n' not in str(error.value)


def test_what_does_not_fit_is_refused(monkeypatch, source, tmp_path):
  monkeypatch.setattr(hardware, 'memory_bytes', lambda devices: 4096)
  with pytest.raises(UserError, match=r'True: train is 0 MiB, and each .*on_device=False$'):
    on_device.upload(source, 'train', make_mesh(1))
  encoded = sources.open_split('fake_imagenet', '', 'train[:8]')
  with pytest.raises(UserError, match=r'pictures of train\[:8\] are not in memory; .*=False$'):
    on_device.upload(encoded, 'train[:8]', make_mesh(1))


# What follows trains.


def on(*flags):
  """Flags of a short run of a small network on the device."""
  return ('--config.data.on_device=True', '--config.model.name=resnet20', *flags)


@pytest.mark.slow
def test_stopped_by_sigterm_and_resumed(tmp_path):
  """In the middle of an epoch and of a log line: as if it had never come, as the host's but for
  last bits.
  """
  flags = '--config.epochs=2', '--config.run.log_every_steps=7'
  _, err = test_main.main(*test_main.digits(tmp_path / 'whole', *on(*flags)))
  assert ', of which the data set 1 MiB' in err
  workdir, stops = tmp_path / 'stopped', 0
  for _ in range(3):
    process = test_main.start(*test_main.digits(workdir, *on(*flags)))
    seen = len(test_main.lines(workdir)) if workdir.exists() else 0
    while process.poll() is None and not (
      workdir.exists() and len(test_main.lines(workdir)) > seen
    ):
      time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode in (0, 75), err[-3000:]
    stops += process.returncode == 75
  test_main.main(*test_main.digits(workdir, *on(*flags)))
  assert stops >= 2
  test_main.assert_equal_runs(tmp_path / 'whole', workdir)
  host = tmp_path / 'host'
  test_main.main(*test_main.digits(host, *on(*flags), '--config.data.on_device=False'))
  for there, here in zip(test_main.lines(host), test_main.lines(workdir), strict=True):
    assert {**here, 'loss': 0, 'top1': 0, 'top5': 0} == {**there, 'loss': 0, 'top1': 0, 'top5': 0}
    np.testing.assert_allclose(here['loss'], there['loss'], rtol=0.1)
  evaluated = test_main.lines(workdir)[-1]['loss']
  assert evaluate.evaluate_run(workdir)['loss'] == pytest.approx(evaluated, rel=1e-5)
  elsewhere = ml_collections.ConfigDict(Workdir(workdir).read_config())
  elsewhere.data.on_device = False
  record = evaluate.evaluate_run(workdir, 'last', elsewhere)
  assert record['loss'] == pytest.approx(evaluated, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('policy', ['skip', 'rollback'])
def test_batches_that_are_not_finite(tmp_path, poison, policy):  # noqa: F811
  """Found out a chunk later; stopped or not, and as from the host."""

  def made(**keys):
    ready = recipe(policy, **keys)
    ready.data.on_device, ready.model.name = True, 'resnet20'
    return ready

  train.train(made(), tmp_path / 'whole')
  metrics, events, steps, _ = whole = left(tmp_path / 'whole')
  total = config.resolve(made()).optim.total_steps
  assert steps[0] == total == metrics[-1]['step']
  for stop in (17, 34, total):
    train.train(made(max_steps=stop), tmp_path / 'stopped')
  assert_same(left(tmp_path / 'stopped'), whole)
  host = made()
  host.data.on_device = False
  train.train(host, tmp_path / 'host')
  same = ('step', 'data_step', 'examples')
  others = left(tmp_path / 'host')[1]
  assert len(others) == len(events) >= 2
  assert [[e[k] for k in same] for e in others] == [[e[k] for k in same] for e in events]


@pytest.mark.slow
def test_loops_and_single_steps_train_alike(tmp_path, monkeypatch):
  """The whole command's training, in the program that accelerators run."""
  made = digits_config.get_config('smoke')
  made.data.on_device, made.model.name = True, 'resnet20'
  made.run.log_every_steps = 3
  train.train(made, tmp_path / 'steps')
  init = on_device.Chunks.__init__
  monkeypatch.setattr(
    on_device.Chunks,
    '__init__',
    lambda self, body, like, options: init(self, body, like, options, loops=True),
  )
  train.train(made, tmp_path / 'loop')
  loop, one_by_one = (test_main.lines(tmp_path / name) for name in ('loop', 'steps'))
  assert [r['step'] for r in loop] == [r['step'] for r in one_by_one] == [3, 4, 4]
  for a, b in zip(loop, one_by_one, strict=True):
    np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-3)


@pytest.mark.slow
def test_two_processes(tmp_path):
  """Each sends half of the order and holds all pictures."""
  flags = on('--config.run.max_steps=10', '--config.run.log_every_steps=9')
  test_main.wait(test_main.start_two(*test_main.digits(tmp_path / 'two', *flags)), status=0)
  test_main.main(*test_main.digits(tmp_path / 'one', *flags))
  one, two = (test_main.lines(tmp_path / name) for name in ('one', 'two'))
  assert [(r['step'], r['examples']) for r in one] == [(r['step'], r['examples']) for r in two]
  np.testing.assert_allclose([r['loss'] for r in two], [r['loss'] for r in one], rtol=1e-2)


@pytest.mark.slow
def test_traces_steps(tmp_path):
  test_main.main(
    *test_main.digits(tmp_path / 'run', *on()),
    '--config.run.max_steps=14',
    '--config.run.profile_steps=2',
  )
  assert list((tmp_path / 'run' / 'profile').rglob('*.xplane.pb'))


@pytest.mark.slow
def test_a_step_that_does_not_fit_beside_the_set(tmp_path, monkeypatch):
  made = digits_config.get_config('smoke')
  made.data.on_device = True
  monkeypatch.setattr(hardware, 'memory_bytes', lambda devices: 2**20)
  with pytest.raises(UserError, match=r'which has 1; use .*, or --config.data.on_device=False$'):
    train.train(made, tmp_path)


def test_older_runs_load():
  made = digits_config.get_config()
  plan = config.resolve(made)
  with made.unlocked():
    del made.data.on_device
  assert config.resolve(made) == plan
  assert not dataclasses.asdict(plan.data)['on_device']
