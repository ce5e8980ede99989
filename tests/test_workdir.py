"""A run's folder takes one run, one config, one process at a time."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import pytest

from afi_flax import workdir as workdir_lib
from afi_flax.errors import UserError
from afi_flax.workdir import StopSignals, Workdir

CONFIG = {
  'model': {'name': 'afi_resnet32', 'stages': (1, 2, 3)},
  'data': {'dataset': 'cifar100', 'data_dir': '/data'},
  'schedule': {'base_lr': 0.1, 'boundaries': (0.5, 0.75)},
  'seed': 0,
  'run': {'workers': 0, 'resume': ''},
}
DATASET = {'name': 'digits', 'class_names': ('zero', 'one'), 'num_train': 500, 'num_eval': 100}


@pytest.fixture
def workdir(tmp_path):
  return Workdir(tmp_path / 'runs' / 'first')


def start(workdir, config=CONFIG, dataset=DATASET, writer=True, token=None):
  with workdir.open_for_training(config, dataset, writer, token):
    pass


def change(tree, path, value):
  """A copy of nested dicts with one value replaced, or removed if None."""
  key, _, rest = path.partition('.')
  tree = dict(tree)
  if rest:
    tree[key] = change(tree[key], rest, value)
  elif value is None:
    del tree[key]
  else:
    tree[key] = value
  return tree


def assert_one_line(error):
  assert '\n' not in str(error.value)


def test_paths_are_absolute_and_in_the_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  workdir = Workdir('run')
  assert workdir.folder == tmp_path / 'run'
  names = ['config_path', 'dataset_path', 'metrics_path', 'curves_path', 'lock_path']
  names += ['checkpoints', 'best', 'events_dir', 'profile']
  paths = [getattr(workdir, name) for name in names]
  assert {path.parent for path in paths} == {workdir.folder}
  assert len(set(paths)) == len(paths)
  assert not workdir.folder.exists()


def test_a_new_run_writes_what_later_commands_read(workdir):
  start(workdir)
  assert workdir.read_config() == json.loads(json.dumps(CONFIG))
  assert workdir.read_dataset() == DATASET | {'class_names': ['zero', 'one']}
  start(workdir)


def test_other_processes_write_nothing(workdir):
  start(workdir, writer=False)
  assert not workdir.folder.exists()
  start(Workdir(workdir.folder))
  before = {p: p.stat().st_mtime_ns for p in workdir.folder.rglob('*')}
  with workdir.open_for_training(CONFIG, DATASET, writer=False):
    workdir.append_metrics({'step': 1, 'split': 'train'})
    workdir.cut_back(0, 0)
  with pytest.raises(UserError, match='seed: 0 -> 1'):
    start(workdir, change(CONFIG, 'seed', 1), writer=False)
  assert {p: p.stat().st_mtime_ns for p in workdir.folder.rglob('*')} == before


@pytest.mark.parametrize(
  ('path', 'value', 'message'),
  [
    ('schedule.base_lr', 0.1 + 2e-17, 'schedule.base_lr: 0.1 -> 0.10000000000000002'),
    ('schedule.boundaries', (0.5, 0.8), 'schedule.boundaries: [0.5, 0.75] -> [0.5, 0.8]'),
    ('model.name', 'resnet32', "model.name: 'afi_resnet32' -> 'resnet32'"),
    ('model.stages', None, 'model.stages: [1, 2, 3] -> absent'),
    ('data.augment', 'crop', "data.augment: absent -> 'crop'"),
    ('running', 1, 'running: absent -> 1'),
  ],
)
def test_another_config_is_refused_key_by_key(workdir, path, value, message):
  start(workdir)
  with pytest.raises(UserError, match=re.escape(f': {message}; take another --workdir')) as error:
    start(workdir, change(CONFIG, path, value))
  assert_one_line(error)
  start(workdir)  # neither was the config replaced nor is the lock still held


def test_keys_that_are_younger_than_the_run(workdir):
  """They must say what the run did without them."""
  start(workdir)
  start(workdir, change(CONFIG, 'data.color_jitter', (0.0,) * 4))
  with pytest.raises(UserError, match=r'config: data\.mixup: 0\.0 -> 0\.1; take another'):
    start(workdir, change(CONFIG, 'data.mixup', 0.1))


def test_many_differences_are_counted(workdir):
  start(workdir, {f'key{i}': 0 for i in range(8)})
  with pytest.raises(UserError, match='key4: 0 -> 1, and 3 more; take'):
    start(workdir, {f'key{i}': 1 for i in range(8)})


def test_keys_that_may_differ_are_replaced(workdir):
  start(workdir)
  moved = change(change(CONFIG, 'data.data_dir', '/new'), 'run.workers', 2)
  start(workdir, moved)
  assert workdir.read_config() == json.loads(json.dumps(moved))


def test_check_config_with_more_keys_that_may_differ(workdir):
  start(workdir)
  other = change(CONFIG, 'seed', 1)
  workdir.check_config(other, ('run', 'seed'))
  with pytest.raises(UserError, match='seed: 0 -> 1'):
    workdir.check_config(other)


@pytest.mark.parametrize(
  ('key', 'value', 'message'),
  [
    ('num_train', 498, 'num_train: 500 -> 498'),
    ('name', 'other', "name: 'digits' -> 'other'"),
    ('class_names', ('zero', 'two'), "class_names: ['zero', 'one'] -> ['zero', 'two']"),
  ],
)
def test_another_data_set_is_refused(workdir, key, value, message):
  start(workdir)
  with pytest.raises(UserError, match='the data set has changed') as error:
    start(workdir, dataset=DATASET | {key: value})
  assert_one_line(error)
  assert f' began: {message}; take another --workdir' in str(error.value)


def test_long_lists_are_shown_in_short(workdir):
  names = [f'class {i}' for i in range(1000)]
  start(workdir, dataset=DATASET | {'class_names': names})
  with pytest.raises(UserError, match='class_names: 1000 values -> 999 values; take'):
    start(workdir, dataset=DATASET | {'class_names': names[1:]})
  names[700] = 'new'
  with pytest.raises(UserError, match=r"class_names\[700\]: 'class 700' -> 'new'; take"):
    start(workdir, dataset=DATASET | {'class_names': names})


@pytest.mark.parametrize('folder', ['file/run', 'file', '/proc/run'])
def test_a_folder_that_cannot_be_written(tmp_path, folder):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match=f'cannot write to workdir .*{folder}: .*--workdir') as error:
    start(Workdir(tmp_path / folder))
  assert_one_line(error)


def test_a_full_disk(workdir, monkeypatch):
  def write(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', write)
  with pytest.raises(UserError, match='No space left on device'):
    start(workdir)
  monkeypatch.undo()
  start(workdir)  # nor did that leave it locked


def test_reading_where_no_run_is(tmp_path, workdir):
  for folder in (tmp_path, tmp_path / 'absent'):
    with pytest.raises(UserError, match=r'no run in .*: config.json is missing; ') as error:
      Workdir(folder).read_config()
    assert_one_line(error)
    with pytest.raises(UserError, match=r'no run in .*: dataset.json is missing; '):
      Workdir(folder).read_dataset()


@pytest.mark.fault('config', 'config.json is damaged', 'one line with the cure')
@pytest.mark.parametrize('content', ['', '{"seed": ', '[]', '\x00\x00'])
def test_a_damaged_config(workdir, content):
  start(workdir)
  workdir.config_path.write_text(content)
  for use in (workdir.read_config, lambda: start(workdir)):
    with pytest.raises(UserError, match=r'config.json cannot be read: ') as error:
      use()
    assert_one_line(error)


@pytest.mark.fault(
  'kill',
  'in the middle of writing config.json',
  'the old file stays whole',
)
def test_a_write_that_is_broken_off_leaves_the_old_file(workdir, monkeypatch):
  start(workdir)

  def die(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(os, 'replace', die)
  with pytest.raises(KeyboardInterrupt):
    start(workdir, change(CONFIG, 'run.workers', 2))
  assert workdir.read_config() == json.loads(json.dumps(CONFIG))


HOLDER = """
import sys
from afi_flax.workdir import Workdir
with Workdir(sys.argv[1]).open_for_training({}, {}):
  print('locked', flush=True)
  sys.stdin.read()
"""


@pytest.mark.fault(
  'workdir',
  'SIGKILL of the one that holds the lock',
  'refused while it lives, naming it; free once it is dead',
)
def test_lock(workdir):
  root = pathlib.Path(workdir_lib.__file__).parents[1]
  holder = subprocess.Popen(
    [sys.executable, '-c', HOLDER, workdir.folder],
    env=os.environ | {'PYTHONPATH': str(root)},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  )
  with holder:
    assert holder.stdout.readline() == b'locked\n'
    who = f'in use by process {holder.pid} on {re.escape(socket.gethostname())} since 20'
    with pytest.raises(UserError, match=f'{who}.*; wait') as error:
      start(workdir, {}, {})
    assert_one_line(error)
    workdir.read_config()  # evaluation may look on
    holder.kill()
  assert json.loads(workdir.lock_path.read_text())['pid'] == holder.pid
  with workdir.open_for_training({}, {}):  # what a dead run left does not block
    assert json.loads(workdir.lock_path.read_text())['pid'] == os.getpid()
    workdir.lock_path.write_text('')  # as it is for a moment
    with pytest.raises(UserError, match='in use by another process; wait'):
      start(Workdir(workdir.folder), {}, {})
  start(Workdir(workdir.folder), {}, {})


def test_a_folder_that_the_processes_do_not_share(tmp_path, monkeypatch):
  monkeypatch.setattr(workdir_lib, '_PATIENCE', 0.0)
  with Workdir(tmp_path / 'a').open_for_training(CONFIG, DATASET, token=1):
    start(Workdir(tmp_path / 'a'), writer=False, token=1)
    for name, token in (('b', 1), ('a', 2)):  # 2: where the lock is what an older start left
      with pytest.raises(UserError, match=f'workdir {tmp_path}/{name} on .* is not the') as error:
        start(Workdir(tmp_path / name), writer=False, token=token)
      assert_one_line(error)


@pytest.mark.fault(
  'disk', "the run's folder moved, deleted or replaced", 'said at the next step; nothing new there'
)
@pytest.mark.parametrize('replaced', [False, True])
def test_a_folder_that_is_gone(workdir, replaced):
  def harm():
    with workdir.open_for_training(CONFIG, DATASET):
      workdir.poll()
      workdir.folder.rename(workdir.folder.with_name('elsewhere'))
      if replaced:
        start(Workdir(workdir.folder))  # by another run, whose lock is another file
      workdir.poll()

  with pytest.raises(UserError, match='was moved, deleted or replaced while the run') as error:
    harm()
  assert_one_line(error)
  workdir.poll()  # holds nothing any more


def fill(workdir):
  start(workdir)
  for step in (100, 200, 300):
    workdir.append_metrics({'step': step, 'split': 'train', 'loss': 1 / step})
    workdir.append_metrics({'step': step, 'split': 'test', 'top1': 0.5})


def summary(workdir):
  return [(r['step'], r['split']) for r in workdir.read_metrics()]


def test_metrics_round_trip(workdir):
  assert workdir.read_metrics() == []
  fill(workdir)
  assert workdir.read_metrics()[4] == {'step': 300, 'split': 'train', 'loss': 1 / 300}
  assert len(workdir.metrics_path.read_text().splitlines()) == 6


@pytest.mark.parametrize(
  ('step', 'train', 'test'), [(0, 0, 0), (200, 2, 1), (250, 2, 2), (300, 3, 2)]
)
def test_cut_back(workdir, step, train, test):
  fill(workdir)
  workdir.cut_back(step, step)
  assert summary(workdir).count((step, 'test')) == 0
  splits = [split for _, split in summary(workdir)]
  assert (splits.count('train'), splits.count('test')) == (train, test)


def test_cut_back_without_metrics(workdir):
  start(workdir)
  workdir.cut_back(0, 0)
  assert workdir.read_metrics() == []


@pytest.mark.fault(
  'kill',
  'in the middle of a line of metrics',
  'the torn line is ignored and written anew',
)
def test_a_torn_last_line_is_ignored_and_cut(workdir):
  fill(workdir)
  whole = workdir.metrics_path.read_bytes()
  workdir.metrics_path.write_bytes(whole[:-10])
  assert summary(workdir)[-1] == (300, 'train')
  workdir.cut_back(300, 300)
  workdir.append_metrics({'step': 300, 'split': 'test', 'top1': 0.5})
  assert workdir.metrics_path.read_bytes() == whole


def test_a_damaged_line_is_named(workdir):
  fill(workdir)
  lines = workdir.metrics_path.read_text().splitlines(keepends=True)
  workdir.metrics_path.write_text(lines[0] + 'what\n' + lines[1])
  with pytest.raises(UserError, match=r"metrics.jsonl, line 2 is not JSON: b'what'; mend"):
    workdir.read_metrics()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_stop(number):
  before = signal.getsignal(number)
  with StopSignals() as stop:
    assert stop.requested is None
    os.kill(os.getpid(), number)
    assert stop.requested == number.name
    os.kill(os.getpid(), signal.SIGTERM)  # again: still only asks
    assert stop.requested == number.name
  assert signal.getsignal(number) is before


def test_a_second_sigint_interrupts_at_once():
  before = signal.getsignal(signal.SIGINT)
  with StopSignals() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested == 'SIGINT'
  assert signal.getsignal(signal.SIGINT) is before


def test_a_run_does_not_start_twice_from_different_weights(workdir):
  start(workdir)
  with pytest.raises(UserError, match=r"run\.init_from: .* -> 'runs/other'"):
    start(workdir, change(CONFIG, 'run.init_from', 'runs/other'))
