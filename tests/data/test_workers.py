"""Worker processes, real ones: killed, stopped, signalled, left behind by their main process."""

import contextlib
import itertools
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import pytest

from afi_flax.data import workers
from afi_flax.errors import FailedError, UserError
from tests.data import makers
from tests.data.conftest import write_picture
from tests.test_main import assert_equal_runs

LONG = 2000  # batches: no worker makes as many in the time that a test takes to turn to it


def children(pid: int) -> set[int]:
  """The processes that a process has started and that have not ended."""
  found = set()
  for stat in pathlib.Path('/proc').glob('[0-9]*/stat'):
    with contextlib.suppress(OSError):  # it ended meanwhile
      state, parent = stat.read_text().rpartition(')')[2].split()[:2]
      if int(parent) == pid and state != 'Z':
        found.add(int(stat.parent.name))
  return found


def commands(pids: set[int]) -> dict[int, str]:
  lines = {}
  for pid in pids:
    with contextlib.suppress(OSError):
      lines[pid] = pathlib.Path(f'/proc/{pid}/cmdline').read_text()
  return lines


def workers_of(pid: int) -> list[int]:
  """In the order in which they were started."""
  return sorted(p for p, line in commands(children(pid)).items() if 'workers.work' in line)


def await_gone(pids, seconds=10.0) -> None:
  deadline = time.monotonic() + seconds
  while alive := [pid for pid in pids if 'workers.work' in commands({pid}).get(pid, '')]:
    assert time.monotonic() < deadline, f'{alive} did not end'
    time.sleep(0.05)


@pytest.fixture
def streams():
  """Opens streams of batches, which end with the test; no worker may be left by then."""
  with contextlib.ExitStack() as stack:
    yield lambda *args: stack.enter_context(contextlib.closing(workers.batches(*args)))
  assert not workers_of(os.getpid())


def numbers(batches) -> list[int]:
  return [int(batch['number'][0]) for batch in batches]


def makers_of(batches) -> list[int]:
  return [int(batch['process'][0]) for batch in batches]


def test_batches_come_in_order_from_one_worker_after_another(streams):
  made = list(streams(makers.tiny, range(3, 30, 2), 3))
  assert numbers(made) == list(range(3, 30, 2))
  pids = makers_of(made)
  assert len(set(pids)) == 3
  assert pids == list(itertools.islice(itertools.cycle(pids[:3]), len(pids)))
  assert made[0]['named'].tolist() == [(3, b'why')]
  assert made[0]['named'].dtype.names == ('example', 'reason')
  assert made[0]['empty'].shape == (0,)
  made[0]['number'][0] = 5  # not read-only


@pytest.mark.slow
def test_fewer_batches_than_workers(streams):
  assert numbers(streams(makers.tiny, range(1), 2)) == [0]


@pytest.mark.slow
def test_large_batches_and_a_long_task(streams):
  """Both fill the socket's buffer several times over."""
  make = makers.Failing(2, UserError('x' * 1_000_000))
  stream = streams(make, range(5), 1)
  assert numbers(itertools.islice(stream, 2)) == [0, 1]
  with pytest.raises(UserError, match=r'^x{1000000}$'):
    next(stream)
  for number, batch in enumerate(streams(makers.large, range(4), 1)):
    assert batch.shape == (1 << 20,)
    assert (batch == number).all()


def test_no_memory_has_a_name(streams):
  stream = streams(makers.large, range(LONG), 1)
  next(stream)
  for pid in (os.getpid(), *workers_of(os.getpid())):
    maps = pathlib.Path(f'/proc/{pid}/maps').read_text().splitlines()
    # What is deleted has no name any more: a lock of Python's own, made by whatever ran before.
    assert not [line for line in maps if '/dev/shm/' in line and not line.endswith('(deleted)')]


@pytest.mark.fault('worker', 'SIGKILL to a worker', 'another takes its place, equal batches')
def test_a_killed_worker_is_replaced(streams, caplog):
  stream = streams(makers.tiny, range(LONG), 2)
  made = list(itertools.islice(stream, 4))
  victim = makers_of(made)[1]
  os.kill(victim, signal.SIGKILL)
  made += stream
  assert numbers(made) == list(range(LONG))
  [warning] = [r.getMessage() for r in caplog.records]
  assert warning == (
    f'worker 1 of 2 (process {victim}) was ended by SIGKILL; another one takes its place'
  )


@pytest.mark.slow
@pytest.mark.fault('worker', 'each new worker is killed, too', 'ends in one line, status 74')
def test_workers_that_are_killed_again_and_again_are_an_error(streams, caplog):
  stream = streams(makers.tiny, range(LONG), 1)
  with pytest.raises(FailedError) as error:  # noqa: PT012
    for batch in stream:
      os.kill(int(batch['process'][0]), signal.SIGKILL)
  text = str(error.value)
  assert re.match(r'worker 0 of 1 \(process \d+\) was ended by SIGKILL, and 3 before it; use', text)
  assert 'run.workers' in text
  assert '\n' not in text
  assert error.value.status == 74
  assert len(caplog.records) == 3


@pytest.mark.slow
@pytest.mark.fault('worker', 'SIGSTOP to a worker', 'ends after the time limit, names the worker')
def test_a_worker_that_hangs_is_an_error(streams, monkeypatch):
  stream = streams(makers.tiny, range(LONG), 2)
  victim = makers_of([next(stream)])[0]
  monkeypatch.setattr(workers, 'PATIENCE', 1.0)
  os.kill(victim, signal.SIGSTOP)
  says = rf'worker 0 of 2 \(process {victim}\) has sent no batch for 1 s; see .*, then start the'
  with pytest.raises(FailedError, match=says):
    list(stream)


@pytest.mark.slow
@pytest.mark.fault('worker', 'an exception in a worker', 'ends, names the worker and the line')
def test_an_exception_in_a_worker(streams):
  stream = streams(makers.Failing(3, ZeroDivisionError('by nought')), range(10), 2)
  made = list(itertools.islice(stream, 3))
  says = rf'^worker 1 of 2 \(process {makers_of(made)[1]}\): ZeroDivisionError: by nought'
  with pytest.raises(RuntimeError, match=says) as error:
    next(stream)
  assert 'makers.py' in error.value.__notes__[0]


@pytest.mark.slow
@pytest.mark.parametrize(
  ('number', 'says'), [(0, 'EOFError: ran out of input'), (1, 'ValueError: of no use')]
)
def test_a_batch_that_cannot_be_read_is_an_error(streams, caplog, number, says):
  """At once, and by the name of its worker; one that is gone is something else."""
  with pytest.raises(RuntimeError, match=rf'^worker 0 of 1 \(process \d+\): .*{says}') as error:
    next(streams(makers.unreadable, range(number, 2), 1))
  assert 'makers.py' in error.value.__notes__[0]
  assert not caplog.records


def test_a_users_mistake_in_a_worker_is_one(streams):
  with pytest.raises(UserError, match=r'^number 0 is wrong$'):
    next(streams(makers.refuses, range(10), 1))


@pytest.mark.slow
def test_a_worker_that_ends_by_itself_is_an_error(streams):
  says = r'worker 0 of 1 \(process \d+\) ended by itself with status 3; see its output above'
  with pytest.raises(FailedError, match=says):
    next(streams(makers.exits, range(10), 1))


@pytest.mark.slow
@pytest.mark.fault('worker', 'SIGINT and SIGTERM to the workers alone', 'they go on')
def test_signals_for_all_do_not_end_the_workers(streams, caplog):
  stream = streams(makers.tiny, range(LONG), 1)
  made = [next(stream)]
  for number in (signal.SIGINT, signal.SIGTERM):
    os.kill(makers_of(made)[0], number)
  made += stream
  assert numbers(made) == list(range(LONG))
  assert len(set(makers_of(made))) == 1
  assert not caplog.records


# ---- the main process

# A shell lets what it starts in the background ignore Ctrl-C, and so what that starts.
MAIN = """
import itertools, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from afi_flax.data import pipeline, workers
from tests.data import makers
if __name__ == '__main__':
  batches = pipeline.prefetch(workers.batches(makers.large, range(1 << 40), 2), lambda batch: batch)
  next(batches), next(batches)
  print('going', flush=True)
  {then}
"""


@contextlib.contextmanager
def main_process(then: str):
  """A process that has two workers and has read two batches; and their ids."""
  code = MAIN.format(then=then)
  main = subprocess.Popen(
    [sys.executable, '-c', code],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,  # a process group of its own, as a terminal makes one
  )
  pids = []
  try:
    assert main.stdout.readline() == 'going\n', main.stderr.read()
    pids = workers_of(main.pid)
    assert len(pids) == 2
    yield main, pids
  finally:
    for pid in (main.pid, *pids):
      with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)
    main.communicate()


@pytest.mark.slow
@pytest.mark.fault(
  'worker', 'SIGKILL to the main process, a worker stopped', 'all gone, no memory left'
)
def test_workers_end_with_a_main_process_that_is_killed():
  before = set(os.listdir('/dev/shm'))
  with main_process('time.sleep(600)') as (main, pids):
    os.kill(pids[0], signal.SIGSTOP)
    main.kill()
    await_gone(pids)
  assert set(os.listdir('/dev/shm')) <= before


@pytest.mark.slow
@pytest.mark.fault('worker', 'SIGINT to the group or the main process', 'ends in seconds')
@pytest.mark.parametrize('send', [os.killpg, os.kill])
def test_ctrl_c_ends_all(send):
  with main_process('[time.sleep(0.01) for _ in batches]') as (main, pids):
    send(main.pid, signal.SIGINT)
    _, err = main.communicate(timeout=30)
    assert err.count('Traceback') == 1
    assert 'KeyboardInterrupt' in err
    await_gone(pids)


@pytest.mark.slow
@pytest.mark.fault('worker', 'Ctrl-C while a worker is stopped', 'ends in seconds, all gone')
def test_ctrl_c_ends_workers_that_hang():
  with main_process('list(batches)') as (main, pids):
    os.kill(pids[1], signal.SIGSTOP)
    time.sleep(0.5)
    os.killpg(main.pid, signal.SIGINT)
    main.communicate(timeout=30)
    await_gone(pids)


# ---- whole runs

PATIENT = """
import sys
from afi_flax import commands, main
from afi_flax.data import workers
workers.PATIENCE = 10.0
commands.run(main.main)
"""


def start_run(pictures: pathlib.Path, workdir: pathlib.Path) -> subprocess.Popen:
  """A run of some seconds that decodes pictures in two workers, in a process group of its own."""
  flags = (
    '--config', 'configs/image_folder.py', '--workdir', workdir,
    f'--config.data.data_dir={pictures}', '--config.run.workers=2', '--config.model.name=resnet20',
    '--config.data.image_size=16', '--config.data.eval_resize=16', '--config.batch_size=4',
    '--config.eval_batch_size=4', '--config.epochs=100.0', '--config.run.eval_every_epochs=50.0',
    '--config.run.log_every_steps=20',
  )  # fmt: skip
  return subprocess.Popen(
    [sys.executable, '-c', PATIENT, *map(str, flags)],
    env=os.environ | {'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )


def finish_run(process: subprocess.Popen, status: int = 0) -> str:
  """What it wrote to stderr."""
  _, err = process.communicate(timeout=300)
  assert process.returncode == status, err[-3000:]
  return err


def await_line(workdir: pathlib.Path, process: subprocess.Popen) -> list[int]:
  """Waits for the first line of metrics.jsonl; the workers that there are then."""
  while not ((file := workdir / 'metrics.jsonl').exists() and file.read_text()):
    assert process.poll() is None, process.stderr.read()
    time.sleep(0.02)
  pids = workers_of(process.pid)
  assert len(pids) >= 2
  return pids


@pytest.fixture(scope='module')
def pictures(tmp_path_factory) -> pathlib.Path:
  root = tmp_path_factory.mktemp('pictures')
  for c, name in enumerate(['ant', 'bee', 'cat']):
    for i in range(7):
      write_picture(root / 'train' / name / f'{i}.jpg', 10 * c + i)
      write_picture(root / 'val' / name / f'{i}.jpg', 100 + 10 * c + i)
  return root


@pytest.fixture(scope='module')
def undisturbed(pictures, tmp_path_factory) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp('undisturbed') / 'run'
  err = finish_run(start_run(pictures, workdir))
  assert 'worker' not in err
  return workdir


@pytest.mark.slow
@pytest.mark.fault('worker', 'SIGKILL to a worker of a run', 'the run is equal to the bit')
def test_a_run_goes_on_when_a_worker_is_killed(pictures, undisturbed, tmp_path):
  process = start_run(pictures, tmp_path / 'run')
  os.kill(await_line(tmp_path / 'run', process)[0], signal.SIGKILL)
  err = finish_run(process)
  assert 'was ended by SIGKILL; another one takes its place' in err
  assert 'Traceback' not in err
  assert_equal_runs(undisturbed, tmp_path / 'run')


@pytest.mark.slow
@pytest.mark.fault('worker', 'Ctrl-C or SIGTERM to a whole run', 'saved, 75; resumes equal')
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_of_a_run(pictures, undisturbed, tmp_path, number):
  process = start_run(pictures, tmp_path / 'run')
  pids = await_line(tmp_path / 'run', process)
  os.killpg(process.pid, number)
  sent = time.monotonic()
  err = finish_run(process, status=75)
  assert time.monotonic() - sent < 30
  assert f'stopped by {number.name} at step' in err
  assert 'worker' not in err
  assert 'Traceback' not in err
  await_gone(pids)
  finish_run(start_run(pictures, tmp_path / 'run'))
  assert_equal_runs(undisturbed, tmp_path / 'run')


@pytest.mark.slow
@pytest.mark.fault('worker', 'SIGSTOP to a worker of a run', 'one line that names it, all gone')
def test_a_run_ends_when_a_worker_hangs(pictures, tmp_path):
  process = start_run(pictures, tmp_path / 'run')
  pids = await_line(tmp_path / 'run', process)
  os.kill(pids[0], signal.SIGSTOP)
  err = finish_run(process, status=FailedError.status)
  says = rf'^error: worker 0 of 2 \(process {pids[0]}\) has sent no batch for 10 s; .*\n\Z'
  assert re.search(says, err, re.MULTILINE), err
  assert 'Traceback' not in err
  await_gone(pids)


@pytest.mark.slow
@pytest.mark.fault('worker', 'Ctrl-C while all workers hang', 'saved, status 75, all gone')
def test_a_run_is_stopped_while_its_workers_hang(pictures, undisturbed, tmp_path):
  process = start_run(pictures, tmp_path / 'run')
  pids = await_line(tmp_path / 'run', process)
  for pid in pids:
    os.kill(pid, signal.SIGSTOP)
  time.sleep(0.5)
  os.killpg(process.pid, signal.SIGINT)
  assert 'stopped by SIGINT at step' in finish_run(process, status=75)
  await_gone(pids)
  assert 'resumed at step' in finish_run(start_run(pictures, tmp_path / 'run'))
  assert_equal_runs(undisturbed, tmp_path / 'run')


@pytest.mark.slow
@pytest.mark.fault('worker', 'SIGKILL to the main process of a run', 'all gone; resumes equal')
def test_a_run_whose_main_process_is_killed(pictures, undisturbed, tmp_path):
  process = start_run(pictures, tmp_path / 'run')
  pids = await_line(tmp_path / 'run', process)
  process.kill()
  finish_run(process, status=-signal.SIGKILL)
  await_gone(pids)
  finish_run(start_run(pictures, tmp_path / 'run'))
  assert_equal_runs(undisturbed, tmp_path / 'run')
