"""What the workers of a test make: batches of little else than their number."""

import dataclasses
import os

import numpy as np

from afi_flax.errors import UserError


def tiny(number: int) -> dict[str, np.ndarray]:
  """A batch that also says which process made it."""
  return {
    'number': np.array([number]),
    'process': np.array([os.getpid()]),
    'empty': np.zeros((0,), np.float32),
    'named': np.array([(number, b'why')], [('example', np.int32), ('reason', 'S10')]),
  }


def large(number: int) -> np.ndarray:
  """More than fits into a socket."""
  return np.full((1 << 20,), number % 256, np.uint8)


@dataclasses.dataclass(frozen=True)
class Failing:
  """Fails at one number."""

  at: int
  error: Exception

  def __call__(self, number: int) -> dict[str, np.ndarray]:
    if number == self.at:
      raise self.error
    return tiny(number)


def exits(number: int) -> None:
  """Ends its process without a word."""
  os._exit(3)


def refuses(number: int) -> None:
  raise UserError(f'number {number} is wrong')


class Unreadable:
  """What can be pickled, but raises the error when it is read."""

  def __init__(self, error: Exception):
    self._error = error

  def __reduce__(self):
    return _raise, (self._error,)


def _raise(error: Exception) -> None:
  raise error


def unreadable(number: int) -> Unreadable:
  return Unreadable(ValueError('of no use') if number else EOFError('ran out of input'))
