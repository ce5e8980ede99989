"""How good a network is, drawn: generalisation gap, confusions, classes, calibration.

Figures are of one run or of two, as {label: Examination} with the baseline first and the run last.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch

from afi_flax.analysis import quality, style
from afi_flax.analysis.examine import Examination

Runs = Mapping[str, Examination]
Pair = tuple[int, int]  # true class, predicted class

FEW_CLASSES = 20  # up to which each has its row in a figure
_PAIRS = 20  # confused pairs in a figure
_EXTREMES = 12  # best and worst classes in a figure
_NAME = 22  # letters of a class name
_LEAST_SHOWN = 10.0  # points of an axis, so that small differences look small


def gap(runs: Runs) -> Figure:
  """Training and evaluation accuracy of each run, and what lies between them."""
  known = {label: run for label, run in runs.items() if run.train_top1 is not None}
  fig = style.new(6.0, 0.95 + 0.62 * len(known))
  style.title(fig, 'Generalisation gap')
  panel = fig.subplots()
  style.axes(panel, grid='x')
  for y, (run, colour) in enumerate(zip(known.values(), style.colours(runs), strict=False)):
    train, test = 100 * run.train_top1, 100 * run.top1
    panel.plot([test, train], [y, y], color=colour, linewidth=3, alpha=0.45)
    panel.plot(train, y, 'o', color=colour, markersize=7, fillstyle='none', markeredgewidth=1.6)
    panel.plot(test, y, 'o', color=colour, markersize=7)
    words = f'{test:.2f}%, training {train:.2f}%: {gap_in_words(run)}'
    across = panel.get_yaxis_transform()
    panel.text(0.02, y - 0.24, words, fontsize=8.5, color=style.INK, transform=across)
  panel.set_yticks(range(len(known)), labels=[style.short(n, 30) for n in known], parse_math=False)
  panel.set_ylim(len(known) - 0.6, -0.6)
  seen = 100 * np.array([(run.top1, run.train_top1) for run in known.values()])
  style.per_cent(panel, seen, _LEAST_SHOWN)
  split = next(iter(known.values())).split
  panel.set_xlabel(f'top-1 accuracy: filled {style.short(split, 30)}, open training')
  return fig


def gap_interval(run: Examination) -> tuple[float, float]:
  """Of training minus evaluation accuracy, with 95% confidence."""
  return quality.difference_interval(run.train_top1, run.train_examples, run.top1, run.examples)


def gap_in_words(run: Examination) -> str:
  """'+1.20 points (−0.3 to +2.7)'."""
  low, high = gap_interval(run)
  points = 100 * (run.train_top1 - run.top1)
  return f'{points:+.2f} points ({100 * low:+.1f} to {100 * high:+.1f})'.replace('-', '−')


def confusion(runs: Runs) -> Figure:
  """The matrix with its numbers, or, of many classes, as a picture beside its largest pairs."""
  if len(next(iter(runs.values())).class_names) <= FEW_CLASSES:
    return _small_matrices(runs)
  fig = style.new(style.WIDTH + 1, 5.0)
  left, right = fig.subplots(1, 2, width_ratios=(1.15, 1))
  label, run = list(runs.items())[-1]
  style.title(fig, f'Confusions, {style.short(label, 60)}')
  _large_matrix(fig, left, run)
  _pair_bars(fig, right, runs)
  return fig


def confused_pairs(run: Examination, most: int | None = None) -> list[tuple[Pair, int]]:
  """Classes that are taken for others: ((true, predicted), how often), the most frequent first."""
  wrong = run.confusion - np.diag(np.diag(run.confusion))
  true, predicted = np.nonzero(wrong)
  counts = wrong[true, predicted]
  order = np.argsort(-counts, kind='stable')[:most]
  return [((int(true[k]), int(predicted[k])), int(counts[k])) for k in order]


def class_accuracies(run: Examination) -> np.ndarray:
  """f64 [K]; NaN for a class that has no example."""
  totals = run.confusion.sum(axis=1)
  return np.divide(
    np.diag(run.confusion), totals, out=np.full(len(totals), np.nan), where=totals > 0
  )


def order_of_likeness(confusion: np.ndarray) -> np.ndarray:
  """The classes so that those which are taken for each other stand together.

  They are sorted by the Fiedler vector of the confusions' normalised Laplacian (Shi and Malik,
  "Normalized Cuts and Image Segmentation", 2000).

  Args:
    confusion: i64 [K,K].

  Returns:
    i64 [K], a permutation.
  """
  wrong = confusion - np.diag(np.diag(confusion))
  like = (wrong + wrong.T) + 1e-3 * max(wrong.mean(), 1e-9)  # or parts would not hang together
  np.fill_diagonal(like, 0)
  scale = 1 / np.sqrt(like.sum(axis=1))
  vectors = np.linalg.eigh(np.eye(len(like)) - scale[:, None] * like * scale)[1]
  return np.argsort(vectors[:, 1] * scale, kind='stable')


def per_class(runs: Runs) -> Figure:
  """The accuracy of every class, or, of many, of the worst and the best."""
  label, run = list(runs.items())[-1]
  accuracy = class_accuracies(run)
  order = np.argsort(accuracy, kind='stable')[: np.isfinite(accuracy).sum()]
  if len(order) <= 2 * _EXTREMES:
    fig = style.new(6.0, 1.2 + 0.2 * len(order))
    _dumbbells(fig.subplots(), runs, order[::-1], '')
  else:
    fig = style.new(style.WIDTH, 4.4)
    curves, worst, best = fig.subplots(1, 3, width_ratios=(1.15, 1, 1))
    _sorted_curves(curves, runs)
    _dumbbells(
      worst, runs, order[:_EXTREMES][::-1], f'{_EXTREMES} lowest of {style.short(label, 24)}'
    )
    _dumbbells(
      best, runs, order[-_EXTREMES:][::-1], f'{_EXTREMES} highest of {style.short(label, 24)}'
    )
  style.title(fig, 'Accuracy of each class')
  handles = [Patch(facecolor=colour) for colour in style.colours(runs)]
  style.legend(fig, handles, list(runs))
  return fig


def reliability(runs: Runs) -> Figure:
  """Accuracy over confidence, with how many predictions there are of each confidence."""
  fig = style.new(4.3 * len(runs) if len(runs) > 1 else 4.6, 4.6)
  style.title(fig, 'Reliability')
  panels = fig.subplots(
    2, len(runs), height_ratios=(3, 1), sharex=True, sharey='row', squeeze=False
  )
  for (upper, lower), (label, run), colour in zip(
    panels.T, runs.items(), style.colours(runs), strict=True
  ):
    _calibration(upper, run, colour)
    style.axes(
      upper,
      f'{style.short(label, 32)}\nECE {100 * run.reliability.ece:.2f}%, NLL {run.nll:.3f} nats',
    )
    style.axes(lower)
    lower.stairs(
      run.reliability.count, 100 * run.reliability.edges, fill=True, color=colour, alpha=0.6
    )
    lower.set_xlabel('confidence')
    lower.xaxis.set_major_formatter('{x:g}%')
  panels[0, 0].set_ylabel('accuracy')
  panels[0, 0].yaxis.set_major_formatter('{x:g}%')
  panels[1, 0].set_ylabel('predictions')
  return fig


def _small_matrices(runs: Runs) -> Figure:
  """One a run, with its counts; colours are shares of the true class."""
  names = [style.short(name, _NAME) for name in next(iter(runs.values())).class_names]
  side = 1.3 + 0.27 * len(names)
  fig = style.new(max(4.0, side) * len(runs) + 0.4, max(4.0, side) + 0.5)
  style.title(fig, 'Confusions')
  panels = fig.subplots(1, len(runs), squeeze=False)[0]
  for panel, (label, run) in zip(panels, runs.items(), strict=True):
    totals = run.confusion.sum(axis=1, keepdims=True)
    share = run.confusion / np.maximum(totals, 1)
    image = panel.imshow(100 * share, cmap=style.HEAT, vmin=0, vmax=100)
    for y, x in zip(*np.nonzero(run.confusion), strict=True):
      panel.text(
        x, y, str(run.confusion[y, x]), ha='center', va='center', fontsize=6.5,
        color='white' if share[y, x] < 0.6 else style.INK,
      )  # fmt: skip
    style.axes(panel, style.short(label, 32), grid='')
    panel.spines[['left', 'bottom']].set_visible(False)
    panel.tick_params(length=0, labelsize=7.5)
    panel.set_xticks(range(len(names)), labels=names, rotation=90, parse_math=False)
    panel.set_yticks(range(len(names)), labels=names, parse_math=False)
    panel.set_xlabel('predicted')
    panel.set_ylabel('true')
  _bar(fig, image, panels, 'share of the true class', 'neither')
  return fig


def _bar(fig: Figure, image: AxesImage, panels: Any, words: str, extend: str) -> None:
  bar = fig.colorbar(
    image, ax=panels, shrink=0.7, aspect=30, pad=0.02, format='{x:g}%', extend=extend
  )
  bar.set_label(words, fontsize=8.5, color=style.INK)
  bar.ax.tick_params(labelsize=7.5)
  bar.outline.set_visible(False)


def _large_matrix(fig: Figure, panel: Axes, run: Examination) -> None:
  """Shares of the true class; classes that are taken for each other stand together."""
  order = order_of_likeness(run.confusion)
  share = 100 * run.confusion / np.maximum(run.confusion.sum(axis=1, keepdims=True), 1)
  wrong = share - np.diag(np.diag(share))
  most = max(wrong.max(), 1.0)
  norm = PowerNorm(0.5, 0, most)  # or all but the diagonal would be dark
  shown = share[order][:, order]
  image = panel.imshow(shown, cmap=style.HEAT, norm=norm)
  style.axes(panel, f'{len(order)} classes, like ones together', grid='')
  panel.spines[['left', 'bottom']].set_visible(False)
  panel.set_xticks([])
  panel.set_yticks([])
  panel.set_xlabel('predicted')
  panel.set_ylabel('true')
  extend = 'max' if shown.max() > most else 'neither'
  _bar(fig, image, panel, 'share of the true class', extend)


def _pair_bars(fig: Figure, panel: Axes, runs: Runs) -> None:
  """How often the run's most confused pairs are confused, by each run."""
  run = list(runs.values())[-1]
  pairs = [pair for pair, _ in confused_pairs(run, _PAIRS)]
  names = run.class_names
  style.axes(panel, 'most confused: true → predicted', grid='x')
  height = 0.8 / len(runs)
  for k, (each, colour) in enumerate(zip(runs.values(), style.colours(runs), strict=True)):
    shift = (k - (len(runs) - 1) / 2) * height
    counts = [each.confusion[pair] for pair in pairs]
    panel.barh(np.arange(len(pairs)) + shift, counts, height, color=colour, alpha=0.8)
  labels = [f'{style.short(names[t], 18)} → {style.short(names[p], 18)}' for t, p in pairs]
  panel.set_yticks(range(len(pairs)), labels=labels, parse_math=False)
  panel.tick_params(axis='y', length=0, labelsize=7)
  panel.invert_yaxis()
  panel.set_xlabel('examples')
  panel.xaxis.get_major_locator().set_params(integer=True)
  if len(runs) > 1:
    style.legend(fig, [Patch(facecolor=colour) for colour in style.colours(runs)], list(runs))


def _sorted_curves(panel: Axes, runs: Runs) -> None:
  """All classes from the worst to the best, each run's in its own order."""
  looks = zip(runs.values(), style.colours(runs), style.DASHES[-len(runs) :], strict=True)
  for run, colour, dash in looks:
    accuracy = np.sort(class_accuracies(run))
    accuracy = accuracy[np.isfinite(accuracy)]
    panel.plot(np.arange(1, len(accuracy) + 1), 100 * accuracy, color=colour, linestyle=dash)
  style.axes(panel, 'all classes')
  panel.set_xlabel("classes, each run's from worst to best")
  panel.set_ylim(0, 101)
  panel.yaxis.set_major_formatter('{x:g}%')


def _dumbbells(panel: Axes, runs: Runs, order: Sequence[int], words: str) -> None:
  """A row a class: one dot a run, the first class at the bottom."""
  style.axes(panel, words, grid='x')
  every = np.array([100 * class_accuracies(run)[order] for run in runs.values()])
  rows = np.arange(len(order))
  if len(runs) > 1:
    panel.hlines(rows, every.min(axis=0), every.max(axis=0), color=style.GREY, linewidth=1)
  for values, colour in zip(every, style.colours(runs), strict=True):
    panel.plot(values, rows, 'o', color=colour, markersize=5)
  names = next(iter(runs.values())).class_names
  labels = [style.short(names[k], _NAME) for k in order]
  panel.set_yticks(rows, labels=labels, parse_math=False)
  panel.tick_params(axis='y', length=0, labelsize=7.5)
  panel.set_ylim(-0.7, len(order) - 0.3)
  panel.set_xlabel('accuracy')
  style.per_cent(panel, every[np.isfinite(every)], _LEAST_SHOWN)


def _calibration(panel: Axes, run: Examination, colour: str) -> None:
  """Bars of accuracy; what is lacking to the confidence is hatched."""
  found = run.reliability
  edges, there = 100 * found.edges, found.count > 0
  middle, width = (edges[1:] + edges[:-1])[there] / 2, np.diff(edges)[there]
  accuracy, confidence = 100 * found.accuracy[there], 100 * found.confidence[there]
  panel.bar(middle, accuracy, 0.94 * width, color=colour, alpha=0.6)
  panel.bar(
    middle, confidence - accuracy, 0.94 * width, accuracy, color='none', edgecolor=style.INK,
    linewidth=0.5, hatch='////', alpha=0.6,
  )  # fmt: skip
  panel.plot([0, 100], [0, 100], color=style.GREY, linewidth=1, linestyle=':')
  panel.set(xlim=(0, 100), ylim=(0, 100))
