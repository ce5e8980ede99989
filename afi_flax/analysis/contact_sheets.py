"""Pictures in rows with words under them: Grad-CAM beside the picture, and confident mistakes.

Everything is placed in inches, since pictures must stay square and words must not move them.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from afi_flax.analysis import style
from afi_flax.analysis.grad_cam import Cams

_SIDE = 1.45  # inches of a picture
_GAP = 0.08  # between pictures
_WORDS = 0.36  # under a picture
_MARGIN = 0.12
_TITLE = 0.42
_HEADER = 0.24
_NAME = 21  # letters under a picture
_HEAT_WORDS = 1.6  # beside the bar of colours
_DRAWN = 320  # pixels that a picture is drawn with, at least
_RIGHT, _WRONG = '✓', '✗'


@dataclasses.dataclass(frozen=True)
class Explained:
  """What one network makes of some pictures.

  Attributes:
    label: its name in the figure.
    images: u8 [B,S,S,3], as it takes them.
    cams: of them.
  """

  label: str
  images: np.ndarray
  cams: Cams


@dataclasses.dataclass(frozen=True)
class Caption:
  """What is known of a picture: the names of its true class or classes, and its own."""

  true: tuple[str, ...]
  name: str


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
  """The picture without its colours, under the heat's.

  Args:
    image: u8 [S,S,3].
    heat: f32 [h,w] in 0..1.

  Returns:
    u8 [T,T,3], T at least that which is drawn; the heat is interpolated smoothly.
  """
  picture = np.asarray(enlarged(image).convert('L'), np.float32)[..., None] / 255
  side = picture.shape[:2][::-1]
  smooth = Image.fromarray(heat.astype(np.float32)).resize(side, Image.Resampling.BICUBIC)
  smooth = np.clip(np.asarray(smooth), 0, 1)
  colour = matplotlib.colormaps[style.OVERLAY](smooth)[..., :3]
  return np.rint(255 * (0.42 * picture + 0.58 * colour)).astype(np.uint8)


def enlarged(image: np.ndarray) -> Image.Image:
  """u8 [S,S,3] -> at least so many pixels as are drawn; those of a small one become squares."""
  times = math.ceil(_DRAWN / image.shape[0])
  size = (image.shape[1] * times, image.shape[0] * times)
  return Image.fromarray(image).resize(size, Image.Resampling.NEAREST)


def grad_cam(
  explained: Sequence[Explained],
  captions: Sequence[Caption],
  class_names: Sequence[str],
  method: str,
) -> Figure:
  """Figure 2 of the paper: each picture beside what made each network decide as it did.

  Args:
    explained: of one run or of two, the baseline first.
    captions: one a picture.
    class_names: in the order of the logits.
    method: in words, for the title: 'Grad-CAM, stage 3'.
  """
  per_picture = len(explained) + 1
  groups = 1 if len(captions) <= 4 else 2
  rows = math.ceil(len(captions) / groups)
  columns = per_picture * groups
  between = 3 * _GAP * (groups - 1)
  width = 2 * _MARGIN + columns * (_SIDE + _GAP) - _GAP + between
  foot = 0.55
  height = _TITLE + _HEADER + rows * (_SIDE + _WORDS) + foot
  fig = Figure(figsize=(width, height), dpi=style.DPI, facecolor='white')
  _title(fig, method)
  for k, caption in enumerate(captions):
    group, row = divmod(k, rows)
    top = _TITLE + _HEADER + row * (_SIDE + _WORDS)
    for column in range(per_picture):
      left = _MARGIN + (group * per_picture + column) * (_SIDE + _GAP) + 3 * _GAP * group
      panel = _place(fig, left, top)
      if column == 0:
        panel.imshow(enlarged(explained[-1].images[k]))
        _words(panel, *_about(caption))
      else:
        each = explained[column - 1]
        panel.imshow(overlay(each.images[k], each.cams.heat[k]))
        _predicted(panel, each.cams, k, caption, class_names)
      if row == 0:
        head = 'picture' if column == 0 else explained[column - 1].label
        colour = style.INK if column == 0 else style.colours(explained)[column - 1]
        panel.set_title(
          style.short(head, _NAME), fontsize=8.5, color=colour, fontweight='bold', pad=4,
          parse_math=False,
        )  # fmt: skip
  _heat_bar(fig, width, height)
  return fig


def mistakes(
  images: Sequence[np.ndarray],
  captions: Sequence[tuple[str, str, float]],
  words: str,
) -> Figure:
  """A contact sheet of what a network got wrong.

  Args:
    images: u8 [S,S,3] each, as it takes them.
    captions: true class, predicted class and its probability of each.
    words: the title.
  """
  columns = min(6, len(images))
  rows = math.ceil(len(images) / columns)
  width = 2 * _MARGIN + max(columns, 3) * (_SIDE + _GAP) - _GAP
  height = _TITLE + rows * (_SIDE + _WORDS + 0.04) + _MARGIN
  fig = Figure(figsize=(width, height), dpi=style.DPI, facecolor='white')
  _title(fig, words)
  for k, (image, (true, predicted, probability)) in enumerate(zip(images, captions, strict=True)):
    row, column = divmod(k, columns)
    left = _MARGIN + column * (_SIDE + _GAP)
    panel = _place(fig, left, _TITLE + row * (_SIDE + _WORDS + 0.04))
    panel.imshow(enlarged(image))
    said = f'{style.short(predicted, _NAME - 5)} {_percent(probability)}'
    _words(panel, f'{_WRONG} {said}', f'true: {style.short(true, _NAME)}', style.COLOURS[1])
  return fig


def _title(fig: Figure, words: str) -> None:
  style.title(fig, words, 1 - 0.1 / fig.get_figheight())


def _place(fig: Figure, left: float, top: float) -> Axes:
  """Axes for a picture, so many inches from the figure's left and upper edge."""
  width, height = fig.get_size_inches()
  panel = fig.add_axes(
    (left / width, 1 - (top + _SIDE) / height, _SIDE / width, _SIDE / height), frameon=False
  )
  panel.set_xticks([])
  panel.set_yticks([])
  return panel


def _words(panel: Axes, first: str, second: str, colour: str = style.INK) -> None:
  """Two lines under a picture."""
  for line, (words, ink) in enumerate(((first, colour), (second, style.GREY))):
    panel.annotate(
      words, (0, 0), (0, -3.5 - 10 * line), xycoords='axes fraction', textcoords='offset points',
      va='top', fontsize=7.5, color=ink, parse_math=False,
    )  # fmt: skip


def _about(caption: Caption) -> tuple[str, str]:
  """Two lines: the true class, where that is known, and the name, of a file without its folders."""
  name = pathlib.PurePath(caption.name).name
  if len(name) > _NAME:  # the split, which the page names
    name = re.sub(r'^.* example (\d+)$', r'example \1', name)
  name = style.short(name, _NAME)
  true = 'true: ' + style.short(' or '.join(caption.true), _NAME - 4)
  return (true, name) if caption.true else (name, '')


def _predicted(
  panel: Axes, cams: Cams, k: int, caption: Caption, class_names: Sequence[str]
) -> None:
  """The class that the network says, with its probability, and whether that is right."""
  best = int(cams.probabilities[k].argmax())
  name, mark = class_names[best], ''
  if caption.true:
    mark = f'{_RIGHT} ' if name in caption.true else f'{_WRONG} '
  said = f'{mark}{style.short(name, _NAME - 5)} {_percent(cams.probabilities[k, best])}'
  _words(panel, said, '' if cams.heat[k].any() else 'no place speaks for it')


def _percent(probability: float) -> str:
  """Never 100% for what is not certain."""
  return f'{min(100 * probability, 99.9):.1f}%' if probability > 0.99 else f'{probability:.0%}'


def _heat_bar(fig: Figure, width: float, height: float) -> None:
  """What the colours mean."""
  long, thick = min(2.4, width - 4 * _MARGIN - _HEAT_WORDS), 0.1
  panel = fig.add_axes((2 * _MARGIN / width, 0.3 / height, long / width, thick / height))
  panel.imshow(
    np.linspace(0, 1, 256)[None], cmap=style.OVERLAY, aspect='auto', extent=(0, 100, 0, 1)
  )
  panel.set_yticks([])
  panel.set_xticks([0, 50, 100], labels=['0%', '50%', '100%'])
  panel.tick_params(labelsize=7.5, length=2, color=style.GREY, labelcolor=style.INK)
  panel.spines[:].set_visible(False)
  panel.annotate(
    "heat, of the map's largest", (1, 0.5), (14, 0), xycoords='axes fraction', va='center',
    textcoords='offset points', fontsize=7.5, color=style.INK,
  )  # fmt: skip
