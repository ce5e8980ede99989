import io
import os
import types

import pytest

from afi_flax import curves, event_file, report
from afi_flax.errors import FailedError, UserError
from afi_flax.workdir import Workdir


class Terminal(io.StringIO):
  columns = 121

  def isatty(self):
    return True

  def fileno(self):
    return 2

  def screen(self):
    """What one would see: a carriage return begins the line anew."""
    lines = []
    for text in self.getvalue().split('\n'):
      line = ''
      for part in text.split('\r'):
        line = part + line[len(part) :]
      lines.append(line.rstrip())
    return lines


@pytest.fixture
def clock(monkeypatch):
  """Time that stands still but for `clock.now += seconds`."""
  clock = types.SimpleNamespace(now=1000.0)
  monkeypatch.setattr(report, 'time', types.SimpleNamespace(monotonic=lambda: clock.now))
  return clock


@pytest.fixture
def terminal(monkeypatch):
  terminal = Terminal()
  monkeypatch.setattr(report, 'sys', types.SimpleNamespace(stderr=terminal))
  size = lambda _: os.terminal_size((terminal.columns, 30))  # noqa: E731
  monkeypatch.setattr(os, 'get_terminal_size', size)
  return terminal


@pytest.fixture
def make(tmp_path):
  """Makes reporters of a run of 20 epochs, and closes them."""
  reporters = []

  def make(folder=tmp_path, **changes):
    arguments = {
      'total_steps': 7800,
      'stop_step': 7800,
      'steps_per_epoch': 390.0,
      'start_step': 0,
      'enabled': True,
      'title': 'afi_resnet32 on cifar100',
    }
    folder.mkdir(exist_ok=True)
    reporters.append(report.Reporter(Workdir(folder), **arguments | changes))
    return reporters[-1]

  yield make
  for reporter in reporters:
    reporter.close()


def record(step, split='train', loss=1.234, top1=0.5, **changes):
  return {
    'step': step,
    'split': split,
    'loss': loss,
    'top1': top1,
    'top5': 0.9,
    'examples': 6400,
    'images_per_second': 93.1,
  } | changes


@pytest.mark.parametrize(
  ('seconds', 'text'), [(0, '0:00'), (59.6, '1:00'), (185, '3:05'), (3753, '1:02:33')]
)
def test_duration(seconds, text):
  assert report.duration(seconds) == text


@pytest.mark.parametrize(
  ('per_second', 'text'),
  [
    (0.0, '0'),
    (9.312, '9.31'),
    (93.14, '93.1'),
    (99.97, '100'),
    (2310.4, '2,310'),
    (12346, '12,350'),
  ],
)
def test_rate(per_second, text):
  assert report.rate(per_second) == text


class TestPlainLines:
  def test_one_aligned_line_for_each_record(self, make, capsys, clock):
    reporter = make()
    for step in range(1, 1001):
      clock.now += 0.5
      reporter.progress(step)
      if step in (50, 1000):
        reporter.train(record(step, top1=step / 2000), 0.1)
    reporter.close()
    speed = 'lr 0.1         93.1 pictures/s'
    assert capsys.readouterr().err.splitlines() == [
      f'  50/7800  epoch  0.13  loss 1.234  top-1  2.5%  {speed}  1:04:35 left',
      f'1000/7800  epoch  2.56  loss 1.234  top-1 50.0%  {speed}  56:40 left',
    ]

  def test_a_run_that_had_ended_here_before_shows_no_speed(self, make, capsys):
    reporter = make()
    reporter.train(record(50) | {'images_per_second': 0.0}, 0.1)
    reporter.close()
    assert 'pictures/s' not in capsys.readouterr().err

  def test_an_evaluation(self, make, capsys):
    reporter = make()
    reporter.evaluation(record(780, 'test', loss=2.5, top1=0.7123, examples=10000))
    reporter.close()
    assert capsys.readouterr().err == (
      ' 780/7800  epoch  2.00  test  loss 2.5000  top-1 71.23%  top-5 90.00%  of 10,000\n'
    )

  def test_no_line_is_longer_than_100_columns(self, make, capsys, clock):
    reporter = make(total_steps=900_000, stop_step=900_000, steps_per_epoch=3000.0)
    reporter.progress(1)
    clock.now += 60
    reporter.progress(600)
    one = record(600, loss=12.345, top1=1.0, images_per_second=54321.0)
    reporter.train(one, 0.000123)
    reporter.train(one | {'mfu': 0.314}, 0.000123)
    reporter.evaluation(record(600, 'train[98%:]', loss=12.3, top1=1.0, top5=1.0, examples=50000))
    reporter.close()
    lines = capsys.readouterr().err.splitlines()
    assert '54,320 pictures/s  25:01:30 left' in lines[0]
    assert '54,320/s, MFU 31%  25:01:30 left' in lines[1]
    assert max(map(len, lines)) <= 100

  def test_a_long_evaluation_tells_once_a_minute(self, capsys, clock):
    console = report.Console()
    for done in range(0, 50_001, 250):
      console.evaluating(done, 50_000)
      clock.now += 0.7  # 141 s in all
    console.close()
    assert capsys.readouterr().err.splitlines() == [
      'evaluating: 21,500 of 50,000 (43%)',
      'evaluating: 43,000 of 50,000 (86%)',
    ]

  def test_work_of_an_unknown_length_tells_once_a_minute(self, capsys, clock):
    console = report.Console()
    for done in range(0, 50_001, 250):
      console.working('predicting', done, None, since=0.0)
      clock.now += 0.7
    console.close()
    assert capsys.readouterr().err.splitlines() == ['predicting: 21,500', 'predicting: 43,000']

  def test_nan_is_said_and_drawn(self, make, tmp_path, capsys):
    reporter = make()
    reporter.train(record(100, loss=float('nan')), 0.1)
    reporter.evaluation(record(100, 'test', loss=float('inf'), top1=0.0))
    reporter.draw_curves()
    reporter.close()
    assert 'loss nan' in capsys.readouterr().err
    assert (tmp_path / 'curves.png').exists()


class TestBar:
  def test_before_the_first_step_nothing_is_known_of_speed(self, make, terminal, clock):
    reporter = make()
    reporter.say('a table\nof two lines')
    lines = terminal.screen()
    assert lines[-3:-1] == ['a table', 'of two lines']
    assert lines[-1].split() == [
      '0%',
      '0/7800',
      'epoch',
      '0.00',
      'compiling',
      'the',
      'first',
      'step',
    ]
    reporter.close()

  def test_after_rolling_back_nothing_is_compiled(self, make, terminal, clock):
    make(start_step=390, compiled=True)
    assert terminal.screen()[-1].endswith('390/7800  epoch  1.00')

  def test_shows_position_results_and_time_left(self, make, terminal, clock):
    reporter = make()
    for step in range(1, 1001):
      clock.now += 0.5
      reporter.progress(step)
    reporter.train(record(1000), 0.1)
    shown = terminal.screen()[-1]
    assert shown.startswith(' 13% ')
    for text in (
      '1000/7800',
      'epoch  2.56',
      'loss 1.234',
      'lr 0.1',
      '93.1 pictures/s',
      '56:40 left',
    ):
      assert text in shown
    assert '\n' not in terminal.getvalue()  # a bar that moves leaves no lines behind
    reporter.close()

  def test_is_redrawn_ten_times_a_second_at_most(self, make, terminal, clock):
    reporter = make()
    before = terminal.getvalue().count('\r')
    for step in range(1, 1001):
      clock.now += 0.001
      reporter.progress(step)
    assert 5 <= terminal.getvalue().count('\r') - before <= 11
    reporter.close()

  @pytest.mark.parametrize('columns', [40, 80, 100, 200])
  def test_fits_the_terminal(self, make, terminal, clock, columns):
    terminal.columns = columns
    reporter = make()
    for step in (1, 2):
      clock.now += 1
      reporter.progress(step)
      reporter.train(record(step), 0.1)
    shown = terminal.screen()[-1]
    assert len(shown) < columns
    assert shown.endswith('2:09:58 left')
    assert ('pictures/s' in shown) == (columns >= 100)
    reporter.close()

  def test_work_of_known_and_unknown_length(self, terminal, clock):
    console, since = report.Console(), clock.now
    clock.now += 2
    console.working('predicting', 250, 1000, since)
    line = terminal.screen()[-1]
    assert line.startswith(' 25% ')
    assert line.endswith('predicting  250/1,000  125/s  0:06 left')
    clock.now += 2
    console.working('predicting', 300, None, since)
    assert terminal.screen()[-1] == 'predicting  300  75/s'
    console.close()

  def test_lines_stand_above_it(self, make, terminal, clock):
    reporter = make()
    reporter.progress(1)
    reporter.evaluating(5000, 10000)
    clock.now += 1
    reporter.evaluating(7500, 10000)
    assert terminal.screen()[-1].endswith('evaluating  7,500/10,000')
    reporter.evaluation(record(1, 'test'))
    reporter.close()
    lines = terminal.screen()
    assert (
      lines[0] == '   1/7800  epoch  0.00  test  loss 1.2340  top-1 50.00%  top-5 90.00%  of 6,400'
    )
    assert '1/7800' in lines[1]  # no longer the evaluation's
    assert lines[2:] == ['']


def test_other_processes_report_nothing(make, tmp_path, capsys):
  reporter = make(enabled=False)
  reporter.say('x')
  reporter.progress(1)
  reporter.train(record(1), 0.1)
  reporter.evaluating(1, 2)
  reporter.evaluation(record(1, 'test'))
  reporter.draw_curves()
  reporter.close()
  reporter.summary('test')
  assert capsys.readouterr() == ('', '')
  assert not list(tmp_path.iterdir())


def test_records_are_stored_in_order_with_the_learning_rate(make, tmp_path):
  reporter = make()
  reporter.train(record(100), 0.1)
  reporter.evaluation(record(100, 'test'))
  reporter.close()
  assert Workdir(tmp_path).read_metrics() == [
    record(100) | {'learning_rate': 0.1},
    record(100, 'test'),
  ]


class Events:
  """An event file that remembers what it is given."""

  def __init__(self, folder, purge_step):
    self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, {}, False

  def add(self, step, scalars):
    self.scalars |= {(step, tag): value for tag, value in scalars.items()}

  def close(self):
    self.closed = True


@pytest.fixture
def events(monkeypatch):
  """The event files that reporters open."""
  opened = []

  def open_(folder, purge_step):
    opened.append(Events(folder, purge_step))
    return opened[-1]

  monkeypatch.setattr(event_file, 'EventFile', open_)
  return opened


class TestEventFiles:
  def test_hold_every_scalar(self, make, tmp_path, events):
    reporter = make()
    reporter.train(record(100), 0.1)
    reporter.evaluation(record(70_000, 'test', loss=2.0))
    reporter.close()
    (file,) = events
    assert file.folder == tmp_path / 'events'
    assert file.closed
    assert file.purge_step == 1
    assert file.scalars == {
      (100, 'train/loss'): 1.234,
      (100, 'train/top1'): 0.5,
      (100, 'train/top5'): 0.9,
      (100, 'train/images_per_second'): 93.1,
      (100, 'train/learning_rate'): 0.1,
      (70_000, 'test/loss'): 2.0,
      (70_000, 'test/top1'): 0.5,
      (70_000, 'test/top5'): 0.9,
      (70_000, 'test/images_per_second'): 93.1,
    }

  def test_a_resumed_run_voids_what_came_after_its_checkpoint(self, make, events):
    for start in (0, 200):
      reporter = make(start_step=start)
      reporter.train(record(start + 100), 0.1)
      reporter.close()
    first, second = events
    assert {step for step, _ in first.scalars} == {100}
    assert {step for step, _ in second.scalars} == {300}
    assert second.purge_step == 201


class TestFullDisk:
  """The device that is always full stands for it."""

  def test_while_it_reports_and_when_it_ends(self, make):
    reporter = make()
    full = os.open('/dev/full', os.O_WRONLY)
    os.dup2(full, reporter._events._file.fileno())
    os.close(full)
    with reporter._workdir.open_for_training({}, {}):
      with pytest.raises(FailedError, match='No space left on device; mend that'):
        reporter.train(record(100), 0.1)
      with pytest.raises(FailedError, match='No space left on device; mend that'):
        reporter.close()  # of what it has not written yet
    reporter.close()

  def test_when_it_begins(self, make, monkeypatch):
    on_full_disk = lambda *_: open('/dev/full', 'wb')  # noqa: E731, SIM115
    monkeypatch.setattr(event_file, 'open', on_full_disk, raising=False)
    with pytest.raises(UserError, match='No space left on device; mend that'):
      make()

  def test_when_curves_are_drawn(self, make, tmp_path):
    reporter = make()
    reporter.evaluation(record(100, 'test'))
    (tmp_path / 'curves.png.tmp').symlink_to('/dev/full')
    with pytest.raises(UserError, match='No space left on device; mend that'):
      reporter.draw_curves()


def test_curves_are_drawn_now_and_then_and_at_the_end(make, clock, monkeypatch):
  drawings = []

  def draw(records, *_):
    drawings.append(len(records))
    clock.now += 0.3

  monkeypatch.setattr(curves, 'draw', draw)
  reporter = make()
  for step, wait in ((1, 1), (2, 5), (3, 4), (4, 1)):
    reporter.evaluation(record(step, 'test'))
    reporter.draw_curves()
    clock.now += wait
  assert drawings == [1, 3]
  reporter.close()
  reporter.close()
  assert drawings == [1, 3, 4]


class TestSummary:
  def summary(self, make, folder, capsys, top1, **changes):
    reporter = make(folder, **changes)
    for epoch, value in enumerate(top1, start=1):
      reporter.evaluation(record(390 * epoch, 'test', top1=value, examples=10000))
    reporter.evaluation(record(7800, 'other', top1=0.99))
    reporter.close()
    capsys.readouterr()
    reporter.summary('test')
    out, err = capsys.readouterr()
    assert err == ''
    return out.splitlines()

  def test_last_and_best(self, make, tmp_path, capsys):
    folder = tmp_path / 'my runs'
    assert self.summary(make, folder, capsys, [0.5, 0.7123, 0.7]) == [
      'test top-1 70.00% (10,000 examples), best 71.23% at epoch 2 (picked on the test split, so '
      'optimistic)',
      f'Curves: {folder}/curves.png',
      f"Next: {report._python()} -m afi_flax.main --mode=eval --workdir '{folder}'",
    ]

  def test_the_last_is_the_best(self, make, tmp_path, capsys):
    first = self.summary(make, tmp_path, capsys, [0.5, 0.7])[0]
    assert first == 'test top-1 70.00% (10,000 examples) at epoch 2, its best'

  @pytest.mark.parametrize('python', ['python', '.venv/bin/python'])
  def test_paths_are_as_one_would_type_them(self, make, tmp_path, capsys, monkeypatch, python):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report.sys, 'executable', str(tmp_path / '.venv/bin/python'))
    found = tmp_path / '.venv/bin/python' if python == 'python' else '/elsewhere/python'
    monkeypatch.setattr(report.shutil, 'which', {'python': str(found)}.get)
    lines = self.summary(make, tmp_path / 'run', capsys, [0.5])
    assert lines[1:] == [
      'Curves: run/curves.png',
      f'Next: {python} -m afi_flax.main --mode=eval --workdir run',
    ]

  def test_a_run_that_max_steps_ended(self, make, tmp_path, capsys):
    first = self.summary(make, tmp_path, capsys, [0.5], stop_step=390)[0]
    assert first == (
      'Ended by max_steps at step 390 of 7800: test top-1 50.00% (10,000 examples) at epoch 1, '
      'its best'
    )

  def test_without_an_evaluation(self, make, tmp_path, capsys):
    assert self.summary(make, tmp_path, capsys, [])[0] == 'test was not evaluated'
