"""The looks that the figures of a run share: colours, axes, names of classes, PNG bytes."""

import functools
import io
import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib import font_manager, text
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from afi_flax.errors import shown

# The baseline's and the run's, as in the learning curves; told apart by colour-blind readers too.
COLOURS = ('#4C78A8', '#E4572E')
DASHES = ('--', '-')
INK, GREY, PALE = '#333333', '#8A8F98', '#EAECEF'
HEAT = 'viridis'  # equal steps look equal, in grey too
BALANCE = 'PuOr'  # less and more than even, for colour-blind readers too
OVERLAY = 'inferno'  # likewise; from black, so that what is cold stays in the dark
WIDTH = 8.0  # inches, of most figures
DPI = 150
_WIDER = (  # for class names in other scripts, where such a font is there
  'Noto Sans CJK JP', 'Noto Sans CJK SC', 'WenQuanYi Zen Hei', 'Hiragino Sans', 'PingFang SC',
  'Microsoft YaHei', 'Arial Unicode MS', 'Noto Sans Arabic', 'Noto Sans Devanagari',
)  # fmt: skip


def colours(runs: Sequence) -> tuple[str, ...]:
  """One for each of one or two runs: the last one is always the run, in its colour."""
  return COLOURS[-len(runs) :]


def new(width: float, height: float) -> Figure:
  """A white figure, inches, that lays itself out."""
  fig = Figure(figsize=(width, height), dpi=DPI, layout='constrained', facecolor='white')
  fig.get_layout_engine().set(w_pad=0.06, h_pad=0.06, wspace=0.03, hspace=0.03)
  return fig


def title(fig: Figure, words: str, y: float | None = None) -> None:
  """Over the whole figure, on one line; `y` is its top, of the height, where no layout sets it."""
  fig.suptitle(short(words, 110), y=y, fontsize=11, fontweight='bold', color=INK, parse_math=False)


def axes(panel: Axes, words: str = '', grid: str = 'y') -> None:
  """The looks of the learning curves; `grid` is 'x', 'y', 'both' or ''."""
  panel.set_title(words, loc='left', fontsize=9.5, color=INK, parse_math=False)
  panel.tick_params(labelsize=8, color=GREY, labelcolor=INK)
  panel.spines[['top', 'right']].set_visible(False)
  panel.spines[['left', 'bottom']].set_color(GREY)
  for side in (panel.xaxis, panel.yaxis):
    side.label.set(fontsize=8.5, color=INK)
  if grid:
    panel.grid(axis=grid, color=PALE, linewidth=0.8)
  panel.set_axisbelow(True)


def per_cent(panel: Axes, values: np.ndarray, least: float) -> None:
  """A horizontal axis for some values in 0..100: `least` wide or more, and not far beyond these."""
  low, high = float(np.min(values)), float(np.max(values))
  half = min(max(0.6 * (high - low), least / 2), 50)
  middle = min(max((low + high) / 2, half), 100 - half)
  panel.set_xlim(middle - 1.04 * half, middle + 1.04 * half)
  panel.xaxis.set_major_formatter('{x:g}%')


def legend(fig: Figure, handles: Sequence, labels: Sequence[str]) -> None:
  """One for all panels, under them."""
  made = fig.legend(
    handles, [short(label, 50) for label in labels], loc='outside lower center',
    ncols=len(labels), frameon=False, fontsize=8.5, handlelength=2.4,
  )  # fmt: skip
  for each in made.get_texts():
    each.set(parse_math=False, color=INK)


def short(name: str, length: int) -> str:
  """A name as one line of at most `length` characters, what is too much left out of its middle.

  >>> short('black-and-tan coonhound', 12)
  'black-…hound'
  """
  name = shown(name)
  if len(name) <= length:
    return name
  head = length // 2
  return f'{name[:head]}…{name[len(name) - (length - head - 1) :]}'


def png(fig: Figure) -> bytes:
  """The figure as a PNG file; letters that no font has become boxes."""
  for each in fig.findobj(text.Text):
    each.set_fontfamily(_families())
  file = io.BytesIO()
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='Glyph .* missing from')
    fig.savefig(file, format='png')
  return file.getvalue()


@functools.cache
def _families() -> list[str]:
  there = set(font_manager.get_font_names())
  return ['DejaVu Sans', *(name for name in _WIDER if name in there)]
