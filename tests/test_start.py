"""Where a run starts, but for what a whole run is needed for: see test_main.py."""

import contextlib

import numpy as np
import pytest

import afi_flax
from afi_flax import config as config_lib
from afi_flax import models, optim, sharding, start, train
from afi_flax.checkpoint import Checkpoints
from afi_flax.errors import UserError
from afi_flax.interop import weights
from configs import digits_afi_resnet20 as digits_config
from tests.interop import fake_weights

DIGITS = tuple('0123456789')


def digits(init_from, name='afi_resnet20', ema_decay=0.0):
  config = digits_config.get_config()
  config.model.name, config.run.init_from, config.ema_decay = name, str(init_from), ema_decay
  return config


def started(config, folder):
  """Where a run with this config starts, in words."""
  plan = config_lib.resolve(config)
  mesh, model = sharding.make_mesh(), models.create_model(**vars(plan.model))
  initial = start.make_initial(plan, model, optim.make(plan.optim), mesh)
  with contextlib.closing(Checkpoints(folder / 'checkpoints')) as checkpoints:
    return start.initial_state(plan, mesh, checkpoints, initial, rolling_back=False)[1]


def first(config):
  plan = config_lib.resolve(config)
  return start.init_from(plan, sharding.make_mesh())


def test_what_is_not_there_is_refused(tmp_path):
  with pytest.raises(UserError, match='there is no such file or folder; give a run'):
    first(digits(tmp_path / 'none'))
  with pytest.raises(UserError, match=r'config\.json is missing'):
    first(digits(tmp_path))


def test_a_file_that_another_process_finds_otherwise(tmp_path, monkeypatch):
  path = tmp_path / 'a.safetensors'
  fake_weights.save_ours(path, fake_weights.model('resnet20', 10), DIGITS)
  monkeypatch.setattr(sharding, 'process_that_differs', lambda text: 3)
  with pytest.raises(UserError, match='process 3 finds another file than process 0'):
    first(digits(path))


def test_what_the_weights_lack_is_not_frozen(tmp_path):
  """Of an AFI network that starts from a plain one."""
  path = tmp_path / 'a.safetensors'
  fake_weights.save_ours(path, fake_weights.model('resnet20', 10), DIGITS)
  for frozen, lost in (('body', 'stage1_block2'), ('stage3', 'stage3_block2')):
    config = digits(path)
    config.optimizer.frozen = (frozen,)
    with pytest.raises(UserError, match=f'would keep {lost} from learning, .* a run of afi_resn'):
      first(config)
  config.optimizer.frozen = ('stem',)
  assert first(config)[1].cut
  config.model.name, config.optimizer.frozen = 'resnet20', ('body',)
  assert not first(config)[1].initialised


@pytest.mark.slow
def test_a_folder_of_imported_weights_is_a_run(tmp_path):
  path, folder = tmp_path / 'a.safetensors', tmp_path / 'run'
  network = fake_weights.model('resnet20', 10)
  saved = fake_weights.save_ours(path, network, DIGITS)
  report = start.save_start(digits(path, 'resnet20', ema_decay=0.9), str(folder))
  assert report.taken.keys() == saved.keys()
  loaded = afi_flax.load_run(folder)
  assert (loaded.step, loaded.class_names) == (0, DIGITS)
  found = weights.flat(loaded.variables)
  for name, value in saved.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)
  with pytest.raises(UserError, match='holds a run already'):
    start.save_start(digits(path, 'resnet20'), str(folder))
  config = digits('', 'resnet20', ema_decay=0.9)
  assert started(config, folder) == 'resumed at step 0'
  # As init_from of another: the plain network starts one with AFI.
  chosen, report = first(digits(folder))
  assert report.cut
  assert f'step 0 of {folder}: resnet20, 10 classes -> afi_resnet20, 10 classes' in str(report)
  np.testing.assert_array_equal(
    chosen['params/stage1_block2/conv1/bn/scale'],
    saved['params/stage1_block2/conv1/bn/scale'][:8],
  )


@pytest.mark.slow
def test_weights_that_do_not_fit_leave_no_folder(tmp_path):
  path = tmp_path / 'a.safetensors'
  network = fake_weights.model('resnet32', 10)
  fake_weights.save_ours(path, network, DIGITS)
  with pytest.raises(UserError, match='resnet32, 10 classes, which cannot start afi_resnet20'):
    start.save_start(digits(path), str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


def test_wrong_weights_leave_no_run_behind(tmp_path):
  path = tmp_path / 'a.safetensors'
  fake_weights.save_ours(path, fake_weights.model('resnet20', 10), DIGITS)
  with pytest.raises(UserError):
    train.train(digits(path, name='afi_resnet32'), str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()
