"""What a person sees of a run: progress, event files for TensorBoard, curves.png, the last lines.

Progress goes to stderr, as a bar on a terminal and as plain lines elsewhere; the closing summary
goes to stdout.
"""

import os
import pathlib
import shlex
import shutil
import sys
import time
from collections.abc import Sequence

import tqdm

from afi_flax import curves, event_file
from afi_flax.curves import Record
from afi_flax.workdir import Workdir

_REDRAW = 0.1  # seconds between two drawings of the bar
_QUIET = 60.0  # seconds without a line before a long evaluation says how far it is
_DRAWING_SHARE = 0.05  # of the run's time that may go into redrawing curves.png


def duration(seconds: float) -> str:
  """'3:05' or '1:02:33'."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


def rate(per_second: float) -> str:
  """Three to four significant digits: '9.31', '93.1', '2,310', '12,350'."""
  if per_second < 99.95:
    return f'{per_second:.3g}'
  return f'{float(f"{per_second:.4g}"):,.0f}'


def describe_evaluation(record: Record) -> str:
  """One evaluation in words: 'test  loss 1.2345  top-1 71.20%  top-5 92.01%  of 10,000'."""
  picked = record.get('picked_on')
  return '  '.join(
    (
      record['split'],
      f'loss {record["loss"]:.4f}',
      f'top-1 {record["top1"]:6.2%}',
      f'top-5 {record["top5"]:6.2%}',
      f'of {record["examples"]:,}',
      *((f'(picked on the {picked} split, so optimistic)',) if picked else ()),
    )
  )


def _speed(done: int, total: int | None, since: float | None) -> list[str]:
  """In words, as far as it is known: '812/s', '0:08 left'."""
  seconds = time.monotonic() - since if since is not None else 0.0
  if not (done and seconds):
    return []
  left = [] if total is None else [f'{duration(seconds * (total - done) / done)} left']
  return [f'{rate(done / seconds)}/s', *left]


class Console:
  """Talks to stderr: one bar with lines above it on a terminal, plain lines elsewhere."""

  def __init__(self, enabled: bool = True):
    """`enabled` is False on all processes but the first: then nothing is ever printed."""
    self._enabled = enabled
    self.has_bar = enabled and sys.stderr.isatty()
    self._bar = None
    self._next_redraw = 0.0
    self._last_line = time.monotonic()

  def say(self, text: str) -> None:
    """Prints a line (or a table), above the bar where there is one."""
    if not self._enabled:
      return
    self._last_line = time.monotonic()
    if self._bar is None:
      print(text, file=sys.stderr, flush=True)
    else:
      tqdm.tqdm.write(text, file=sys.stderr)

  def due(self) -> bool:
    """Whether the bar may be drawn again: at most ten times a second, never without a terminal."""
    return self.has_bar and time.monotonic() >= self._next_redraw

  def show(self, done: int, total: int | None, parts: Sequence[str]) -> None:
    """Draws the bar at done/total; parts that find no room are left out, the last one stays.

    Of an unknown total there is no bar, only the parts.
    """
    if not self.has_bar:
      return
    self._next_redraw = time.monotonic() + _REDRAW
    columns = _columns()
    if self._bar is None:
      self._bar = tqdm.tqdm(total=1, file=sys.stderr, bar_format=' ', ncols=columns, nrows=20)
    # A bar of fixed length: one that filled the line would jump with every digit of the text.
    self._bar.bar_format = '{percentage:3.0f}% ' if total is not None else ''
    room = columns - 5
    if columns >= 100 and total is not None:
      self._bar.bar_format += '{bar:10}  '
      room -= 12
    parts = list(parts)
    while len(parts) > 2 and len('  '.join(parts)) > room:
      del parts[-2]
    self._bar.bar_format += '{desc}'
    self._bar.n, self._bar.total, self._bar.ncols = done, max(total or 1, 1), columns
    self._bar.set_description_str('  '.join(parts), refresh=False)
    self._bar.refresh()

  def evaluating(self, done: int, total: int) -> None:
    """Shows how many of the examples are evaluated; without a terminal at most once a minute."""
    self.working('evaluating', done, total)

  def working(self, doing: str, done: int, total: int | None, since: float | None = None) -> None:
    """Shows how much is done; without a terminal at most once a minute.

    Args:
      doing: what, as 'evaluating'.
      done: until now.
      total: in all; None: unknown.
      since: when it began, by `time.monotonic`; with it, speed and time left are shown too.
    """
    if self.has_bar:
      if self.due() or done == total:
        of = '' if total is None else f'/{total:,}'
        self.show(done, total, [f'{doing}  {done:,}{of}', *_speed(done, total, since)])
    elif self._enabled and time.monotonic() >= self._last_line + _QUIET:
      of = '' if total is None else f' of {total:,} ({done / total:.0%})'
      self.say(f'{doing}: {done:,}{of}')

  def close(self) -> None:
    """Leaves the bar as it is and goes to the next line."""
    if self._bar is not None:
      self._bar.close()
      self._bar = None


class Reporter:
  """Reports a training run; on all processes but the first its methods do nothing.

  Example:
    reporter = Reporter(workdir, total_steps=7800, stop_step=7800, steps_per_epoch=390.625,
                        start_step=0, enabled=jax.process_index() == 0, title='afi_resnet32')
    for step in range(1, 7801):
      ...
      reporter.progress(step)
    reporter.close()
    reporter.summary('test')
  """

  def __init__(
    self,
    workdir: Workdir,
    *,
    total_steps: int,
    stop_step: int,
    steps_per_epoch: float,
    start_step: int,
    enabled: bool,
    title: str = '',
    compiled: bool = False,
  ):
    """Opens a new event file and shows the bar.

    Args:
      workdir: the run's folder, its metrics already cut back to `start_step`.
      total_steps: the whole schedule's steps.
      stop_step: the step after which this run ends: total_steps or less.
      steps_per_epoch: need not be whole, as batches straddle epochs.
      start_step: the step restored from a checkpoint, or 0.
      enabled: whether this process reports.
      title: what is trained, written over the curves.
      compiled: whether the training step is compiled already, as after rolling back.
    """
    self._workdir = workdir
    self._total_steps = total_steps
    self._stop_step = stop_step
    self._steps_per_epoch = steps_per_epoch
    self._step = start_step
    self._enabled = enabled
    self._title = title
    self.console = Console(enabled)
    self._first_done: tuple[int, float] | None = None  # the first step of this run, and when
    self._results: list[str] = [] if compiled else ['compiling the first step']
    self._drawing_due = 0.0
    self._undrawn = False
    self._closed = False
    if enabled:
      with workdir.writing():
        self._events = event_file.EventFile(workdir.events_dir, purge_step=start_step + 1)
      self._draw_bar()

  def say(self, text: str) -> None:
    """Prints a line (or a table), above the bar where there is one."""
    self.console.say(text)

  def progress(self, step: int) -> None:
    """Call after every step: it takes note of the step and now and then moves the bar."""
    self._step = step
    if self._first_done is None:  # compiling is over: speed is measured from here
      self._first_done = (step, time.monotonic())
      self._results = []
    if self.console.due():
      self._draw_bar()

  def train(self, record: Record, learning_rate: float) -> None:
    """Reports the means over the steps since the last such record.

    Args:
      record: step, split 'train', loss, top1 and top5 (fractions), examples, images_per_second,
        and mfu (a fraction) where the devices' peak is known.
      learning_rate: that of the record's last step; it is stored with the record.
    """
    if not self._enabled:
      return
    record = {**record, 'learning_rate': learning_rate}
    self._store(record)
    loss = record['loss']
    self._results = [
      f'loss {f"{loss:.3f}" if loss < 10 else f"{loss:.4g}"}',
      f'top-1 {record["top1"]:5.1%}',
      f'lr {learning_rate:<8.3g}',
    ]
    if speed := record['images_per_second']:  # 0 where the run ended here before
      mfu = f'/s, MFU {record["mfu"]:.0%}' if 'mfu' in record else ' pictures/s'
      self._results.append(rate(speed).rjust(6) + mfu)
    if self.console.has_bar:
      self._draw_bar()
    else:
      self.say('  '.join(self._parts(record['step'])))

  def evaluation(self, record: Record) -> None:
    """Reports a whole split's evaluation: as `train`, with the name of the split in `split`."""
    if not self._enabled:
      return
    self._store(record)
    self.say('  '.join([*self._position(record['step']), describe_evaluation(record)]))
    self._draw_bar()  # where the evaluation's was

  def evaluating(self, done: int, total: int) -> None:
    """Shows how many examples of a split are evaluated so far."""
    self.console.evaluating(done, total)

  def draw_curves(self) -> None:
    """Brings curves.png up to date, or leaves it to a later call if that came too often.

    A drawing takes a fraction of a second, which a run that evaluates every few seconds would
    feel; so at most a twentieth of the time goes into it. `close` draws what was left out.
    """
    if not self._enabled:
      return
    self._undrawn = True
    start = time.monotonic()
    if start >= self._drawing_due:
      self._draw_curves()
      end = time.monotonic()
      self._drawing_due = end + (end - start) / _DRAWING_SHARE

  def close(self) -> None:
    """Closes the event file, finishes the bar and the curves. Calling it again does nothing."""
    if not self._enabled or self._closed:
      return
    self._closed = True
    self.console.close()
    with self._workdir.writing():
      self._events.close()
    if self._undrawn:
      self._draw_curves()

  def summary(self, split: str) -> None:
    """Prints to stdout what was reached, where the curves are and what to run next.

    Args:
      split: the evaluated split that is reported, on which the best checkpoint was picked.
    """
    if not self._enabled:
      return
    folder = shlex.quote(_shown(self._workdir.folder))
    print(self._reached(split))
    print(f'Curves: {_shown(self._workdir.shown(self._workdir.curves_path))}')
    print(f'Next: {_python()} -m afi_flax.main --mode=eval --workdir {folder}', flush=True)

  def _reached(self, split: str) -> str:
    start = ''
    if self._stop_step < self._total_steps:
      start = f'Ended by max_steps at step {self._stop_step} of {self._total_steps}: '
    records = [r for r in self._workdir.read_metrics() if r['split'] == split]
    if not records:
      return f'{start}{split} was not evaluated'
    last, best = records[-1], max(reversed(records), key=lambda r: r['top1'])
    text = f'{start}{split} top-1 {last["top1"]:.2%} ({last["examples"]:,} examples)'
    if best['top1'] <= last['top1']:
      return f'{text} at epoch {self._epoch(last):g}, its best'
    return (
      f'{text}, best {best["top1"]:.2%} at epoch {self._epoch(best):g} '
      f'(picked on the {split} split, so optimistic)'
    )

  def _epoch(self, record: Record) -> float:
    return round(record['step'] / self._steps_per_epoch, 2)

  def _store(self, record: Record) -> None:
    self._workdir.append_metrics(record)
    skipped = ('step', 'split', 'examples')
    scalars = {f'{record["split"]}/{k}': v for k, v in record.items() if k not in skipped}
    with self._workdir.writing():
      self._events.add(record['step'], scalars)

  def _draw_curves(self) -> None:
    self._undrawn = False
    records = self._workdir.read_metrics()
    with self._workdir.writing():
      curves.draw(records, self._workdir.curves_path, self._steps_per_epoch, self._title)

  def _draw_bar(self) -> None:
    self.console.show(self._step, self._stop_step, self._parts(self._step))

  def _position(self, step: int) -> list[str]:
    width = len(f'{self._total_steps / self._steps_per_epoch:.2f}')
    return [
      f'{step:>{len(str(self._stop_step))}}/{self._stop_step}',
      f'epoch {step / self._steps_per_epoch:{width}.2f}',
    ]

  def _parts(self, step: int) -> list[str]:
    return [*self._position(step), *self._results, *self._time_left(step)]

  def _time_left(self, step: int) -> list[str]:
    """At the mean speed since compiling, evaluations included: they will come again."""
    if self._first_done is None or step <= self._first_done[0]:
      return []
    first, since = self._first_done
    seconds = (time.monotonic() - since) / (step - first) * (self._stop_step - step)
    return [f'{duration(seconds)} left']


def _columns() -> int:
  """Of the terminal, but for the last one; some that are not on a screen say that they have 0."""
  try:
    return (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1
  except OSError:
    return 79


def _python() -> str:
  """What to type for this interpreter: its path where `python` is another one."""
  found = shutil.which('python')
  same = found and os.path.abspath(found) == os.path.abspath(sys.executable)
  return 'python' if same else shlex.quote(_shown(sys.executable))


def _shown(path: str | os.PathLike) -> str:
  """The path as one would type it here."""
  if '://' in os.fspath(path):
    return os.fspath(path)
  path = pathlib.Path(path).absolute()
  here = pathlib.Path.cwd()
  return str(path.relative_to(here) if path.is_relative_to(here) else path)
