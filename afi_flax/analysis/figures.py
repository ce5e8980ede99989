"""What a network does inside, drawn: class selectivity and the fusion weights of AFI.

Figures are of one run or of two, as {label: Examination} with the baseline first and the run last.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from afi_flax.analysis import style
from afi_flax.analysis.examine import Examination, Reuse

Runs = Mapping[str, Examination]

_FEW = 32  # channels, up to which a histogram has wide bins
_MOST_NUMBERED = 20  # sources, up to which a heat map has its numbers in its cells
_LEAST_UNEVEN = math.log2(1.5)  # of the colours' scale, so that noise is not made to shine


def place(block: str) -> tuple[int, int]:
  """Stage and block, from 1, of a block's name.

  >>> place('stage2_block10')
  (2, 10)
  """
  stage, number = map(int, re.findall(r'\d+', block)[:2])
  return stage, number


def by_stage(blocks: Iterable[str]) -> dict[int, list[str]]:
  """The blocks of every stage, in the network's order.

  >>> by_stage(['stage2_block3', 'stage1_block2', 'stage1_block10', 'stage1_block2'])
  {1: ['stage1_block2', 'stage1_block10'], 2: ['stage2_block3']}
  """
  found = itertools.groupby(sorted(set(blocks), key=place), lambda block: place(block)[0])
  return {stage: list(names) for stage, names in found}


def selectivity(runs: Runs, stage: int) -> Figure:
  """Figure 4 of the paper for one stage: a histogram of the class selectivity index a block."""
  blocks = by_stage(itertools.chain(*(run.selectivity for run in runs.values())))[stage]
  columns = len(blocks)
  if columns > 4:
    columns = min((4, 5, 3), key=lambda n: -len(blocks) % n)  # the fewest empty places
  rows = math.ceil(len(blocks) / columns)
  fig = style.new(max(style.WIDTH * columns / 4, 5.0), 1.75 * rows + 1.1)
  style.title(fig, f'Class selectivity of channels, stage {stage}')
  panels = fig.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
  for k, panel in enumerate(panels.flat):
    if k >= len(blocks):
      panel.remove()
      continue
    values = [run.selectivity.get(blocks[k]) for run in runs.values()]
    _histogram(panel, f'block {place(blocks[k])[1]}', values)
    if k + columns >= len(blocks):  # the last one of its column
      panel.tick_params(labelbottom=True)
      panel.set_xlabel('class selectivity index')
    if k % columns == 0:
      panel.set_ylabel('channels')
      panel.yaxis.set_major_formatter('{x:g}%')
  panels[0, 0].set_ylim(0, 1.3 * panels[0, 0].get_ylim()[1])  # room for the means
  handles = [Patch(facecolor=colour, alpha=0.6) for colour in style.colours(runs)]
  style.legend(fig, handles, list(runs))
  return fig


def _histogram(panel: Axes, words: str, values: list[np.ndarray | None]) -> None:
  """Of one block: per cent of each run's living channels, the mean as a line and in words."""
  style.axes(panel, words)
  most = max(v.size for v in values if v is not None)
  edges = np.linspace(0, 1, (10 if most <= _FEW else 20) + 1)
  panel.set_xlim(0, 1)
  panel.set_xticks([0, 0.5, 1], labels=['0', '0.5', '1'])
  lines = zip(values, style.colours(values), style.DASHES[-len(values) :], strict=True)
  top = 0.97
  for value, colour, dash in lines:
    if value is None:
      continue
    living = value[~np.isnan(value)]
    if living.size:
      share = 100 * np.histogram(living, edges)[0] / living.size
      panel.stairs(share, edges, fill=True, color=colour, alpha=0.35)
      panel.stairs(share, edges, color=colour, linewidth=1.1)
      panel.axvline(living.mean(), ymax=0.78, color=colour, linewidth=1.3, linestyle=dash)
    panel.text(
      0.97, top, _mean_in_words(value), color=colour, fontsize=7.5, ha='right', va='top',
      transform=panel.transAxes,
    )  # fmt: skip
    top -= 0.11


def _mean_in_words(value: np.ndarray) -> str:
  dead = int(np.isnan(value).sum())
  if dead == value.size:
    return f'all {dead} dead'
  return f'mean {np.nanmean(value):.3f}' + (f', {dead} of {value.size} dead' if dead else '')


def selectivity_by_depth(runs: Runs) -> Figure:
  """The mean of every block, and between which values the middle half of its channels is."""
  stages = by_stage(itertools.chain(*(run.selectivity for run in runs.values())))
  blocks = list(itertools.chain(*stages.values()))
  fig = style.new(style.WIDTH, 3.2)
  style.title(fig, 'Class selectivity by depth')
  panel = fig.subplots()
  style.axes(panel)
  shifts = (-0.12, 0.12) if len(runs) > 1 else (0.0,)
  looks = [
    {'color': colour, 'linestyle': dash, 'marker': 'o', 'markersize': 3.5}
    for colour, dash in zip(style.colours(runs), style.DASHES[-len(runs) :], strict=True)
  ]
  for run, look, shift in zip(runs.values(), looks, shifts, strict=True):
    for names in stages.values():
      there = [(blocks.index(b) + shift, v) for b in names if (v := _quartiles(run, b))]
      if there:
        x, values = zip(*there, strict=True)
        low, high, mean = np.array(values).T
        panel.vlines(x, low, high, color=look['color'], alpha=0.35, linewidth=3)
        panel.plot(x, mean, **look)
  _mark_stages(panel, stages)
  panel.set_xticks(range(len(blocks)), labels=[str(place(b)[1]) for b in blocks])
  if len(blocks) > 40:
    panel.tick_params(axis='x', labelsize=5.5)
  panel.set_xlabel('block')
  panel.set_ylabel('class selectivity index')
  panel.set_ylim(bottom=0)
  style.legend(fig, [Line2D([], [], **look) for look in looks], list(runs))
  return fig


def _quartiles(run: Examination, block: str) -> tuple[float, float, float] | None:
  """Of the living channels: 25%, 75% and the mean."""
  value = run.selectivity.get(block)
  if value is None or np.isnan(value).all():
    return None
  return (*np.nanquantile(value, [0.25, 0.75]), np.nanmean(value))


def _mark_stages(panel: Axes, stages: Mapping[int, list[str]]) -> None:
  """Lines between the stages, and their names over them."""
  first = 0
  for stage, names in stages.items():
    if first:
      panel.axvline(first - 0.5, color=style.GREY, linewidth=0.8)
    panel.text(
      first + (len(names) - 1) / 2, 1.02, f'stage {stage}', ha='center', fontsize=8.5,
      color=style.INK, transform=panel.get_xaxis_transform(),
    )  # fmt: skip
    first += len(names)
  panel.set_xlim(-0.6, first - 0.4)


def reuse(label: str, run: Examination) -> Figure:
  """What AFI reuses: the mean fusion weight of every block and source, its spread, its entropy."""
  stages = by_stage(run.reuse)
  heights = [len(blocks) for blocks in stages.values()]
  cell = 0.34 if max(heights) <= 6 else 0.26 if max(heights) <= _MOST_NUMBERED else 0.14
  fig = style.new(style.WIDTH, cell * sum(heights) + 0.75 * len(stages) + 1.15)
  style.title(fig, f'What AFI reuses, {label}')
  ratios = {'height_ratios': [n + 1.2 for n in heights], 'width_ratios': (5, 5, 2.2)}
  panels = fig.subplots(len(stages), 3, squeeze=False, **ratios)
  choices = [each for each in run.reuse.values() if len(each.sources) > 1]
  uneven = max([_LEAST_UNEVEN, *(np.abs(_preference(each)).max() for each in choices)])
  widest = max([1e-3, *(each.spread.max() for each in choices)])
  for row, (stage, blocks) in zip(panels, stages.items(), strict=True):
    reuses = [run.reuse[block] for block in blocks]
    rows = [f'block {place(block)[1]}' for block in blocks]
    weights = _cells(row[0], reuses, _preference, style.BALANCE, (-uneven, uneven))
    spreads = _cells(row[1], reuses, lambda each: each.spread, style.HEAT, (0, widest))
    far = [np.abs(_preference(each)) > 0.7 * uneven for each in reuses]
    _numbers(row[0], [each.mean for each in reuses], far, 2)
    of_choice = [each.spread if len(each.sources) > 1 else np.array([]) for each in reuses]
    digits = 3 if widest > 0.01 else 4
    _numbers(row[1], of_choice, [spread < 0.6 * widest for spread in of_choice], digits)
    for panel, name in zip(row, ('mean weight', 'spread over classes'), strict=False):
      style.axes(panel, f'stage {stage}: {name}', grid='')
      panel.spines[['left', 'bottom']].set_visible(False)
      panel.set_yticks(range(len(blocks)), labels=rows)
    _entropies(row[2], reuses)
  for panel, name in zip(panels[-1], ('source: block',) * 2 + ('entropy / log N',), strict=True):
    panel.set_xlabel(name)
  times = np.array([2.0**-uneven, 1, 2.0**uneven])
  bar = _bar(fig, weights, panels[:, 0], 'colour: mean s~ relative to even weights, 1/N')
  bar.set_ticks(np.log2(times), labels=[f'{t:.2g}×' for t in times])
  _bar(fig, spreads, panels[:, 1], "deviation of the classes' means")
  return fig


def _preference(reuse: Reuse) -> np.ndarray:
  """How many times its even share a source has, as a power of 2: 0 where it is even."""
  return np.log2(np.maximum(reuse.mean * len(reuse.sources), 2.0**-8))


def _cells(
  panel: Axes,
  reuses: list[Reuse],
  of: Callable[[Reuse], np.ndarray],
  colours: str,
  limits: tuple[float, float],
) -> AxesImage:
  """Blocks by sources; a block with one source has nothing to choose, and is hatched."""
  sources = max(reuses, key=lambda each: len(each.sources)).sources
  table = np.full((len(reuses), len(sources)), np.nan)
  for y, (row, each) in enumerate(zip(table, reuses, strict=True)):
    look = {'fill': False}
    if len(each.sources) > 1:
      row[: len(each.sources)] = of(each)
    else:
      look = {'facecolor': 'white', 'hatch': '////'}
    for x in range(len(each.sources)):
      panel.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, edgecolor=style.PALE, **look))
  low, high = limits
  image = panel.imshow(table, cmap=colours, vmin=low, vmax=high, aspect='auto')
  every = math.ceil(len(sources) / 12)
  names = [str(place(source)[1]) for source in sources]
  panel.set_xticks(range(0, len(sources), every), labels=names[::every])
  panel.tick_params(length=0)
  return image


def _numbers(
  panel: Axes, rows: Sequence[np.ndarray], dark: Sequence[np.ndarray], digits: int
) -> None:
  """Written into the cells, where there is room; white where these are dark."""
  longest = max(map(len, rows))
  if longest > _MOST_NUMBERED:
    return
  for y, row in enumerate(rows):
    for x, value in enumerate(row):
      words = f'{value:.{digits}f}'
      panel.text(
        x, y, words if longest <= 8 else words.removeprefix('0'), ha='center', va='center',
        fontsize=7.5 if longest <= 8 else 4.5, color='white' if dark[y][x] else style.INK,
      )  # fmt: skip


def _bar(fig: Figure, image: AxesImage, panels: np.ndarray, words: str) -> Colorbar:
  """What the colours of a column mean, under it."""
  bar = fig.colorbar(image, ax=panels, location='bottom', aspect=40, pad=0.02)
  bar.set_label(words, fontsize=8.5, color=style.INK)
  bar.ax.tick_params(labelsize=7.5)
  bar.outline.set_visible(False)
  return bar


def _entropies(panel: Axes, reuses: list[Reuse]) -> None:
  """Bars up to 1, where all sources weigh the same."""
  style.axes(panel, 'evenness', grid='')
  for y, each in enumerate(reuses):
    if math.isnan(each.entropy):
      panel.text(0.03, y, 'one source', fontsize=7, va='center', color=style.GREY)
      continue
    panel.barh(y, each.entropy, height=0.62, color=style.COLOURS[1], alpha=0.75)
    if len(reuses) <= _MOST_NUMBERED:
      words = f'{each.entropy:.3f}'
      panel.text(0.04, y, words, fontsize=7, va='center', color='white')
  panel.axvline(1, color=style.GREY, linewidth=0.8)
  panel.set_xlim(0, 1.02)
  panel.set_ylim(len(reuses) - 0.5, -0.5)
  panel.set_xticks([0, 0.5, 1], labels=['0', '0.5', '1'])
  panel.set_yticks([])
