"""Folders of pictures: ROOT/CLASS/... or ROOT/SPLIT/CLASS/..., in any format that is decoded."""

import collections
import dataclasses
import errno
import functools
import os
import pathlib
import stat
import unicodedata
import zlib
from collections.abc import Iterable, Iterator

import numpy as np
from absl import logging

from afi_flax import random_draws
from afi_flax.data import array_records
from afi_flax.errors import UserError, shown

_SPLITS = ('train', 'val', 'validation', 'test')
SUFFIXES = ('.jpg', '.jpeg', '.png', '.gif', '.bmp', '.webp', '.tif', '.tiff', '.ppm')
_MAX_BYTES = 1 << 30  # of a file: twice what decode.MAX_PIXELS take without compression


@dataclasses.dataclass(frozen=True)
class Pictures:
  """Files below a folder: paths bytes [N], relative, in a fixed shuffled order; labels i32 [N]."""

  root: str
  paths: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)

  def read(self, i: int) -> tuple[bytes, int]:
    """Bytes of picture i and its label; OSError where the file cannot be read, or is none."""
    return read_file(self._path(i)), int(self.labels[i])

  def read_named(self, i: int) -> tuple[bytes, str]:
    """Bytes of picture i and its file's name; OSError as `read`."""
    return self.read(i)[0], os.path.basename(self._path(i))

  def name(self, i: int) -> str:
    """The file of picture i, as one line of text."""
    return shown(self._path(i))

  def _path(self, i: int) -> str:
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
    where = shown(str(splits[first]))
    raise UserError(f'{where} has no pictures of {_shown(empty)}; add some or remove it')
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


def is_picture(name: str) -> bool:
  """Whether a file of this name is taken for a picture where a folder is listed."""
  return os.path.splitext(name)[1].lower() in SUFFIXES


def by_suffix(files: Iterable[str]) -> str:
  """How many there are, of the most frequent suffixes: '12 of .txt, 3 of .heic'; '' of none."""
  suffixes = collections.Counter(os.path.splitext(f)[1].lower() or 'no suffix' for f in files)
  return ', '.join(f'{count:,} of {shown(suffix)}' for suffix, count in suffixes.most_common(3))


def warn_of_others(folder: str | os.PathLike, others: Iterable[str]) -> None:
  """Says how many files below a folder are left out, but for hidden ones."""
  visible = [name for name in others if not name.startswith('.')]
  if visible:
    logging.warning(
      '%s: %d files have not the suffix of a picture and are left out: %s',
      shown(str(folder)), len(visible), by_suffix(visible),
    )  # fmt: skip


def read_file(path: str) -> bytes:
  """All of a file; OSError where it is none, without waiting for someone to write to a pipe."""
  with open(path, 'rb', opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode):
      raise OSError(errno.EINVAL, 'not a file but a pipe or device')
    if found.st_size > _MAX_BYTES:
      raise OSError(errno.EFBIG, f'{found.st_size >> 20} MiB are more than {_MAX_BYTES >> 20}')
    return file.read()


def _cannot_list(error: OSError, folder: str | os.PathLike) -> UserError:
  """For a folder: or its pictures would be missing, and nobody would know."""
  return UserError(f'{shown(str(folder))} cannot be listed ({error.strerror}); mend or remove it')


def _splits(data_dir: str) -> dict[str, pathlib.Path]:
  """Split name -> its folder of class folders; a folder without split folders is all 'train'."""
  root = array_records.local(data_dir)
  if not data_dir:
    raise UserError('image_folder needs a folder of pictures: add --config.data.data_dir=FOLDER')
  if not os.path.isdir(root):
    raise UserError(
      f'image_folder: {data_dir!r} is not a folder; give one by --config.data.data_dir=FOLDER'
    )
  folders = _sub_folders(root)
  if not folders:
    raise UserError(
      f'{shown(str(root))} has no class folders; put the pictures of each class in one of its own'
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
      f'{shown(str(splits[first]))} has {len(classes)} class folders '
      f'({_shown(classes) or "none"}); a classifier needs at least 2'
    )
  for folder in splits.values():
    if extra := sorted(set(_sub_folders(folder)) - set(classes)):
      raise UserError(
        f'{shown(str(folder))} has classes that {first} has not: {_shown(extra)}; remove them'
      )
  return tuple(classes)


@functools.lru_cache(maxsize=8)  # a big folder on a network disk takes a while to list
def list_pictures(folder: pathlib.Path, classes: tuple[str, ...]) -> Pictures:
  """All pictures in class folders; the label of one is its class's place in `classes`.

  The order is shuffled by a hash of the names, so that any part of a split ('train[:80%]') has
  pictures of all classes, and new files hardly move old ones.

  Raises:
    UserError: there is none, or a folder that cannot be listed.
  """
  paths, labels, links, others = [], [], [], []
  for label, name in enumerate(classes):
    for parent, sub_folders, files in walk(folder / name):
      links += [path for f in sub_folders if os.path.islink(path := os.path.join(parent, f))]
      within = os.path.relpath(parent, folder)
      chosen = [f for f in sorted(files) if is_picture(f)]
      others += [f for f in files if not is_picture(f)]
      paths += [os.fsencode(os.path.join(within, f)) for f in chosen]
      labels += [label] * len(chosen)
  if not paths:
    flat = sum(map(is_picture, os.listdir(folder)))
    where = f'; its {flat} own pictures must be sorted into them' if flat else ''
    raise UserError(
      f'{shown(str(folder))} has no pictures in class folders ({_shown(classes)}){where}'
    )
  if links:
    logging.warning('links to folders in class folders are not followed: %s', _shown(links))
  warn_of_others(folder, others)
  _warn_of_twins(folder, classes)
  crc = np.array([zlib.crc32(path) for path in paths], np.uint32)
  order = np.argsort(random_draws.bits(random_draws.FILE_ORDER, crc), kind='stable')
  return Pictures(str(folder), np.array(paths)[order], np.array(labels, np.int32)[order])


def walk(folder: str | os.PathLike) -> Iterator[tuple[str, list[str], list[str]]]:
  """As os.walk, in a fixed order; UserError for a folder that cannot be listed."""

  def refuse(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # val/ need not have every class
      raise _cannot_list(error, error.filename) from error

  for parent, sub_folders, files in os.walk(folder, onerror=refuse):
    sub_folders.sort()
    yield parent, sub_folders, files


def _warn_of_twins(folder: pathlib.Path, classes: tuple[str, ...]) -> None:
  """Of names that some machines and all readers take for one; here they are two classes."""
  same = collections.defaultdict(list)
  for name in classes:
    same[unicodedata.normalize('NFC', name).casefold()].append(name)
  for names in same.values():
    if len(names) > 1:
      logging.warning(
        '%s: %s are %d classes, whose names differ only in upper and lower case or in how accents '
        'are written',
        shown(str(folder)), _shown(map(repr, names)), len(names),
      )  # fmt: skip


def _sub_folders(folder: pathlib.Path) -> list[str]:
  """Names of the folders in a folder, but for hidden ones.

  Raises:
    UserError: it cannot be listed, or a link in it leads nowhere or to a folder that holds it.
  """
  try:
    entries = [e for e in os.scandir(folder) if not e.name.startswith('.')]
    here = pathlib.Path(os.path.realpath(folder))
  except OSError as e:
    raise _cannot_list(e, folder) from e
  for link in (e for e in entries if e.is_symlink()):
    try:
      target = os.path.realpath(link.path, strict=True)
    except OSError as e:
      raise UserError(
        f'{shown(link.path)} is a link that leads nowhere ({e.strerror}); mend or remove it'
      ) from e
    if here.is_relative_to(target):
      raise UserError(f'{shown(link.path)} is a link to a folder that holds it; remove it')
  return sorted(e.name for e in entries if e.is_dir())


def _shown(names: Iterable[str]) -> str:
  names = list(names)
  return ', '.join(map(shown, names[:5])) + (', ...' if len(names) > 5 else '')
