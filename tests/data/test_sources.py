import contextlib
import pickle
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from afi_flax import random_draws
from afi_flax.data import decode, sources
from afi_flax.errors import UserError

INFO = sources.DatasetInfo('set', {'train': 150, 'test': 7}, ('a', 'b'))


@pytest.mark.parametrize(
  ('spec', 'wanted'),
  [
    ('train', ('train', 0, 150)),
    ('train[:98%]', ('train', 0, 147)),
    ('train[98%:]', ('train', 147, 150)),
    ('train[33%:66%]', ('train', 50, 99)),
    ('train[100:120]', ('train', 100, 120)),
    ('train[-10:]', ('train', 140, 150)),
    ('train[:-10%]', ('train', 0, 135)),
    ('train[12.5%:]', ('train', 19, 150)),
    ('test[:50%]', ('test', 0, 4)),
  ],
)
def test_split_arithmetic_is_that_of_tfds(spec, wanted):
  import tensorflow_datasets as tfds

  assert sources.split_range(spec, INFO) == wanted
  infos = {
    name: tfds.core.SplitInfo(name=name, shard_lengths=[n], num_bytes=0)
    for name, n in INFO.num_examples.items()
  }
  [theirs] = tfds.core.ReadInstruction.from_spec(spec).to_absolute(infos)
  n = INFO.num_examples[wanted[0]]
  assert wanted[1:] == (theirs.from_ or 0, n if theirs.to is None else theirs.to)


@pytest.mark.parametrize('n', [1, 7, 150, 999])
@pytest.mark.parametrize('percent', [1, 50, 98])
def test_the_two_parts_of_a_cut_make_the_whole(n, percent):
  info = sources.DatasetInfo('set', {'train': n}, ())
  examples = []
  for spec in (f'train[:{percent}%]', f'train[{percent}%:]'):
    with contextlib.suppress(UserError):  # a part may be empty
      _, start, stop = sources.split_range(spec, info)
      examples += range(start, stop)
  assert examples == list(range(n))


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ('valid', "unknown split of set 'valid'"),
    ('train[50]', "split 'train[50]' is not understood"),
    ('train+test', "split 'train+test' is not understood"),
    ('train[10%:20]', "split 'train[10%:20]' mixes examples and per cent"),
    ('train[:200]', "split 'train[:200]' asks for example 200 of 150"),
    ('train[:0%]', "split 'train[:0%]' of set is empty; train has 150 examples"),
    ('train[60%:40%]', "split 'train[60%:40%]' of set is empty"),
    ('train[1.5:]', "'1.5' is not a number of examples or per cent"),
  ],
)
def test_bad_splits(spec, message):
  with pytest.raises(UserError) as e:
    sources.split_range(spec, INFO)
  assert message in str(e.value)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  ('dataset', 'sizes', 'num_classes'),
  [
    ('digits', {'train': 1438, 'test': 359}, 10),
    ('cifar10', {'train': 50_000, 'test': 10_000}, 10),
    ('cifar100', {'train': 50_000, 'test': 10_000}, 100),
    ('imagenet2012', {'train': 1_281_167, 'validation': 50_000}, 1000),
    ('imagenet2012_real', {'validation': 50_000}, 1000),
    ('fake_cifar', {'train': 500, 'test': 100}, 10),
    ('fake_imagenet', {'train': 1000, 'validation': 100}, 1000),
  ],
)
def test_sizes_and_classes_are_known_without_files(dataset, sizes, num_classes, tmp_path):
  info = sources.describe(dataset, str(tmp_path))
  assert info.name == dataset
  assert info.num_examples == sizes
  assert len(set(info.class_names)) == num_classes
  assert sources.describe(dataset, str(tmp_path)) == info


def test_imagenet_classes_are_wordnet_ids_in_order(tmp_path):
  names = sources.describe('imagenet2012', str(tmp_path)).class_names
  assert names[:2] == ('n01440764', 'n01443537')
  assert list(names) == sorted(names)


def test_digits():
  train = sources.open_split('digits', '', 'train')
  test = sources.open_split('digits', '', 'test')
  assert (len(train), len(test)) == (1438, 359)
  assert train.images.shape == (1438, 16, 16, 3)
  assert (train.images.dtype, train.labels.dtype) == (np.uint8, np.int32)
  assert (train.images.min(), train.images.max()) == (0, 255)
  from sklearn import datasets

  digits = datasets.load_digits()
  np.testing.assert_array_equal(test.labels, digits.target[4::5])
  shown = test.images[3, ::2, ::2, 1] / 255 * 16
  np.testing.assert_allclose(shown, digits.images[19], atol=0.04)
  part = sources.open_split('digits', '', 'train[:10%]')
  np.testing.assert_array_equal(part.images, train.images[:144])


@pytest.mark.parametrize('dataset', ['digits', 'fake_cifar'])
def test_small_sets_are_learnable_by_the_nearest_class_mean(dataset):
  splits = [sources.open_split(dataset, '', split) for split in ('train', 'test')]
  (x, y), (x_test, y_test) = [(s.images.reshape(len(s), -1) / 255, s.labels) for s in splits]
  means = np.stack([x[y == c].mean(0) for c in range(10)])
  nearest = ((x_test[:, None] - means) ** 2).sum(-1).argmin(1)
  assert (nearest == y_test).mean() > 0.85


def test_fake_pictures_are_deterministic_and_differ():
  train = sources.open_split('fake_imagenet', '', 'train[100:110]')
  whole = sources.open_split('fake_imagenet', '', 'train')
  assert len(train) == 10
  assert train.read(3) == whole.read(103)
  assert train.read(3)[1] == 103
  assert train.name(3) == 'fake_imagenet train example 103'
  validation = sources.open_split('fake_imagenet', '', 'validation')
  assert validation.read(3)[0] != whole.read(3)[0]
  assert decode.picture_size(validation.read(3)[0])[1] in (224, 256, 288)


# ---- from files


def test_small_prepared_sets_are_decoded_and_counted(tiny_cifar100):
  data_dir, pixels = tiny_cifar100
  split = sources.open_split('cifar100', str(data_dir), 'train')
  assert sorted(split.labels) == list(range(60))
  np.testing.assert_array_equal(split.images, pixels[split.labels])
  part = sources.open_split('cifar100', str(data_dir), 'train[50%:]')
  np.testing.assert_array_equal(part.images, split.images[30:])
  assert sources.describe('cifar100', str(data_dir)).num_examples == {'train': 60, 'test': 20}


def test_a_set_that_is_not_prepared_fails_at_once_with_the_command(tmp_path):
  begin = time.perf_counter()
  for dataset in ('cifar10', 'cifar100', 'imagenet2012'):
    with pytest.raises(UserError) as e:
      sources.open_split(dataset, str(tmp_path), 'train')
    archives = ' --archives FOLDER' if dataset == 'imagenet2012' else ''
    assert str(e.value) == (
      f'{dataset} is not prepared under {tmp_path}; '
      f'run `python -m afi_flax.prepare --dataset {dataset}{archives} --data_dir {tmp_path}`'
    )
  assert time.perf_counter() - begin < 10


def test_image_folder(picture_folder):
  info = sources.describe('image_folder', str(picture_folder))
  assert info == sources.DatasetInfo('image_folder', {'train': 21, 'val': 6}, ('ant', 'bee', 'cat'))
  train = sources.open_split('image_folder', str(picture_folder), 'train')
  kept = sources.open_split('image_folder', str(picture_folder), 'train[:80%]')
  held_out = sources.open_split('image_folder', str(picture_folder), 'train[80%:]')
  assert (len(train), len(kept), len(held_out)) == (21, 17, 4)
  names = [part.name(i) for part in (kept, held_out) for i in range(len(part))]
  assert names == [train.name(i) for i in range(21)]
  assert held_out.read(3) == train.read(20)
  assert info.class_names[train.read(20)[1]] in train.name(20)
  with pytest.raises(UserError, match=r"unknown split of image_folder 'test'.* Known: train, val"):
    sources.open_split('image_folder', str(picture_folder), 'test')


def test_a_folder_without_val_names_the_flags_that_hold_a_part_out(picture_folder):
  def message(folder) -> str:
    with pytest.raises(UserError) as e:
      sources.open_split('image_folder', str(folder), 'val')
    return str(e.value)

  cure = "add --config.data.train_split='train[:80%]' --config.data.eval_split='train[80%:]'"
  only_classes = picture_folder / 'train'
  assert message(only_classes) == (
    "unknown split of image_folder 'val'. Known: train. "
    f'No train/ and val/ found in {only_classes}, only class folders: {cure}'
  )
  shutil.rmtree(picture_folder / 'val')
  assert message(picture_folder).endswith(f' No val/ found in {picture_folder}: {cure}')


def test_a_sample_of_a_split():
  whole = sources.open_split('digits', '', 'train')
  some = sources.sample(whole, 30, seed=1)
  chosen = random_draws.choice(len(whole), 30, seed=1)
  assert np.array_equal(some.images, whole.images[chosen])
  assert np.array_equal(some.labels, whole.labels[chosen])
  assert len(sources.sample(whole, 9999, seed=1)) == len(whole)

  whole = sources.open_split('fake_imagenet', '', 'train')
  some = pickle.loads(pickle.dumps(sources.sample(whole, 30, seed=1)))  # as workers get it
  chosen = random_draws.choice(len(whole), 30, seed=1)
  assert len(some) == 30
  assert some.read(7) == whole.read(int(chosen[7]))
  assert some.name(7) == whole.name(int(chosen[7]))


def test_unknown_data_sets_are_answered_with_the_list():
  for call in (sources.describe, lambda name: sources.open_split(name, '', 'train')):
    with pytest.raises(UserError) as e:
      call('cifar1000')
    assert str(e.value) == (
      "unknown data set 'cifar1000'; did you mean 'cifar100'? Known: cifar10, cifar100, digits, "
      'fake_cifar, fake_imagenet, image_folder, imagenet2012, imagenet2012_real, imagenet_v2.'
    )


# ---- what is not imported, and the real data


def test_neither_jax_nor_tensorflow_is_imported(tiny_cifar100):
  code = (
    'import sys\n'
    'from afi_flax.data import sources, pipeline, prepare\n'
    f's = sources.open_split("cifar100", {str(tiny_cifar100[0])!r}, "train")\n'
    'next(pipeline.train_batches(s, seed=0, data_step=0, batch_size=8, augment="pad_crop",'
    ' image_size=32))\n'
    'print([m for m in ("jax", "tensorflow", "grain", "torch") if m in sys.modules])\n'
  )
  run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert run.stdout.strip() == '[]'


def test_real_cifar100(real_data):
  if not (real_data / 'tfds/cifar100').is_dir():
    pytest.skip('no CIFAR-100 in the real data')
  data_dir = str(real_data / 'tfds')
  test = sources.open_split('cifar100', data_dir, 'test')
  assert test.images.shape == (10_000, 32, 32, 3)
  assert np.bincount(test.labels).tolist() == [100] * 100
  means = test.images.reshape(-1, 3).mean(0) / 255
  np.testing.assert_allclose(means, [0.5071, 0.4865, 0.4409], atol=0.003)
  names = (real_data / 'tfds/cifar100/3.0.2/label.labels.txt').read_text().split()
  assert sources.describe('cifar100', data_dir).class_names == tuple(names)
  part = sources.open_split('cifar100', data_dir, 'train[98%:]')
  assert len(part) == 1000


@pytest.mark.parametrize('dataset', ['cifar100', 'image_folder', 'imagenet_v2'])
def test_a_bucket_is_mounted_first(dataset):
  with pytest.raises(UserError, match="'gs://bucket/sets' is not on a file system; mount") as error:
    sources.describe(dataset, 'gs://bucket/sets')
  assert '\n' not in str(error.value)
