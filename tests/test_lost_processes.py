"""Processes of a run that are killed or hang while it trains: the others end, and all can go on."""

import random
import re
import shutil
import signal
import socket

import numpy as np
import pytest

from afi_flax.workdir import Workdir
from tests import watched
from tests.test_kills import finish, flags
from tests.test_main import assert_equal_runs
from tests.test_processes import said
from tests.watched import SEALED, STEP, Watched

pytestmark = pytest.mark.slow

STEPS = 20


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """The folder of a run on two processes that is left alone."""
  folder = tmp_path_factory.mktemp('two')
  for run in watched.together(folder / 'marks', 2, *flags(folder / 'run', STEPS)):
    finish(run)
  return folder / 'run'


@pytest.mark.fault(
  'host',
  'SIGKILL of one of two processes in mid-step, of each in turn',
  'the other ends in 60 s, naming it; resumed, equal bit for bit',
)
def test_one_is_killed(two, tmp_path):
  command = flags(tmp_path / 'run', STEPS)
  for victim in (1, 0):
    running = watched.together(tmp_path / 'marks', 2, *command)
    assert running[victim].until(SEALED)
    assert running[victim].until(STEP, random.Random(victim).randint(1, 6))
    running[victim].process.kill()
    other = running[1 - victim]
    err = other.end(timeout=60)
    assert other.process.returncode == 1, err[-3000:]
    name = f'process {victim} ({socket.gethostname()})' if victim else 'process 0'
    assert said(err).startswith(f'error: {name} ended without saying why')
    running[victim].end()
  errs = [finish(run) for run in watched.together(tmp_path / 'marks', 2, *command)]
  assert 'resumed at step' in errs[0]
  assert_equal_runs(two, tmp_path / 'run')


@pytest.mark.fault(
  'host',
  'SIGSTOP of one of two processes: it hangs',
  'the other names it and ends with status 1 within 60 s',
)
@pytest.mark.parametrize('victim', [0, 1])
def test_one_hangs(tmp_path, at_full_size, victim):
  """To the others it is as if its host had vanished: its connections are open and silent."""
  if victim == 0 and not at_full_size:
    pytest.skip('at full size only')
  beat = None if at_full_size else 2.0  # seconds; the silence that is borne is five of them
  running = watched.together(tmp_path / 'marks', 2, *flags(tmp_path / 'run', 1000), beat=beat)
  assert running[victim].until(STEP, 2)
  running[victim].process.send_signal(signal.SIGSTOP)
  other = running[1 - victim]
  err = other.end(timeout=60)
  running[victim].process.send_signal(signal.SIGCONT)
  running[victim].end(timeout=60)
  assert other.process.returncode == 1, err[-3000:]
  says = rf'error: process {victim}.* has not been heard for \d+ s, so it hangs or its host is gone'
  assert re.match(says, said(err))
  assert running[victim].process.returncode != 0, 'nor does it go on alone'


@pytest.mark.fault(
  'machine',
  'SIGKILL of all of 4 processes; then 1 or 2 go on',
  'the same examples; losses equal to 1e-3',
)
def test_killed_on_four_and_resumed_on_others(tmp_path):
  """4 x 2 devices are killed, 1 x 1 and 2 x 4 go on, as 1 x 1 that is left alone."""
  steps = 8  # in which a rounding error does not grow too large
  # Nor does it as fast as with statistics over 8, or with longer steps.
  slow = '--config.batch_size=32', '--config.schedule.base_lr=0.01'
  alone = Watched(tmp_path / 'marks', *flags(tmp_path / 'alone', steps), *slow)
  finish(alone)
  examples = watched.ids([alone])
  running = watched.together(
    tmp_path / 'marks', 4, *flags(tmp_path / 'run', steps), *slow, devices=2
  )
  assert running[0].until(SEALED)
  assert running[0].until(STEP, 6)
  for run in running:
    run.process.kill()
  for run in running:
    run.end()
    assert run.process.returncode == -signal.SIGKILL
  done = watched.ids(running)
  assert done == {step: examples[step] for step in done}
  for count, devices in ((1, 1), (2, 4)):
    workdir = tmp_path / f'{count} x {devices}'
    shutil.copytree(tmp_path / 'run', workdir)
    command = (*flags(workdir, steps), *slow)
    resumed = watched.together(tmp_path / 'marks', count, *command, devices=devices)
    errs = [finish(run) for run in resumed]
    start = int(re.search(r'resumed at step (\d+)', errs[0])[1])
    assert watched.ids(resumed) == {n: ids for n, ids in examples.items() if n > start}
    losses, wanted = train_losses(workdir), train_losses(tmp_path / 'alone')
    assert list(losses) == list(range(1, steps + 1))
    found, wanted = (np.array(list(of.values())) for of in (losses, wanted))
    np.testing.assert_allclose(found[:5], wanted[:5], rtol=1e-4)
    np.testing.assert_allclose(found, wanted, rtol=1e-3)


def train_losses(workdir):
  return {r['step']: r['loss'] for r in Workdir(workdir).read_metrics() if r['split'] == 'train'}
