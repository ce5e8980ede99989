"""Where examples come from: one table of data sets, their sizes, class names and splits.

Small sets are decoded once into memory (`Arrays`); sets of large pictures stay encoded and are read
one by one (`Encoded`). The sets of TFDS are read from array_record files, without TensorFlow.
A new data set is one entry in `_TABLE`.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Protocol

import numpy as np

from afi_flax import errors, random_draws
from afi_flax.data import array_records, folders, imagenet
from afi_flax.errors import UserError

CIFAR10_CLASSES = 'airplane automobile bird cat deer dog frog horse ship truck'
CIFAR100_CLASSES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
    crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
    keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse
    mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy
    porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper
    snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television
    tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"""

_SPLIT_SPEC = re.compile(r'([\w.-]+)(?:\[(-?[\d.]+%?)?:(-?[\d.]+%?)?\])?')


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
  """What is known of a data set before its pictures are opened.

  Attributes:
    name: its name in the table.
    num_examples: how many examples each split has, by the split's name.
    class_names: one name a class, in the order of the labels.
    split_cure: what to do where a split is not there, for the error; '' where there is nothing.
  """

  name: str
  num_examples: dict[str, int]
  class_names: tuple[str, ...]
  split_cure: str = ''


@dataclasses.dataclass(frozen=True)
class Arrays:
  """A split decoded in memory: images u8 [N,H,W,3], labels i32 [N]."""

  images: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)


class Encoded(Protocol):
  """A split of encoded pictures, read one by one; can be pickled into worker processes."""

  def __len__(self) -> int: ...

  def read(self, i: int) -> tuple[bytes, int | np.ndarray]:
    """Bytes of picture i and its label (all, in imagenet2012_real); OSError if it is unreadable."""

  def name(self, i: int) -> str:
    """What to call picture i in a message: its file's name, or the data set's and its index."""


def known_datasets() -> list[str]:
  """Names that `describe` and `open_split` take."""
  return sorted(_TABLE)


def describe(dataset: str, data_dir: str = '') -> DatasetInfo:
  """Sizes and class names; needs no files, but for an image folder. Folders are listed.

  Args:
    dataset: a name in `known_datasets()`.
    data_dir: the TFDS folder or the image folder; '' is TFDS's own default.

  Raises:
    UserError: unknown name, or an image folder that does not hold what it should.
  """
  return _entry(dataset).describe(data_dir)


def open_split(dataset: str, data_dir: str, spec: str) -> Arrays | Encoded:
  """Opens a split, or a part of one such as 'train[:98%]'.

  Raises:
    UserError: unknown data set or split, files missing or of another format, a bad label.
  """
  entry = _entry(dataset)
  info = entry.describe(data_dir)
  name, start, stop = split_range(spec, info)
  return entry.open(data_dir, info, name, start, stop)


@dataclasses.dataclass(frozen=True)
class _Chosen:
  """Some pictures of an encoded split."""

  source: Encoded
  chosen: np.ndarray

  def __len__(self) -> int:
    return len(self.chosen)

  def read(self, i: int) -> tuple[bytes, int | np.ndarray]:
    return self.source.read(int(self.chosen[i]))

  def name(self, i: int) -> str:
    return self.source.name(int(self.chosen[i]))


def sample(source: Arrays | Encoded, count: int, seed: int) -> Arrays | Encoded:
  """At most `count` examples of a split, chosen by the seed alone, in the split's order."""
  chosen = random_draws.choice(len(source), count, seed)
  if isinstance(source, Arrays):
    return Arrays(source.images[chosen], source.labels[chosen])
  return _Chosen(source, chosen)


def split_range(spec: str, info: DatasetInfo) -> tuple[str, int, int]:
  """Split name, first and one past the last example of a spec, counted as TFDS counts them.

  >>> info = DatasetInfo('x', {'train': 150}, ('a', 'b'))
  >>> split_range('train[98%:]', info)
  ('train', 147, 150)

  Raises:
    UserError: a split that the data set does not have, or a part that is empty or out of range.
  """
  match = _SPLIT_SPEC.fullmatch(spec)
  if not match:
    raise UserError(
      f'split {spec!r} is not understood; write train, train[:98%], train[98%:] or train[100:200]'
    )
  name, first, last = match.groups()
  if name not in info.num_examples:
    raise errors.unknown(f'split of {info.name}', name, info.num_examples, info.split_cure)
  n = info.num_examples[name]
  if first and last and first.endswith('%') != last.endswith('%'):
    raise UserError(f'split {spec!r} mixes examples and per cent; use one of them')
  start = _boundary(first, n, spec) if first else 0
  stop = _boundary(last, n, spec) if last else n
  if start >= stop:
    raise UserError(f'split {spec!r} of {info.name} is empty; {name} has {n} examples')
  return name, start, stop


def _boundary(text: str, n: int, spec: str) -> int:
  try:
    value = round(float(text[:-1]) * n / 100) if text.endswith('%') else int(text)
  except ValueError:
    raise UserError(f'split {spec!r}: {text!r} is not a number of examples or per cent') from None
  if abs(value) > n:
    raise UserError(f'split {spec!r} asks for example {value} of {n}; stay within {n}')
  return value + n if value < 0 else value


# ---- in memory


def _open_digits(data_dir: str, info: DatasetInfo, split: str, start: int, stop: int) -> Arrays:
  """scikit-learn's handwritten digits: 8x8, levels 0..16 -> 16x16x3, 0..255; a fifth is 'test'."""
  del data_dir, info
  from sklearn import datasets  # slow to import, and only this set needs it

  digits = datasets.load_digits()
  grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # [1797,8,8]
  images = grey.repeat(2, axis=1).repeat(2, axis=2)[..., None].repeat(3, axis=3)
  is_test = np.arange(len(images)) % 5 == 4
  chosen = np.flatnonzero(is_test == (split == 'test'))[start:stop]
  return Arrays(np.ascontiguousarray(images[chosen]), digits.target[chosen].astype(np.int32))


def _fake_images(label: np.ndarray, example: np.ndarray, side: int) -> np.ndarray:
  """u8 [n,side,side,3]: a coarse coloured pattern for each class, under noise."""
  cells = np.arange(4 * 4 * 3).reshape(4, 4, 3)
  pattern = random_draws.uniform(random_draws.FAKE, 0, label[:, None, None, None], cells)
  at = np.arange(side) * 4 // side
  pattern = pattern[:, at][:, :, at]
  pixels = np.arange(side * side * 3).reshape(side, side, 3)
  noise = random_draws.uniform(random_draws.FAKE, 1, example[:, None, None, None], pixels)
  return (255 * (0.7 * pattern + 0.3 * noise)).astype(np.uint8)


def _fake_ids(split: str, start: int, stop: int) -> np.ndarray:
  """Example numbers that the splits do not share."""
  return np.arange(start, stop) + (0 if split == 'train' else 1 << 20)


def _open_fake_cifar(data_dir: str, info: DatasetInfo, split: str, start: int, stop: int) -> Arrays:
  del data_dir
  labels = (np.arange(start, stop) % len(info.class_names)).astype(np.int32)
  return Arrays(_fake_images(labels, _fake_ids(split, start, stop), 32), labels)


# ---- encoded


@dataclasses.dataclass(frozen=True)
class _FakePictures:
  """JPEGs of about 224 pixels, made when they are read."""

  split: str
  start: int
  stop: int
  num_classes: int

  def __len__(self) -> int:
    return self.stop - self.start

  def read(self, i: int) -> tuple[bytes, int]:
    import simplejpeg

    label = (self.start + i) % self.num_classes
    example = _fake_ids(self.split, self.start, self.stop)[i]
    side = 224 + 32 * int(random_draws.integers(3, random_draws.FAKE, 2, example))
    image = _fake_images(np.array([label]), np.array([example]), side)[0, : side - 16]
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=90), label

  def name(self, i: int) -> str:
    return f'fake_imagenet {self.split} example {self.start + i}'


def _open_fake_imagenet(
  data_dir: str, info: DatasetInfo, split: str, start: int, stop: int
) -> Encoded:
  del data_dir
  return _FakePictures(split, start, stop, len(info.class_names))


# ---- from files


def _open_array_records(
  data_dir: str, info: DatasetInfo, split: str, start: int, stop: int
) -> array_records.Pictures:
  num_classes = len(info.class_names)
  return array_records.open_split(info.name, data_dir, split, start, stop, num_classes)


def _open_in_memory(data_dir: str, info: DatasetInfo, split: str, start: int, stop: int) -> Arrays:
  return Arrays(*_open_array_records(data_dir, info, split, start, stop).decode())


def _open_folder(data_dir: str, info: DatasetInfo, split: str, start: int, stop: int) -> Encoded:
  return folders.open_split(data_dir, info.class_names, split, start, stop)


# ---- the table


@dataclasses.dataclass(frozen=True)
class _Entry:
  """describe(data_dir), and open(data_dir, info, split, start, stop)."""

  describe: Callable[[str], DatasetInfo]
  open: Callable[[str, DatasetInfo, str, int, int], Arrays | Encoded]


def _fixed(name: str, sizes: dict[str, int], classes) -> Callable[[str], DatasetInfo]:
  info = DatasetInfo(name, sizes, tuple(classes))
  return lambda data_dir: info


def _from_tfds(name: str, sizes: dict[str, int], classes) -> Callable[[str], DatasetInfo]:
  """Sizes as prepared where the set is, else as published."""

  def describe(data_dir: str) -> DatasetInfo:
    prepared = array_records.find_prepared(name, data_dir)
    found = array_records.split_sizes(prepared) if prepared else sizes
    return DatasetInfo(name, found, tuple(classes()))

  return describe


def _describe_folder(data_dir: str) -> DatasetInfo:
  return DatasetInfo('image_folder', *folders.describe(data_dir), folders.split_cure(data_dir))


def _describe_v2(data_dir: str) -> DatasetInfo:
  sizes, classes = imagenet.v2_sizes(data_dir), tuple(imagenet.class_names())
  return DatasetInfo('imagenet_v2', sizes, classes, 'Give one as data.eval_split.')


def _open_v2(data_dir: str, info: DatasetInfo, split: str, start: int, stop: int) -> Encoded:
  del info
  return imagenet.open_v2(data_dir, split, start, stop)


def _describe_real(data_dir: str) -> DatasetInfo:
  sizes = {'validation': imagenet.real_size(data_dir)}
  return DatasetInfo('imagenet2012_real', sizes, tuple(imagenet.class_names()))


def _open_real(data_dir: str, info: DatasetInfo, split: str, start: int, stop: int) -> Encoded:
  del info, split
  return imagenet.open_real(data_dir, start, stop)


def _entry(dataset: str) -> _Entry:
  if dataset not in _TABLE:
    raise errors.unknown('data set', dataset, _TABLE)
  return _TABLE[dataset]


_CIFAR_SIZES = {'train': 50_000, 'test': 10_000}
_IMAGENET_SIZES = {'train': 1_281_167, 'validation': 50_000}
_TABLE = {
  'digits': _Entry(_fixed('digits', {'train': 1438, 'test': 359}, '0123456789'), _open_digits),
  'cifar10': _Entry(_from_tfds('cifar10', _CIFAR_SIZES, CIFAR10_CLASSES.split), _open_in_memory),
  'cifar100': _Entry(_from_tfds('cifar100', _CIFAR_SIZES, CIFAR100_CLASSES.split), _open_in_memory),
  'imagenet2012': _Entry(
    _from_tfds('imagenet2012', _IMAGENET_SIZES, imagenet.class_names), _open_array_records
  ),
  'imagenet_v2': _Entry(_describe_v2, _open_v2),
  'imagenet2012_real': _Entry(_describe_real, _open_real),
  'image_folder': _Entry(_describe_folder, _open_folder),
  'fake_cifar': _Entry(
    _fixed('fake_cifar', {'train': 500, 'test': 100}, map(str, range(10))), _open_fake_cifar
  ),
  'fake_imagenet': _Entry(
    _fixed('fake_imagenet', {'train': 1000, 'validation': 100}, map(str, range(1000))),
    _open_fake_imagenet,
  ),
}
