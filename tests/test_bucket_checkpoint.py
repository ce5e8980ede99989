"""Checkpoints in a bucket: as on a disk, without a rename."""

import contextlib

import pytest

from afi_flax import files
from afi_flax.checkpoint import Checkpoints
from afi_flax.errors import UserError
from tests.test_checkpoint import ABSTRACT, assert_equal, fill, make_state


@pytest.fixture
def folder(object_store, request):
  yield files.absolute(f'gs://bucket/{request.node.name}/checkpoints')
  object_store.refuse = lambda method, name: 0


@pytest.fixture
def opened(folder):
  """Opens the folder's checkpoints; all are closed at the end."""
  with contextlib.ExitStack() as stack:
    yield lambda keep=3: stack.enter_context(contextlib.closing(Checkpoints(folder, keep)))


def key(path):
  return str(path).removeprefix('gs://')


def flip_byte(object_store, step_folder):
  """Of the largest of the objects that hold array values."""
  names = (n for n in files.names(step_folder) if '/d/' in n)
  name = max(names, key=lambda n: len(files.read(step_folder / n)))
  content = bytearray(files.read(step_folder / name))
  content[len(content) // 2] ^= 1
  object_store.put(key(step_folder / name), bytes(content))
  return name


def test_round_trip(folder, opened):
  fill(opened(), 1)
  sums = folder / '1' / 'sums.0-of-1.json'
  recorded = set(files.names(folder / '1')) - {sums.name}
  assert all(name in files.read(sums).decode() for name in recorded)
  state, step = opened().restore(ABSTRACT)
  assert step == 1
  assert_equal(state, make_state(1))


def test_keeps_the_newest(folder, opened):
  assert fill(opened(keep=1), 1, 2).steps() == [2]
  assert {name.split('/')[0] for name in files.names(folder)} == {'2'}


@pytest.mark.slow
def test_a_damaged_object_is_found_and_set_aside(object_store, folder, opened, caplog):
  fill(opened(), 1, 2)
  name = flip_byte(object_store, folder / '2')
  checkpoints = opened()
  state, step = checkpoints.restore(ABSTRACT)
  assert step == 1
  assert_equal(state, make_state(1))
  assert f'{name} does not match its SHA-256 sum' in caplog.text
  moved = {n: files.read(folder / '2' / n) for n in files.names(folder / '2')}
  checkpoints.set_aside(newer_than=1)
  assert checkpoints.steps() == [1]
  assert files.names(folder / '2') == []
  aside = folder.parent / 'unreadable' / '2'
  assert {n: files.read(aside / n) for n in files.names(aside)} == moved
  fill(checkpoints, 2).set_aside(newer_than=1)
  assert files.names(folder.parent / 'unreadable' / '2-1')


@pytest.mark.slow
def test_a_step_that_was_not_committed_does_not_count(object_store, folder, opened):
  """As a run leaves it that is killed while it saves."""
  fill(opened(), 1, 2)
  del object_store.objects[key(folder / '2' / 'commit_success.txt')]
  checkpoints = opened()
  assert checkpoints.steps() == [1]
  assert checkpoints.restore(ABSTRACT)[1] == 1
  left = set(files.names(folder / '2'))
  checkpoints.set_aside(newer_than=1)
  assert_equal(fill(checkpoints, 2).restore(ABSTRACT)[0], make_state(2))
  data = {name for name in left if '/d/' in name}
  assert data.isdisjoint(files.names(folder / '2')), 'what was left is removed'


@pytest.mark.slow
def test_a_move_that_was_broken_off_moves_again(object_store, folder, opened):
  fill(opened(), 1, 2)
  checkpoints = opened()
  object_store.refuse = lambda method, name: 403 if method == 'DELETE' else 0
  with pytest.raises(UserError, match='checkpoint 2 cannot be moved'):
    checkpoints.set_aside(newer_than=1)
  object_store.refuse = lambda method, name: 0
  assert checkpoints.steps() == [1, 2]
  checkpoints.set_aside(newer_than=1)
  assert checkpoints.steps() == [1]


def test_an_account_that_may_not_look_at_the_bucket(object_store, folder):
  object_store.buckets.add('closed')
  object_store.refuse = lambda method, name: 403 if name == 'closed' else 0
  with pytest.raises(UserError, match=r'may not be used: .*legacyBucketReader') as error:
    Checkpoints('gs://closed/run/checkpoints')
  assert '\n' not in str(error.value)


def test_a_save_that_fails_is_an_error(object_store, folder, opened):
  checkpoints = fill(opened(), 1)
  object_store.refuse = lambda method, name: 403 if '/2/commit' in name else 0
  with pytest.raises(UserError, match=f'checkpoint 2 could not be written to {folder}: ') as error:
    fill(checkpoints, 2)
  assert '\n' not in str(error.value)
  checkpoints.close()  # says it no second time
  object_store.refuse = lambda method, name: 0
  assert opened().restore(ABSTRACT)[1] == 1
