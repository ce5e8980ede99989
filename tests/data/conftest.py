"""Small pictures and a small prepared set on disk."""

import io
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image

from afi_flax.data import prepare


def write_picture(path: pathlib.Path, seed: int, size: tuple[int, int] = (40, 30)) -> None:
  """A smooth random picture; the suffix chooses the format."""
  path.parent.mkdir(parents=True, exist_ok=True)
  coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
  Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def picture_folder(tmp_path) -> pathlib.Path:
  """train/ with 3 x 7 and val/ with 3 x 2 JPEGs of different sizes."""
  root = tmp_path / 'pictures'
  for c, name in enumerate(['ant', 'bee', 'cat']):
    for i in range(7):
      write_picture(root / 'train' / name / f'{i}.jpg', 10 * c + i, (40 + i, 30 + c))
    for i in range(2):
      write_picture(root / 'val' / name / f'{i}.jpg', 100 + 10 * c + i)
  return root


TINY_PIXELS = {
  split: np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
  for seed, (split, n) in enumerate({'train': 60, 'test': 20}.items())
}


def write_cifar100_archive(folder: pathlib.Path) -> None:
  """TINY_PIXELS laid out as the official archive; example i of a split has label i."""
  files = {
    f'{split}.bin': b''.join(
      bytes([i % 20, i]) + image.transpose(2, 0, 1).tobytes() for i, image in enumerate(images)
    )
    for split, images in TINY_PIXELS.items()
  }
  files['coarse_label_names.txt'] = '\n'.join(f'coarse{i}' for i in range(20)).encode()
  files['fine_label_names.txt'] = '\n'.join(f'fine{i}' for i in range(100)).encode()
  with tarfile.open(folder / 'cifar-100-binary.tar.gz', 'w:gz') as tar:
    for name, data in files.items():
      member = tarfile.TarInfo(f'cifar-100-binary/{name}')
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope='session')
def tiny_archives(tmp_path_factory) -> pathlib.Path:
  """A folder with a small cifar-100-binary.tar.gz."""
  folder = tmp_path_factory.mktemp('archives')
  write_cifar100_archive(folder)
  return folder


@pytest.fixture(scope='session')
def tiny_cifar100(tiny_archives, tmp_path_factory) -> tuple[pathlib.Path, np.ndarray]:
  """A TFDS folder prepared from the small archive, and its training pictures [60,32,32,3]."""
  from tensorflow_datasets.core.download import checksums

  data_dir = tmp_path_factory.mktemp('tfds')
  url = 'https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz'
  sums = {url: checksums.compute_url_info(tiny_archives / 'cifar-100-binary.tar.gz')}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checksums, 'load_url_infos', lambda path: dict(sums))
    message = prepare.prepare('cifar100', str(data_dir), str(tiny_archives))
  assert message == f'prepared cifar100 in {data_dir}/cifar100/3.0.2: 60 train, 20 test examples'
  return data_dir, TINY_PIXELS['train']
