"""Where examples come from: one table of data sets, their sizes, class names and splits.

Small sets are decoded once into memory (`Arrays`); sets of large pictures stay encoded and are read
one by one (`Encoded`). The sets of TFDS are read from array_record files, without TensorFlow.
A new data set is one entry in `_TABLE`.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import re
import zlib
from collections.abc import Callable
from typing import Protocol

import numpy as np

from afi_flax import errors, random_draws
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

SPLIT_FOLDERS = ('train', 'val', 'validation', 'test')
PICTURE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.gif', '.bmp', '.webp', '.tif', '.tiff', '.ppm')
_SPLIT_SPEC = re.compile(r'([\w-]+)(?:\[(-?[\d.]+%?)?:(-?[\d.]+%?)?\])?')


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
  """What is known of a data set before its pictures are opened.

  Attributes:
    name: its name in the table.
    num_examples: how many examples each split has, by the split's name.
    class_names: one name a class, in the order of the labels.
  """

  name: str
  num_examples: dict[str, int]
  class_names: tuple[str, ...]


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

  def read(self, i: int) -> tuple[bytes, int]:
    """Bytes of picture i and its label; OSError where the file cannot be read."""

  def name(self, i: int) -> str:
    """What to call picture i in a message: its file's name, or the data set's and its index."""


def known_datasets() -> list[str]:
  """Names that `describe` and `open_split` take."""
  return sorted(_TABLE)


def describe(dataset: str, data_dir: str = '') -> DatasetInfo:
  """Sizes and class names; needs no files, but for an image folder, which is listed.

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
    raise errors.unknown(f'split of {info.name}', name, info.num_examples)
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


def _open_fake_imagenet(data_dir, info, split, start, stop) -> Encoded:
  del data_dir
  return _FakePictures(split, start, stop, len(info.class_names))


# ---- TFDS


def tfds_root(data_dir: str) -> pathlib.Path:
  """The folder of prepared TFDS sets: data_dir, or TFDS's own default where that is ''."""
  default = os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  return pathlib.Path(data_dir or default).expanduser()


def find_prepared(dataset: str, data_dir: str) -> pathlib.Path | None:
  """The newest version's folder of a prepared TFDS set, or None; looks at local files only."""
  found = [path.parent for path in (tfds_root(data_dir) / dataset).glob('*/dataset_info.json')]
  return max(found, key=lambda path: [int(x) for x in re.findall(r'\d+', path.name)], default=None)


def file_format(prepared: pathlib.Path) -> str:
  """'array_record', 'tfrecord', ...: the format of a prepared set's files."""
  return _read_info(prepared).get('fileFormat', 'tfrecord')


def _read_info(prepared: pathlib.Path) -> dict:
  return json.loads((prepared / 'dataset_info.json').read_text())


def _tfds_sizes(dataset: str, data_dir: str, known: dict[str, int]) -> dict[str, int]:
  """Examples by split: as prepared where the set is, else as published."""
  prepared = find_prepared(dataset, data_dir)
  if prepared is None:
    return known
  splits = _read_info(prepared)['splits']
  return {split['name']: sum(map(int, split['shardLengths'])) for split in splits}


def _readable(dataset: str, data_dir: str, split: str) -> pathlib.Path:
  """The prepared set's folder; checked here because TFDS would try the network ten times first."""
  root = tfds_root(data_dir)
  command = f'python -m afi_flax.prepare --dataset {dataset} --data_dir'
  prepared = find_prepared(dataset, data_dir)
  if prepared is None:
    raise UserError(f'{dataset} is not prepared under {root}; run `{command} {root}`')
  if file_format(prepared) != 'array_record':
    raise UserError(
      f'{prepared} holds {file_format(prepared)} files and array_record is needed; prepare it '
      f'again beside them: `{command} {root}_array_record`'
    )
  shards = next(s for s in _read_info(prepared)['splits'] if s['name'] == split)['shardLengths']
  found = len(list(prepared.glob(f'{dataset}-{split}.array_record-*')))
  if found != len(shards):
    raise UserError(
      f'{prepared} has {found} of {len(shards)} files of its {split} split; '
      f'delete it and run `{command} {root}`'
    )
  return prepared


class _TfdsPictures:
  """Pictures and labels in a prepared set's array_record files; opened when first read."""

  def __init__(self, prepared: pathlib.Path, split: str, start: int, stop: int, num_classes: int):
    self._prepared = prepared
    self._split = split
    self._start = start
    self._stop = stop
    self._num_classes = num_classes

  def __len__(self) -> int:
    return self._stop - self._start

  def __getstate__(self):  # workers open the files themselves
    return {key: value for key, value in self.__dict__.items() if key != '_records'}

  @functools.cached_property
  def _records(self):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(self._prepared)
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    return builder.as_data_source(split=self._split, deserialize_method=raw)

  def read(self, i: int) -> tuple[bytes, int]:
    return self._parse(i, self._records[self._start + i])

  def read_many(self, chunk: range) -> list[tuple[bytes, int]]:
    """As `read` for each of a range, at less than half the time."""
    records = self._records.__getitems__([self._start + i for i in chunk])
    return [self._parse(i, record) for i, record in zip(chunk, records, strict=True)]

  def _parse(self, i: int, record: bytes) -> tuple[bytes, int]:
    """Picture and label of a record, in a tenth of the time that TFDS's feature decoding takes."""
    from tensorflow_datasets.proto import tf_example_pb2

    feature = tf_example_pb2.Example.FromString(record).features.feature
    label = feature['label'].int64_list.value[0]
    if not 0 <= label < self._num_classes:
      raise UserError(
        f'{self.name(i)} has label {label}; labels of {self._num_classes} classes go from 0 to '
        f'{self._num_classes - 1}'
      )
    return feature['image'].bytes_list.value[0], label

  def name(self, i: int) -> str:
    return f'{self._prepared.parent.name} {self._split} example {self._start + i}'


def _open_tfds(data_dir, info, split, start, stop) -> Encoded:
  prepared = _readable(info.name, data_dir, split)
  return _TfdsPictures(prepared, split, start, stop, len(info.class_names))


def _open_tfds_in_memory(data_dir, info, split, start, stop) -> Arrays:
  """Decodes all pictures of one size (lossless PNGs) in threads."""
  import cv2

  source = _open_tfds(data_dir, info, split, start, stop)

  def decode(chunk: range) -> tuple[np.ndarray, list[int]]:
    records = source.read_many(chunk)
    images = [cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) for data, _ in records]
    if any(image is None for image in images):
      raise UserError(f'{source.name(chunk[0])} or one soon after cannot be decoded; prepare again')
    return np.stack(images)[..., ::-1], [label for _, label in records]  # OpenCV's order is BGR

  chunks = [range(at, min(at + 500, len(source))) for at in range(0, len(source), 500)]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    images, labels = zip(*pool.map(decode, chunks), strict=True)
  return Arrays(np.concatenate(images), np.concatenate(labels).astype(np.int32))


# ---- folders of pictures


@dataclasses.dataclass(frozen=True)
class _FolderPictures:
  """Files below a folder: paths bytes [N], relative, in a fixed shuffled order; labels i32 [N]."""

  root: str
  paths: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)

  def read(self, i: int) -> tuple[bytes, int]:
    with open(self.name(i), 'rb') as file:
      return file.read(), int(self.labels[i])

  def name(self, i: int) -> str:
    return os.path.join(self.root, os.fsdecode(self.paths[i]))


def _folder_splits(data_dir: str) -> dict[str, pathlib.Path]:
  """Split name -> its folder of class folders; a folder without split folders is all 'train'."""
  root = pathlib.Path(data_dir).expanduser()
  if not data_dir or not root.is_dir():
    raise UserError(f'image_folder: {data_dir!r} is not a folder; set data_dir to one')
  folders = _sub_folders(root)
  if not folders:
    raise UserError(
      f'{root} has no class folders; put the pictures of each class in one of its own'
    )
  splits = {name: root / name for name in SPLIT_FOLDERS if name in folders}
  # A class may be called 'train' or 'test' too; a split is known by the folders that it holds.
  if set(folders) == set(splits) or any(_sub_folders(path) for path in splits.values()):
    return splits
  return {'train': root}


def _sub_folders(folder: pathlib.Path) -> list[str]:
  return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith('.'))


@functools.lru_cache(maxsize=8)  # a big folder on a network disk takes a while to list
def _list_folder(folder: pathlib.Path, classes: tuple[str, ...]) -> _FolderPictures:
  """All pictures of a split. The order is shuffled by a hash of the names, so that any part of
  the split ('train[:80%]') has pictures of all classes, and new files hardly move old ones."""
  paths, labels = [], []
  for label, name in enumerate(classes):
    for parent, folders, files in os.walk(folder / name):
      folders.sort()
      within = os.path.relpath(parent, folder)
      chosen = [f for f in sorted(files) if os.path.splitext(f)[1].lower() in PICTURE_SUFFIXES]
      paths += [os.fsencode(os.path.join(within, f)) for f in chosen]
      labels += [label] * len(chosen)
  if not paths:
    raise UserError(f'{folder} has no pictures in its class folders ({_shown(classes)})')
  crc = np.array([zlib.crc32(path) for path in paths], np.uint32)
  order = np.argsort(random_draws.bits(random_draws.FILE_ORDER, crc), kind='stable')
  return _FolderPictures(str(folder), np.array(paths)[order], np.array(labels, np.int32)[order])


def _shown(names) -> str:
  names = list(names)
  return ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')


def _folder_classes(splits: dict[str, pathlib.Path]) -> tuple[str, ...]:
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


def _describe_folder(data_dir: str) -> DatasetInfo:
  splits = _folder_splits(data_dir)
  classes = _folder_classes(splits)
  listed = {name: _list_folder(folder, classes) for name, folder in splits.items()}
  first = next(iter(splits))
  counts = np.bincount(listed[first].labels, minlength=len(classes))
  if empty := [name for name, count in zip(classes, counts, strict=True) if not count]:
    raise UserError(f'{splits[first]} has no pictures of {_shown(empty)}; add some or remove it')
  return DatasetInfo('image_folder', {name: len(s) for name, s in listed.items()}, classes)


def _open_folder(data_dir, info, split, start, stop) -> Encoded:
  whole = _list_folder(_folder_splits(data_dir)[split], info.class_names)
  return _FolderPictures(whole.root, whole.paths[start:stop], whole.labels[start:stop])


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
  return lambda data_dir: DatasetInfo(name, _tfds_sizes(name, data_dir, sizes), tuple(classes()))


def _imagenet_classes() -> list[str]:
  """The 1,000 WordNet ids ('n01440764', ...), which TFDS carries; no files, no network."""
  import tensorflow_datasets as tfds

  return tfds.builder('imagenet2012').info.features['label'].names


def _entry(dataset: str) -> _Entry:
  if dataset not in _TABLE:
    raise errors.unknown('data set', dataset, _TABLE)
  return _TABLE[dataset]


_CIFAR_SIZES = {'train': 50_000, 'test': 10_000}
_IMAGENET_SIZES = {'train': 1_281_167, 'validation': 50_000}
_TABLE = {
  'digits': _Entry(_fixed('digits', {'train': 1438, 'test': 359}, '0123456789'), _open_digits),
  'cifar10': _Entry(
    _from_tfds('cifar10', _CIFAR_SIZES, CIFAR10_CLASSES.split), _open_tfds_in_memory
  ),
  'cifar100': _Entry(
    _from_tfds('cifar100', _CIFAR_SIZES, CIFAR100_CLASSES.split), _open_tfds_in_memory
  ),
  'imagenet2012': _Entry(
    _from_tfds('imagenet2012', _IMAGENET_SIZES, _imagenet_classes), _open_tfds
  ),
  'image_folder': _Entry(_describe_folder, _open_folder),
  'fake_cifar': _Entry(
    _fixed('fake_cifar', {'train': 500, 'test': 100}, map(str, range(10))), _open_fake_cifar
  ),
  'fake_imagenet': _Entry(
    _fixed('fake_imagenet', {'train': 1000, 'validation': 100}, map(str, range(1000))),
    _open_fake_imagenet,
  ),
}
