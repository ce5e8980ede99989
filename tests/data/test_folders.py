import os
import shutil

import pytest

from afi_flax.data import folders
from afi_flax.errors import UserError

CLASSES = ('ant', 'bee', 'cat')


def open_split(root, split='train', start=0, stop=None) -> folders.Pictures:
  return folders.open_split(str(root), CLASSES, split, start, stop)


def test_pictures_are_the_files_and_labels_the_folders(picture_folder):
  assert folders.describe(str(picture_folder)) == ({'train': 21, 'val': 6}, CLASSES)
  train = open_split(picture_folder)
  names = [train.name(i) for i in range(21)]
  assert sorted(names) == sorted(map(str, picture_folder.glob('train/*/*.jpg')))
  for i, name in enumerate(names):
    data, label = train.read(i)
    assert f'/{CLASSES[label]}/' in name
    with open(name, 'rb') as file:
      assert file.read() == data


def test_a_part_of_a_folder_has_all_classes_and_new_files_move_no_others(picture_folder):
  root = picture_folder / 'train'  # a folder of class folders has one split
  assert folders.describe(str(root))[0] == {'train': 21}
  kept, held_out = open_split(root, stop=17), open_split(root, start=17)
  names = [[s.name(i) for i in range(len(s))] for s in (kept, held_out)]
  assert (len(names[0]), len(names[1])) == (17, 4)
  assert not set(names[0]) & set(names[1])
  assert {kept.read(i)[1] for i in range(17)} == {0, 1, 2}
  assert len({held_out.read(i)[1] for i in range(4)}) > 1
  order = names[0] + names[1]
  shutil.copy(order[0], root / 'bee/new.jpg')
  folders.list_pictures.cache_clear()
  more = open_split(root)
  renewed = [more.name(i) for i in range(22)]
  assert [name for name in renewed if 'new' not in name] == order


def test_what_is_a_picture_and_what_a_class(picture_folder, caplog):
  train = picture_folder / 'train'
  (train / '.hidden').mkdir()
  for other in ('ant/notes.txt', 'bee/b.heic', 'bee/c.HEIC', 'bee/.DS_Store'):
    (train / other).write_text('no picture')
  (train / 'ant/deeper').mkdir()
  shutil.copy(train / 'ant/0.jpg', train / 'ant/deeper/ü x\n.JPEG')
  os.symlink(train, train / 'ant/loop')
  assert folders.describe(str(picture_folder)) == ({'train': 22, 'val': 6}, CLASSES)
  split = open_split(picture_folder)
  assert len(split) == 22
  [odd] = [i for i in range(22) if 'deeper' in split.name(i)]
  assert split.read(odd)[1] == 0
  links, left_out = (record.getMessage() for record in caplog.records)
  assert links.startswith('links to folders')
  assert left_out.startswith(f'{train}: 3 files have not the suffix of a picture')
  assert left_out.endswith(': 2 of .heic, 1 of .txt')


def test_a_class_may_be_called_train(picture_folder):
  os.rename(picture_folder / 'train/cat', picture_folder / 'train/test')
  assert folders.describe(str(picture_folder / 'train'))[1] == ('ant', 'bee', 'test')


def test_mistakes(picture_folder, tmp_path):
  def message(folder) -> str:
    folders.list_pictures.cache_clear()
    with pytest.raises(UserError) as e:
      folders.describe(str(folder))
    assert '\n' not in str(e.value)
    return str(e.value)

  assert message('') == (
    'image_folder needs a folder of pictures: add --config.data.data_dir=FOLDER'
  )
  assert message(tmp_path / 'nowhere').endswith(
    "nowhere' is not a folder; give one by --config.data.data_dir=FOLDER"
  )
  (tmp_path / 'empty').mkdir()
  assert 'empty has no class folders' in message(tmp_path / 'empty')
  (tmp_path / 'one/cat').mkdir(parents=True)
  assert 'has 1 class folders (cat); a classifier needs at least 2' in message(tmp_path / 'one')
  (tmp_path / 'one/dog').mkdir()
  assert 'has no pictures in class folders (cat, dog)' in message(tmp_path / 'one')
  (tmp_path / 'one/1.jpeg').touch()
  folders.list_pictures.cache_clear()
  assert message(tmp_path / 'one').endswith('; its 1 own pictures must be sorted into them')
  (picture_folder / 'train/dog').mkdir()
  assert 'has no pictures of dog; add some or remove it' in message(picture_folder)
  (picture_folder / 'train/dog').rmdir()
  (picture_folder / 'val/dog').mkdir()
  assert 'val has classes that train has not: dog; remove them' in message(picture_folder)
