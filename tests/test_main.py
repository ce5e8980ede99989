"""The command itself, in processes of its own: train, stop, resume, evaluate, and every mistake."""

import dataclasses
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import afi_flax
from afi_flax import evaluate, models, optim, run, sharding, state, train
from afi_flax.analysis import cost
from afi_flax.analysis import devices as hardware
from afi_flax.errors import UserError
from afi_flax.workdir import Workdir
from configs import digits_afi_resnet20 as digits_config
from tests.test_processes import free_port

DIGITS = 'configs/digits_afi_resnet20.py'


def start(*flags):
  """The command with one CPU device, not waited for."""
  command = [sys.executable, '-m', 'afi_flax.main', *map(str, flags)]
  cache = jax.config.jax_compilation_cache_dir
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_COMPILATION_CACHE_DIR': cache}
  env.pop('XLA_FLAGS', None)
  return subprocess.Popen(
    command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )


def main(*flags, status=0):
  """Runs the command to its end; (stdout, stderr)."""
  process = start(*flags)
  out, err = process.communicate(timeout=300)
  assert process.returncode == status, err[-3000:]
  return out, err


def digits(workdir, *flags):
  """Flags of a short run on the digits."""
  return (
    '--config', DIGITS, '--workdir', workdir, '--config.eval_batch_size=100', *flags
  )  # fmt: skip


def lines(workdir):
  """What metrics.jsonl says, but for the time it took."""
  return [
    {k: v for k, v in record.items() if k != 'images_per_second'}
    for record in Workdir(workdir).read_metrics()
  ]


def last_state(workdir):
  """The whole state of a run's last checkpoint, and its step."""
  loaded = afi_flax.load_run(workdir)
  mesh = sharding.make_mesh(jax.devices()[:1])
  model = models.create_model(**vars(loaded.plan.model))
  abstract = state.abstract(
    model, optim.make(loaded.plan.optim), loaded.plan.data.image_size, sharding.replicated(mesh)
  )
  return run.restore(Workdir(workdir), abstract, 'last')


def assert_equal_runs(one, other):
  assert lines(one) == lines(other)
  (a, step), (b, other_step) = last_state(one), last_state(other)
  assert step == other_step
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y, err_msg=str(path))


@pytest.fixture(scope='module')
def four_steps(tmp_path_factory):
  """The folder of a run of four steps, with what the command printed."""
  workdir = tmp_path_factory.mktemp('four') / 'run'
  out, err = main(*digits(workdir, '--config.run.max_steps=4', '--config.run.log_every_steps=3'))
  return workdir, out, err


def test_trains_and_says_so(four_steps):
  workdir, out, err = four_steps
  reached, curves, following = out.splitlines()
  assert 'max_steps at step 4 of' in reached
  assert '359 examples' in reached
  assert str(workdir / 'curves.png') in curves
  assert '--mode=eval' in following
  for said in ('Compiled the training step', '225,210', '1,438 training', 'starts from scratch'):
    assert said in err, err
  assert 'Traceback' not in err
  for name in ('config.json', 'curves.png', 'metrics.jsonl', 'checkpoints/4', 'best/4'):
    assert (workdir / name).exists(), name
  records = lines(workdir)
  assert [(r['step'], r['split']) for r in records] == [
    (3, 'train'), (4, 'train'), (4, 'test'),
  ]  # fmt: skip
  assert [r['examples'] for r in records] == [96, 32, 359]
  assert all(0 <= r['top1'] <= r['top5'] <= 1 for r in records)


def test_two_and_two_steps_are_four(four_steps, tmp_path):
  workdir = tmp_path / 'run'
  flags = digits(workdir, '--config.run.log_every_steps=3')
  main(*flags, '--config.run.max_steps=2')
  assert [(r['step'], r['examples'], 'partial' in r) for r in lines(workdir)] == [
    (2, 64, True),
    (2, 359, False),
  ]
  _, err = main(*flags, '--config.run.max_steps=4')
  assert 'resumed at step 2' in err
  assert_equal_runs(four_steps[0], workdir)


def test_evaluates_what_it_trained(four_steps):
  workdir = four_steps[0]
  trained = lines(workdir)[-1]
  out, _ = main('--mode=eval', '--workdir', workdir, '--checkpoint=best')
  assert out.startswith('step 4 ')
  assert '(picked on the test split, so optimistic)' in out
  assert f'{trained["loss"]:.4f}' in out
  assert f'{trained["top1"]:.2%}' in out
  for checkpoint in ('last', '4'):
    record = evaluate.evaluate_run(workdir, checkpoint)
    assert record['step'] == 4
    assert record['top1'] == trained['top1']
  assert 'picked_on' not in record
  config = digits_config.get_config()
  config.eval_batch_size, config.data.eval_split = 50, 'train[:100]'
  assert evaluate.evaluate_run(workdir, 'last', config)['examples'] == 100


def test_load_run(four_steps):
  loaded = afi_flax.load_run(four_steps[0])
  assert loaded.class_names == tuple('0123456789')
  assert loaded.step == 4
  images = np.zeros([3, 16, 16, 3], 'uint8')
  apply = jax.jit(functools.partial(loaded.model.apply, train=False))
  logits = apply(loaded.variables, loaded.preprocessing(images))
  assert logits.shape == (3, 10)


def test_awkward_batches_evaluate_the_same(four_steps):
  """In 7s, of which the last is short and eight devices pad each, one by one, and all at once."""
  loaded = afi_flax.load_run(four_steps[0])
  records = []
  for batch, devices in ((7, 8), (1, 1), (359, 1), (500, 8)):
    plan = loaded.plan
    plan = type(plan)(**vars(plan) | {'eval_batch_size': batch})
    mesh = sharding.make_mesh(jax.devices()[:devices])
    variables = jax.device_put(loaded.variables, sharding.replicated(mesh))
    records.append(evaluate.Evaluator(plan, loaded.model, mesh)(variables))
  for record in records[1:]:
    for key in ('examples', 'top1', 'top5'):
      assert record[key] == records[0][key]
    np.testing.assert_allclose(record['loss'], records[0]['loss'], rtol=1e-5)
  assert records[0]['examples'] == 359


@pytest.mark.slow
def test_starts_with_another_runs_weights(four_steps, tmp_path):
  _, err = main(
    *digits(tmp_path / 'a', '--config.run.max_steps=1', f'--config.run.init_from={four_steps[0]}')
  )
  assert 'starts with the weights of step 4' in err
  _, err = main(
    *digits(tmp_path / 'b', '--config.run.max_steps=5', f'--config.run.resume={four_steps[0]}')
  )
  assert 'goes on from step 4' in err
  assert lines(tmp_path / 'b')[-1]['step'] == 5


def one_line(err):
  """The error that a command ended with: one line, no stack trace."""
  said = err.splitlines()
  assert len(said) == 1, err
  assert said[0].startswith('error: '), err
  return said[0]


@pytest.mark.parametrize(
  ('flags', 'says'),
  [
    (('--config', DIGITS), 'no --workdir'),
    (('--workdir', 'W', '--config', DIGITS, '--config.model.nam=1'), "did you mean 'model.name'"),
    (('--workdir', 'W', '--config', 'configs/cifar100_resnet33.py'), 'cifar100_resnet32.py'),
    (('--workdir', 'W', '--config', 'configs/common.py'), 'common.py has no get_config()'),
    (('--workdir', 'W', '--config', DIGITS + ':c'), "unknown config variant 'c'"),
    (('--workdir', 'W', '--mode=eval', '--config.epochs=1'), 'without --config; give the run'),
    (('--workdir', 'W', '--config', DIGITS, '--checkpoint=best'), '--checkpoint is for'),
    (('--workdir', 'W', '--config', DIGITS, '--config.epochs=x'), "epochs 'x' must be a number"),
    (('--workdir', 'W', '--config', DIGITS, '--epochs=2'), 'did you mean --config.epochs?'),
    (('--workdir', 'W', '--config', DIGITS, '--config.model.name.x=1'), '--config.KEY'),
    (('--workdir', 'W', '--config', DIGITS, '--coordinator=here', '--processes=2'), 'HOST:PORT'),
  ],
)
def test_mistakes_in_the_command(flags, says, tmp_path):
  _, err = main(*(str(tmp_path / 'W') if f == 'W' else f for f in flags), status=2)
  assert says in one_line(err)
  assert not (tmp_path / 'W').exists(), 'nothing is written for a run that cannot start'


@pytest.mark.parametrize(
  ('key', 'value', 'says'),
  [
    ('model.name', 'afi_resnet21', "did you mean 'afi_resnet"),
    ('model.stages', (4,), r'model.stages \(4,\) must be some of'),
    ('data.dataset', 'cifar11', "did you mean 'cifar1"),
    ('data.dataset', 'cifar100', 'python -m afi_flax.prepare --dataset cifar100 --data_dir /no'),
    ('data.eval_split', 'train[50%:]', 'overlaps data.train_split .train. in 719 examples'),
    ('data.eval_split', 'train', 'overlaps'),
    ('data.augment', 'random_resized_crop_flip', 'random_resized_crop_flip'),
    ('data.image_size', 32, 'image_size 32'),
  ],
)
def test_mistakes_in_the_config(key, value, says, tmp_path):
  config = digits_config.get_config()
  config.data.data_dir = '/no'
  config.update_from_flattened_dict({key: value})
  with pytest.raises(UserError, match=says) as error:
    train.train(config, str(tmp_path / 'W'))
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'W').exists(), 'nothing is written for a run that cannot start'


def test_evaluating_other_classes_is_refused(four_steps):
  plan = afi_flax.load_run(four_steps[0]).plan
  mesh = sharding.make_mesh(jax.devices()[:1])
  for names, says in (
    (tuple('012345678x'), "class 9 was 'x' in training and is '9' here"),
    (tuple('01234567'), "class 8 was 'absent' in training and is '8' here"),
    (tuple('0123456789a'), "class 10 was 'a' in training and is 'absent' here"),
  ):
    other = dataclasses.replace(plan, dataset=dataclasses.replace(plan.dataset, class_names=names))
    with pytest.raises(UserError, match=says):
      evaluate.Evaluator(other, models.create_model('resnet20', 10), mesh)


def test_a_bucket_of_another_kind():
  with pytest.raises(UserError, match="'s3://bucket/run' must be a folder, or one in a bucket: gs"):
    train.train(digits_config.get_config(), 's3://bucket/run')


def test_a_folder_that_cannot_be_written():
  with pytest.raises(UserError, match='/proc/W'):
    train.train(digits_config.get_config(), '/proc/W')


def test_mistakes_about_a_run_that_is_there(four_steps):
  workdir = four_steps[0]
  config = digits_config.get_config()
  config.epochs, config.seed = 13.0, 1
  with pytest.raises(UserError, match=r'epochs: 20.0 -> 13.0.*seed: 0 -> 1'):
    train.train(config, workdir)
  with pytest.raises(UserError, match=r'no checkpoint of step 3 in .*; there are: 4'):
    evaluate.evaluate_run(workdir, '3')
  with pytest.raises(UserError, match='last, best or the number'):
    evaluate.evaluate_run(workdir, 'first')
  with pytest.raises(UserError, match='no run in'):
    evaluate.evaluate_run(workdir / 'elsewhere')


def test_a_checkpoint_of_another_model(four_steps, tmp_path):
  config = digits_config.get_config()
  config.model.name = 'resnet20'
  config.run.resume = str(four_steps[0])
  with pytest.raises(UserError, match=r'of another model: params/.* is float32\['):
    train.train(config, tmp_path / 'run')


def test_batch_and_devices(tmp_path):
  config = digits_config.get_config()
  config.batch_size = 100
  with pytest.raises(UserError, match='100 is not divisible by 8 devices; use 96 or 104'):
    train.train(config, tmp_path / 'run')


@pytest.mark.slow
def test_a_step_that_does_not_fit(tmp_path, monkeypatch):
  monkeypatch.setattr(hardware, 'memory_bytes', lambda devices: 2**20)
  with pytest.raises(UserError, match=r'each device, which has 1; use --config.micro_batches=2 or'):
    train.train(digits_config.get_config('smoke'), tmp_path)
  assert not Workdir(tmp_path).read_metrics()


@pytest.mark.slow
def test_utilisation_of_devices_whose_peak_is_known(tmp_path, monkeypatch):
  monkeypatch.setattr(hardware, 'peak_flops', lambda devices: 1e10)
  train.train(digits_config.get_config('smoke'), tmp_path)
  model = models.create_model('afi_resnet20', 10)
  for record in Workdir(tmp_path).read_metrics():
    if record['split'] == 'train':
      at_best = cost.train_flops(model, 32) / 1e10
      assert record['mfu'] == pytest.approx(record['images_per_second'] * at_best)
    else:
      assert 'mfu' not in record


@pytest.mark.slow
@pytest.mark.fault(
  'kill',
  'SIGTERM between two log lines, several times',
  'status 75; lines and weights equal, bit for bit',
)
def test_stopped_by_sigterm_and_resumed(tmp_path):
  """SIGTERM in the middle of an epoch and of a log line: as if it had never come."""
  flags = ('--config.epochs=2', '--config.run.log_every_steps=7')
  main(*digits(tmp_path / 'whole', *flags))
  workdir = tmp_path / 'stopped'
  stops = 0
  for _ in range(4):
    process = start(*digits(workdir, *flags))
    seen = len(lines(workdir)) if workdir.exists() else 0
    while process.poll() is None and not (workdir.exists() and len(lines(workdir)) > seen):
      time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode in (0, 75), err[-3000:]
    stops += process.returncode == 75
    if process.returncode == 75:
      assert 'stopped by SIGTERM at step' in err
  main(*digits(workdir, *flags))
  assert stops >= 2
  assert_equal_runs(tmp_path / 'whole', workdir)


def start_two(*flags):
  """Two processes on this machine that share one run."""
  address = f'127.0.0.1:{free_port()}'
  return [
    start(*flags, '--coordinator', address, '--processes=2', f'--process={i}') for i in (0, 1)
  ]


def wait(processes, status):
  """Waits for all; their stderr."""
  errs = [process.communicate(timeout=300)[1] for process in processes]
  for process, err in zip(processes, errs, strict=True):
    assert process.returncode == status, err[-3000:]
  return errs


@pytest.mark.slow
def test_two_processes_are_one_run(four_steps, tmp_path):
  """Each has half of every batch: the same losses, every example evaluated once, one checkpoint."""
  workdir = tmp_path / 'run'
  flags = digits(workdir, '--config.run.max_steps=4', '--config.run.log_every_steps=3')
  wait(start_two(*flags), status=0)
  one, two = lines(four_steps[0]), lines(workdir)
  assert [(r['step'], r['split'], r['examples']) for r in two] == [
    (r['step'], r['split'], r['examples']) for r in one
  ]
  np.testing.assert_allclose([r['loss'] for r in two], [r['loss'] for r in one], rtol=1e-3)
  assert evaluate.evaluate_run(workdir)['examples'] == 359


@pytest.mark.slow
@pytest.mark.fault(
  'kill',
  'SIGTERM to one of two processes',
  'both stop at the same step, saved, with status 75',
)
def test_a_signal_to_one_of_two_processes_stops_both(tmp_path):
  workdir = tmp_path / 'run'
  flags = digits(workdir, '--config.epochs=2', '--config.run.log_every_steps=7')
  processes = start_two(*flags)
  while all(p.poll() is None for p in processes) and not (workdir.exists() and lines(workdir)):
    time.sleep(0.02)
  processes[1].send_signal(signal.SIGTERM)
  errs = wait(processes, status=75)
  assert 'stopped by a signal to another process at step' in errs[0]
  assert 'stopped by SIGTERM at step' in errs[1]
  wait(start_two(*flags), status=0)
  steps = [r['step'] for r in lines(workdir) if r['split'] == 'train']
  assert steps == [*range(7, 90, 7), 90]
  assert [r['examples'] for r in lines(workdir)][-1] == 359


@pytest.mark.slow
def test_traces_steps_for_xprof(tmp_path):
  main(*digits(tmp_path / 'run', '--config.run.max_steps=14', '--config.run.profile_steps=2'))
  assert list((tmp_path / 'run' / 'profile').rglob('*.xplane.pb'))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
  _, err = main(*digits(tmp_path / 'run', '--config.schedule.base_lr=1e20'), status=2)
  assert 'schedule.base_lr' in err.splitlines()[-1]
  assert 'Traceback' not in err
  for place in (tmp_path / 'run').glob('checkpoints/*'):
    raise AssertionError(f'{place}: a state that is not finite was saved')


@pytest.mark.slow
def test_a_folder_of_pictures_from_class_folders(tmp_path, real_data):
  """Real JPEGs of all sizes, two classes, four of them damaged: trains, evaluates, names them."""
  pictures = sorted((real_data / 'imagenet-samples' / 'val').rglob('*.JPEG'))[:60]
  for i, picture in enumerate(pictures):
    folder = tmp_path / 'pictures' / ('val' if i % 5 == 4 else 'train') / ('ab'[i % 2])
    folder.mkdir(parents=True, exist_ok=True)
    data = picture.read_bytes()
    (folder / picture.name).write_bytes(data[:100] if i in (0, 1, 4, 9) else data)
  workdir = tmp_path / 'run'
  small = (
    '--config', 'configs/image_folder.py', '--workdir', workdir,
    f'--config.data.data_dir={tmp_path / "pictures"}', '--config.batch_size=8',
    '--config.eval_batch_size=8', '--config.data.image_size=32', '--config.data.eval_resize=36',
    '--config.epochs=2',
  )  # fmt: skip
  _, err = main(*small)
  assert pictures[0].name in err
  assert pictures[4].name in err
  evaluation = [r for r in lines(workdir) if r['split'] == 'val']
  assert evaluation[-1]['examples'] == 12 - 2
  _, err = main(*small, '--config.data.max_unreadable=1', '--workdir', tmp_path / 'other', status=2)
  assert 'max_unreadable' in err.splitlines()[-1]


def test_metrics_are_one_json_object_a_line(four_steps):
  text = pathlib.Path(four_steps[0], 'metrics.jsonl').read_text()
  for line in text.splitlines():
    record = json.loads(line)
    assert {'step', 'split', 'loss', 'top1', 'top5', 'examples', 'images_per_second'} <= set(record)
