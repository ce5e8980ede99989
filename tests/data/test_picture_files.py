"""Which files are meant, and that they are decoded as evaluation decodes them."""

import os
import shutil

import numpy as np
import pytest

from afi_flax.data import picture_files, pipeline, sources
from afi_flax.errors import UserError
from tests.data.conftest import write_picture


@pytest.fixture
def photos(tmp_path, monkeypatch):
  """photos/ with three pictures and other things, and the working directory beside it."""
  monkeypatch.chdir(tmp_path)
  for name in ('b.PNG', 'a.jpg', 'sub/deep/c.webp'):
    write_picture(tmp_path / 'photos' / name.lower(), seed=1)
  os.rename('photos/b.png', 'photos/b.PNG')
  (tmp_path / 'photos/notes.txt').write_text('of the pictures')
  (tmp_path / 'photos/sub/README').write_text('too')
  return tmp_path / 'photos'


IN_PHOTOS = ['photos/a.jpg', 'photos/b.PNG', 'photos/sub/deep/c.webp']


@pytest.mark.parametrize(
  ('names', 'paths'),
  [
    (['photos'], IN_PHOTOS),
    (['photos/b.PNG', 'photos/notes.txt'], ['photos/b.PNG', 'photos/notes.txt']),
    (['photos/sub', 'photos/a.jpg'], [IN_PHOTOS[2], 'photos/a.jpg']),
    (['photos/*'], ['photos/a.jpg', 'photos/b.PNG', 'photos/notes.txt', IN_PHOTOS[2]]),
    (['photos/**'], [*IN_PHOTOS[:2], 'photos/notes.txt', 'photos/sub/README', IN_PHOTOS[2]]),
    (['photos/**/*.[pw]*'], ['photos/sub/deep/c.webp']),
    (['photos/a.jpg', 'photos/a.jpg'], ['photos/a.jpg'] * 2),
  ],
  ids=lambda names: names[0],
)  # fmt: skip
def test_what_is_found(photos, names, paths):
  listed = picture_files.find(names)
  assert list(listed) == list(listed) == paths
  assert len(listed) == listed.count == len(paths)
  assert listed.longest == max(map(len, paths))


def test_a_file_whose_name_looks_like_a_pattern(photos):
  os.rename('photos/a.jpg', 'photos/a[1].jpg')
  assert list(picture_files.find(['photos/a[1].jpg'])) == ['photos/a[1].jpg']


def test_the_home_folder(photos, monkeypatch):
  monkeypatch.setenv('HOME', str(photos))
  assert list(picture_files.find(['~/a.jpg'])) == [f'{photos}/a.jpg']


def test_links(photos, caplog):
  """As in folders to train on: links to files count, links to folders do not but may be given."""
  (photos / 'again.jpg').symlink_to('a.jpg')
  (photos / 'loop').symlink_to('.')
  (photos / 'gone.jpg').symlink_to('nothing')
  listed = picture_files.find(['photos'])
  first = ['a.jpg', 'again.jpg', 'b.PNG', 'gone.jpg']
  assert list(listed) == [*(f'photos/{name}' for name in first), IN_PHOTOS[2]]
  assert [record.getMessage() for record in caplog.records] == [
    'photos/loop is a link to a folder, not followed; give it by itself',
    'photos: 2 files have not the suffix of a picture and are left out: 1 of .txt, 1 of no suffix',
  ]
  assert len(picture_files.find(['photos/loop'])) == 5


@pytest.mark.parametrize(
  ('name', 'says'),
  [
    ('photo', r"^no such file, folder or pattern: 'photo'; paths are relative to /"),
    ('photos/*.gif', r"^the pattern 'photos/\*.gif' matches nothing; paths are relative to /"),
    ('photos/empt?', r"^the pattern 'photos/empt\?' matches 1 folder without pictures; "),
    ('photos/empty', r'empty has no files with the suffix of a picture \(.jpg, .*\), only nothing'),
    (
      'photos/texts',
      r"^photos/texts has no .*, only 2 of .txt, 1 of no suffix; 'photos/texts/\*' takes files",
    ),
    ('gs://bucket/a.jpg', "^'gs://bucket/a.jpg' is not on a file system; copy it"),
    ('a\nb', r"^no such file, folder or pattern: 'a\\nb'"),
  ],
)
def test_mistakes(photos, name, says):
  (photos / 'empty').mkdir()
  (photos / 'texts/more').mkdir(parents=True)
  for file in ('a.txt', 'more/b.TXT', 'Makefile'):
    (photos / 'texts' / file).touch()
  with pytest.raises(UserError, match=says):
    picture_files.find(['photos/a.jpg', name])


@pytest.mark.skipif(os.geteuid() == 0, reason='root may list any folder')
def test_a_folder_that_cannot_be_listed(photos):
  (photos / 'sub').chmod(0)
  with pytest.raises(UserError, match='photos/sub cannot be listed'):
    picture_files.find(['photos'])
  (photos / 'sub').chmod(0o755)


def test_lines():
  lines = [b'a.jpg\n', b'\n', b'b c.png\r\n', b'\xff.png']
  assert list(picture_files.from_lines(lines)) == ['a.jpg', 'b c.png', os.fsdecode(b'\xff.png')]


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_pixels_are_those_of_evaluation(picture_folder, workers):
  """Of the same files, with one that cannot be read and one under another format's name."""
  val = picture_folder / 'val'
  shutil.rmtree(picture_folder / 'train')
  (val / 'bee/1.jpg').write_text('not a picture')
  write_picture(val / 'cat/2.png', seed=3, size=(33, 70))
  os.rename(val / 'cat/2.png', val / 'cat/2.jpg')
  source = sources.open_split('image_folder', str(picture_folder), 'val')
  how = {'batch_size': 4, 'image_size': 16, 'resize': 20, 'workers': workers}
  by_name = {}
  for batch in pipeline.eval_batches(source, **how):
    for example, image, mask in zip(batch['example'], batch['image'], batch['mask'], strict=True):
      by_name[source.name(example) if example >= 0 else None] = image, mask
  files = picture_files.Files(tuple(picture_files.find([str(val)])))
  seen = []
  for batch, reasons in pipeline.read_batches(files, **how):
    assert batch['image'].shape == (4, 16, 16, 3)
    assert 'bad' not in batch
    for example, image, mask in zip(batch['example'], batch['image'], batch['mask'], strict=True):
      name = files.name(example) if example >= 0 else None
      np.testing.assert_array_equal(image, by_name[name][0])
      assert mask == by_name[name][1] == (name is not None and 'bee/1' not in name)
      assert reasons.get(example) == (
        'not a picture of a known format' if name and not mask else None
      )
      seen.append(name)
  assert seen == [*sorted(by_name.keys() - {None}), None]


@pytest.mark.parametrize(
  ('path', 'why'),
  [
    ('gone.jpg', 'No such file'),
    ('folder', 'Is a directory'),
    ('pipe', 'a pipe or device'),
    ('a\0b', 'a zero byte'),
    ('x' * 300, 'name too long'),
  ],
)
def test_what_cannot_be_read(tmp_path, monkeypatch, path, why):
  monkeypatch.chdir(tmp_path)
  os.mkdir('folder')
  os.mkfifo('pipe')
  files = picture_files.Files((path,))
  with pytest.raises(OSError, match=why):
    files.read(0)
  assert files.name(0).isprintable()
