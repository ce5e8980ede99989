"""The command with a workdir in a bucket: trains, stops, goes on elsewhere, evaluates."""

import json
import re
import signal
import time

import jax
import numpy as np
import pytest

import afi_flax
from afi_flax import evaluate
from tests.test_main import digits, last_state, lines, main, start, start_two, wait

pytestmark = pytest.mark.slow

SMALL = ('--config.model.name=resnet20', '--config.run.log_every_steps=7')


@pytest.fixture
def workdir(object_store, request, tmp_path, monkeypatch):
  monkeypatch.setenv('TMPDIR', str(tmp_path))  # where a run that is killed leaves its metrics
  yield f'gs://bucket/{request.node.name}'
  object_store.refuse = lambda method, name: 0


@pytest.fixture(scope='module')
def on_disk(tmp_path_factory):
  """The folder of a run of two epochs, 90 steps, on a disk."""
  folder = tmp_path_factory.mktemp('disk') / 'run'
  main(*digits(folder, *SMALL, '--config.epochs=2'))
  return folder


def key(workdir, name=''):
  return f'{workdir}/{name}'.removeprefix('gs://')


def until_logged(process, workdir, count):
  """Waits until the bucket has that many lines of metrics, or the process has ended."""
  while process.poll() is None and len(lines(workdir)) < count:
    time.sleep(0.05)


@pytest.mark.fault(
  'kill',
  'SIGTERM twice, then on another machine',
  'status 75; lines and weights equal, bit for bit',
)
def test_stopped_and_resumed_on_another_machine(on_disk, object_store, workdir, tmp_path):
  """Nothing is left on the machine; SIGTERM twice, and the lines and weights are as on a disk."""
  flags = digits(workdir, *SMALL, '--config.epochs=2', '--config.run.save_every_steps=10')
  stops = 0
  for count in (1, 6):
    process = start(*flags)
    until_logged(process, workdir, count)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode in (0, 75), err[-3000:]
    if process.returncode == 75:
      stops += 1
      step = int(re.search(r'SIGTERM at step (\d+)', err)[1])
      assert f'checkpoints/{step}/commit_success.txt' in object_store.names(key(workdir))
    assert not list(tmp_path.iterdir())
    assert 'lock' not in object_store.names(key(workdir))
  assert stops
  out, _ = main(*flags)
  assert f'Curves: {workdir}/curves.png' in out
  assert lines(workdir) == lines(on_disk)
  (a, step), (b, other) = last_state(on_disk), last_state(workdir)
  assert step == other == 90
  jax.tree.map(np.testing.assert_array_equal, a, b)
  names = object_store.names(key(workdir))
  assert {'config.json', 'dataset.json', 'curves.png'} <= set(names)
  assert any(name.startswith('events/') for name in names)
  assert not [name for name in names if name.startswith('unreadable/')]


@pytest.mark.fault(
  'kill',
  'SIGKILL of a run in a bucket',
  'its lock is void after 15 s; lines equal',
)
def test_killed_and_resumed(on_disk, object_store, workdir):
  """SIGKILL leaves the lock, and metrics that stop before or behind the last checkpoint."""
  flags = digits(workdir, *SMALL, '--config.epochs=2', '--config.run.save_every_steps=10')
  process = start(*flags)
  while process.poll() is None and not any(
    re.fullmatch(r'checkpoints/[2-9]0/commit_success.txt', n)
    for n in object_store.names(key(workdir))
  ):
    time.sleep(0.02)
  process.kill()
  process.communicate()
  object_store.put(key(workdir, 'lock'), object_store.objects[key(workdir, 'lock')].data, age=1e3)
  _, err = main(*flags)
  assert 'waiting up to 15 s for a sign of life' in err
  assert 'resumed at step' in err
  assert lines(workdir) == lines(on_disk)


@pytest.mark.fault(
  'workdir',
  'a second command on a run in a bucket',
  'refused, naming the first, which goes on',
)
def test_a_second_run_is_refused_while_the_first_one_trains(object_store, workdir):
  flags = digits(workdir, *SMALL, '--config.run.max_steps=400')
  first = start(*flags)
  while first.poll() is None and key(workdir, 'lock') not in object_store.objects:
    time.sleep(0.05)
  second = start(*flags)
  _, err = second.communicate(timeout=120)
  assert second.returncode == 2
  assert f'error: workdir {workdir} is in use by process {first.pid} on ' in err.splitlines()[-1]
  assert 'Traceback' not in err
  assert first.poll() is None
  first.send_signal(signal.SIGTERM)
  _, err = first.communicate(timeout=120)
  assert first.returncode == 75, err[-3000:]


@pytest.mark.fault(
  'workdir',
  'another run takes the lock in the bucket',
  'the first ends, naming it, and writes nothing more',
)
def test_a_run_that_loses_its_lock_ends(object_store, workdir):
  first = start(*digits(workdir, *SMALL, '--config.epochs=100'))
  until_logged(first, workdir, 1)
  thief = {'host': 'thief', 'pid': 1, 'since': 'now', 'token': 1}
  object_store.put(key(workdir, 'lock'), json.dumps(thief).encode())
  _, err = first.communicate(timeout=120)
  assert first.returncode == 2
  assert 'was taken over by process 1 on thief since now' in err.splitlines()[-1]
  assert json.loads(object_store.objects[key(workdir, 'lock')].data) == thief


def test_evaluates_and_opens_what_is_in_a_bucket(on_disk, object_store, workdir):
  for path in (p for p in on_disk.rglob('*') if p.is_file() and p.name != 'lock'):
    name = path.relative_to(on_disk).as_posix()
    object_store.put(key(workdir, name), path.read_bytes())
  before = dict(object_store.objects)
  out, _ = main('--mode=eval', '--workdir', workdir, '--checkpoint=best')
  assert f'{evaluate.evaluate_run(on_disk, "best")["loss"]:.4f}' in out
  loaded, there = afi_flax.load_run(workdir), afi_flax.load_run(on_disk)
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, there.variables)
  assert object_store.objects == before, 'evaluation writes nothing'
  name = next(n for n in object_store.names(key(workdir)) if re.match(r'checkpoints/90/.*/d/', n))
  content = bytearray(object_store.objects[key(workdir, name)].data)
  content[len(content) // 2] ^= 1
  object_store.put(key(workdir, name), bytes(content))
  _, err = main('--mode=eval', '--workdir', workdir, '--checkpoint=90', status=2)
  assert 'does not match its SHA-256 sum' in err.splitlines()[-1]


def test_two_processes_train_into_one_bucket(on_disk, object_store, workdir):
  """Even if one of them must wait for a dead run's lock: longer than a collective operation may."""
  object_store.put(key(workdir, 'lock'), b'{"host": "dead", "pid": 1, "since": "now"}', age=20.0)
  flags = digits(workdir, *SMALL, '--config.run.max_steps=14', '--config.run.profile_steps=2')
  errs = wait(start_two(*flags), status=0)
  assert 'waiting up to' in errs[0]
  got, wanted = lines(workdir), lines(on_disk)
  assert [(r['step'], r['split']) for r in got] == [(7, 'train'), (14, 'train'), (14, 'test')]
  np.testing.assert_allclose(got[0]['loss'], wanted[0]['loss'], rtol=1e-3)
  names = object_store.names(key(workdir))
  assert {'checkpoints/14/sums.0-of-2.json', 'checkpoints/14/sums.1-of-2.json'} <= set(names)
  assert any(name.startswith('profile/') for name in names)
  assert evaluate.evaluate_run(workdir)['examples'] == 359


def test_without_the_bucket(workdir, object_store):
  _, err = main(*digits('gs://another/run', *SMALL), status=2)
  assert 'cannot write to workdir gs://another/run: there is no such' in err.splitlines()[-1]
  assert 'Traceback' not in err


def test_tensorflow_is_not_imported(workdir, object_store, tmp_path, monkeypatch):
  """Which etils would do for gs:// where it is installed."""
  (tmp_path / 'tensorflow').mkdir()
  (tmp_path / 'tensorflow' / '__init__.py').write_text('raise SystemExit("TensorFlow imported")')
  monkeypatch.setenv('PYTHONPATH', str(tmp_path))
  main(*digits(workdir, *SMALL, '--config.run.max_steps=1'))
