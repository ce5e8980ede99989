"""ImageNet in small: real layouts, names and classes, tiny pictures; made without TensorFlow."""

import functools
import io
import pathlib
from collections.abc import Iterable

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as original


@functools.cache
def jpeg(seed: int) -> bytes:
  """A smooth random picture of 40 x 36."""
  coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
  file = io.BytesIO()
  Image.fromarray(coarse).resize((40, 36), Image.Resampling.BICUBIC).save(file, 'JPEG')
  return file.getvalue()


def validation_name(seed: int) -> str:
  return f'ILSVRC2012_val_{seed + 1:08}.JPEG'


def write_prepared(data_dir: pathlib.Path, train: Iterable, validation: Iterable) -> None:
  """imagenet2012 as TFDS prepares it, shuffled by its hash; splits are (file name, seed, label)."""
  with tfds.core.registered.skip_registration():

    class Builder(original.Builder):
      name = 'imagenet2012'
      __module__ = original.__name__

      def _split_generators(self, dl_manager):
        return {name: self._generate(split) for name, split in splits.items()}

      def _generate(self, split):
        for file_name, seed, label in split:
          image = io.BytesIO(jpeg(seed))
          yield file_name, {'file_name': file_name, 'image': image, 'label': label}

  splits = {'train': train, 'validation': validation}
  tfds.disable_progress_bar()
  config = tfds.download.DownloadConfig(try_download_gcs=False)
  builder = Builder(data_dir=str(data_dir), file_format='array_record')
  builder.download_and_prepare(download_config=config)


def write_folders(root: pathlib.Path, names: Iterable[str], pictures: Iterable) -> None:
  """Class folders `names`, and in them pictures: (class folder, file name, seed)."""
  for name in names:
    (root / name).mkdir(parents=True)
  for name, file_name, seed in pictures:
    (root / name / file_name).write_bytes(jpeg(seed))
