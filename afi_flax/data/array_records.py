"""Data sets that TFDS has prepared as array_record files, read without TensorFlow."""

import concurrent.futures
import contextlib
import functools
import json
import os
import pathlib
import re
from collections.abc import Iterator

import numpy as np

from afi_flax.errors import UserError

_CHUNK = 500  # pictures that a thread decodes at a time


def root(data_dir: str) -> pathlib.Path:
  """The folder of prepared TFDS sets: data_dir, or TFDS's own default where that is ''."""
  return local(data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets')


def local(data_dir: str) -> pathlib.Path:
  """The folder on this machine; UserError where it is none, but a bucket."""
  if '://' in data_dir:
    raise UserError(
      f'data_dir {data_dir!r} is not on a file system; mount the bucket, as gcsfuse or --bucket of '
      'the launchers does, or copy what is there, and give the folder'
    )
  try:
    path = pathlib.Path(data_dir).expanduser()
    path.exists()  # raises where it cannot even be looked for
  except (OSError, RuntimeError) as error:
    why = getattr(error, 'strerror', None) or 'there is no such user'
    raise UserError(f'data_dir {data_dir!r} cannot be read: {why}; give another folder') from error
  return path


def find_prepared(dataset: str, data_dir: str) -> pathlib.Path | None:
  """The newest version's folder of a prepared set, or None; looks at local files only."""
  found = [path.parent for path in (root(data_dir) / dataset).glob('*/dataset_info.json')]
  return max(found, key=lambda path: [int(x) for x in re.findall(r'\d+', path.name)], default=None)


def file_format(prepared: pathlib.Path) -> str:
  """'array_record', 'tfrecord', ...: the format of a prepared set's files."""
  return _read_info(prepared).get('fileFormat', 'tfrecord')


def split_sizes(prepared: pathlib.Path) -> dict[str, int]:
  """Examples by split."""
  return {name: sum(shards) for name, shards in _shard_lengths(prepared).items()}


def prepare_command(dataset: str, folder: str | os.PathLike) -> str:
  """The command that prepares a set under a folder; imagenet2012 cannot be downloaded."""
  archives = ' --archives FOLDER' if dataset == 'imagenet2012' else ''
  return f'`python -m afi_flax.prepare --dataset {dataset}{archives} --data_dir {folder}`'


class Pictures:
  """Encoded pictures and labels of a part of a split; its files are opened when first read."""

  def __init__(self, prepared: pathlib.Path, split: str, start: int, stop: int, num_classes: int):
    """Examples `start` to `stop` of a split, whose labels must be less than `num_classes`."""
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

    try:
      builder = tfds.builder_from_directory(self._prepared)
    except Exception as e:  # TFDS raises nearly anything on damaged descriptions
      raise _damaged_info(self._prepared, 'features.json') from e
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    return builder.as_data_source(split=self._split, deserialize_method=raw)

  def read(self, i: int) -> tuple[bytes, int]:
    """Bytes of picture i and its label.

    Raises:
      OSError: the record is damaged.
      UserError: the label is out of range.
    """
    with _damage_as_os_error():
      return self._parse(i, self._records[self._start + i])

  def read_named(self, i: int) -> tuple[bytes, str]:
    """Bytes of picture i and the name that its file had; OSError where the record is damaged."""
    with _damage_as_os_error():
      feature = _features(self._records[self._start + i])
      name = feature['file_name'].bytes_list.value[0].decode()
      return feature['image'].bytes_list.value[0], name

  def read_many(self, chunk: range) -> list[tuple[bytes, int]]:
    """As `read` for each of a range, at less than half the time."""
    with _damage_as_os_error():
      records = self._records.__getitems__([self._start + i for i in chunk])
      return [self._parse(i, record) for i, record in zip(chunk, records, strict=True)]

  def name(self, i: int) -> str:
    """What to call picture i in a message."""
    return f'{self._prepared.parent.name} {self._split} example {self._start + i}'

  def decode(self) -> tuple[np.ndarray, np.ndarray]:
    """All pictures, which must be lossless and of one size: images u8 [N,H,W,3], labels i32 [N].

    Raises:
      UserError: a picture cannot be read or decoded, or a label is out of range.
    """
    import cv2  # here, as its first import must not be in several threads at once

    def decode(chunk: range) -> tuple[np.ndarray, list[int]]:
      try:
        records = self.read_many(chunk)
      except OSError as e:
        raise self._damaged(chunk, str(e)) from e
      try:
        images = [
          cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) for data, _ in records
        ]
      except cv2.error as e:  # of no bytes, or of more pixels than OpenCV allows
        raise self._damaged(chunk, 'not a picture') from e
      if any(image is None for image in images):
        raise self._damaged(chunk, 'not a picture')
      if len({image.shape for image in images}) > 1:
        raise self._damaged(chunk, 'a picture of another size')
      return np.stack(images)[..., ::-1], [label for _, label in records]  # OpenCV's order is BGR

    chunks = [range(at, min(at + _CHUNK, len(self))) for at in range(0, len(self), _CHUNK)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
      images, labels = zip(*pool.map(decode, chunks), strict=True)
    for chunk, part in zip(chunks, images, strict=True):
      if part.shape[1:] != images[0].shape[1:]:
        raise self._damaged(chunk, 'a picture of another size')
    return np.concatenate(images), np.concatenate(labels).astype(np.int32)

  def _damaged(self, chunk: range, reason: str) -> UserError:
    return UserError(
      f'{self.name(chunk[0])} or one soon after cannot be read ({reason}); '
      f'{_delete_and_prepare(self._prepared)}'
    )

  def _parse(self, i: int, record: bytes) -> tuple[bytes, int]:
    """Picture and label of a record."""
    feature = _features(record)
    label = feature['label'].int64_list.value[0]
    if not 0 <= label < self._num_classes:
      raise UserError(
        f'{self.name(i)} has label {label}; labels of {self._num_classes} classes go from 0 to '
        f'{self._num_classes - 1}'
      )
    return feature['image'].bytes_list.value[0], label


def open_split(
  dataset: str, data_dir: str, split: str, start: int, stop: int, num_classes: int
) -> Pictures:
  """Opens examples `start` to `stop` of a prepared set's split.

  Raises:
    UserError: the set is not prepared, or in another format, or files of the split are missing, or
      its description is damaged.
  """
  # All checked here, because TFDS would try the network ten times first.
  folder = root(data_dir)
  prepared = find_prepared(dataset, data_dir)
  if prepared is None:
    raise UserError(
      f'{dataset} is not prepared under {folder}; run {prepare_command(dataset, folder)}'
    )
  if file_format(prepared) != 'array_record':
    raise UserError(
      f'{prepared} holds {file_format(prepared)} files and array_record is needed; prepare it '
      f'again beside them: {prepare_command(dataset, f"{folder}_array_record")}'
    )
  wanted = len(_shard_lengths(prepared)[split])
  # One that is a pipe would keep its reader waiting for ever.
  found = sum(path.is_file() for path in prepared.glob(f'{dataset}-{split}.array_record-*'))
  if found != wanted:
    raise UserError(
      f'{prepared} has {found} of {wanted} files of its {split} split; '
      f'{_delete_and_prepare(prepared)}'
    )
  return Pictures(prepared, split, start, stop, num_classes)


def _features(record: bytes):
  """Features of a record by name, in a tenth of the time that TFDS's decoding of them takes."""
  from tensorflow_datasets.proto import tf_example_pb2

  return tf_example_pb2.Example.FromString(record).features.feature


@contextlib.contextmanager
def _damage_as_os_error() -> Iterator[None]:
  """array_record raises a RuntimeError, with a long text, where a file is damaged.

  What stands in a record of something else, protobuf and a look into it fail in their own ways.
  """
  try:
    yield
  except UserError:
    raise
  except IndexError as e:
    raise OSError('damaged record: no picture, label or name in it') from e
  except Exception as e:
    raise OSError(f'damaged record: {" ".join(str(e).split(" (")[0].split())[:80]}') from e


def _delete_and_prepare(prepared: pathlib.Path) -> str:
  command = prepare_command(prepared.parent.name, prepared.parent.parent)
  return f'delete {prepared} and run {command}'


def _read_info(prepared: pathlib.Path) -> dict:
  try:
    info = json.loads((prepared / 'dataset_info.json').read_text())
  except (OSError, ValueError, RecursionError) as e:  # of the file, of JSON or of UTF-8
    raise _damaged_info(prepared) from e
  if not isinstance(info, dict):
    raise _damaged_info(prepared)
  return info


def _shard_lengths(prepared: pathlib.Path) -> dict[str, list[int]]:
  """Examples in each file, by split."""
  info = _read_info(prepared)
  try:
    return {split['name']: list(map(int, split['shardLengths'])) for split in info['splits']}
  except (KeyError, TypeError, ValueError) as e:
    raise _damaged_info(prepared) from e


def _damaged_info(prepared: pathlib.Path, name: str = 'dataset_info.json') -> UserError:
  return UserError(f'{prepared}/{name} is damaged; {_delete_and_prepare(prepared)}')
