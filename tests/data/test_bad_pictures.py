"""Folders with damaged pictures, odd names, links and no permissions, through the pipeline."""

import contextlib
import itertools
import os
import pathlib
import shutil
import socket

import numpy as np
import pytest

from afi_flax.data import folders, pipeline, sources
from afi_flax.errors import UserError
from tests.data import odd_pictures

JPEG = odd_pictures.encode(odd_pictures.picture(), 'JPEG')

named = pytest.mark.fault(
  'picture',
  'names with spaces, quotes, line breaks, bytes of no text',
  'read; a line each in the log',
)
folder_fault = pytest.mark.fault(
  'picture', 'class folders: link loops, dead links, no permission', 'refused, naming the folder'
)


@pytest.fixture(autouse=True)
def _list_again():
  folders.list_pictures.cache_clear()


@pytest.fixture
def root(tmp_path) -> pathlib.Path:
  """Two classes of four good pictures."""
  for name, i in itertools.product(['ant', 'bee'], range(4)):
    (tmp_path / 'root' / name).mkdir(parents=True, exist_ok=True)
    (tmp_path / 'root' / name / f'{i}.jpg').write_bytes(JPEG)
  return tmp_path / 'root'


def train(root, **more) -> list[pipeline.Batch]:
  """Two epochs."""
  source = sources.open_split('image_folder', str(root), 'train')
  options = {'seed': 0, 'data_step': 0, 'augment': 'random_resized_crop_flip', 'image_size': 8}
  batches = pipeline.train_batches(source, batch_size=len(source), **options, **more)
  with contextlib.closing(batches):
    return list(itertools.islice(batches, 2))


def evaluate(root, **more) -> pipeline.Batch:
  source = sources.open_split('image_folder', str(root), 'train')
  [batch] = pipeline.eval_batches(source, batch_size=len(source), image_size=8, **more)
  return batch


def said(caplog) -> list[str]:
  messages = [record.getMessage() for record in caplog.records]
  caplog.clear()
  assert not any('\n' in message for message in messages)
  return messages


def check(root, file, reason, caplog) -> None:
  """Replaced in training, masked in evaluation, named both times, and counted."""
  source = sources.open_split('image_folder', str(root), 'train')
  [example] = [i for i in range(9) if source.name(i).endswith(f'/{file}')]
  name = source.name(example)
  for batch in train(root, max_unreadable=1):
    assert example not in batch['example']
    assert len(batch['example']) == 9
    assert batch['image'].any(axis=(1, 2, 3)).all()
  [message] = said(caplog)
  assert message.startswith(f'cannot read {name} (example {example}): {reason}')
  assert message.endswith('; replaced by the next')
  batch = evaluate(root, max_unreadable=1)
  assert batch['example'].tolist() == list(range(9))
  assert np.flatnonzero(batch['mask'] == 0).tolist() == [example]
  [message] = said(caplog)
  assert message.startswith(f'cannot read {name} (example {example}): {reason}')
  assert message.endswith('; left out of the evaluation')
  for read in (train, evaluate):
    with pytest.raises(UserError) as e:
      read(root, max_unreadable=0)
    assert str(e.value).startswith('1 picture cannot be read and data.max_unreadable is 0; ')
    assert f'{name} ({reason}' in str(e.value)
  caplog.clear()


@pytest.mark.fault(
  'picture', 'cut off, empty, text, a bomb, too large a file', 'replaced or masked; named, counted'
)
@pytest.mark.parametrize(
  ('data', 'reason'),
  [
    (JPEG[:-99], 'damaged picture: image file is truncated'),
    (b'', 'an empty file'),
    (b'no picture', 'not a picture of a known format'),
    (b'\0' * 5000, 'not a picture of a known format'),
    (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'not a picture of a known format'),
    (odd_pictures.jpeg_of_size(20_000, 20_000), '20000 x 20000 pixels are more than 178956970'),
    (odd_pictures.png_of_size(20_000, 20_000), 'more than 178956970 pixels'),
  ],
  ids=['cut off', 'empty', 'text', 'zeros', 'SVG', 'JPEG bomb', 'PNG bomb'],
)
def test_a_file_that_is_no_picture(root, data, reason, caplog):
  (root / 'bee/odd.jpg').write_bytes(data)
  check(root, 'odd.jpg', reason, caplog)


def unfinished_link(path):
  path.symlink_to('nowhere.jpg')


def link_to_itself(path):
  path.symlink_to(path.name)


def links_in_a_ring(path):
  path.symlink_to('.other')
  (path.parent / '.other').symlink_to(path.name)


def endless_device(path):
  path.symlink_to('/dev/zero')


def listening_socket(path):
  with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as there:  # names are short
    there.bind(path.name)


def far_too_large_a_file(path):
  with open(path, 'wb') as file:
    file.truncate(1 << 40)  # all of it a hole


@pytest.mark.fault(
  'picture', 'a pipe, socket, device, link loop, dead link or 1 TiB', 'the same, at once'
)
@pytest.mark.parametrize(
  ('make', 'reason'),
  [
    (os.mkfifo, 'not a file but a pipe or device'),
    (endless_device, 'not a file but a pipe or device'),
    (listening_socket, 'No such device or address'),
    (unfinished_link, 'No such file or directory'),
    (link_to_itself, 'Too many levels of symbolic links'),
    (links_in_a_ring, 'Too many levels of symbolic links'),
    (far_too_large_a_file, '1048576 MiB are more than 1024'),
  ],
)
def test_what_is_no_file(root, make, reason, caplog):
  make(root / 'bee/odd.jpg')
  check(root, 'odd.jpg', reason, caplog)


@pytest.fixture
def as_nobody(tmp_path):
  """A call whose body runs without root's rights, where the tests have them."""

  @contextlib.contextmanager
  def within():
    if os.geteuid():
      yield
      return
    for folder in (tmp_path, *list(tmp_path.parents)[:-2]):  # where nobody must come through
      folder.chmod(folder.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
      yield
    finally:
      os.seteuid(0)

  return within


@pytest.mark.fault(
  'picture', 'a file without permission to read it', 'replaced or masked; named, counted'
)
def test_a_file_without_permission(root, as_nobody, caplog):
  evaluate(root)  # so that all is imported
  (root / 'bee/odd.jpg').write_bytes(JPEG)
  (root / 'bee/odd.jpg').chmod(0)
  folders.list_pictures.cache_clear()
  with as_nobody():
    check(root, 'odd.jpg', 'Permission denied', caplog)


def message(root) -> str:
  with pytest.raises(UserError) as e:
    sources.describe('image_folder', str(root))
  assert '\n' not in str(e.value)
  return str(e.value)


@folder_fault
@pytest.mark.parametrize('path', ['.', 'bee', 'bee/deeper'])
def test_a_folder_without_permission(root, path, as_nobody):
  (root / path).mkdir(exist_ok=True)
  (root / path).chmod(0)
  with as_nobody():
    assert message(root) == f'{root / path} cannot be listed (Permission denied); mend or remove it'
  (root / path).chmod(0o755)


@folder_fault
def test_a_path_that_is_too_long_to_be_listed(root):
  deep = os.open(root / 'bee', os.O_RDONLY)
  for _ in range(20):
    os.mkdir('d' * 250, dir_fd=deep)
    deep, above = os.open('d' * 250, os.O_RDONLY, dir_fd=deep), deep
    os.close(above)
  os.close(deep)
  assert message(root).endswith(' cannot be listed (File name too long); mend or remove it')


@folder_fault
@pytest.mark.parametrize('target', ['.', '..', '/', '../HERE/loop2/..'])
def test_a_class_that_is_a_link_to_what_holds_it(root, target):
  """Its pictures would be all others', under its label."""
  (root / 'loop2').mkdir()
  (root / 'loop').symlink_to(target.replace('HERE', root.name))
  assert message(root) == f'{root}/loop is a link to a folder that holds it; remove it'


@folder_fault
@pytest.mark.parametrize(
  ('target', 'why'),
  [('nowhere', 'No such file or directory'), ('cow', 'Too many levels of symbolic links')],
)
def test_a_class_that_is_a_link_to_nowhere(root, target, why):
  """It would be missing, and the classes after it have other labels."""
  (root / 'cow').symlink_to(target)
  assert message(root) == f'{root}/cow is a link that leads nowhere ({why}); mend or remove it'


@folder_fault
def test_links_inside_a_class_are_not_followed_and_named(root, tmp_path, caplog):
  (tmp_path / 'more').mkdir()
  (tmp_path / 'more/9.jpg').write_bytes(JPEG)
  for name, target in [('loop', '.'), ('up', '../..'), ('more', tmp_path / 'more')]:
    (root / 'bee' / name).symlink_to(target)
  assert sources.describe('image_folder', str(root)).num_examples == {'train': 8}
  want = ', '.join(f'{root}/bee/{name}' for name in ('loop', 'more', 'up'))
  assert said(caplog) == [f'links to folders in class folders are not followed: {want}']


def test_a_class_may_be_a_link_and_so_may_its_pictures(root, tmp_path, caplog):
  shutil.move(root / 'bee', tmp_path / 'elsewhere')
  (root / 'bee').symlink_to(tmp_path / 'elsewhere')
  (root / 'bee/linked.jpg').symlink_to('0.jpg')
  assert evaluate(root)['mask'].tolist() == [1] * 9
  assert not said(caplog)


NAMES = [
  b'a b', b' ', b'it\'s "q"', b'new\nline\r', b'\t\x1b[31m', 'ü ñ 猫'.encode(), b'\xff\xfe',
  b'%s %d', b'-x', b'$(x); `y`', b'\\n', '\u202e\u2028'.encode(), b'x' * 250, b'*?[a]',
]  # fmt: skip


@named
def test_files_of_any_name(root, caplog):
  for i, name in enumerate(NAMES):
    with open(os.path.join(os.fsencode(root / 'bee'), name + b'.jpg'), 'wb') as file:
      file.write(JPEG if i % 2 else b'')
  source = sources.open_split('image_folder', str(root), 'train')
  assert len(source) == 8 + len(NAMES)
  batch = evaluate(root)
  assert batch['mask'].sum() == 8 + len(NAMES) // 2
  messages = said(caplog)
  bad = [source.name(i) for i in np.flatnonzero(batch['mask'] == 0)]
  assert len(set(bad)) == len(messages) == len(NAMES) // 2
  assert all(any(name in message for message in messages) for name in bad)
  assert all(name.isprintable() for name in bad)
  assert f'{root}/bee/\\udcff\\udcfe.jpg' in bad


@named
def test_classes_of_any_name(tmp_path):
  root = os.fsencode(tmp_path / 'a\n"b" \udcff')
  for name in NAMES:
    os.makedirs(os.path.join(root, name))
    with open(os.path.join(root, name, b'1.jpg'), 'wb') as file:
      file.write(JPEG)
  info = sources.describe('image_folder', os.fsdecode(root))
  assert sorted(map(os.fsencode, info.class_names)) == sorted(NAMES)
  source = sources.open_split('image_folder', os.fsdecode(root), 'train')
  for i in range(len(NAMES)):
    data, label = source.read(i)
    assert data == JPEG
    assert info.class_names[label] in os.fsdecode(source.part(i, i + 1).paths[0])
  os.remove(os.path.join(root, b'new\nline\r', b'1.jpg'))
  folders.list_pictures.cache_clear()
  assert message(os.fsdecode(root)) == (
    f'{tmp_path}/a\\n"b" \\udcff has no pictures of new\\nline\\r; add some or remove it'
  )


many = pytest.mark.fault(
  'picture', '2,000 classes; names that differ only in case', 'a label each; a warning'
)


@many
def test_thousands_of_classes(tmp_path):
  (tmp_path / '1.jpg').write_bytes(JPEG)
  for i in range(2000):
    (tmp_path / f'root/c{i:04d}').mkdir(parents=True)
    os.link(tmp_path / '1.jpg', tmp_path / f'root/c{i:04d}/1.jpg')
  batch = evaluate(tmp_path / 'root')
  assert sorted(batch['label']) == list(range(2000))
  source = sources.open_split('image_folder', str(tmp_path / 'root'), 'train')
  assert all(f'/c{source.labels[i]:04d}/' in source.name(i) for i in range(2000))
  os.remove(tmp_path / 'root/c0007/1.jpg')
  folders.list_pictures.cache_clear()
  assert message(tmp_path / 'root').endswith('has no pictures of c0007; add some or remove it')


@many
def test_names_that_differ_only_in_case_are_classes_of_their_own(tmp_path, caplog):
  names = ['Straße', 'STRASSE', 'cat', 'Cat', 'caf\u00e9', 'cafe\u0301', 'dog']
  for name in names:
    (tmp_path / 'root' / name).mkdir(parents=True)
    (tmp_path / 'root' / name / '1.jpg').write_bytes(JPEG)
  if len(os.listdir(tmp_path / 'root')) < 7:
    pytest.skip('a file system that takes them for one')
  info = sources.describe('image_folder', str(tmp_path / 'root'))
  assert sorted(info.class_names) == sorted(names)
  assert sorted(evaluate(tmp_path / 'root')['label']) == list(range(7))
  messages = said(caplog)
  assert len(messages) == 3
  assert messages[0].startswith(f"{tmp_path / 'root'}: 'Cat', 'cat' are 2 classes, whose names")
