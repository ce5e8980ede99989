"""Random draws as a pure function of counters, equal bit for bit in numpy and jax.numpy.

A draw is a 32-bit hash of (seed, stream of what is drawn, counters). There is no generator and no
state: whoever knows the counters knows the draw, so neither processes, workers, devices nor a
restart can change it, and the host and the device can each compute the same augmentation.

The mixer is Wellons' `lowbias32` (https://nullprogram.com/blog/2018/07/31/), a bijection of 32 bits
with near-ideal avalanche.
"""

from typing import Any

import numpy as np

# What is drawn. A number, once given, is never reused for something else: it would change old runs.
PERMUTATION = 0
CROP_Y = 1
CROP_X = 2
FLIP = 3
CROP_AREA = 4
CROP_ASPECT = 5
FILE_ORDER = 7
FAKE = 8
MIXUP = 9
CUTMIX = 10
CUTMIX_Y = 11
CUTMIX_X = 12
MIX_SWITCH = 13
DROP_PATH = 14
ERASE = 15
ERASE_AREA = 16
ERASE_ASPECT = 17
ERASE_Y = 18
ERASE_X = 19
ERASED_PIXEL = 20
RAND_AUGMENT = 21
COLOR_JITTER = 22
LIGHTING = 23
SAMPLE = 24

Array = Any  # numpy.ndarray or jax.Array
_GOLDEN = 0x9E3779B9


def _mix(x: Array) -> Array:
  x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
  return x ^ (x >> 16)


def _mix_int(x: int) -> int:
  x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
  x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
  return x ^ (x >> 16)


def bits(*counters: int | Array) -> Array:
  """uint32 hash of the counters, which broadcast; the order of the counters matters.

  Args:
    *counters: integers or integer arrays; only the low 32 bits of each count.

  Returns:
    uint32, of the broadcast shape: numpy where all counters are numpy, else jax.
  """
  if all(isinstance(counter, int) for counter in counters):  # a tenth of numpy's time for one draw
    h = 0
    for counter in counters:
      h = _mix_int(h ^ _mix_int((counter + _GOLDEN) & 0xFFFFFFFF))
    return np.uint32(h)
  h = np.uint32(0)
  with np.errstate(over='ignore'):  # numpy warns when 0-d uint32 wraps, which is what a hash does
    for counter in counters:
      if isinstance(counter, int):
        counter = np.uint32(counter & 0xFFFFFFFF)
      h = _mix(h ^ _mix(counter.astype(np.uint32) + np.uint32(_GOLDEN)))
  return h


def uniform(*counters: int | Array) -> Array:
  """float32 in [0, 1), a multiple of 2^-24: exact, and so the same on host and device."""
  return (bits(*counters) >> 8).astype(np.float32) * np.float32(2.0**-24)


def integers(n: int, *counters: int | Array) -> Array:
  """int32 in [0, n), n <= 65536."""
  if not 0 < n <= 65536:
    raise ValueError(f'integers draws below n for n in 1..65536, got {n}')
  return (((bits(*counters) >> 16) * np.uint32(n)) >> 16).astype(np.int32)


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
  """int64 [n]: the order of n examples in one epoch; no two library versions differ on it."""
  return np.argsort(bits(seed, PERMUTATION, epoch, np.arange(n)), kind='stable')


def choice(n: int, count: int, seed: int) -> np.ndarray:
  """int64 [min(n, count)]: some of 0 .. n - 1, in rising order, each as likely as any other."""
  return np.sort(np.argsort(bits(seed, SAMPLE, np.arange(n)), kind='stable')[:count])
