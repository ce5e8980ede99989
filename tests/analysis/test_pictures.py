import numpy as np
import pytest
from PIL import Image

from afi_flax.analysis import pictures
from afi_flax.data import sources
from afi_flax.errors import UserError
from afi_flax.run import Preprocessing

HOW = Preprocessing(16, 18, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
CLASSES = ('cat', 'dog')


@pytest.fixture
def folder(tmp_path):
  """Four pictures of each class and a note."""
  for label, name in enumerate(CLASSES):
    (tmp_path / name).mkdir()
    for k in range(4):
      Image.new('RGB', (30, 20), (60 * k, 100 * label, 0)).save(tmp_path / name / f'{k}.png')
  (tmp_path / 'note.txt').write_text('no picture')
  return tmp_path


def test_files_are_all_taken_in_their_order(folder):
  (folder / 'x.png').write_bytes((folder / 'dog/1.png').read_bytes())
  paths = [str(folder / name) for name in ('dog/3.png', 'x.png', 'cat/0.png')]
  found = pictures.named(paths, CLASSES, HOW, count=1, seed=0)
  assert [picture.name for picture in found] == paths
  assert [picture.label for picture in found] == [1, None, 0], 'by the folder'
  images = pictures.batch(found, HOW)
  assert images.shape == (3, 16, 16, 3)
  assert images[:, 0, 0].tolist() == [[180, 100, 0], [60, 100, 0], [0, 0, 0]]


def test_of_a_folder_a_seeded_sample(folder):
  some = [pictures.named([str(folder)], CLASSES, HOW, 3, seed) for seed in (0, 0, 1)]
  names = [[picture.name for picture in each] for each in some]
  assert names[0] == names[1] != names[2]
  assert len(set(names[0])) == 3
  assert len(pictures.named([str(folder)], CLASSES, HOW, 99, 0)) == 8


def test_mistakes_are_named(folder, tmp_path):
  with pytest.raises(UserError, match=r'none.png cannot be read: No such file .*--images'):
    pictures.named([str(folder / 'none.png')], CLASSES, HOW, 8, 0)
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match='empty has no pictures'):
    pictures.named([str(tmp_path / 'empty')], CLASSES, HOW, 8, 0)
  (note,) = pictures.named([str(folder / 'note.txt')], CLASSES, HOW, 8, 0)
  with pytest.raises(UserError, match=r'note.txt cannot be read: .*--images'):
    note.cut(HOW)
  with pytest.raises(UserError, match='more than the 64 pictures that a figure has room'):
    pictures.named([str(folder / 'cat/0.png')] * 65, CLASSES, HOW, 8, 0)


def test_examples_of_a_set_in_memory():
  rng = np.random.default_rng(0)
  source = sources.Arrays(rng.integers(0, 256, (20, 16, 16, 3), np.uint8), np.arange(20) % 2)
  found = pictures.sample(source, 'test', HOW, 5, seed=3)
  numbers = [int(picture.name.removeprefix('test example ')) for picture in found]
  assert len(set(numbers)) == 5
  for picture, k in zip(found, numbers, strict=True):
    np.testing.assert_array_equal(picture.cut(HOW), source.images[k])
    assert picture.label == k % 2
  assert pictures.examples(source, 'test', numbers)[2].name == found[2].name


def test_examples_that_cannot_be_read_are_passed_over(folder):
  for k in range(4):
    (folder / f'cat/{k}.png').write_bytes(b'not a picture')
  source = sources.open_split('image_folder', str(folder), 'train')
  found = pictures.sample(source, 'train', HOW, 8, seed=0)
  assert [picture.label for picture in found] == [1] * 4
  assert sorted(picture.name for picture in found) == [f'{k}.png' for k in range(4)]


def test_files_of_a_folder_that_cannot_be_read_are_passed_over(folder):
  (folder / 'cat/gone.png').symlink_to('nowhere')
  for k in range(4):
    (folder / f'cat/{k}.png').write_bytes(b'not a picture')
  found = pictures.named([str(folder)], CLASSES, HOW, 3, seed=0)
  assert [picture.label for picture in found] == [1] * 3
  with pytest.raises(UserError, match=r'cat has no pictures that can be read; .*--images'):
    pictures.named([str(folder / 'cat')], CLASSES, HOW, 3, seed=0)
