"""ImageNet's classes, and two more sets to evaluate on: ImageNetV2 and the ReaL labels."""

import dataclasses
import json
import os
import pathlib
import re

import numpy as np

from afi_flax.data import array_records, folders
from afi_flax.errors import UserError

_VALIDATION_SIZE = 50_000
_VALIDATION_FILE = re.compile(r'ILSVRC2012_val_(\d{8})')
_WORDNET_ID = re.compile(r'n\d{8}')
_REAL_URL = 'https://github.com/google-research/reassessed-imagenet'
_V2_URL = 'https://huggingface.co/datasets/vaishaal/ImageNetV2/resolve/main/'
_V2_SIZE = 10_000
_V2_ARCHIVES = {
  'matched-frequency': 'imagenetv2-matched-frequency',
  'threshold-0.7': 'imagenetv2-threshold0.7',
  'top-images': 'imagenetv2-top-images',
}
_V2_CLASS_FOLDERS = tuple(map(str, range(1000)))  # in the order of the classes, not of the names


def class_names() -> list[str]:
  """The 1,000 WordNet ids ('n01440764', ...), which TFDS carries; no files, no network."""
  import tensorflow_datasets as tfds

  return tfds.builder('imagenet2012').info.features['label'].names


def readable(names: tuple[str, ...]) -> tuple[str, ...]:
  """'tench' for 'n01440764', where all are ids of ImageNet's classes; others as they are.

  The words are the first ones of each class in the list that TFDS carries, in the order of the ids.
  Two of them are called 'maillot' there, and keep their ids: 'maillot (n03710637)'.
  """
  if not all(_WORDNET_ID.fullmatch(name) for name in names):
    return names
  from tensorflow_datasets.datasets.siscore.labels import IMAGENET_LABELS_LIST

  firsts = [words.partition(',')[0] for words in IMAGENET_LABELS_LIST]
  words = dict(zip(class_names(), firsts, strict=True))
  if not words.keys() >= set(names):
    return names
  return tuple(f'{words[n]} ({n})' if firsts.count(words[n]) > 1 else words[n] for n in names)


# ---- ImageNetV2: Recht et al., "Do ImageNet classifiers generalize to ImageNet?", 2019


def v2_sizes(data_dir: str) -> dict[str, int]:
  """Pictures by split: as found, and as published where a split is not there."""
  return {
    split: len(_list_v2(folder)) if (folder := _v2_folder(data_dir, split)).is_dir() else _V2_SIZE
    for split in _V2_ARCHIVES
  }


def open_v2(data_dir: str, split: str, start: int, stop: int) -> folders.Pictures:
  """Pictures `start` to `stop` of a split, from the folder that its archive unpacks to.

  Args:
    data_dir: where that folder is, or the folder itself.
    split: 'matched-frequency', 'threshold-0.7' or 'top-images'.
    start: the first example.
    stop: one past the last.

  Raises:
    UserError: the folder is not there, or is not whole.
  """
  folder = _v2_folder(data_dir, split)
  if not folder.is_dir():
    raise UserError(
      f'no {folder}; fetch {_V2_URL}{_V2_ARCHIVES[split]}.tar.gz and unpack it in {folder.parent}'
    )
  return _list_v2(folder).part(start, stop)


def _v2_folder(data_dir: str, split: str) -> pathlib.Path:
  root, name = array_records.root(data_dir), f'{_V2_ARCHIVES[split]}-format-val'
  return root if root.name == name else root / name


def _list_v2(folder: pathlib.Path) -> folders.Pictures:
  found = sum((folder / name).is_dir() for name in _V2_CLASS_FOLDERS)
  if found != len(_V2_CLASS_FOLDERS):
    raise UserError(
      f'{folder} has {found} of the 1000 class folders 0 to 999; unpack its archive again'
    )
  return folders.list_pictures(folder, _V2_CLASS_FOLDERS)


# ---- ReaL: Beyer et al., "Are we done with ImageNet?", 2020


@dataclasses.dataclass(frozen=True)
class RealLabels:
  """ImageNet's validation pictures, each with all labels that are right for it, or with none.

  Attributes:
    pictures: the validation split, or a part of it, in any order.
    labels: i32 [N,L], of the pictures in the order of their files' numbers; padded with -1.
    file: where they come from.
  """

  pictures: array_records.Pictures | folders.Pictures
  labels: np.ndarray
  file: pathlib.Path

  def __len__(self) -> int:
    return len(self.pictures)

  def read(self, i: int) -> tuple[bytes, np.ndarray]:
    """Bytes of picture i and its labels i32 [L]; OSError where the file cannot be read."""
    data, name = self.pictures.read_named(i)
    number = _VALIDATION_FILE.search(name)
    if not number:
      raise UserError(
        f'{self.name(i)} is called {name!r}; ReaL labels go by names like '
        'ILSVRC2012_val_00000001.JPEG, so give the original files'
      )
    at = int(number[1]) - 1
    if not 0 <= at < len(self.labels):
      raise UserError(
        f'{self.file} has labels of {len(self.labels)} pictures and none of {name}; '
        f'fetch it again from {_REAL_URL}'
      )
    return data, self.labels[at]

  def name(self, i: int) -> str:
    """What to call picture i in a message."""
    return self.pictures.name(i)


def real_size(data_dir: str) -> int:
  """How many validation pictures there are; as published where there are none."""
  if prepared := array_records.find_prepared('imagenet2012', data_dir):
    return array_records.split_sizes(prepared).get('validation', 0)
  folder = _validation_folder(data_dir)
  return len(folders.list_pictures(folder, tuple(class_names()))) if folder else _VALIDATION_SIZE


def open_real(data_dir: str, start: int, stop: int) -> RealLabels:
  """Validation pictures `start` to `stop` with their ReaL labels.

  Args:
    data_dir: holds `real.json`, and imagenet2012 as TFDS prepared it or, where that is not,
      class folders in `val/` or `validation/`.
    start: the first example.
    stop: one past the last.

  Raises:
    UserError: the labels or the pictures are not there or damaged.
  """
  file = array_records.root(data_dir) / 'real.json'
  classes = tuple(class_names())
  labels = _read_real(file, len(classes))
  folder = _validation_folder(data_dir)
  if folder and not array_records.find_prepared('imagenet2012', data_dir):
    pictures = folders.list_pictures(folder, classes).part(start, stop)
  else:
    pictures = array_records.open_split(
      'imagenet2012', data_dir, 'validation', start, stop, len(classes)
    )
  return RealLabels(pictures, labels, file)


def _validation_folder(data_dir: str) -> pathlib.Path | None:
  found = (array_records.root(data_dir) / name for name in ('val', 'validation'))
  return next((folder for folder in found if folder.is_dir()), None)


def _read_real(file: str | os.PathLike, num_classes: int) -> np.ndarray:
  """i32 [N,L], padded with -1."""
  try:
    with open(file, encoding='utf-8') as opened:
      found = [sorted(set(labels)) for labels in json.load(opened)]
    if not all(type(x) is int and 0 <= x < num_classes for labels in found for x in labels):
      raise ValueError(f'a label is not a number from 0 to {num_classes - 1}')
  except FileNotFoundError:
    raise UserError(f'no {file}; fetch real.json from {_REAL_URL} and put it there') from None
  except (OSError, TypeError, ValueError, RecursionError) as e:  # of the file, or what is in it
    raise UserError(f'{file} is damaged ({e}); fetch it again from {_REAL_URL}') from e
  padded = np.full((len(found), max(map(len, found), default=1) or 1), -1, np.int32)
  for row, labels in zip(padded, found, strict=True):
    row[: len(labels)] = labels
  return padded
