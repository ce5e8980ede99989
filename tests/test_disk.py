"""A disk that is full, slow, read-only or gone while a run goes on.

The full and the read-only disk are real ones: a small file system in memory, for which no root is
needed in a namespace of one's own. Permissions would not do: they stop nobody who is root.
"""

import pathlib
import re
import shutil
import subprocess

import pytest

from afi_flax.errors import FailedError
from tests.test_kills import finish, flags
from tests.test_main import assert_equal_runs
from tests.watched import SAVE, SEALED, STEP, Watched

pytestmark = pytest.mark.slow

STEPS = 16


class SmallDisk:
  """A file system of 24 MiB, ten checkpoints, mounted where only its own shell sees it.

  Attributes:
    folder: the way to it for all others, through that shell.
  """

  def __init__(self, mount_point: pathlib.Path):
    mount_point.mkdir()
    self._mount_point = mount_point
    self._shell = subprocess.Popen(
      ['unshare', '-rm', 'sh'],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    self.folder = pathlib.Path(f'/proc/{self._shell.pid}/root{mount_point}')
    self.run('mount -t tmpfs -o size=24m none .')

  def run(self, command: str) -> None:
    """Runs a command of the shell in the mount point; OSError if that fails."""
    line = f'(cd {self._mount_point} && {command}) 2>&1; echo "ended with $?"'
    print(line, file=self._shell.stdin, flush=True)
    said = []
    while not said or not said[-1].startswith('ended with'):
      said.append(self._shell.stdout.readline())
      if not said[-1]:
        break
    if said[-1] != 'ended with 0\n':
      raise OSError(''.join(said))

  def close(self) -> None:
    self._shell.stdin.close()
    self._shell.wait(timeout=30)
    self._shell.stdout.close()


@pytest.fixture
def disk(tmp_path):
  try:
    made = SmallDisk(tmp_path / 'disk')
  except OSError as error:
    pytest.skip(f'needs a file system of its own, by unshare -rm: {error}')
  yield made
  made.close()


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """The folder of a run whose disk is in order."""
  folder = tmp_path_factory.mktemp('whole')
  finish(Watched(folder / 'marks', *flags(folder / 'run', STEPS)))
  return folder / 'run'


def full(disk):
  """Room for log lines, but not for a checkpoint."""
  disk.run('head -c 300000 /dev/zero > room; cat /dev/zero > filler; rm room')


def emptied(disk):
  disk.run('rm filler')


def read_only(disk):
  """As a file system is after an error, for all that is opened from now on."""
  # It is busy while a file there is open for writing.
  remount = 'for i in $(seq 500); do mount -o remount,bind,ro run && exit; sleep 0.01; done; exit 1'
  disk.run(f'mount --bind run run && {remount}')


def writable(disk):
  disk.run('umount run')


def gone(disk):
  disk.run('mv run elsewhere')


def put_back(disk):
  """In the place of what a save that had begun may have written where the folder was."""
  assert not (disk.folder / 'run' / 'config.json').exists()
  disk.run('rm -rf run && mv elsewhere run')


def replaced(disk):
  disk.run('mv run/checkpoints elsewhere && touch run/checkpoints')


def replaced_back(disk):
  disk.run('rm run/checkpoints && mv elsewhere run/checkpoints')


@pytest.mark.parametrize(
  ('harm', 'mend', 'reason'),
  [
    (full, emptied, r'checkpoint \d+ could not be written to .*(RESOURCE_EXHAUSTED|No space left)'),
    (read_only, writable, 'Read-only file system'),
    (gone, put_back, 'workdir .* was moved, deleted or replaced|No such file or directory'),
    (replaced, replaced_back, r'checkpoint \d+ could not be written to .*(Not a dir|File exists)'),
  ],
  ids=['full', 'read-only', 'gone', 'replaced'],
)
@pytest.mark.fault(
  'disk',
  'full, read-only, its folder gone or replaced',
  'ends in one save interval, with reason and cure; mended, equal',
)
def test_harmed_while_a_run_goes_on(whole, disk, tmp_path, at_full_size, harm, mend, reason):
  if harm is replaced and not at_full_size:
    pytest.skip('at full size only')
  command = flags(disk.folder / 'run', STEPS)
  run = Watched(tmp_path / 'marks', *command)
  assert run.until(SEALED)
  begun = len(run.marks())
  harm(disk)
  err = run.end(timeout=120)
  assert run.process.returncode == FailedError.status, err[-3000:]
  last = err.splitlines()[-1]
  assert last.startswith('error: ')
  assert re.search(reason, last)
  assert 'start the same command again' in last or 'take another --workdir' in last
  assert 'Traceback' not in err
  after = run.marks()[begun:]
  failed = next((i for i, m in enumerate(after) if m['what'] == SAVE), 0)
  assert sum(m['what'] == STEP for m in after[failed:]) <= 4 + 1, 'beyond one save interval'

  mend(disk)
  err = finish(Watched(tmp_path / 'marks', *command))
  assert re.search(r'resumed at step [1-9]', err), 'an older step was good'
  assert_equal_runs(whole, disk.folder / 'run')


# Stands for a disk that is slow: each file that is to be safe there takes as long as on a busy one.
SLOW = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>
int fsync(int file) {
  usleep(30000);
  return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(file);
}
"""


@pytest.mark.fault('disk', 'slow: every fsync takes 30 ms more', 'training waits for it; equal')
def test_a_slow_disk(whole, tmp_path):
  compiler = shutil.which('cc')
  if not compiler:
    pytest.skip('needs a C compiler')
  (tmp_path / 'slow.c').write_text(SLOW)
  library = tmp_path / 'slow.so'
  subprocess.run(
    [compiler, '-shared', '-fPIC', '-o', library, tmp_path / 'slow.c', '-ldl'], check=True
  )
  command = flags(tmp_path / 'run', STEPS)
  run = Watched(tmp_path / 'marks', *command, LD_PRELOAD=str(library))
  finish(run)
  waiting = {}
  for mark in run.marks():
    if mark['what'] == SAVE:
      waiting.setdefault(mark['folder'], []).append(mark['step'])
      assert len(waiting[mark['folder']]) <= 2, 'the next one waits for the one before it'
    elif mark['what'] == SEALED:
      assert waiting[mark['folder']].pop(0) == mark['step']
  assert not any(waiting.values())
  assert_equal_runs(whole, tmp_path / 'run')
