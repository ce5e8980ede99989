import json
import pickle
import shutil

import cv2
import numpy as np
import pytest

from afi_flax.data import array_records
from afi_flax.errors import UserError


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


@pytest.mark.parametrize(
  'text', ['', '{"splits": [', '[]', '{}', '{"splits": [{"name": "train"}]}', '\xff']
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
