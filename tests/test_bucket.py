"""In a bucket a lock is held by one process at a time, and metrics get there sooner or later."""

import contextlib
import functools
import json
import logging
import pathlib
import re
import shutil
import socket
import time

import pytest

from afi_flax import bucket, files
from afi_flax.bucket import Lock, Mirror
from afi_flax.errors import FailedError, StoppedError, UserError
from afi_flax.workdir import Workdir
from tests.test_workdir import CONFIG, DATASET, assert_one_line, change

BEAT, LIMIT = 0.05, 0.4


@pytest.fixture
def folder(object_store, request):
  """A folder of the test's own in the bucket."""
  yield files.absolute(f'gs://bucket/{request.node.name}')
  object_store.refuse = lambda method, name: 0
  object_store.lose_answers = 0


@pytest.fixture
def locks(folder):
  """Makes locks on one object, which are released at the end."""
  with contextlib.ExitStack() as stack:

    def make():
      lock = Lock(folder / 'lock', BEAT, LIMIT)
      stack.callback(lambda: lock._thread.is_alive() and lock.release())
      return lock

    yield make


def until(condition):
  """Waits for what a thread will do."""
  deadline = time.monotonic() + 10
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def stored(object_store, path):
  return object_store.objects[str(path).removeprefix('gs://')]


def put(object_store, path, data, age=0.0):
  return object_store.put(str(path).removeprefix('gs://'), data, age)


def test_one_at_a_time(object_store, folder, locks):
  first, second = locks(), locks()
  assert first.take(b'first') is None
  assert second.take(b'second') == b'first'
  assert stored(object_store, folder / 'lock').data == b'first'
  first.release()
  assert not files.exists(folder / 'lock')
  assert second.take(b'second') is None


def test_it_is_written_again_and_again(object_store, folder, locks):
  lock = locks()
  lock.take(b'first')
  before = stored(object_store, folder / 'lock').generation
  until(lambda: stored(object_store, folder / 'lock').generation > before)
  assert lock.lost is None


@pytest.mark.parametrize('age', [0.0, 1e6, -1e6], ids=['just now', 'long ago', 'clock ahead'])
def test_what_a_dead_process_left_does_not_block(object_store, folder, locks, age, caplog):
  put(object_store, folder / 'lock', b'dead', age)
  assert locks().take(b'new') is None
  assert stored(object_store, folder / 'lock').data == b'new'
  assert 'is held by dead' in caplog.text


def test_the_old_holder_finds_out(object_store, folder, locks):
  lock = locks()
  lock.take(b'first')
  put(object_store, folder / 'lock', b'second')
  until(lambda: lock.lost is not None)
  assert lock.lost == b'second'
  lock.release()
  assert stored(object_store, folder / 'lock').data == b'second', 'it is not its to give back'


def test_a_lock_that_somebody_deletes_is_lost(object_store, folder, locks):
  lock = locks()
  lock.take(b'first')
  del object_store.objects[str(folder / 'lock').removeprefix('gs://')]
  until(lambda: lock.lost is not None)
  assert lock.lost == b''


def test_outlives_an_outage(object_store, folder, locks, caplog):
  lock = locks()
  lock.take(b'first')
  object_store.refuse = lambda method, name: 503
  until(lambda: 'no heartbeat' in caplog.text)
  object_store.refuse = lambda method, name: 0
  before = stored(object_store, folder / 'lock').generation
  until(lambda: stored(object_store, folder / 'lock').generation > before)
  assert lock.lost is None
  assert caplog.text.count('no heartbeat') == 1


def test_a_heartbeat_that_fails_in_any_way_is_tried_again(
  object_store, folder, locks, monkeypatch, caplog
):
  lock = locks()
  lock.take(b'first')
  with monkeypatch.context() as patch:
    patch.setattr(files, 'blob', lambda path: 1 / 0)
    until(lambda: 'division by zero; trying again' in caplog.text)
  before = stored(object_store, folder / 'lock').generation
  until(lambda: stored(object_store, folder / 'lock').generation > before)


def test_a_holder_that_is_not_heard_for_too_long_is_none(object_store, folder, locks):
  """As others may take it then; if none has, a heartbeat that gets through makes it one again."""
  lock = locks()
  assert lock.lost is None
  lock.take(b'first')
  object_store.refuse = lambda method, name: 503
  until(lambda: lock.lost == b'')
  with pytest.raises(FailedError, match=r'could not be written for 0\.4 s'):
    lock.poll()
  object_store.refuse = lambda method, name: 0
  until(lambda: lock.lost is None)
  put(object_store, folder / 'lock', b'second')
  until(lambda: lock.lost == b'second')
  assert lock.poll() == b'second'


def test_its_own_writing_is_recognised(object_store, folder, locks):
  """A request may be done although its answer never came: that is no other run."""
  object_store.lose_answers = 1
  lock = locks()
  with pytest.raises(OSError, match='ConnectionError'):
    lock.take(b'first')
  assert locks().take(b'first') is None  # here in its place: the same content
  object_store.lose_answers = 1
  writes = len(object_store.writes)
  until(lambda: len(object_store.writes) > writes + 3)
  assert stored(object_store, folder / 'lock').data == b'first'


@pytest.fixture
def mirror(tmp_path, folder):
  made = Mirror(tmp_path, folder, interval=0.05)
  yield made
  made._closing.set()


def test_uploads_what_changes(object_store, tmp_path, folder, mirror):
  (tmp_path / 'metrics.jsonl').write_text('1\n')
  (tmp_path / 'events').mkdir()
  (tmp_path / 'events' / 'a').write_bytes(bytes(range(256)))
  until(lambda: files.names(folder) == ['events/a', 'metrics.jsonl'])
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('2\n')
  until(lambda: files.read(folder / 'metrics.jsonl') == b'1\n2\n')
  assert files.read(folder / 'events/a') == bytes(range(256))
  name = str(folder / 'events/a').removeprefix('gs://')
  assert object_store.writes.count(name) == 1, 'what has not changed is not uploaded again'


def test_leaves_out_what_is_being_written(tmp_path, folder, mirror):
  for name in ('curves.png.tmp', '.metrics.jsonl.tmp', 'a'):
    (tmp_path / name).touch()
  mirror.close()
  assert files.names(folder) == ['a']


def test_an_outage_is_said_once_and_made_good(object_store, tmp_path, folder, mirror, caplog):
  caplog.set_level(logging.WARNING)
  object_store.refuse = lambda method, name: 503 if method == 'POST' else 0
  (tmp_path / 'a').write_text('1')
  until(lambda: 'cannot upload metrics' in caplog.text)
  assert not mirror.sync(patience=0.05)
  (tmp_path / 'a').write_text('12')
  object_store.refuse = lambda method, name: 0
  until(lambda: 'uploaded to gs://bucket/' in caplog.text)
  assert files.read(folder / 'a') == b'12'
  assert caplog.text.count('cannot upload') == 1


def test_what_cannot_be_uploaded_in_the_end_is_an_error(object_store, tmp_path, mirror):
  object_store.refuse = lambda method, name: 403
  (tmp_path / 'a').touch()
  with pytest.raises(OSError, match='403'):
    mirror.close(patience=0.05)


def test_files(folder):
  path = folder / 'a' / 'b'
  assert not files.exists(path)
  with pytest.raises(FileNotFoundError):
    files.read(path)
  files.write(path, 'one')
  files.write(path, b'two')
  assert files.read(path) == b'two'
  with files.reading(path) as file:
    assert file.read() == b'two'
  files.write(folder / 'ab', b'')
  assert files.names(folder) == ['a/b', 'ab']
  assert files.names(folder / 'a') == ['b']
  assert files.exists(folder / 'a')
  files.move(folder / 'a', folder / 'c' / 'd', seal='b')
  assert files.names(folder) == ['ab', 'c/d/b']


@pytest.mark.parametrize('kind', ['DataCorruption', 'InvalidResponse'])
def test_a_broken_transfer_is_an_os_error(folder, kind):
  error = getattr(pytest.importorskip('google.cloud.storage.exceptions'), kind)
  with pytest.raises(OSError, match=f'{kind}.*the sums differ'), files.os_errors(folder):
    raise error(None, 'the sums differ')


def test_an_absent_bucket_is_said(object_store):
  with pytest.raises(OSError, match='no such object or bucket'):
    files.write(files.absolute('gs://another/a'), b'')


@pytest.mark.parametrize(
  'name', ['gs://bucket', 'gs://', 's3://bucket/run', 'gs:///run', 'gs:/bucket/run']
)
def test_names_that_are_no_folder(name):
  with pytest.raises(UserError, match='gs://BUCKET/FOLDER') as error:
    files.absolute(name)
  assert_one_line(error)


def test_without_gcsfs(monkeypatch):
  monkeypatch.setattr(files.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"needs what `pip install -e '.\[gcs\]'` installs"):
    Workdir('gs://bucket/run')


@pytest.fixture
def quick_locks(monkeypatch):
  monkeypatch.setattr(bucket, 'Lock', functools.partial(Lock, beat=BEAT))


def test_a_run_leaves_all_in_the_bucket(folder, quick_locks):
  workdir = Workdir(folder)
  with workdir.open_for_training(CONFIG, DATASET, token=7):
    holder = json.loads(files.read(folder / 'lock'))
    assert (holder['host'], holder['token']) == (socket.gethostname(), 7)
    for step in (100, 200, 300):
      workdir.append_metrics({'step': step, 'split': 'train', 'loss': 1 / step})
    assert not files.exists(workdir.folder / 'metrics.jsonl')
    workdir.sync()
    assert len(Workdir(folder).read_metrics()) == 3
    workdir.append_metrics({'step': 300, 'split': 'test', 'loss': 1.0})
    assert workdir.shown(workdir.curves_path) == f'{folder}/curves.png'
    local = workdir.metrics_path.parent
  assert not local.exists()
  assert files.names(folder) == ['config.json', 'dataset.json', 'metrics.jsonl']
  assert Workdir(folder).read_config() == json.loads(json.dumps(CONFIG))
  assert len(Workdir(folder).read_metrics()) == 4


def test_another_machine_goes_on_with_the_metrics(folder, quick_locks):
  for last in (200, 300):
    workdir = Workdir(folder)
    with workdir.open_for_training(CONFIG, DATASET):
      workdir.cut_back(100, 100)
      for step in range(100 if last == 200 else 200, last + 1, 100):
        workdir.append_metrics({'step': step, 'split': 'train'})
  assert [r['step'] for r in Workdir(folder).read_metrics()] == [100, 200, 300]


def test_a_workdir_in_use_is_refused(folder, quick_locks):
  with Workdir(folder).open_for_training(CONFIG, DATASET):
    who = f'{folder} is in use by process .* on {socket.gethostname()} since 20.*; wait for it'
    with (
      pytest.raises(UserError, match=who) as error,
      Workdir(folder).open_for_training(CONFIG, DATASET),
    ):
      pass
    assert_one_line(error)


def test_another_config_is_refused_in_a_bucket(folder, quick_locks):
  for seed in (0, 0):
    with Workdir(folder).open_for_training(change(CONFIG, 'seed', seed), DATASET):
      pass
  with (
    pytest.raises(UserError, match='seed: 0 -> 1'),
    Workdir(folder).open_for_training(change(CONFIG, 'seed', 1), DATASET),
  ):
    pass
  assert not files.exists(folder / 'lock')


def test_a_run_that_lost_its_lock_ends_and_writes_nothing_more(object_store, folder, quick_locks):
  workdir = Workdir(folder)
  thief = json.dumps({'host': 'thief', 'pid': 1, 'since': 'now', 'token': 1}).encode()

  def train():
    with workdir.open_for_training(CONFIG, DATASET):
      workdir.poll()
      workdir.append_metrics({'step': 1, 'split': 'train'})
      put(object_store, folder / 'lock', thief)
      until(lambda: workdir._lock.lost)
      workdir.poll()

  with pytest.raises(UserError, match='taken over by process 1 on thief since now') as error:
    train()
  assert_one_line(error)
  assert files.names(folder) == ['config.json', 'dataset.json', 'lock']


def test_a_run_that_is_not_heard_for_too_long_ends(object_store, folder, monkeypatch):
  monkeypatch.setattr(bucket, 'Lock', functools.partial(Lock, beat=BEAT, limit=LIMIT))
  workdir = Workdir(folder)
  with workdir.open_for_training(CONFIG, DATASET):
    object_store.refuse = lambda method, name: 503
    until(lambda: workdir._lock.lost == b'')
    with pytest.raises(FailedError, match='could not be written for') as error:
      workdir.poll()
    object_store.refuse = lambda method, name: 0
  assert '\n' not in str(error.value)


def unable_to_upload(object_store, workdir, ends_with=None):
  """Runs until its metrics are refused in the end; the local folder."""
  with workdir.open_for_training(CONFIG, DATASET):
    workdir.append_metrics({'step': 1, 'split': 'train'})
    object_store.refuse = lambda method, name: 403 if name.endswith('jsonl') else 0
    if ends_with:
      raise ends_with


def test_metrics_that_cannot_be_uploaded_stay_here(object_store, folder, quick_locks):
  with pytest.raises(UserError, match=r'could not be uploaded to .*: copy them there') as error:
    unable_to_upload(object_store, Workdir(folder))
  assert_one_line(error)
  local = pathlib.Path(re.search('they are in (.*): copy', str(error.value))[1])
  assert len((local / 'metrics.jsonl').read_text().splitlines()) == 1
  shutil.rmtree(local)


def test_what_ended_a_run_is_said_before_what_could_not_be_uploaded(
  object_store, folder, quick_locks, caplog
):
  with pytest.raises(StoppedError):
    unable_to_upload(object_store, Workdir(folder), StoppedError('stopped'))
  said = re.search('could not be uploaded .* they are in (.*): copy', caplog.text)
  shutil.rmtree(said[1])


def test_a_bucket_that_refuses(object_store, folder, quick_locks):
  object_store.refuse = lambda method, name: 403
  with (
    pytest.raises(UserError, match=f'cannot write to workdir {folder}: Forbidden: 403') as error,
    Workdir(folder).open_for_training(CONFIG, DATASET),
  ):
    pass
  assert_one_line(error)
