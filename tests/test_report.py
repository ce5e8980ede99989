import io
import itertools
import os
import struct
import types

import numpy as np
import pytest
from matplotlib import figure

from afi_flax import report
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
  fake = types.SimpleNamespace(
    monotonic=lambda: clock.now, time=lambda: clock.now, time_ns=lambda: int(clock.now * 1e9)
  )
  monkeypatch.setattr(report, 'time', fake)
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
    reporter.train(record(600, loss=12.345, top1=1.0, images_per_second=54321.0), 0.000123)
    reporter.evaluation(record(600, 'train[98%:]', loss=12.3, top1=1.0, top5=1.0, examples=50000))
    reporter.close()
    lines = capsys.readouterr().err.splitlines()
    assert '25:01:30 left' in lines[0]
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


def crc32c(data):
  """Bit by bit, as RFC 3720 defines it."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
  return crc ^ 0xFFFFFFFF


def records_of(data):
  """Payloads of a TFRecord file, whose checksums must be right."""

  def masked(part):
    crc = crc32c(part)
    return ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) % 2**32

  while data:
    (length,), (crc,) = struct.unpack('<Q', data[:8]), struct.unpack('<I', data[8:12])
    payload = data[12 : 12 + length]
    assert len(payload) == length
    assert crc == masked(data[:8])
    assert struct.unpack('<I', data[12 + length : 16 + length]) == (masked(payload),)
    yield payload
    data = data[16 + length :]


def fields_of(message):
  """[(number, value)] of a protocol buffer message."""
  fields = []
  position = 0

  def varint():
    nonlocal position
    value = shift = 0
    while True:
      byte = message[position]
      position += 1
      value |= (byte & 127) << shift
      shift += 7
      if byte < 128:
        return value

  while position < len(message):
    key = varint()
    if key & 7 == 0:
      value = varint()
    else:
      length = {1: 8, 5: 4}.get(key & 7) or varint()
      value = message[position : position + length]
      position += length
      if key & 7 != 2:
        (value,) = struct.unpack('<d' if length == 8 else '<f', value)
    fields.append((key >> 3, value))
  return fields


def scalars_of(path):
  """{(step, tag): value} and the step from which older events are void."""
  assert crc32c(b'123456789') == 0xE3069283
  scalars, purge_step = {}, None
  for number, event in enumerate(records_of(path.read_bytes())):
    fields = dict(fields_of(event))
    if number == 0:
      assert fields[3] == b'brain.Event:2'
    elif 7 in fields:
      assert fields_of(fields[7]) == [(1, 1)]  # status START
      purge_step = fields[2]
    else:
      for _, value in fields_of(fields[5]):
        tag, scalar = dict(fields_of(value))[1], dict(fields_of(value))[2]
        scalars[fields[2], tag.decode()] = scalar
  return scalars, purge_step


class TestEventFiles:
  def test_hold_every_scalar(self, make, tmp_path):
    reporter = make()
    reporter.train(record(100), 0.1)
    reporter.evaluation(record(70_000, 'test', loss=2.0))
    (path,) = (tmp_path / 'events').iterdir()
    scalars, purge_step = scalars_of(path)  # before closing: what is written is there
    reporter.close()
    assert 'tfevents' in path.name  # by which TensorBoard finds it
    assert purge_step == 1
    assert scalars == pytest.approx(
      {
        (100, 'train/loss'): 1.234,
        (100, 'train/top1'): 0.5,
        (100, 'train/top5'): 0.9,
        (100, 'train/images_per_second'): 93.1,
        (100, 'train/learning_rate'): 0.1,
        (70_000, 'test/loss'): 2.0,
        (70_000, 'test/top1'): 0.5,
        (70_000, 'test/top5'): 0.9,
        (70_000, 'test/images_per_second'): 93.1,
      },
      rel=1e-6,
    )

  def test_a_resumed_run_voids_what_came_after_its_checkpoint(self, make, tmp_path):
    for start in (0, 200):
      reporter = make(start_step=start)
      reporter.train(record(start + 100), 0.1)
      reporter.close()
    first, second = sorted((tmp_path / 'events').iterdir())
    assert set(step for step, _ in scalars_of(first)[0]) == {100}
    assert set(step for step, _ in scalars_of(second)[0]) == {300}
    assert scalars_of(second)[1] == 201


@pytest.fixture
def drawn(monkeypatch):
  """The figures that were saved."""
  figures = []
  save = figure.Figure.savefig

  def savefig(self, *arguments, **keywords):
    figures.append(self)
    save(self, *arguments, **keywords)

  monkeypatch.setattr(figure.Figure, 'savefig', savefig)
  return figures


def texts(axes):
  return [text.get_text() for text in axes.texts]


class TestCurves:
  def test_axes_labels_and_drops(self, tmp_path, drawn):
    path = tmp_path / 'curves.png'
    path.write_bytes(b'an older picture')
    records = []
    for step in range(100, 1000, 100):
      rate = 0.1 if step <= 500 else 0.01
      records.append(record(step, loss=5 - step / 250, top1=step / 1250, learning_rate=rate))
    for step, loss, top1 in ((300, 3.0, 0.2), (600, 1.5, 0.61), (900, 1.7, 0.6)):
      records.append(record(step, 'test', loss=loss, top1=top1))
    report.draw_curves(records, path, steps_per_epoch=300.0, title='five $ and $ a name')

    assert path.read_bytes().startswith(b'\x89PNG')
    assert list(tmp_path.iterdir()) == [path]
    (fig,) = drawn
    assert fig.get_suptitle() == 'five $ and $ a name'
    loss, top1 = fig.axes
    assert texts(loss) == ['train 1.400', 'test 1.700\nbest 1.500, epoch 2', 'lr 0.01']
    assert texts(top1) == ['train 72.0%', 'test 60.0%\nbest 61.0%, epoch 2']
    train, test = [line for line in top1.lines if len(line.get_xdata()) in (9, 3)]
    np.testing.assert_allclose(train.get_xdata(), np.arange(1, 10) / 3)
    np.testing.assert_allclose(test.get_ydata(), [20, 61, 60])
    assert [line.get_xdata() for line in loss.lines if line.get_linestyle() == '--'] == [
      [500 / 300] * 2
    ]

  def test_labels_do_not_cover_each_other(self, tmp_path, drawn):
    records = [
      record(step, split, loss=1.0 + step / 1e6)
      for step in (100, 200, 300)
      for split in ('train', 'test', 'train[98%:]', 'other')
    ]
    report.draw_curves(records, tmp_path / 'curves.png', 100.0)
    for axes in drawn[0].axes:
      boxes = sorted(text.get_window_extent().extents[[1, 3]].tolist() for text in axes.texts)
      assert len(boxes) == 4
      assert all(low[1] <= high[0] + 0.5 for low, high in itertools.pairwise(boxes))

  def test_a_long_training_curve_is_smoothed_and_an_evaluated_one_is_not(self, tmp_path, drawn):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=3000)
    records = [record(step, loss=3 + noise[step]) for step in range(3000)]
    records += [record(step, 'test', loss=3 + noise[step]) for step in range(0, 3000, 10)]
    report.draw_curves(records, tmp_path / 'curves.png', 100.0)
    raw, smooth, test, _ = (np.asarray(line.get_ydata()) for line in drawn[0].axes[0].lines)
    np.testing.assert_allclose(raw, 3 + noise)
    np.testing.assert_allclose(smooth[1500], raw[1485:1516].mean())
    assert smooth.std() < raw.std() / 4
    np.testing.assert_allclose(test, raw[::10])

  def test_a_few_huge_losses_do_not_flatten_the_rest(self, tmp_path, drawn):
    records = [record(step, loss=1e6 if step == 3 else 2.0) for step in range(1, 101)]
    report.draw_curves(records, tmp_path / 'curves.png', 100.0)
    assert drawn[0].axes[0].get_ylim() == (0, 4)

  @pytest.mark.parametrize('split', ['train', 'test'])
  def test_one_point(self, tmp_path, drawn, split):
    report.draw_curves([record(100, split)], tmp_path / 'curves.png', 100.0)
    assert drawn[0].axes[0].lines[0].get_marker() == 'o'

  def test_nothing_is_drawn_of_nothing(self, tmp_path):
    report.draw_curves([], tmp_path / 'curves.png', 100.0)
    assert not list(tmp_path.iterdir())

  def test_a_cosine_has_no_drops(self, tmp_path, drawn):
    rates = 0.05 + 0.05 * np.cos(np.pi * np.arange(1, 101) / 100)
    records = [record(k, learning_rate=rate) for k, rate in enumerate(rates, start=1)]
    report.draw_curves(records, tmp_path / 'curves.png', 10.0)
    assert texts(drawn[0].axes[0]) == ['train 1.234']

  def test_are_drawn_now_and_then_and_at_the_end(self, make, clock, monkeypatch):
    drawings = []

    def draw(records, *_):
      drawings.append(len(records))
      clock.now += 0.3

    monkeypatch.setattr(report, 'draw_curves', draw)
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
  def summary(self, make, folder, capsys, top1, hint='', **changes):
    reporter = make(folder, **changes)
    for epoch, value in enumerate(top1, start=1):
      reporter.evaluation(record(390 * epoch, 'test', top1=value, examples=10000))
    reporter.evaluation(record(7800, 'other', top1=0.99))
    reporter.close()
    capsys.readouterr()
    reporter.summary('test', hint)
    out, err = capsys.readouterr()
    assert err == ''
    return out.splitlines()

  def test_last_and_best(self, make, tmp_path, capsys):
    folder = tmp_path / 'my runs'
    assert self.summary(make, folder, capsys, [0.5, 0.7123, 0.7]) == [
      'test top-1 70.00% (10,000 examples), best 71.23% at epoch 2 (picked on the test split, so '
      'optimistic)',
      f'Curves: {folder}/curves.png',
      f"Next: python -m afi_flax.main --mode=eval --workdir '{folder}'",
    ]

  def test_the_last_is_the_best(self, make, tmp_path, capsys):
    first = self.summary(make, tmp_path, capsys, [0.5, 0.7])[0]
    assert first == 'test top-1 70.00% (10,000 examples) at epoch 2, its best'

  def test_paths_are_short_and_the_hint_is_shown(self, make, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = self.summary(make, tmp_path / 'run', capsys, [0.5], hint='or make test')
    assert lines[1:] == [
      'Curves: run/curves.png',
      'Next: python -m afi_flax.main --mode=eval --workdir run  (or make test)',
    ]

  def test_a_run_that_max_steps_ended(self, make, tmp_path, capsys):
    first = self.summary(make, tmp_path, capsys, [0.5], stop_step=390)[0]
    assert first == (
      'Ended by max_steps at step 390 of 7800: test top-1 50.00% (10,000 examples) at epoch 1, '
      'its best'
    )

  def test_without_an_evaluation(self, make, tmp_path, capsys):
    assert self.summary(make, tmp_path, capsys, [])[0] == 'test was not evaluated'
