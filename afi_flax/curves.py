"""Learning curves: loss and top-1 accuracy over epochs, in a PNG file."""

import itertools
import os
import pathlib
from typing import Any

import numpy as np

Record = dict[str, Any]  # one line of metrics.jsonl

_SMOOTHED_FROM = 200  # points of a curve, above which a running mean is drawn over it
_COLOURS = ('#4C78A8', '#E4572E', '#54A24B', '#B279A2', '#9D755D')  # train, then evaluated splits
_GREY = '#8A8F98'


def draw(
  records: list[Record], path: str | os.PathLike, steps_per_epoch: float, title: str = ''
) -> None:
  """Draws loss and top-1 accuracy over epochs into a PNG file, which is replaced atomically.

  Args:
    records: lines of metrics.jsonl in the order of their steps; none draws nothing.
    path: the PNG file.
    steps_per_epoch: scales the horizontal axis.
    title: what was trained.
  """
  from matplotlib import figure  # a second, which only a process that draws should pay

  if not records:
    return
  splits = sorted({r['split']: None for r in records}, key=lambda split: split != 'train')
  fig = figure.Figure(figsize=(10, 3.8), dpi=150, layout='constrained', facecolor='white')
  fig.get_layout_engine().set(w_pad=0.08, h_pad=0.06, wspace=0.03)
  loss_axes, top1_axes = fig.subplots(1, 2)
  epochs, losses, top1 = {}, {}, {}
  for split in splits:
    own = [r for r in records if r['split'] == split]
    epochs[split] = np.array([r['step'] for r in own]) / steps_per_epoch
    losses[split] = np.array([r['loss'] for r in own], float)
    top1[split] = np.array([r['top1'] for r in own], float) * 100
  top1_axes.yaxis.set_major_formatter('{x:g}%')
  drops = [(step / steps_per_epoch, lr) for step, lr in _learning_rate_drops(records)]
  _draw_panel(loss_axes, 'loss', epochs, losses, drops, best=np.nanargmin, form='{:.3f}')
  _draw_panel(top1_axes, 'top-1 accuracy', epochs, top1, drops, best=np.nanargmax, form='{:.1f}%')
  for epoch, lr in drops:
    loss_axes.annotate(
      f'lr {lr:.3g}',
      (epoch, 1),
      xycoords=('data', 'axes fraction'),
      xytext=(3, -3),
      textcoords='offset points',
      va='top',
      fontsize=7,
      color=_GREY,
    )
  if title:
    fig.suptitle(title, fontsize=11, fontweight='bold', parse_math=False)
  path = pathlib.Path(path)
  unfinished = path.with_name(path.name + '.tmp')
  fig.savefig(unfinished, format='png')
  unfinished.replace(path)


def _draw_panel(axes, name, epochs, values, drops, *, best, form) -> None:
  """Draws one curve per split, with its last and best values written to the right of it."""
  axes.set_title(name, loc='left', fontsize=10, color='#333333')
  axes.set_xlabel('epoch', fontsize=9, color='#333333')
  axes.tick_params(labelsize=8, color=_GREY, labelcolor='#333333')
  axes.spines[['top', 'right']].set_visible(False)
  axes.spines[['left', 'bottom']].set_color(_GREY)
  axes.grid(axis='y', color='#EAECEF', linewidth=0.8)
  axes.set_axisbelow(True)
  for epoch, _ in drops:
    axes.axvline(epoch, color=_GREY, linewidth=0.7, dashes=(2, 3), zorder=0.9)
  labels = []
  for (split, y), colour in zip(values.items(), itertools.cycle(_COLOURS), strict=False):
    x = epochs[split]
    if split == 'train' and len(y) > _SMOOTHED_FROM:
      axes.plot(x, y, color=colour, linewidth=0.6, alpha=0.3)
      y = _smooth(y)
    marker = 'o' if len(y) == 1 or (split != 'train' and len(y) <= 40) else None
    axes.plot(x, y, color=colour, linewidth=1.6, marker=marker, markersize=3.5)
    text = f'{split} {form.format(y[-1])}'
    if split != 'train' and np.isfinite(y).any():
      k = len(y) - 1 - best(y[::-1])  # the last of equals, which is the one that is kept
      axes.plot(x[k], y[k], 'o', markersize=7, color=colour, fillstyle='none', clip_on=False)
      if k == len(y) - 1:
        text += ' (best)'
      else:
        text += f'\nbest {form.format(y[k])}, epoch {round(x[k], 1):g}'
    labels.append((y[-1], text, colour))
  _limit(axes, epochs.values(), values.values())
  _write_labels(axes, labels)


def _limit(axes, epochs, values) -> None:
  """Shows all from epoch 0 on, but for the few values that would flatten all others."""
  axes.set_xlim(0, 1.01 * max(x[-1] for x in epochs))
  y = np.concatenate(list(values))
  y = y[np.isfinite(y)]
  if not y.size:
    return
  if y.max() > 4 * (usual := np.quantile(y, 0.95)) > 0:
    axes.set_ylim(top=2 * usual)
  if y.size == 1 or y.min() <= y.max() / 2:
    axes.set_ylim(bottom=0)


def _write_labels(axes, labels: list[tuple[float, str, str]]) -> None:
  """Writes (value, text, colour) to the right of the axes at the height of the value, no two
  over each other."""
  low, high = axes.get_ylim()
  line = 0.052  # of the axes' height
  heights = [line * (1 + text.count('\n')) + 0.01 for _, text, _ in labels]
  order = sorted(range(len(labels)), key=lambda i: labels[i][0])
  middles = [0.0] * len(labels)
  free = 0.0
  for i in order:  # upwards, each above the one below
    value = min(1.0, max(0.0, (labels[i][0] - low) / (high - low)))  # NaN is put at the bottom
    middles[i] = max(value, free + heights[i] / 2)
    free = middles[i] + heights[i] / 2
  free = 1.0
  for i in reversed(order):  # and back down from the top
    middles[i] = min(middles[i], free - heights[i] / 2)
    free = middles[i] - heights[i] / 2
  for (_, text, colour), middle in zip(labels, middles, strict=True):
    axes.text(1.015, middle, text, color=colour, fontsize=8, va='center', transform=axes.transAxes)


def _smooth(y: np.ndarray) -> np.ndarray:
  """The running mean over a hundredth of the points; values that are not finite do not count."""
  window = np.ones(len(y) // 100 | 1)
  finite = np.isfinite(y)
  total = np.convolve(np.where(finite, y, 0), window, 'same')
  count = np.convolve(finite.astype(float), window, 'same')
  return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _learning_rate_drops(records: list[Record]) -> list[tuple[int, float]]:
  """(step, new learning rate) where a constant learning rate falls, as in a step schedule."""
  points = [(r['step'], r['learning_rate']) for r in records if 'learning_rate' in r]
  drops = []
  for (_, before), (step, old), (_, new) in zip(points, points[1:], points[2:], strict=False):
    if before == old and new < old / 1.5:
      drops.append((step, new))
  return drops
