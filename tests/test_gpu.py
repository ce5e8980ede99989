"""A GPU against this machine's CPU, by `make gpu-test`; skipped by every other run of the tests.

AFI_FLAX_TEST_PLATFORMS=cpu makes them compare the CPU with itself, to try the tests themselves.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afi_flax import config, models, on_device, optim, sharding, state, steps, train
from afi_flax.analysis import memory
from afi_flax.data import pipeline, sources
from configs import cifar100_afi_resnet32 as shipped
from configs import digits_afi_resnet20 as digits_config
from tests import test_main

pytestmark = pytest.mark.gpu
BATCH = 8
NETWORKS = (
  'resnet20', 'afi_resnet20', 'afi_resnet20_b_cbam', 'afi_mobilenetv2_cifar',
  'afi_mobilenetv2_cifar_b', 'afi_shufflenetv2_x0_5_cifar', 'afi_resnext29_32x4d_b',
)  # fmt: skip


@pytest.fixture(scope='module')
def gpu():
  """The device to be tested."""
  (device, *_) = jax.devices()
  asked = os.environ.get('AFI_FLAX_TEST_PLATFORMS')
  if asked is None:
    pytest.skip('needs a GPU: make gpu-test')
  # Where JAX sees none it falls back to the CPU, and says nothing.
  assert device.platform == 'gpu' or asked == 'cpu', 'JAX finds no GPU'
  return device


@pytest.fixture(scope='module')
def cpu():
  (device, *_) = jax.devices('cpu')
  return device


@pytest.fixture(autouse=True)
def precise():
  """float32 as it is written: GPUs multiply it as TF32 otherwise."""
  with jax.default_matmul_precision('highest'):
    yield


def make_plan(network='afi_resnet20', dtype='float32'):
  cfg = shipped.get_config('smoke')
  cfg.model.name, cfg.model.dtype, cfg.batch_size = network, dtype, BATCH
  cfg.schedule.boundaries = ()
  return config.resolve(cfg)


def host_batches(plan, count):
  source = sources.open_split('fake_cifar', '', 'train')
  stream = pipeline.train_batches(
    source, seed=0, data_step=0, batch_size=BATCH, augment='pad_crop_flip', image_size=32
  )
  return source, [next(stream) for _ in range(count)]


def step_on(device, plan, count=1, deterministic=False):
  """The first state, that after some steps, and their numbers f32 [count,3], on the host."""
  mesh = sharding.make_mesh([device])
  whole = sharding.replicated(mesh)
  model, optimizer = models.create_model(**vars(plan.model)), optim.make(plan.optim)
  step = steps.jit_train_step(model, optimizer, plan.data, plan.step, whole, deterministic)
  now = state.Initial(model, optimizer, 32, 0, whole).state()
  first, numbers = jax.device_get(now), []
  for batch in host_batches(plan, count)[1]:
    now, three = step(now, sharding.put_batch(batch, mesh))
    numbers.append(np.asarray(three))
  return first, jax.device_get(now), np.stack(numbers)


@pytest.mark.parametrize('network', NETWORKS)
def test_a_step_is_that_of_the_cpu(gpu, cpu, network):
  plan = make_plan(network)
  (first, after, numbers), (on_cpu, wanted, wanted_numbers) = (
    step_on(device, plan) for device in (gpu, cpu)
  )
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(first.variables)]
  of = [jax.tree.leaves(one.variables) for one in (first, on_cpu, after, wanted)]
  np.testing.assert_allclose(numbers, wanted_numbers, rtol=1e-3)
  for path, begin, cpu_begin, x, y in zip(paths, *of, strict=True):
    where = jax.tree_util.keystr(path)
    np.testing.assert_allclose(begin, cpu_begin, rtol=1e-5, atol=1e-6, err_msg=where)  # same draws
    most = np.abs(y - cpu_begin).max()
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 + 0.02 * most, err_msg=where)


def test_bfloat16_is_near_float32(gpu):
  _, after, numbers = step_on(gpu, make_plan(dtype='bfloat16'), count=3)
  _, _, wanted = step_on(gpu, make_plan(), count=3)
  np.testing.assert_allclose(numbers[0, 0], wanted[0, 0], rtol=0.03)
  assert numbers[0, 0] != wanted[0, 0]
  assert (numbers[:, 2] == 1).all()
  assert {x.dtype for x in jax.tree.leaves(after.params)} == {np.dtype('float32')}


def test_a_loop_on_the_device_is_steps_from_the_host(gpu):
  """The same examples and crops; the same numbers, up to kernels that a loop may choose."""
  plan, count = make_plan(), 5
  _, after, numbers = step_on(gpu, plan, count, deterministic=True)
  source, _ = host_batches(plan, 1)
  mesh = sharding.make_mesh([gpu])
  whole = sharding.replicated(mesh)
  model, optimizer = models.create_model(**vars(plan.model)), optim.make(plan.optim)
  step = steps.make_train_step(model, optimizer, plan.data, plan.step)
  chunks = on_device.Chunks(
    on_device.make_train_body(step, 0, 'pad_crop_flip', mesh),
    whole,
    steps.compiler_options(True, gpu),
    loops=True,
  )
  inputs = (
    on_device.upload(source, 'train', mesh),
    on_device.send_order(len(source), 0, BATCH, 0, mesh),
  )
  ends = []
  for lengths in ([count], [2, 3]):
    now = state.Initial(model, optimizer, 32, 0, whole).state()
    carry = now, jax.device_put(jnp.zeros([on_device.WINDOW, 3]), whole)
    if chunks.program is None:
      chunks.program = chunks.step.lower(*chunks.arguments(carry, *inputs)).compile()
    first = 0
    for length in lengths:
      carry, first = chunks(carry, first, length, *inputs), first + length
    ends.append(jax.device_get(carry))
  jax.tree.map(np.testing.assert_array_equal, *ends)  # however many at once
  (made, found), _ = ends
  assert made.step == after.step == count
  np.testing.assert_allclose(found[:count, 0], numbers[:, 0], rtol=1e-3)
  for x, y in zip(jax.tree.leaves(made.params), jax.tree.leaves(after.params), strict=True):
    np.testing.assert_allclose(x, y, rtol=0.01, atol=1e-3)


def test_deterministic_runs_are_equal_to_the_bit(gpu):
  one, other = (step_on(gpu, make_plan(), 3, deterministic=True)[1:] for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, one, other)


def digits(max_steps, on_gpu):
  cfg = digits_config.get_config()
  cfg.run.max_steps, cfg.run.log_every_steps = max_steps, 2
  cfg.run.deterministic, cfg.data.on_device = True, on_gpu
  cfg.eval_batch_size = 100
  return cfg


@pytest.mark.parametrize('on_gpu', [False, True])
def test_a_stopped_run_is_one_that_was_not(gpu, tmp_path, on_gpu):
  del gpu
  for folder, stops in (('whole', [4]), ('stopped', [2, 4])):
    for stop in stops:
      train.train(digits(stop, on_gpu), str(tmp_path / folder))
  test_main.assert_equal_runs(tmp_path / 'stopped', tmp_path / 'whole')


def test_a_run_of_the_cpu_goes_on(gpu, tmp_path):
  """From its checkpoint, with the examples that it would have taken there."""
  del gpu
  for folder, steps_there in (('whole', 4), ('moved', 2)):
    flags = test_main.digits(tmp_path / folder, '--config.run.log_every_steps=2')
    test_main.main(*flags, f'--config.run.max_steps={steps_there}')
  cfg = digits(4, on_gpu=False)
  cfg.run.deterministic = False
  train.train(cfg, str(tmp_path / 'moved'))
  wanted, found = (
    {(r['step'], r['split']): r for r in test_main.lines(tmp_path / folder)}
    for folder in ('whole', 'moved')
  )
  for key, record in wanted.items():
    assert found[key]['examples'] == record['examples']
    np.testing.assert_allclose(found[key]['loss'], record['loss'], rtol=0.01)


def test_memory_is_checked(gpu):
  plan = make_plan()
  model, optimizer = models.create_model(**vars(plan.model)), optim.make(plan.optim)
  program = memory.train_program(model, optimizer, plan.data, plan.step, BATCH, [gpu])
  said = memory.check_fits(program.lower().compile(), [gpu], 'a cure')
  assert ' of ' in said
