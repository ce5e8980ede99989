"""Archives or downloads -> array_record files, through TFDS's own builders.

TFDS's builders of CIFAR want TensorFlow only to unpack their archive and to encode PNGs; here they
do both without it, with the same examples in the same order. imagenet2012's builder needs it.
"""

import contextlib
import importlib.util
import io
import os
import pathlib
import shutil
import tarfile
import urllib.request

import numpy as np

from afi_flax import errors
from afi_flax.data import array_records, sources
from afi_flax.errors import UserError

_CIFAR_URL = 'https://www.cs.toronto.edu/~kriz/'
_IMAGENET_URL = 'https://image-net.org/download-images'  # after registration there
_ARCHIVES = {
  'cifar10': (_CIFAR_URL, ('cifar-10-binary.tar.gz',)),
  'cifar100': (_CIFAR_URL, ('cifar-100-binary.tar.gz',)),
  'imagenet2012': (_IMAGENET_URL, ('ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar')),
}
_OPTIONAL = {'imagenet2012': ('ILSVRC2012_img_test.tar',)}  # TFDS takes it too where it is there
_PROBE_SECONDS = 5


def prepare(dataset: str, data_dir: str = '', archives: str = '') -> str:
  """Writes the array_record files of a data set, where it needs any and has none yet.

  Args:
    dataset: a name that `sources.known_datasets` lists.
    data_dir: the TFDS folder to write into; '' is TFDS's own default.
    archives: a folder with the original archives, under their original names; '' downloads them.

  Returns:
    One line that says what is there now.

  Raises:
    UserError: what is missing and where to fetch it, or how much disk space.
  """
  if dataset not in sources.known_datasets():
    raise errors.unknown('data set', dataset, sources.known_datasets())
  if dataset not in _ARCHIVES:
    return f'{dataset} needs no preparing'
  root = array_records.root(data_dir)
  prepared = array_records.find_prepared(dataset, data_dir)
  if prepared is not None:
    if (found := array_records.file_format(prepared)) != 'array_record':
      raise UserError(
        f'{prepared} holds {found} files, which a run cannot read; give another --data_dir'
      )
    return f'{dataset} is already prepared in {prepared}'
  if dataset == 'imagenet2012' and importlib.util.find_spec('tensorflow') is None:
    raise UserError(
      f'TFDS needs TensorFlow to prepare {dataset}; run `pip install -e '
      "'.[tensorflow]'` in the clone of this repository"
    )
  _check_space(dataset, root, _space_needed(dataset, root, archives))
  _build(dataset, root, archives)
  info = sources.describe(dataset, data_dir)
  sizes = ', '.join(f'{n} {split}' for split, n in info.num_examples.items())
  return f'prepared {dataset} in {array_records.find_prepared(dataset, data_dir)}: {sizes} examples'


def _space_needed(dataset: str, root: pathlib.Path, archives: str) -> int:
  """Bytes that preparing will write, at most; raises where the archives cannot be had.

  The records take less than the archives that they are read from, in which every picture has a
  header and padding: 0.96 of them for ImageNet pictures, 0.85 for CIFAR-100. TFDS shuffles through
  temporary files, of which each goes before its records come, so they take no space besides. What
  is downloaded stays.
  """
  url, names = _ARCHIVES[dataset]
  cure = (
    f'fetch {" and ".join(names)} from {url}, put into a folder A, and run '
    f'`python -m afi_flax.prepare --dataset {dataset} --data_dir {root} --archives A`'
  )
  if archives:
    folder = pathlib.Path(archives).expanduser()
    if missing := [name for name in names if not (folder / name).is_file()]:
      raise UserError(f'{archives} has no {" and no ".join(missing)}; {cure}')
    found = [folder / name for name in (*names, *_OPTIONAL.get(dataset, ()))]
    return sum(path.stat().st_size for path in found if path.is_file())
  if dataset == 'imagenet2012':
    raise UserError(f'{dataset} cannot be downloaded without an account; {cure}')
  try:
    return 2 * _download_size(url + names[0])
  except OSError as e:  # URLError, HTTPError and timeouts are OSErrors
    problem = getattr(e, 'reason', e)
    raise UserError(f'{url + names[0]} cannot be reached ({problem}); {cure}') from e


def _download_size(url: str) -> int:
  """Bytes, 0 if unknown; OSError where it cannot be reached. TFDS would try that ten times."""
  request = urllib.request.Request(url, method='HEAD')
  with urllib.request.urlopen(request, timeout=_PROBE_SECONDS) as response:
    return int(response.headers.get('Content-Length') or 0)


def _check_space(dataset: str, root: pathlib.Path, needed: int) -> None:
  there = next(path for path in (root, *root.absolute().parents) if path.exists())
  free = shutil.disk_usage(there).free
  if free < needed:
    left = ''.join(
      f', or delete {path}, of a preparation that did not end'
      for path in (root / dataset).glob('incomplete.*')  # what TFDS has not yet renamed
    )
    raise UserError(
      f'preparing {dataset} takes up to {needed / 2**30:,.1f} GiB in {root}, where '
      f'{free / 2**30:,.1f} GiB are free; give a folder on a larger disk by --data_dir{left}'
    )


def _build(dataset: str, root: pathlib.Path, archives: str) -> None:
  import tensorflow_datasets as tfds

  try:
    root.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise UserError(
      f'{root} cannot be made: {e.strerror}; give another folder by --data_dir'
    ) from e
  where = {'data_dir': os.fspath(root), 'file_format': 'array_record'}
  if dataset == 'imagenet2012':
    builder = tfds.builder(dataset, **where)
    # The published sizes, with which TFDS's progress bars can say how much is left.
    sizes = sources.describe(dataset, os.fspath(root)).num_examples
    parts = [tfds.core.SplitInfo(name=k, shard_lengths=[n], num_bytes=0) for k, n in sizes.items()]
    builder.info.set_splits(tfds.core.splits.SplitDict(parts))
  else:
    builder = _cifar_builder(dataset)(**where)
  manual_dir = os.fspath(pathlib.Path(archives).expanduser()) if archives else None
  config = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
  # A download and imagenet2012 take long, and show how far they are; the rest takes a minute.
  show = not archives or dataset == 'imagenet2012'
  tfds.display_progress_bar(show)
  try:
    with contextlib.nullcontext() if show else contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare(download_config=config)
  except Exception as e:
    if type(e).__name__ == 'NonMatchingChecksumError':  # TFDS does not export it
      url, names = _ARCHIVES[dataset]
      raise UserError(
        f'{names[0]} is damaged or cut short (wrong checksum); fetch it again from {url}'
      ) from e
    if isinstance(e, OSError | tarfile.TarError):
      raise UserError(f'{dataset} could not be prepared in {root}: {e}') from e
    raise


def _cifar_builder(dataset: str):
  """TFDS's builder class of a CIFAR, with the two steps that need TensorFlow replaced."""
  import cv2
  import tensorflow_datasets as tfds
  from tensorflow_datasets.image_classification import cifar

  base = {'cifar10': cifar.Cifar10, 'cifar100': cifar.Cifar100}[dataset]
  with tfds.core.registered.skip_registration():

    class Builder(base):
      name = base.name
      __module__ = base.__module__  # where TFDS looks for the archive's checksum

      def _split_generators(self, dl_manager):
        url, names = _ARCHIVES[dataset]
        info = self._cifar_info
        with tarfile.open(dl_manager.download(url + names[0])) as tar:
          files = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}
        for key, file in zip(info.label_keys, info.label_files, strict=True):
          self.info.features[key].names = files[info.prefix + file].decode().split()
        blobs = {
          split: b''.join(files[info.prefix + file] for file in wanted)
          for split, wanted in (('train', info.train_files), ('test', info.test_files))
        }
        return {split: self._generate_examples(split, blob) for split, blob in blobs.items()}

      def _generate_examples(self, split, blob):
        """Records are the label bytes and then 3 x 32 x 32 pixel bytes."""
        keys = self._cifar_info.label_keys
        for i, row in enumerate(np.frombuffer(blob, np.uint8).reshape(-1, len(keys) + 3072)):
          bgr = row[len(keys) :].reshape(3, 32, 32)[::-1].transpose(1, 2, 0)
          png = cv2.imencode('.png', np.ascontiguousarray(bgr))[1].tobytes()
          labels = dict(zip(keys, map(int, row), strict=False))
          yield i, {'id': f'{split}_{i:05d}', 'image': png, **labels}

  return Builder
