"""What happens to the colours and the shape of a picture, on the host: PIL and numpy.

RandAugment as timm has it (Cubuk et al., "RandAugment"), colour jitter as torchvision has it, and
AlexNet's PCA lighting. Each draw is a hash of (seed, what is drawn, epoch, example, which), so a
picture of an epoch is the same in any process or worker, and after a restart.
"""

import dataclasses
import math
import re
import statistics
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from afi_flax import random_draws
from afi_flax.errors import UserError

# (name, how much) of an operation, at magnitude 0..10 and with a sign, as timm's list of that name
# has them. What has `sign` is negated with probability a half.
_MAX_LEVEL = 10.0
_INCREASING = {
  'AutoContrast': lambda level, sign: None,
  'Equalize': lambda level, sign: None,
  'Invert': lambda level, sign: None,
  'Rotate': lambda level, sign: sign * 30.0 * level,  # degrees
  'Posterize': lambda level, sign: 4 - int(4 * level),  # bits kept
  'Solarize': lambda level, sign: 256 - min(256, int(256 * level)),  # inverted from there on
  'SolarizeAdd': lambda level, sign: min(128, int(110 * level)),  # added below 128
  'Color': lambda level, sign: max(0.1, 1.0 + sign * 0.9 * level),
  'Contrast': lambda level, sign: max(0.1, 1.0 + sign * 0.9 * level),
  'Brightness': lambda level, sign: max(0.1, 1.0 + sign * 0.9 * level),
  'Sharpness': lambda level, sign: max(0.1, 1.0 + sign * 0.9 * level),
  'ShearX': lambda level, sign: sign * 0.3 * level,
  'ShearY': lambda level, sign: sign * 0.3 * level,
  'TranslateX': lambda level, sign: sign * 0.45 * level,  # of the width
  'TranslateY': lambda level, sign: sign * 0.45 * level,
}
_NOT_INCREASING = {
  **_INCREASING,
  'Posterize': lambda level, sign: int(4 * level),
  'Solarize': lambda level, sign: min(256, int(256 * level)),
  **dict.fromkeys(
    ('Color', 'Contrast', 'Brightness', 'Sharpness'), lambda level, sign: 1.8 * level + 0.1
  ),
}

# The principal components of ImageNet's colours (Krizhevsky et al.), in 0..1.
_EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
_EIGENVECTORS = np.array(
  [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)

_SECTIONS = {'m': int, 'n': int, 'p': float, 'mstd': float, 'mmax': int, 'inc': int}


@dataclasses.dataclass(frozen=True)
class RandAugment:
  """timm's RandAugment: some operations in a row, each drawn from 15 and then left out or not.

  Attributes:
    magnitude: 0..10.
    layers: operations in a row.
    probability: that one is not left out.
    deviation: of the magnitude, which is normal; inf: uniform from 0 up to the magnitude.
    max_magnitude: what it is cut off at.
    increasing: all operations do more at a higher magnitude.
    fill: what comes in at the borders, u8 of each channel.
  """

  magnitude: int = 10
  layers: int = 2
  probability: float = 0.5
  deviation: float = 0.0
  max_magnitude: int = 10
  increasing: bool = False
  fill: tuple[int, int, int] = (128, 128, 128)

  def __call__(self, image: Image.Image, seed: int, epoch: int, example: int) -> Image.Image:
    """An RGB picture, with the operations that its draws pick."""
    amounts = _INCREASING if self.increasing else _NOT_INCREASING
    for layer in range(self.layers):
      counters = seed, random_draws.RAND_AUGMENT, epoch, example, layer
      which, left_out, size, sign, sampling = (
        float(random_draws.uniform(*counters, i)) for i in range(5)
      )
      if left_out >= self.probability:
        continue
      name = list(amounts)[int(which * len(amounts))]
      amount = amounts[name](self._level(size) / _MAX_LEVEL, -1 if sign < 0.5 else 1)
      resampling = Image.Resampling.BILINEAR if sampling < 0.5 else Image.Resampling.BICUBIC
      image = apply(name, image, amount, resampling, self.fill)
    return image

  def _level(self, drawn: float) -> float:
    """The magnitude, from a uniform draw."""
    if self.deviation == math.inf:
      level = drawn * self.magnitude
    else:
      level = self.magnitude + (self.deviation * _normal(drawn) if self.deviation else 0)
    return max(0.0, min(level, self.max_magnitude))


def parse_rand_augment(text: str, mean: tuple[float, ...]) -> RandAugment:
  """Reads 'rand-m6-mstd0.5-inc1': magnitude m (10), operations n (2), probability p (0.5), the
  magnitude's deviation mstd (0; above 100 uniform), its limit mmax (10), and inc1 (off).

  Args:
    text: as timm's `--aa` takes it, but for its sections t (other lists of operations).
    mean: of the channels, in 0..1: what fills the borders.

  Raises:
    UserError: not a RandAugment, or a section that is not understood.
  """
  first, *sections = text.split('-')
  given = {}
  for section in sections if first == 'rand' else [text]:
    match = re.fullmatch(r'([a-z]+)(\d+|\d*\.\d+)', section)
    key, value = match.groups() if match else ('', '')
    if key not in _SECTIONS or (_SECTIONS[key] is int and '.' in value) or key in given:
      raise UserError(
        f'data.auto_augment {text!r}: {section!r} is not understood; '
        'write it like rand-m6-mstd0.5-inc1, with m, n, p, mstd, mmax and inc, each once'
      )
    given[key] = _SECTIONS[key](value)
  made = RandAugment(
    magnitude=given.get('m', 10),
    layers=given.get('n', 2),
    probability=given.get('p', 0.5),
    deviation=given.get('mstd', 0.0) if given.get('mstd', 0.0) <= 100 else math.inf,
    max_magnitude=given.get('mmax', 0) or 10,
    increasing=bool(given.get('inc', 0)),
    fill=tuple(min(255, round(255 * m)) for m in mean),
  )
  if made.probability > 1:
    raise UserError(f'data.auto_augment {text!r}: p {made.probability} must be at most 1')
  return made


def apply(
  name: str,
  image: Image.Image,
  amount: float | None,
  resampling: Image.Resampling,
  fill: tuple[int, int, int],
) -> Image.Image:
  """One operation of RandAugment on an RGB picture, by as much as its row in the lists says."""
  if name in ('AutoContrast', 'Equalize', 'Invert'):
    return getattr(ImageOps, name.lower())(image)
  if name in ('Color', 'Contrast', 'Brightness', 'Sharpness'):
    return getattr(ImageEnhance, name)(image).enhance(amount)
  if name == 'Posterize':
    dropped = 8 - max(0, min(8, amount))  # max_magnitude may be above 10; and PIL refuses 0 bits
    return image.point([i >> dropped << dropped for i in range(256)] * 3)
  if name == 'Solarize':
    return ImageOps.solarize(image, amount)
  if name == 'SolarizeAdd':
    return image.point([min(255, i + amount) if i < 128 else i for i in range(256)] * 3)
  if name == 'Rotate':
    return image.rotate(amount, resampling, fillcolor=fill)
  matrix = {
    'ShearX': (1, amount, 0, 0, 1, 0),
    'ShearY': (1, 0, 0, amount, 1, 0),
    'TranslateX': (1, 0, amount * image.width, 0, 1, 0),
    'TranslateY': (1, 0, 0, 0, 1, amount * image.height),
  }[name]
  return image.transform(
    image.size, Image.Transform.AFFINE, matrix, resample=resampling, fillcolor=fill
  )


@dataclasses.dataclass(frozen=True)
class ColorJitter:
  """torchvision's ColorJitter: its four changes, in an order that is drawn.

  Attributes:
    brightness: b: times 1 - b .. 1 + b, but not below 0.
    contrast: likewise, from the mean grey level.
    saturation: likewise, from the grey picture.
    hue: h: turned by -h .. h, of a whole turn.
  """

  brightness: float
  contrast: float
  saturation: float
  hue: float

  def __call__(self, image: Image.Image, seed: int, epoch: int, example: int) -> Image.Image:
    """An RGB picture, jittered."""
    counters = seed, random_draws.COLOR_JITTER, epoch, example
    drawn = random_draws.uniform(*counters, np.arange(8)).astype(float)
    for i in np.argsort(drawn[4:]):
      strength = (self.brightness, self.contrast, self.saturation, self.hue)[i]
      if strength and i == 3:
        image = turn_hue(image, strength * (2 * drawn[i] - 1))
      elif strength:
        low, high = max(0.0, 1 - strength), 1 + strength
        enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[i]
        image = enhance(image).enhance(low + (high - low) * drawn[i])
    return image


def turn_hue(image: Image.Image, turn: float) -> Image.Image:
  """An RGB picture whose hue is turned, by -0.5 to 0.5 of a whole turn."""
  hue, saturation, value = image.convert('HSV').split()
  turned = np.asarray(hue) + np.array(int(turn * 255)).astype(np.uint8)  # wraps around
  return Image.merge('HSV', (Image.fromarray(turned), saturation, value)).convert('RGB')


@dataclasses.dataclass(frozen=True)
class Lighting:
  """Adds to all pixels a colour along the principal components of ImageNet's (Krizhevsky et al.).

  Attributes:
    deviation: of the share of each component, which is normal.
  """

  deviation: float

  def __call__(self, image: Image.Image, seed: int, epoch: int, example: int) -> Image.Image:
    """An RGB picture, lit."""
    counters = seed, random_draws.LIGHTING, epoch, example
    shares = np.array([_normal(float(random_draws.uniform(*counters, i))) for i in range(3)])
    added = _EIGENVECTORS @ (_EIGENVALUES * self.deviation * shares)
    lit = np.asarray(image) + 255 * added
    return Image.fromarray(np.rint(lit).clip(0, 255).astype(np.uint8))


def _normal(drawn: float) -> float:
  """A uniform draw, a multiple of 2^-24 in [0, 1) -> a normal one."""
  return statistics.NormalDist().inv_cdf(drawn + 2.0**-25)


@dataclasses.dataclass(frozen=True)
class Distortion:
  """Several of the above, one after the other."""

  parts: tuple[Callable[[Image.Image, int, int, int], Image.Image], ...]

  def __call__(self, image: np.ndarray, seed: int, epoch: int, example: int) -> np.ndarray:
    """u8 [H,W,3] -> u8 [H,W,3]."""
    picture = Image.fromarray(image)
    for part in self.parts:
      picture = part(picture, seed, int(epoch), int(example))
    return np.asarray(picture)


def make(
  auto_augment: str,
  color_jitter: tuple[float, float, float, float],
  lighting: float,
  mean: tuple[float, ...],
) -> Distortion | None:
  """What a config asks for; None: nothing.

  Args:
    auto_augment: for `parse_rand_augment`; '': none.
    color_jitter: brightness, contrast, saturation and hue; 0: off.
    lighting: the deviation; 0: off.
    mean: of the channels, in 0..1.

  Raises:
    UserError: a value that has no meaning.
  """
  valid = len(color_jitter) == 4 and all(0 <= strength < math.inf for strength in color_jitter)
  if not valid or color_jitter[3] > 0.5:
    raise UserError(
      f'data.color_jitter {tuple(color_jitter)} must be brightness, contrast, saturation and hue, '
      'finite, none below 0 and hue at most 0.5'
    )
  if not 0 <= lighting < math.inf:
    raise UserError(f'data.lighting {lighting} must be finite and at least 0')
  parts = []
  if auto_augment:
    parts.append(parse_rand_augment(auto_augment, mean))
  if any(color_jitter):
    parts.append(ColorJitter(*color_jitter))
  if lighting:
    parts.append(Lighting(lighting))
  return Distortion(tuple(parts)) if parts else None
