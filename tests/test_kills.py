"""A run that is killed anywhere, any number of times, and started again: nothing is lost."""

import collections
import random
import re
import signal
import socket
import statistics
import time

import jax
import numpy as np
import pytest

import afi_flax
from tests import watched
from tests.test_checkpoint import flip_byte
from tests.test_main import assert_equal_runs
from tests.watched import COMPILE, EVALUATE, LISTENS, SAVE, SEALED, START, STEP, Watched

pytestmark = pytest.mark.slow

PHASES = (START, COMPILE, STEP, EVALUATE, SAVE)


def flags(workdir, steps):
  """A small network that logs every step, saves every four and evaluates every five or six."""
  return (
    '--config', 'configs/digits_afi_resnet20.py', '--workdir', workdir,
    '--config.model.name=resnet20', '--config.batch_size=8', '--config.eval_batch_size=100',
    '--config.data.eval_split=test[:100]', '--config.run.log_every_steps=1',
    '--config.run.save_every_steps=4', '--config.run.eval_every_epochs=0.03',
    f'--config.run.max_steps={steps}',
  )  # fmt: skip


def last_step(run):
  """The last step that a process began."""
  return max((m['step'] for m in run.marks(STEP)), default=0)


def phases(run):
  """What a process that has ended was doing: a save goes on beside other things."""
  doing = {SEALED: STEP, watched.EVALUATED: STEP, LISTENS: START, SAVE: STEP}
  last = run.marks()[-1]['what'] if run.marks() else START
  saves = {(m['folder'], m['step']) for m in run.marks(SAVE)}
  sealed = {(m['folder'], m['step']) for m in run.marks(SEALED)}
  return {doing.get(last, last)} | ({SAVE} if saves - sealed else set())


def lengths(run, started):
  """Seconds that each phase took, of those that a process came through."""
  begun = {m['what']: m['at'] for m in reversed(run.marks())}  # for the first time
  found = collections.defaultdict(list)
  if COMPILE in begun:
    found[START] = [begun[COMPILE] - started]
  if STEP in begun:
    found[COMPILE] = [begun[STEP] - begun[COMPILE]]
  for mark, following in zip(run.marks(), run.marks()[1:], strict=False):
    if mark['what'] in (STEP, EVALUATE):
      found[mark['what']].append(following['at'] - mark['at'])
  saves = {m['step']: m['at'] for m in run.marks(SAVE) if m['folder'] == 'checkpoints'}
  for mark in run.marks(SEALED):
    if mark['folder'] == 'checkpoints' and mark['step'] in saves:
      found[SAVE].append(mark['at'] - saves[mark['step']])
  return {phase: statistics.median(values) for phase, values in found.items()}


def stop_in(phase, run, draw, took, number):
  """Sends a signal at a random moment of a phase; when, or None if the run ended before."""
  count = draw.randint(1, 5) if phase == STEP else 1
  if phase != START and not run.until(phase, count):
    return None
  time.sleep(draw.uniform(0, took[phase]))
  now = time.time()
  run.process.send_signal(number)
  return now


def check_sigterm(run, err, at, workdir):
  """It ends with the state after the step that it was in, once it listens to signals at all."""
  if not run.marks(LISTENS):
    assert run.process.returncode == -signal.SIGTERM, err[-3000:]
    return
  assert run.process.returncode == 75, err[-3000:]
  step = int(re.search(r'stopped by SIGTERM at step (\d+)', err)[1])
  assert step == (last_step(run) or step)
  assert sum(m['at'] > at for m in run.marks(STEP)) <= 1, 'it went on training'
  if step:
    assert (workdir / 'checkpoints' / str(step) / 'sums.0-of-1.json').exists()


@pytest.fixture(scope='module')
def whole(request, tmp_path_factory):
  """A run that is left alone: its folder, the examples of its steps, the seconds of each phase."""
  steps = 300 if request.config.getoption('--faults') else 40
  folder, began = tmp_path_factory.mktemp('whole'), time.time()
  run = Watched(folder / 'marks', *flags(folder / 'run', steps))
  finish(run)
  ids = watched.ids([run])
  assert list(ids) == list(range(1, steps + 1))
  return folder / 'run', ids, lengths(run, began)


def finish(run):
  """Waits for its good end; what it said."""
  err = run.end(timeout=1200)
  assert run.process.returncode == 0, err[-3000:]
  return err


@pytest.mark.fault(
  'kill',
  'SIGKILL or SIGTERM in any phase of a run',
  'lines, weights and examples equal, bit for bit',
)
def test_killed_anywhere(whole, tmp_path, at_full_size, record_property):
  unbroken, examples, took = whole
  kills, steps = 100 if at_full_size else 10, len(examples)
  record_property('tries', kills)
  draw, hit, took = random.Random(kills), collections.Counter(), dict(took)
  workdir = tmp_path / 'run'
  aims = [PHASES[i % len(PHASES)] for i in range(kills)]
  draw.shuffle(aims)
  for phase in aims:
    number = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
    began = time.time()
    run = Watched(tmp_path / 'marks', *flags(workdir, steps))
    at = stop_in(phase, run, draw, took, number)
    err = run.end()
    assert run.process.returncode != 0, 'done before all kills: it needs more steps'
    if number == signal.SIGTERM:
      check_sigterm(run, err, at, workdir)
    else:
      assert run.process.returncode == -signal.SIGKILL, err[-3000:]
    hit.update((number.name, name) for name in phases(run))
    took |= lengths(run, began)
    for step, ids in watched.ids([run]).items():
      assert ids == examples[step], f'other examples at step {step}'
  finish(Watched(tmp_path / 'marks', *flags(workdir, steps)))
  assert_equal_runs(unbroken, workdir)
  best, same = (afi_flax.load_run(folder, 'best') for folder in (unbroken, workdir))
  assert best.step == same.step
  jax.tree.map(np.testing.assert_array_equal, best.variables, same.variables)
  print(', '.join(f'{count} x {" in ".join(key)}' for key, count in sorted(hit.items())))
  if at_full_size:
    assert {phase for name, phase in hit if name == 'SIGKILL'} == set(PHASES)


@pytest.mark.fault(
  'checkpoint',
  'a byte flipped in the newest one of a real run',
  'said; the older one; equal in the end',
)
def test_a_flipped_byte_is_not_trained_on(whole, tmp_path):
  unbroken, examples, _ = whole
  workdir = tmp_path / 'run'
  run = Watched(tmp_path / 'marks', *flags(workdir, len(examples)))
  assert run.until(SEALED, count=3)
  run.process.terminate()
  check_sigterm(run, run.end(), time.time(), workdir)
  older, newest = sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir())
  flip_byte(workdir / 'checkpoints' / str(newest))
  damaged = contents(workdir / 'checkpoints' / str(newest))
  run = Watched(tmp_path / 'marks', *flags(workdir, len(examples)))
  err = finish(run)
  assert re.search(rf'checkpoint {newest} in .* is damaged: .* does not match its SHA-256 sum', err)
  assert f'resumed at step {older}' in err
  assert watched.ids([run]) == {n: ids for n, ids in examples.items() if n > older}
  assert_equal_runs(unbroken, workdir)
  assert contents(workdir / 'unreadable' / str(newest)) == damaged


def contents(folder):
  return {
    path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()
  }


@pytest.mark.fault(
  'workdir',
  'a second command on it, then SIGKILL of the first',
  'refused, naming the first; then it runs',
)
def test_a_second_run_waits_for_the_first_ones_end(whole, tmp_path):
  unbroken, examples, _ = whole
  command = flags(tmp_path / 'run', len(examples))
  first = Watched(tmp_path / 'marks', *command)
  assert first.until(SEALED)
  first.process.send_signal(signal.SIGSTOP)  # so that it is not done before the second one comes
  second = Watched(tmp_path / 'marks', *command)
  err = second.end()
  assert second.process.returncode == 2, err[-3000:]
  host = socket.gethostname()
  who = rf'in use by process {first.process.pid} on {host} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d'
  assert re.search(who, err.splitlines()[-1])
  assert 'Traceback' not in err
  first.process.kill()
  first.end()
  err = finish(Watched(tmp_path / 'marks', *command))
  assert 'resumed at step ' in err
  assert_equal_runs(unbroken, tmp_path / 'run')
