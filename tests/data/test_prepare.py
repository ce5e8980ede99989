import functools
import http.server
import io
import pathlib
import socket
import tarfile
import threading
import time
import types

import pytest

from afi_flax.data import array_records, prepare, sources
from afi_flax.errors import UserError


def test_what_needs_no_preparing():
  for dataset in ('digits', 'fake_cifar', 'fake_imagenet', 'image_folder'):
    assert prepare.prepare(dataset) == f'{dataset} needs no preparing'


def test_cifar_from_an_archive_and_then_again(tiny_cifar100):
  """The fixture prepared it; its pictures are compared in test_array_records."""
  data_dir, _ = tiny_cifar100
  prepared = array_records.find_prepared('cifar100', str(data_dir))
  assert array_records.file_format(prepared) == 'array_record'
  message = prepare.prepare('cifar100', str(data_dir))
  assert message == f'cifar100 is already prepared in {prepared}'


def test_cifar_by_download(tmp_path, tiny_archives, monkeypatch):
  handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tiny_archives)
  monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, 'log_message', lambda *_: None)
  monkeypatch.setenv('no_proxy', '*')
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}/'
    names = prepare._ARCHIVES['cifar100'][1]
    monkeypatch.setitem(prepare._ARCHIVES, 'cifar100', (url, names))
    with monkeypatch.context() as small_disk:  # which holds either the archive or what it becomes
      free_space(small_disk, 2 * (tiny_archives / names[0]).stat().st_size - 1)
      with pytest.raises(UserError, match=r'preparing cifar100 takes up to .* by --data_dir'):
        prepare.prepare('cifar100', str(tmp_path))
      assert not list(tmp_path.iterdir())
    message = prepare.prepare('cifar100', str(tmp_path))
    server.shutdown()
  assert message.endswith('60 train, 20 test examples')
  assert len(sources.open_split('cifar100', str(tmp_path), 'train')) == 60


def free_space(monkeypatch, size: int) -> list[pathlib.Path]:
  """Makes every disk have so many bytes free; the folders that are asked for."""
  asked = []

  def usage(folder):
    asked.append(pathlib.Path(folder))
    return types.SimpleNamespace(free=size)

  monkeypatch.setattr(prepare.shutil, 'disk_usage', usage)
  return asked


@pytest.mark.parametrize('with_test_set', [False, True])
def test_too_small_a_disk_is_said_before_anything_is_written(
  tmp_path, monkeypatch, with_tensorflow, with_test_set
):
  sizes = {'train': 138, 'val': 6, 'test': 13} if with_test_set else {'train': 138, 'val': 6}
  for split, size in sizes.items():
    with (tmp_path / f'ILSVRC2012_img_{split}.tar').open('wb') as tar:
      tar.truncate(size << 30)  # takes no space
  needed = sum(sizes.values()) << 30
  asked = free_space(monkeypatch, needed - (1 << 30))
  with pytest.raises(UserError) as e:
    prepare.prepare('imagenet2012', f'{tmp_path}/new/tfds', str(tmp_path))
  assert str(e.value) == (
    f'preparing imagenet2012 takes up to {needed >> 30}.0 GiB in {tmp_path}/new/tfds, where '
    f'{(needed >> 30) - 1}.0 GiB are free; give a folder on a larger disk by --data_dir'
  )
  assert asked == [tmp_path]
  assert not (tmp_path / 'new').exists()
  free_space(monkeypatch, needed)
  built = []
  monkeypatch.setattr(prepare, '_build', lambda *arguments: built.append(arguments))
  prepare.prepare('imagenet2012', f'{tmp_path}/new/tfds', str(tmp_path))
  assert built == [('imagenet2012', tmp_path / 'new/tfds', str(tmp_path))]


def test_a_cifar_takes_its_archives_size(tmp_path, tiny_archives, monkeypatch):
  size = (tiny_archives / 'cifar-100-binary.tar.gz').stat().st_size
  free_space(monkeypatch, size - 1)
  with pytest.raises(UserError, match=r'preparing cifar100 takes up to .* by --data_dir'):
    prepare.prepare('cifar100', f'{tmp_path}/tfds', str(tiny_archives))
  assert not (tmp_path / 'tfds').exists()
  killed = tmp_path / 'tfds/cifar100/incomplete.ABC123_3.0.2'
  killed.mkdir(parents=True)
  with pytest.raises(UserError, match=f'or delete {killed}, of a preparation that did not end$'):
    prepare.prepare('cifar100', f'{tmp_path}/tfds', str(tiny_archives))


def test_a_damaged_archive_is_named(tmp_path):
  (tmp_path / 'cifar-10-binary.tar.gz').write_bytes(b'cut short')
  with pytest.raises(UserError, match=r'cifar-10-binary.tar.gz is damaged or cut short .* fetch'):
    prepare.prepare('cifar10', str(tmp_path / 'out'), str(tmp_path))
  assert array_records.find_prepared('cifar10', str(tmp_path / 'out')) is None


def test_a_folder_that_cannot_be_made(tmp_path, tiny_archives):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='file/tfds cannot be made: Not a directory; give another'):
    prepare.prepare('cifar100', f'{tmp_path}/file/tfds', str(tiny_archives))


@pytest.fixture
def with_tensorflow(monkeypatch):
  monkeypatch.setattr(prepare.importlib.util, 'find_spec', lambda name: object())


def test_an_archive_that_is_not_there(tmp_path, with_tensorflow):
  for dataset, file in [('cifar10', 'cifar-10-binary'), ('imagenet2012', 'ILSVRC2012_img_train')]:
    with pytest.raises(UserError) as e:
      prepare.prepare(dataset, str(tmp_path), str(tmp_path))
    message = str(e.value)
    assert f'{tmp_path} has no {file}.tar' in message
    assert f'--dataset {dataset} --data_dir {tmp_path} --archives A`' in message
    assert '\n' not in message


def test_without_a_network_it_fails_at_once_and_says_what_to_fetch(tmp_path, monkeypatch):
  def no_network(*args, **kwargs):
    raise socket.gaierror(-2, 'nobody answers')

  monkeypatch.setattr(socket, 'create_connection', no_network)
  begin = time.perf_counter()
  with pytest.raises(UserError) as e:
    prepare.prepare('cifar100', str(tmp_path))
  assert time.perf_counter() - begin < 5
  assert str(e.value) == (
    'https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz cannot be reached ([Errno -2] '
    'nobody answers); fetch cifar-100-binary.tar.gz from https://www.cs.toronto.edu/~kriz/, put '
    'into a folder A, and run '
    f'`python -m afi_flax.prepare --dataset cifar100 --data_dir {tmp_path} --archives A`'
  )


def test_imagenet_cannot_be_downloaded(tmp_path, with_tensorflow):
  with pytest.raises(UserError) as e:
    prepare.prepare('imagenet2012', str(tmp_path))
  assert 'ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from https://image-net.org' in str(
    e.value
  )


def test_tfrecord_files_are_left_alone(tmp_path):
  folder = tmp_path / 'cifar10/3.0.2'
  folder.mkdir(parents=True)
  (folder / 'dataset_info.json').write_text('{"fileFormat": "tfrecord"}')
  with pytest.raises(UserError, match=r'holds tfrecord files, .* give another --data_dir'):
    prepare.prepare('cifar10', str(tmp_path))


def test_imagenet_without_tensorflow_says_so_before_it_asks_for_archives(tmp_path, monkeypatch):
  monkeypatch.setattr(prepare.importlib.util, 'find_spec', lambda name: None)
  for archives in ('', str(tmp_path)):
    with pytest.raises(UserError, match=r"run `pip install -e '\.\[tensorflow\]'` in the clone"):
      prepare.prepare('imagenet2012', str(tmp_path), archives)


def write_imagenet_archives(folder: pathlib.Path) -> dict[str, bytes]:
  """Two training pictures of each of three classes, five for validation; by file name."""
  fake = sources.open_split('fake_imagenet', '', 'train')
  written = {}

  def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))

  with tarfile.open(folder / 'ILSVRC2012_img_train.tar', 'w') as train:
    for c, wnid in enumerate(['n01440764', 'n01443537', 'n01484850']):
      inner = io.BytesIO()
      with tarfile.open(fileobj=inner, mode='w') as tar:
        for i in range(2):
          name = f'{wnid}_{i}.JPEG'
          written[name] = fake.read(2 * c + i)[0]
          add(tar, name, written[name])
      add(train, f'{wnid}.tar', inner.getvalue())
  with tarfile.open(folder / 'ILSVRC2012_img_val.tar', 'w') as validation:
    for i in range(5):
      add(validation, f'ILSVRC2012_val_{i + 1:08}.JPEG', fake.read(100 + i)[0])
  return written


@pytest.mark.slow
def test_imagenet_from_archives(tmp_path):
  pytest.importorskip('tensorflow', reason='TFDS prepares imagenet2012 with TensorFlow only')
  written = write_imagenet_archives(tmp_path)
  message = prepare.prepare('imagenet2012', str(tmp_path / 'tfds'), str(tmp_path))
  assert message.endswith(': 6 train, 5 validation examples')
  train = sources.open_split('imagenet2012', str(tmp_path / 'tfds'), 'train')
  read = [train.read(i) for i in range(6)]
  assert sorted(label for _, label in read) == [0, 0, 1, 1, 2, 2]
  names = ['n01440764', 'n01443537', 'n01484850']
  for data, label in read:
    assert data in (written[f'{names[label]}_{i}.JPEG'] for i in range(2))
  validation = sources.open_split('imagenet2012', str(tmp_path / 'tfds'), 'validation')
  assert len(validation) == 5


@pytest.mark.slow
def test_imagenet_takes_no_more_space_than_its_archives(tmp_path, real_data, monkeypatch, capfd):
  """Real pictures, shuffled through temporary files as the whole of ImageNet is."""
  pytest.importorskip('tensorflow', reason='TFDS prepares imagenet2012 with TensorFlow only')
  from tensorflow_datasets.core import shuffle

  pictures = sorted((real_data / 'imagenet-samples/val').rglob('*.JPEG'))[:200]
  with tarfile.open(tmp_path / 'ILSVRC2012_img_train.tar', 'w') as train:
    for wnid in sorted({picture.parent.name for picture in pictures}):
      with tarfile.open(tmp_path / f'{wnid}.tar', 'w') as tar:
        for picture in (p for p in pictures if p.parent.name == wnid):
          tar.add(picture, picture.name)
      train.add(tmp_path / f'{wnid}.tar', f'{wnid}.tar')
      (tmp_path / f'{wnid}.tar').unlink()
  with tarfile.open(tmp_path / 'ILSVRC2012_img_val.tar', 'w') as tar:
    for i, picture in enumerate(pictures[:50]):
      tar.add(picture, f'ILSVRC2012_val_{i + 1:08}.JPEG')
  archives = sum(path.stat().st_size for path in tmp_path.glob('*.tar'))
  used = []
  read_values = shuffle._Bucket.read_values

  def measured(bucket):
    used.append(sum(path.stat().st_size for path in (tmp_path / 'tfds').rglob('*')))
    return read_values(bucket)

  monkeypatch.setattr(shuffle._Bucket, 'read_values', measured)
  monkeypatch.setattr(shuffle, 'MAX_MEM_BUFFER_SIZE', 1 << 20)
  monkeypatch.setattr(shuffle, 'BUCKETS_NUMBER', 100)
  prepare.prepare('imagenet2012', str(tmp_path / 'tfds'), str(tmp_path))
  assert len(used) == 200
  used.append(sum(path.stat().st_size for path in (tmp_path / 'tfds').rglob('*')))
  assert 0.9 * archives < max(used) < archives
  shown = capfd.readouterr().err
  for bar in ('Generating train examples', 'Generating validation examples', 'Shuffling'):
    assert bar in shown
  assert '/1281167 [' in shown
