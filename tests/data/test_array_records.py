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


def test_the_default_folder_is_that_of_tfds(tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  with pytest.raises(UserError, match=f'cifar10 is not prepared under {tmp_path};'):
    array_records.open_split('cifar10', '', 'train', 0, 1, 10)


def test_tfrecord_files_and_missing_files_are_named(tiny_cifar100, tmp_path):
  def open_split(split):
    return array_records.open_split('cifar100', str(tmp_path), split, 0, 20, 100)

  shutil.copytree(tiny_cifar100[0] / 'cifar100', tmp_path / 'cifar100')
  prepared = tmp_path / 'cifar100/3.0.2'
  (prepared / 'cifar100-test.array_record-00000-of-00001').unlink()
  assert len(open_split('train').decode()[1]) == 20
  with pytest.raises(UserError, match='has 0 of 1 files of its test split; delete it and run'):
    open_split('test')
  info = json.loads((prepared / 'dataset_info.json').read_text())
  (prepared / 'dataset_info.json').write_text(json.dumps(info | {'fileFormat': 'tfrecord'}))
  with pytest.raises(UserError) as e:
    open_split('train')
  assert str(e.value) == (
    f'{prepared} holds tfrecord files and array_record is needed; prepare it again beside them: '
    f'`python -m afi_flax.prepare --dataset cifar100 --data_dir {tmp_path}_array_record`'
  )


def test_the_newest_prepared_version_is_taken(tmp_path):
  for version in ('5.0.0', '5.10.0', '5.9.0'):
    folder = tmp_path / 'imagenet2012' / version
    folder.mkdir(parents=True)
    (folder / 'dataset_info.json').write_text('{}')
  (tmp_path / 'imagenet2012/6.0.0').mkdir()  # left by a preparation that was killed
  assert array_records.find_prepared('imagenet2012', str(tmp_path)).name == '5.10.0'
