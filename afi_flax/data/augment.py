"""Augmentation on the host: each draw is a hash of (seed, what is drawn, epoch, example).

`pad_crop` and `flip` take whole batches and use only what numpy and jax.numpy share, so the same
code runs on the device and gives the same pixels.
"""

import math
from typing import Any

import cv2
import numpy as np

from afi_flax import random_draws
from afi_flax.data import decode

Array = Any  # numpy.ndarray or jax.Array

IN_MEMORY = ('none', 'pad_crop', 'pad_crop_flip')
ENCODED = ('none', 'random_resized_crop_flip')

_AREA = (0.08, 1.0)  # of the picture; as torchvision's RandomResizedCrop
_ASPECT = (3 / 4, 4 / 3)  # width / height
_TRIES = 10


def arrays(name: str, images: Array, seed: int, epoch: Array, example: Array) -> Array:
  """A batch of pictures of one size, augmented.

  Args:
    name: one of IN_MEMORY.
    images: u8 [b,H,W,3].
    seed: of the run.
    epoch: i32 [b].
    example: i32 [b].

  Returns:
    u8 [b,H,W,3].
  """
  if name in ('pad_crop', 'pad_crop_flip'):
    images = pad_crop(images, seed, epoch, example)
  if name == 'pad_crop_flip':
    images = flip(images, seed, epoch, example)
  return images


def encoded(
  name: str, data: bytes, size: int, seed: int, epoch: int, example: int, antialias: bool = True
) -> np.ndarray:
  """One encoded picture, augmented.

  Args:
    name: one of ENCODED; 'none' is the centre.
    data: of the picture's file.
    size: of the result, in pixels.
    seed: of the run.
    epoch: number.
    example: number.
    antialias: of the resize after a random crop; False is faster.

  Returns:
    u8 [size,size,3].

  Raises:
    decode.UnreadableError: the picture cannot be decoded.
  """
  if name == 'none':
    return decode.resize_centre_crop(data, size, size)
  box = random_resized_box(*decode.picture_size(data), seed, epoch, example)
  image = decode.crop_resize(data, box, size, antialias)
  flipped = random_draws.integers(2, seed, random_draws.FLIP, epoch, example) == 1
  return cv2.flip(image, 1) if flipped else image  # a sixth of numpy's time


def pad_crop(images: Array, seed: int, epoch: Array, example: Array) -> Array:
  """Pads with zeros by an eighth of the side (4 for 32 pixels), crops to the old size at random."""
  xp = images.__array_namespace__()
  b, height, width, _ = images.shape
  pad = height // 8
  y = random_draws.integers(2 * pad + 1, seed, random_draws.CROP_Y, epoch, example)  # [b]
  x = random_draws.integers(2 * pad + 1, seed, random_draws.CROP_X, epoch, example)
  padded = xp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  at = xp.arange(b)[:, None]
  rows = padded[at, y[:, None] + xp.arange(height)[None, :]]  # [b,H,W+2pad,3]
  columns = xp.swapaxes(rows, 1, 2)[at, x[:, None] + xp.arange(width)[None, :]]  # [b,W,H,3]
  return xp.swapaxes(columns, 1, 2)


def flip(images: Array, seed: int, epoch: Array, example: Array) -> Array:
  """Flips left and right with probability a half."""
  xp = images.__array_namespace__()
  flipped = random_draws.integers(2, seed, random_draws.FLIP, epoch, example) == 1  # [b]
  return xp.where(flipped[:, None, None, None], images[:, :, ::-1], images)


def random_resized_box(
  height: int, width: int, seed: int, epoch: int, example: int
) -> tuple[int, int, int, int]:
  """y, x, height, width of torchvision's RandomResizedCrop: area 0.08..1, aspect 3/4..4/3.

  Ten draws; where none fits in the picture, the largest centre crop of allowed aspect.
  """
  low, high = math.log(_ASPECT[0]), math.log(_ASPECT[1])
  y = float(random_draws.uniform(seed, random_draws.CROP_Y, epoch, example))
  x = float(random_draws.uniform(seed, random_draws.CROP_X, epoch, example))
  for k in range(_TRIES):
    area = float(random_draws.uniform(seed, random_draws.CROP_AREA, epoch, example, k))
    aspect = float(random_draws.uniform(seed, random_draws.CROP_ASPECT, epoch, example, k))
    area = height * width * (_AREA[0] + (_AREA[1] - _AREA[0]) * area)
    aspect = math.exp(low + (high - low) * aspect)
    h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
    if 1 <= w <= width and 1 <= h <= height:
      return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
  h, w = min(height, round(width / _ASPECT[0])), min(width, round(height * _ASPECT[1]))
  return (height - h) // 2, (width - w) // 2, h, w
