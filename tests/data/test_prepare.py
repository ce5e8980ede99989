import functools
import http.server
import io
import pathlib
import socket
import tarfile
import threading
import time

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
    message = prepare.prepare('cifar100', str(tmp_path))
    server.shutdown()
  assert message.endswith('60 train, 20 test examples')
  assert len(sources.open_split('cifar100', str(tmp_path), 'train')) == 60


def test_a_damaged_archive_is_named(tmp_path):
  (tmp_path / 'cifar-10-binary.tar.gz').write_bytes(b'cut short')
  with pytest.raises(UserError, match=r'cifar-10-binary.tar.gz is damaged or cut short .* fetch'):
    prepare.prepare('cifar10', str(tmp_path / 'out'), str(tmp_path))
  assert array_records.find_prepared('cifar10', str(tmp_path / 'out')) is None


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
