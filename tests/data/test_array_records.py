import json
import os
import pickle
import shutil

import cv2
import numpy as np
import pytest

from afi_flax.data import array_records
from afi_flax.errors import UserError

records = pytest.mark.fault(
  'picture',
  'array_record files: damaged, of something else, a pipe',
  'named; one picture, or refused',
)


def test_pictures_and_labels_are_those_of_the_archive(tiny_cifar100):
  data_dir, pixels = tiny_cifar100
  images, labels = array_records.open_split('cifar100', str(data_dir), 'train', 0, 60, 100).decode()
  assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
  assert sorted(labels) == list(range(60))
  np.testing.assert_array_equal(images, pixels[labels])
  part = array_records.open_split('cifar100', str(data_dir), 'train', 30, 60, 100)
  np.testing.assert_array_equal(part.decode()[0], images[30:])
  prepared = array_records.find_prepared('cifar100', str(data_dir))
  assert array_records.split_sizes(prepared) == {'train': 60, 'test': 20}


def test_chunks_are_put_together_in_order(tiny_cifar100, monkeypatch):
  pictures = array_records.open_split('cifar100', str(tiny_cifar100[0]), 'train', 0, 60, 100)
  images, labels = pictures.decode()
  monkeypatch.setattr(array_records, '_CHUNK', 7)
  for whole, chunked in zip((images, labels), pictures.decode(), strict=True):
    np.testing.assert_array_equal(whole, chunked)


def test_encoded_pictures_can_be_pickled_and_name_themselves(tiny_cifar100):
  data_dir, pixels = tiny_cifar100
  source = array_records.open_split('cifar100', str(data_dir), 'train', 10, 20, 100)
  data, label = source.read(3)
  copy = pickle.loads(pickle.dumps(source))
  assert copy.read(3) == (data, label)
  assert len(copy) == 10
  assert copy.name(3) == 'cifar100 train example 13'
  image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
  np.testing.assert_array_equal(image, pixels[label])


def test_a_label_out_of_range_is_named(tiny_cifar100):
  source = array_records.open_split('cifar100', str(tiny_cifar100[0]), 'train', 0, 60, 10)
  with pytest.raises(UserError, match=r'cifar100 train example \d+ has label \d+; labels of 10'):
    source.read_many(range(60))


@pytest.fixture
def copied(tiny_cifar100, tmp_path):
  """A copy of the prepared set, to be damaged: its TFDS folder and its own."""
  shutil.copytree(tiny_cifar100[0] / 'cifar100', tmp_path / 'cifar100')
  return tmp_path, tmp_path / 'cifar100/3.0.2'


def damage_a_record(prepared) -> None:
  [file] = prepared.glob('cifar100-train.array_record-*')
  data = bytearray(file.read_bytes())
  at = len(data) // 2
  data[at : at + 40] = b'x' * 40
  file.write_bytes(data)


@records
def test_a_damaged_record_is_one_picture_that_cannot_be_read(copied):
  data_dir, prepared = copied
  damage_a_record(prepared)
  source = array_records.open_split('cifar100', str(data_dir), 'train', 0, 60, 100)
  errors = []
  for i in range(60):
    try:
      source.read(i)
    except OSError as e:
      errors.append(str(e))
  assert len(errors) == 1
  assert errors[0].startswith('damaged record: Corrupted Riegeli')
  assert '\n' not in errors[0]
  assert len(errors[0]) < 100


@records
def test_a_damaged_record_of_a_set_in_memory_names_the_cure(copied):
  data_dir, prepared = copied
  damage_a_record(prepared)
  with pytest.raises(UserError) as e:
    array_records.open_split('cifar100', str(data_dir), 'train', 0, 60, 100).decode()
  message = str(e.value)
  assert message.startswith('cifar100 train example 0 or one soon after cannot be read (damaged')
  assert message.endswith(
    f'; delete {prepared} and run '
    f'`python -m afi_flax.prepare --dataset cifar100 --data_dir {data_dir}`'
  )
  assert '\n' not in message


def of_something_else(key):
  """A record as TFDS writes them, with one feature."""
  from tensorflow_datasets.proto import tf_example_pb2

  example = tf_example_pb2.Example()
  example.features.feature[key].bytes_list.value.append(b'no picture')
  return example.SerializeToString()


@records
@pytest.mark.parametrize(
  'record', [b'', b'\xff' * 50, of_something_else('x'), of_something_else('image')]
)
def test_records_of_something_else(copied, record):
  from array_record.python import array_record_module

  data_dir, prepared = copied
  [file] = prepared.glob('cifar100-train.array_record-*')
  writer = array_record_module.ArrayRecordWriter(str(file), 'group_size:1')
  for _ in range(60):
    writer.write(record)
  writer.close()
  source = array_records.open_split('cifar100', str(data_dir), 'train', 0, 60, 100)
  with pytest.raises(OSError, match=r'^damaged record: ') as e:
    source.read(7)
  assert '\n' not in str(e.value)
  with pytest.raises(
    UserError, match=r'^cifar100 train example 0 or one soon after cannot be read'
  ):
    source.decode()


@records
@pytest.mark.parametrize('replace', [os.mkfifo, os.mkdir, lambda path: path.symlink_to('nowhere')])
def test_a_file_of_records_that_is_none(copied, replace):
  data_dir, prepared = copied
  [file] = prepared.glob('cifar100-test.array_record-*')
  file.unlink()
  replace(file)
  with pytest.raises(UserError, match=r'has 0 of 1 files of its test split; delete /.* and run'):
    array_records.open_split('cifar100', str(data_dir), 'test', 0, 20, 100)


@records
@pytest.mark.parametrize('size', [0, 1000, 70_000])
def test_a_file_of_records_that_was_cut_off(copied, size):
  data_dir, prepared = copied
  [file] = prepared.glob('cifar100-train.array_record-*')
  os.truncate(file, size)
  source = array_records.open_split('cifar100', str(data_dir), 'train', 0, 60, 100)
  with pytest.raises(OSError, match=r'^damaged record: '):
    source.read(59)


@records
def test_pictures_of_two_sizes_in_a_set_in_memory(copied, monkeypatch):
  source = array_records.open_split('cifar100', str(copied[0]), 'train', 0, 60, 100)
  pictures = [
    cv2.imencode('.png', np.zeros((side, 9, 3), np.uint8))[1].tobytes() for side in (8, 9)
  ]
  monkeypatch.setattr(source, 'read_many', lambda chunk: [(pictures[i > 30], 0) for i in chunk])
  for size in (7, 500):  # in chunks of their own, and in one
    monkeypatch.setattr(array_records, '_CHUNK', size)
    with pytest.raises(UserError, match=r'cannot be read \(a picture of another size\); delete'):
      source.decode()


@records
@pytest.mark.parametrize('text', [None, '', '{', '[]', '{"a": 1}'])
def test_a_damaged_list_of_features_names_the_cure(copied, text):
  data_dir, prepared = copied
  (prepared / 'features.json').unlink()
  if text is not None:
    (prepared / 'features.json').write_text(text)
  source = array_records.open_split('cifar100', str(data_dir), 'train', 0, 60, 100)
  with pytest.raises(UserError, match=r'/features.json is damaged; delete /.* and run `python -m'):
    source.read(0)


@records
@pytest.mark.parametrize(
  'text', ['', '{"splits": [', '[]', '{}', '{"splits": [{"name": "train"}]}', '\xff', '[' * 100_000]
)
def test_a_damaged_description_names_the_cure(copied, text):
  data_dir, prepared = copied
  (prepared / 'dataset_info.json').write_bytes(text.encode('latin-1'))
  with pytest.raises(UserError) as e:
    array_records.split_sizes(prepared)
  assert str(e.value) == (
    f'{prepared}/dataset_info.json is damaged; delete {prepared} and run '
    f'`python -m afi_flax.prepare --dataset cifar100 --data_dir {data_dir}`'
  )


def test_the_default_folder_is_that_of_tfds(tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  with pytest.raises(UserError, match=f'cifar10 is not prepared under {tmp_path};'):
    array_records.open_split('cifar10', '', 'train', 0, 1, 10)


def test_tfrecord_files_and_missing_files_are_named(copied):
  data_dir, prepared = copied

  def open_split(split):
    return array_records.open_split('cifar100', str(data_dir), split, 0, 20, 100)

  (prepared / 'cifar100-test.array_record-00000-of-00001').unlink()
  assert len(open_split('train').decode()[1]) == 20
  with pytest.raises(UserError, match=r'has 0 of 1 files of its test split; delete /.* and run'):
    open_split('test')
  info = json.loads((prepared / 'dataset_info.json').read_text())
  (prepared / 'dataset_info.json').write_text(json.dumps(info | {'fileFormat': 'tfrecord'}))
  with pytest.raises(UserError) as e:
    open_split('train')
  assert str(e.value) == (
    f'{prepared} holds tfrecord files and array_record is needed; prepare it again beside them: '
    f'`python -m afi_flax.prepare --dataset cifar100 --data_dir {data_dir}_array_record`'
  )


def test_the_newest_prepared_version_is_taken(tmp_path):
  for version in ('5.0.0', '5.10.0', '5.9.0'):
    folder = tmp_path / 'imagenet2012' / version
    folder.mkdir(parents=True)
    (folder / 'dataset_info.json').write_text('{}')
  (tmp_path / 'imagenet2012/6.0.0').mkdir()  # left by a preparation that was killed
  assert array_records.find_prepared('imagenet2012', str(tmp_path)).name == '5.10.0'
