import json
import pickle
import shutil

import numpy as np
import pytest

from afi_flax import config as config_lib
from afi_flax.data import imagenet, pipeline, sources
from afi_flax.errors import UserError
from configs import imagenet_afi_resnet50
from tests.data.imagenet_files import jpeg, validation_name, write_folders, write_prepared

V2 = 'imagenetv2-matched-frequency-format-val'
REAL = [[7], [], [3, 999], [2], [0, 1, 2], [], [5], [6, 5]]  # of validation pictures 1 to 8


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
  """A data_dir with imagenet2012 prepared, real.json, and one split of ImageNetV2."""
  root = tmp_path_factory.mktemp('imagenet')
  validation = [(validation_name(i), i, 100 + i) for i in range(8)]
  write_prepared(root, train=[('n01440764_1.JPEG', 50, 0)], validation=validation)
  (root / 'real.json').write_text(json.dumps(REAL))
  found = [('2', 'a.jpeg', 0), ('10', 'b.jpeg', 1), ('999', 'c.jpeg', 2), ('10', 'd.jpeg', 3)]
  write_folders(root / V2, map(str, range(1000)), found)
  return root


def message(call, *arguments) -> str:
  with pytest.raises(UserError) as e:
    call(*arguments)
  assert '\n' not in str(e.value)
  return str(e.value)


# ---- class folders


def test_imagenet_from_class_folders_has_the_same_classes(tmp_path):
  classes = imagenet.class_names()
  for split in ('train', 'val'):  # in an order that is not the classes'
    write_folders(tmp_path / split, classes[::-1], [(c, f'{c}_1.JPEG', 0) for c in classes])
  config = imagenet_afi_resnet50.get_config()
  flags = {'dataset': 'image_folder', 'data_dir': str(tmp_path), 'eval_split': 'val'}
  config.update_from_flattened_dict({f'data.{key}': value for key, value in flags.items()})
  config.batch_size = 8
  plan = config_lib.resolve(config)
  assert plan.dataset == config_lib.Dataset('image_folder', tuple(classes), 1000, 1000)
  source = sources.open_split('image_folder', str(tmp_path), 'val')
  for i in (0, 500, 999):
    assert f'/{classes[source.read(i)[1]]}/' in source.name(i)


# ---- ImageNetV2


def test_class_folders_of_v2_are_numbers(shared):
  for data_dir in (shared, shared / V2):
    source = sources.open_split('imagenet_v2', str(data_dir), 'matched-frequency')
    assert {source.read(i) for i in range(len(source))} == {
      (jpeg(0), 2), (jpeg(1), 10), (jpeg(2), 999), (jpeg(3), 10),
    }  # fmt: skip
  part = sources.open_split('imagenet_v2', str(shared), 'matched-frequency[1:3]')
  assert [part.read(i) for i in range(2)] == [source.read(i) for i in (1, 2)]


def test_sizes_of_v2_are_as_found_or_as_published(shared):
  info = sources.describe('imagenet_v2', str(shared))
  assert info.num_examples == {
    'matched-frequency': 4,
    'threshold-0.7': 10_000,
    'top-images': 10_000,
  }
  assert info.class_names == sources.describe('imagenet2012', '').class_names


def test_a_split_of_v2_that_is_not_there_says_what_to_fetch(shared):
  assert message(sources.open_split, 'imagenet_v2', str(shared), 'threshold-0.7') == (
    f'no {shared}/imagenetv2-threshold0.7-format-val; fetch https://huggingface.co/datasets/'
    f'vaishaal/ImageNetV2/resolve/main/imagenetv2-threshold0.7.tar.gz and unpack it in {shared}'
  )
  said = message(sources.open_split, 'imagenet_v2', str(shared), 'validation')
  assert 'Known: matched-frequency, threshold-0.7, top-images.' in said


def test_half_unpacked_v2_is_refused(tmp_path):
  write_folders(tmp_path / V2, map(str, range(700)), [])
  said = message(sources.open_split, 'imagenet_v2', str(tmp_path), 'matched-frequency')
  assert said == f'{tmp_path / V2} has 700 of the 1000 class folders 0 to 999; unpack its ' + (
    'archive again'
  )


# ---- ReaL


def padded(labels):
  return sorted(labels) + [-1] * (3 - len(labels))


@pytest.fixture(params=['array_record', 'class folders'])
def real(request, shared, tmp_path):
  """ReaL labels of the same eight pictures, from either layout."""
  if request.param == 'array_record':
    return sources.open_split('imagenet2012_real', str(shared), 'validation')
  shutil.copy(shared / 'real.json', tmp_path)
  classes = imagenet.class_names()[100:108]
  files = [(name, validation_name(i), i) for i, name in enumerate(classes)]
  write_folders(tmp_path / 'val', classes, files)
  return sources.open_split('imagenet2012_real', str(tmp_path), 'validation')


def test_labels_go_by_the_pictures_file_names(real):
  assert len(real) == 8
  read = [pickle.loads(pickle.dumps(real)).read(i) for i in range(8)]
  order = [[jpeg(k) for k in range(8)].index(data) for data, _ in read]
  assert order != list(range(8))
  for (_, labels), picture in zip(read, order, strict=True):
    assert labels.dtype == np.int32
    assert labels.tolist() == padded(REAL[picture])


def test_batches_mask_pictures_without_a_label(real):
  batches = list(pipeline.eval_batches(real, batch_size=6, image_size=32))
  assert [batch['label'].shape for batch in batches] == [(6, 3), (6, 3)]
  label, mask, example = (
    np.concatenate([batch[key] for batch in batches]) for key in ('label', 'mask', 'example')
  )
  assert label.dtype == np.int32
  assert example.tolist() == [*range(8), *[-1] * 4]
  assert label.tolist() == [real.read(i)[1].tolist() for i in range(8)] + [[-1] * 3] * 4
  np.testing.assert_array_equal(mask, label.max(axis=1) >= 0)
  assert mask.sum() == sum(map(bool, REAL))


def test_a_picture_that_cannot_be_read_has_no_label(real, monkeypatch):
  def damaged(pictures, i):
    return jpeg(0)[:100], validation_name(0)

  monkeypatch.setattr(type(real.pictures), 'read_named', damaged)
  [batch] = pipeline.eval_batches(real, batch_size=8, image_size=32)
  assert batch['mask'].tolist() == [0] * 8
  assert batch['label'].tolist() == [[-1] * 3] * 8


def test_it_is_not_for_training(real):
  said = message(
    lambda: pipeline.train_batches(
      real, seed=0, data_step=0, batch_size=4, augment='none', image_size=32
    )
  )
  assert said.endswith('train on imagenet2012 and give it as data.eval_dataset')


def test_without_labels_or_pictures_it_says_what_to_fetch(shared, tmp_path):
  fetch = 'https://github.com/google-research/reassessed-imagenet'
  open_real = sources.open_split, 'imagenet2012_real', str(tmp_path), 'validation'
  assert message(*open_real) == (
    f'no {tmp_path}/real.json; fetch real.json from {fetch} and put it there'
  )
  shutil.copy(shared / 'real.json', tmp_path)
  assert message(*open_real).startswith(
    f'imagenet2012 is not prepared under {tmp_path}; run `python'
  )


@pytest.mark.parametrize(
  'text', ['', '[[1], 2]', '[[1], ["2"]]', '[[1000]]', '{"a": [-1]}', '\xff']
)
def test_damaged_labels(shared, tmp_path, text):
  (tmp_path / 'real.json').write_bytes(text.encode('latin-1'))
  said = message(sources.open_split, 'imagenet2012_real', str(tmp_path), 'validation')
  assert said.startswith(f'{tmp_path}/real.json is damaged (')
  assert said.endswith(
    '; fetch it again from https://github.com/google-research/reassessed-imagenet'
  )


def test_labels_that_are_no_file(tmp_path):
  (tmp_path / 'real.json').mkdir()
  said = message(sources.open_split, 'imagenet2012_real', str(tmp_path), 'validation')
  assert said.startswith(f'{tmp_path}/real.json is damaged ([Errno 21] Is a directory')


def test_labels_that_do_not_go_with_the_pictures(shared, tmp_path):
  classes = imagenet.class_names()[:2]
  files = [(classes[0], 'tench.JPEG', 0), (classes[1], validation_name(8), 1)]
  write_folders(tmp_path / 'val', classes, files)
  shutil.copy(shared / 'real.json', tmp_path)
  source = sources.open_split('imagenet2012_real', str(tmp_path), 'validation')
  named = {source.name(i): message(source.read, i) for i in range(2)}
  assert (
    "is called 'tench.JPEG'; ReaL labels"
    in named[str(tmp_path / 'val' / classes[0] / 'tench.JPEG')]
  )
  assert f'has labels of 8 pictures and none of {validation_name(8)}' in str(named.values())


def test_classes_in_words():
  ids = tuple(imagenet.class_names())
  words = imagenet.readable(ids)
  assert words[0] == 'tench'
  assert words[281] == 'tabby'
  assert words[999] == 'toilet tissue'
  assert {words[638], words[639]} == {'maillot (n03710637)', 'maillot (n03710721)'}
  assert len(set(words)) == 1000
  assert imagenet.readable(ids[::-1]) == words[::-1]
  assert imagenet.readable((ids[281], ids[0])) == ('tabby', 'tench')  # of a part of them
  assert imagenet.readable(('n00000001', ids[0])) == ('n00000001', ids[0])
  assert imagenet.readable(('cat', 'dog')) == ('cat', 'dog')
