"""A trained network on other data sets of the same classes."""

import functools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import afi_flax
from afi_flax import evaluate
from afi_flax.data import decode, imagenet
from afi_flax.errors import UserError
from afi_flax.train import train
from configs import digits_afi_resnet20, imagenet_afi_resnet50
from tests.data.imagenet_files import jpeg, validation_name, write_folders, write_prepared

PICTURES = 10


def config_of(data_dir, **data):
  config = imagenet_afi_resnet50.get_config()
  flags = {'image_size': 32, 'eval_resize': 36, 'data_dir': str(data_dir), **data}
  config.update_from_flattened_dict({f'data.{key}': value for key, value in flags.items()})
  config.update_from_flattened_dict({'model.name': 'afi_resnet20', 'run.max_steps': 2})
  config.batch_size = config.eval_batch_size = 8
  return config


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  """imagenet2012 in small, as TFDS prepares it."""
  root = tmp_path_factory.mktemp('data')
  train = [(f'n_{i}.JPEG', 20 + i, 5 * i) for i in range(16)]
  write_prepared(root, train, [(validation_name(i), i, i) for i in range(PICTURES)])
  return root


@pytest.fixture(scope='module')
def trained(data_dir, tmp_path_factory):
  """A run of two steps on it."""
  workdir = tmp_path_factory.mktemp('run')
  train(config_of(data_dir), str(workdir))
  return workdir


@pytest.fixture(scope='module')
def log_p(trained):
  """Of the run's network for the validation pictures, by number, [N,1000]."""
  run = afi_flax.load_run(trained)
  sizes = run.preprocessing.resize, run.preprocessing.image_size
  images = np.stack([decode.resize_centre_crop(jpeg(i), *sizes) for i in range(PICTURES)])
  apply = jax.jit(functools.partial(run.model.apply, train=False))
  return np.asarray(jax.nn.log_softmax(apply(run.variables, run.preprocessing(images))))


@pytest.mark.slow
def test_real_labels(trained, data_dir, log_p):
  """Labels made so that what is right is known: the best, the third, the last class, or none."""
  order = np.argsort(-log_p, axis=1)
  ranks = [[0, 700], [2], [999], [], [4, 0], [], [5], [], [1, 3, 998], [0]]
  chosen = [order[i, list(r)].tolist() for i, r in enumerate(ranks)]
  (data_dir / 'real.json').write_text(json.dumps(chosen))
  config = config_of(data_dir, eval_dataset='imagenet2012_real')
  record = evaluate.evaluate_run(trained, 'best', config)
  assert record['split'] == 'imagenet2012_real validation'
  assert record['picked_on'] == 'validation'
  assert record['examples'] == 7
  assert record['top1'] == 3 / 7
  assert record['top5'] == 5 / 7
  losses = [-np.log(np.exp(log_p[i, c]).sum()) for i, c in enumerate(chosen) if c]
  np.testing.assert_allclose(record['loss'], np.mean(losses), rtol=1e-3)


@pytest.mark.slow
def test_imagenet_v2_by_the_command(trained, log_p, tmp_path):
  """Three of five pictures lie in the folder of the class that the network takes them for."""
  best, second = np.argsort(-log_p, axis=1)[:, :2].T
  labels = [best[0], second[1], best[2], second[3], best[4]]
  files = [(str(label), f'{i}.jpeg', i) for i, label in enumerate(labels)]
  write_folders(tmp_path / 'imagenetv2-top-images-format-val', map(str, range(1000)), files)
  flags = {'model.name': 'afi_resnet20', 'batch_size': 8, 'eval_batch_size': 3}
  flags |= {'data.image_size': 32, 'data.eval_resize': 36, 'data.data_dir': tmp_path}
  flags |= {'data.eval_dataset': 'imagenet_v2', 'data.eval_split': 'top-images'}
  config = ('--config', 'configs/imagenet_afi_resnet50.py')
  given = [f'--config.{key}={value}' for key, value in flags.items()]
  command = [sys.executable, '-m', 'afi_flax.main', '--mode=eval', '--workdir', trained, *config]
  done = subprocess.run([*command, *given], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.startswith('step 2  imagenet_v2 top-images  loss ')
  assert 'top-1 60.00%  top-5 100.00%  of 5' in done.stdout


@pytest.mark.slow
def test_prepared_and_in_class_folders_it_is_the_same(trained, tmp_path):
  """A run on imagenet2012 evaluated on image_folder, and one on image_folder on imagenet2012."""
  classes = imagenet.class_names()
  files = [(name, f'{name}_1.JPEG', i) for i, name in enumerate(classes)]
  write_folders(tmp_path / 'train', classes, files)
  write_folders(tmp_path / 'val', classes, [(c, validation_name(i), i) for c, _, i in files[:10]])
  own = evaluate.evaluate_run(trained)
  config = config_of(tmp_path, eval_dataset='image_folder', eval_split='val')
  record = evaluate.evaluate_run(trained, 'best', config)
  assert record['split'] == 'image_folder val'
  assert 'picked_on' not in record
  for key in ('examples', 'top1', 'top5'):
    assert record[key] == own[key]
  np.testing.assert_allclose(record['loss'], own['loss'], rtol=1e-5)

  workdir = tmp_path / 'run'
  config = config_of(tmp_path, dataset='image_folder', eval_split='val')
  train(config, str(workdir))
  own = evaluate.evaluate_run(workdir)
  config.data.eval_dataset, config.data.eval_split = 'imagenet2012', 'validation'
  config.data.data_dir = afi_flax.load_run(trained).plan.data.data_dir
  other = evaluate.evaluate_run(workdir, config=config)
  assert (own['split'], other['split']) == ('val', 'imagenet2012 validation')
  np.testing.assert_allclose(other['loss'], own['loss'], rtol=1e-5)


@pytest.mark.slow
def test_while_it_trains_another_set_may_be_evaluated_too(data_dir, tmp_path):
  (data_dir / 'real.json').write_text(json.dumps([[i] for i in range(PICTURES)]))
  train(config_of(data_dir, eval_dataset='imagenet2012_real'), str(tmp_path))
  plain = evaluate.evaluate_run(tmp_path, config=config_of(data_dir, eval_dataset=''))
  real = evaluate.evaluate_run(tmp_path, 'best')
  assert plain['split'] == 'validation'
  assert real['split'] == real['picked_on'] == 'imagenet2012_real validation'
  for key in ('examples', 'top1', 'top5'):
    assert plain[key] == real[key]
  np.testing.assert_allclose(plain['loss'], real['loss'], rtol=1e-5)


def test_a_set_of_other_classes_is_refused(tmp_path):
  config = digits_afi_resnet20.get_config()
  config.data.dataset, config.data.eval_dataset = 'fake_cifar', 'fake_imagenet'
  config.data.eval_split, config.data.image_size = 'validation', 32
  with pytest.raises(UserError, match="class 10 was 'absent' in training and is '10' here"):
    train(config, str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()
