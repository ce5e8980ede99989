"""Pictures to look at: files that are named, folders of them, or examples of a split."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from absl import logging

from afi_flax import random_draws
from afi_flax.data import decode, folders, sources
from afi_flax.errors import UserError, shown
from afi_flax.run import Preprocessing

MOST = 64  # pictures that a figure has room for
_CURE = 'give other pictures by --images'


@dataclasses.dataclass(frozen=True)
class Picture:
  """One picture: encoded, as bytes, or of a set in memory, as u8 [H,W,3].

  Attributes:
    data: of the picture.
    name: what to call it.
    label: its class, where that is known.
  """

  data: bytes | np.ndarray
  name: str
  label: int | None

  def cut(self, how: Preprocessing) -> np.ndarray:
    """u8 [S,S,3], as evaluation cuts it; UserError where it cannot be read."""
    if isinstance(self.data, np.ndarray):
      return self.data
    try:
      return decode.resize_centre_crop(self.data, how.resize, how.image_size)
    except decode.UnreadableError as error:
      raise UserError(f'{self.name} cannot be read: {error}; {_CURE}') from error


def batch(pictures: Sequence[Picture], how: Preprocessing) -> np.ndarray:
  """u8 [B,S,S,3]; UserError for a picture that cannot be read."""
  return np.stack([picture.cut(how) for picture in pictures])


def named(
  paths: Sequence[str], class_names: Sequence[str], how: Preprocessing, count: int, seed: int
) -> list[Picture]:
  """Files as they are given, and of each folder a sample of those that can be read.

  Args:
    paths: files and folders.
    class_names: a picture whose folder is called like one of them is taken to be of that class.
    how: evaluation cuts pictures, to find out whether it can.
    count: how many pictures of a folder, at most.
    seed: of the sample.

  Raises:
    UserError: a file that cannot be read, a folder without one that can, or too many files.
  """
  found = []
  for path in map(pathlib.Path, paths):
    if path.is_dir():
      found += _sample_of_folder(path, class_names, how, count, seed)
    else:
      found.append(_read(path, class_names))
    if len(found) > MOST:
      raise UserError(
        f'--images names more than the {MOST} pictures that a figure has room for; give fewer, or '
        'their folder, of which --num_images are taken'
      )
  return found


def sample(
  source: sources.Arrays | sources.Encoded, split: str, how: Preprocessing, count: int, seed: int
) -> list[Picture]:
  """Some examples of a split, chosen by the seed; those that cannot be read are passed over."""
  order = map(int, random_draws.permutation(len(source), seed, 0))
  return _readable((functools.partial(_example, source, split, k) for k in order), how, count)


def examples(
  source: sources.Arrays | sources.Encoded, split: str, chosen: Sequence[int]
) -> list[Picture]:
  """Those of a split that have been read before."""
  return [_example(source, split, example) for example in chosen]


def _readable(
  reads: Iterable[Callable[[], Picture]], how: Preprocessing, count: int
) -> list[Picture]:
  """The first `count` that can be read; a warning for each that is passed over."""
  found = []
  for read in reads:
    try:
      picture = read()
      picture.cut(how)
    except (OSError, UserError) as error:
      logging.warning('left out of the figure: %s', error)
      continue
    found.append(picture)
    if len(found) == count:
      break
  return found


def _example(source: sources.Arrays | sources.Encoded, split: str, example: int) -> Picture:
  if isinstance(source, sources.Arrays):
    label = int(source.labels[example])
    return Picture(source.images[example], f'{split} example {example}', label)
  data, label = source.read(example)
  first = int(np.ravel(label)[0])  # imagenet2012_real has several
  return Picture(data, pathlib.PurePath(source.name(example)).name, first)


def _sample_of_folder(
  folder: pathlib.Path, class_names: Sequence[str], how: Preprocessing, count: int, seed: int
) -> list[Picture]:
  there = [
    pathlib.Path(parent, name)
    for parent, _, names in folders.walk(folder)
    for name in sorted(names)
    if folders.is_picture(name)
  ]
  if not there:
    raise UserError(f'{shown(str(folder))} has no pictures; {_CURE}')
  order = random_draws.permutation(len(there), seed, 0)
  found = _readable((functools.partial(_read, there[k], class_names) for k in order), how, count)
  if not found:
    raise UserError(f'{shown(str(folder))} has no pictures that can be read; {_CURE}')
  return found


def _read(path: pathlib.Path, class_names: Sequence[str]) -> Picture:
  name = shown(str(path))
  try:
    data = folders.read_file(path)
  except OSError as error:
    raise UserError(f'{name} cannot be read: {error.strerror}; {_CURE}') from error
  folder = path.absolute().parent.name
  label = class_names.index(folder) if folder in class_names else None
  return Picture(data, name, label)
