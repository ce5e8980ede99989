"""Folders of pictures: ROOT/CLASS/... or ROOT/SPLIT/CLASS/..., in any format that is decoded."""

import dataclasses
import functools
import os
import pathlib
import zlib
from collections.abc import Iterable

import numpy as np

from afi_flax import random_draws
from afi_flax.data import array_records
from afi_flax.errors import UserError

_SPLITS = ('train', 'val', 'validation', 'test')
_SUFFIXES = ('.jpg', '.jpeg', '.png', '.gif', '.bmp', '.webp', '.tif', '.tiff', '.ppm')


@dataclasses.dataclass(frozen=True)
class Pictures:
  """Files below a folder: paths bytes [N], relative, in a fixed shuffled order; labels i32 [N]."""

  root: str
  paths: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)

  def read(self, i: int) -> tuple[bytes, int]:
    """Bytes of picture i and its label; OSError where the file cannot be read."""
    with open(self.name(i), 'rb') as file:
      return file.read(), int(self.labels[i])

  def read_named(self, i: int) -> tuple[bytes, str]:
    """Bytes of picture i and its file's name; OSError as `read`."""
    return self.read(i)[0], os.path.basename(self.name(i))

  def name(self, i: int) -> str:
    """The file of picture i."""
    return os.path.join(self.root, os.fsdecode(self.paths[i]))

  def part(self, start: int, stop: int) -> 'Pictures':
    """Pictures `start` to `stop`."""
    return Pictures(self.root, self.paths[start:stop], self.labels[start:stop])


def describe(data_dir: str) -> tuple[dict[str, int], tuple[str, ...]]:
  """Lists a folder: how many pictures each split has, and the names of the classes.

  Raises:
    UserError: there is no such folder, or it does not hold what it should.
  """
  splits = _splits(data_dir)
  classes = _class_names(splits)
  listed = {name: list_pictures(folder, classes) for name, folder in splits.items()}
  first = next(iter(splits))
  counts = np.bincount(listed[first].labels, minlength=len(classes))
  if empty := [name for name, count in zip(classes, counts, strict=True) if not count]:
    raise UserError(f'{splits[first]} has no pictures of {_shown(empty)}; add some or remove it')
  return {name: len(pictures) for name, pictures in listed.items()}, classes


def split_cure(data_dir: str) -> str:
  """What to do where a split other than 'train' is asked for and there is none; else ''."""
  splits = _splits(data_dir)
  if set(splits) != {'train'}:
    return ''
  root = pathlib.Path(data_dir).expanduser()
  if splits['train'] == root:
    found = f'No train/ and val/ found in {root}, only class folders'
  else:
    found = f'No val/ found in {root}'
  flags = "--config.data.train_split='train[:80%]' --config.data.eval_split='train[80%:]'"
  return f'{found}: add {flags}'


def open_split(
  data_dir: str, class_names: tuple[str, ...], split: str, start: int, stop: int
) -> Pictures:
  """Pictures `start` to `stop` of a split; the label of one is its class's place in class_names."""
  return list_pictures(_splits(data_dir)[split], class_names).part(start, stop)


def _splits(data_dir: str) -> dict[str, pathlib.Path]:
  """Split name -> its folder of class folders; a folder without split folders is all 'train'."""
  root = array_records.local(data_dir)
  if not data_dir:
    raise UserError('image_folder needs a folder of pictures: add --config.data.data_dir=FOLDER')
  if not root.is_dir():
    raise UserError(
      f'image_folder: {data_dir!r} is not a folder; give one by --config.data.data_dir=FOLDER'
    )
  folders = _sub_folders(root)
  if not folders:
    raise UserError(
      f'{root} has no class folders; put the pictures of each class in one of its own'
    )
  splits = {name: root / name for name in _SPLITS if name in folders}
  # A class may be called 'train' or 'test' too; a split is known by the folders that it holds.
  if set(folders) == set(splits) or any(_sub_folders(path) for path in splits.values()):
    return splits
  return {'train': root}


def _class_names(splits: dict[str, pathlib.Path]) -> tuple[str, ...]:
  """Class names: those of 'train', or of the first split there is."""
  first = next(iter(splits))
  classes = _sub_folders(splits[first])
  if len(classes) < 2:
    raise UserError(
      f'{splits[first]} has {len(classes)} class folders ({_shown(classes) or "none"}); '
      'a classifier needs at least 2'
    )
  for folder in splits.values():
    if extra := sorted(set(_sub_folders(folder)) - set(classes)):
      raise UserError(f'{folder} has classes that {first} has not: {_shown(extra)}; remove them')
  return tuple(classes)


@functools.lru_cache(maxsize=8)  # a big folder on a network disk takes a while to list
def list_pictures(folder: pathlib.Path, classes: tuple[str, ...]) -> Pictures:
  """All pictures in class folders; the label of one is its class's place in `classes`.

  The order is shuffled by a hash of the names, so that any part of a split ('train[:80%]') has
  pictures of all classes, and new files hardly move old ones.

  Raises:
    UserError: there is none.
  """
  paths, labels = [], []
  for label, name in enumerate(classes):
    for parent, folders, files in os.walk(folder / name):
      folders.sort()
      within = os.path.relpath(parent, folder)
      chosen = [f for f in sorted(files) if os.path.splitext(f)[1].lower() in _SUFFIXES]
      paths += [os.fsencode(os.path.join(within, f)) for f in chosen]
      labels += [label] * len(chosen)
  if not paths:
    flat = sum(os.path.splitext(name)[1].lower() in _SUFFIXES for name in os.listdir(folder))
    where = f'; its {flat} own pictures must be sorted into them' if flat else ''
    raise UserError(f'{folder} has no pictures in class folders ({_shown(classes)}){where}')
  crc = np.array([zlib.crc32(path) for path in paths], np.uint32)
  order = np.argsort(random_draws.bits(random_draws.FILE_ORDER, crc), kind='stable')
  return Pictures(str(folder), np.array(paths)[order], np.array(labels, np.int32)[order])


def _sub_folders(folder: pathlib.Path) -> list[str]:
  return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith('.'))


def _shown(names: Iterable[str]) -> str:
  names = list(names)
  return ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')
