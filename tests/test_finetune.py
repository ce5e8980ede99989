"""Fine-tuning: runs that start from another run's weights, whole, and the config for a folder."""

import re

import jax
import numpy as np
import pytest

import afi_flax
from afi_flax import evaluate, train
from afi_flax.errors import UserError
from configs import digits_afi_resnet20 as digits_config
from configs import finetune_image_folder
from tests import test_main
from tests.data.conftest import write_picture

FROZEN = ('stem', 'stage1_block1', 'stage1_block2', 'stage1_block3')


def smoke():
  made = digits_config.get_config('smoke')
  made.model.name = 'resnet20'  # compiles in half the time
  return made


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """The folder of a run of four steps."""
  folder = tmp_path_factory.mktemp('base') / 'run'
  train.train(smoke(), folder)
  return folder


def recipe(base):
  """Four steps with everything that keeps more than weights."""
  made = smoke()
  made.run.init_from = str(base)
  made.optimizer.name, made.schedule.base_lr, made.ema_decay = 'adamw', 1e-3, 0.9
  made.optimizer.frozen, made.optimizer.layer_decay = ('stem', 'stage1'), 0.8
  return made


@pytest.mark.slow
def test_two_and_two_steps_are_four(base, tmp_path):
  made = recipe(base)
  train.train(made, tmp_path / 'whole')
  for stop in (2, 4):
    made.run.max_steps = stop
    train.train(made, tmp_path / 'halves')
  whole, halves = (afi_flax.load_run(tmp_path / name) for name in ('whole', 'halves'))
  assert (whole.step, halves.step) == (4, 4)
  jax.tree.map(np.testing.assert_array_equal, whole.variables, halves.variables)
  assert [r for r in test_main.lines(tmp_path / 'halves') if 'partial' not in r] == test_main.lines(
    tmp_path / 'whole'
  )
  start = afi_flax.load_run(base).variables
  for name, tree in whole.variables.items():
    for module, below in tree.items():
      same = [
        (a == b).all()
        for a, b in zip(jax.tree.leaves(below), jax.tree.leaves(start[name][module]), strict=True)
      ]
      assert all(same) if module in FROZEN else not any(same), (name, module)
  record = evaluate.evaluate_run(tmp_path / 'whole')
  assert record['loss'] == pytest.approx(test_main.lines(tmp_path / 'whole')[-1]['loss'], rel=1e-5)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  """Class folders with pictures of odd sizes."""
  root = tmp_path_factory.mktemp('pictures')
  for number in range(40):
    folder = root / ('ant', 'bee', 'cat', 'dog')[number % 4]
    folder.mkdir(exist_ok=True)
    write_picture(folder / f'{number}.jpg', number, (33 + 7 * number, 301 - 5 * number))
  return root


def flags(name, pictures, workdir, *more):
  return (
    '--config', f'configs/{name}', '--workdir', workdir, f'--config.data.data_dir={pictures}',
    '--config.data.train_split=train[:80%]', '--config.data.eval_split=train[80%:]',
    '--config.model.name=resnet20', '--config.data.image_size=32', '--config.data.eval_resize=36',
    *more,
  )  # fmt: skip


@pytest.mark.slow
def test_a_folder_of_pictures_from_the_first_try(pictures, tmp_path):
  base = tmp_path / 'base'
  test_main.main(*flags('image_folder.py', pictures, base, '--config.batch_size=16',
                        '--config.run.max_steps=2'))  # fmt: skip
  start = f'--config.run.init_from={base}'
  for variant, trained in (('', ''), (':head', '260')):
    workdir = tmp_path / f'tuned{variant.strip(":")}'
    config = f'finetune_image_folder.py{variant}'
    _, err = test_main.main(*flags(config, pictures, workdir, start, '--config.epochs=2'))
    assert 'starts with the weights of step 2' in err
    assert (' trained ' in err) == bool(trained)
    assert f' {trained} ' in err
    evaluations = [r for r in test_main.lines(workdir) if r['split'] != 'train']
    assert [(r['step'], r['examples']) for r in evaluations] == [(2, 8), (4, 8)]
  before, after = (afi_flax.load_run(folder).variables for folder in (base, tmp_path / 'tunedhead'))
  assert (
    before['params']['head']['dense']['kernel'] != after['params']['head']['dense']['kernel']
  ).all()
  for name in set(before['params']) - {'head'}:
    jax.tree.map(np.testing.assert_array_equal, before['params'][name], after['params'][name])
  jax.tree.map(np.testing.assert_array_equal, before['batch_stats'], after['batch_stats'])


def tuning(pictures, **keys):
  """The config, for a small network."""
  made = finetune_image_folder.get_config()
  small = {'model.name': 'resnet20', 'data.image_size': 32, 'data.eval_resize': 36}
  made.update_from_flattened_dict({**small, 'data.data_dir': str(pictures), **keys})
  return made


HALVES = {'data.train_split': 'train[:80%]', 'data.eval_split': 'train[80%:]'}
START = {'run.init_from': 'nowhere'}


@pytest.mark.parametrize(
  ('keys', 'says'),
  [
    (
      HALVES,
      'layer_decay 0.9 is for weights that were trained before: add --config.run.init_from=',
    ),
    (START, 'only class folders: add --config.data.train_split='),
    ({**HALVES, **START, 'batch_size': 64}, 'batch_size 64 is more than the 32 training examples'),
    (
      {**HALVES, **START, 'optimizer.frozen': ('neck',)},
      "frozen 'neck'. Known: body, head, stage1",
    ),
    ({**HALVES, **START, 'epochs': 1.0}, 'schedule.warmup_epochs 1.0 (2 steps) does not leave any'),
  ],
)
def test_mistakes(pictures, tmp_path, keys, says):
  with pytest.raises(UserError, match=re.escape(says)) as error:
    train.train(tuning(pictures, **keys), tmp_path / 'run')
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_weights_that_are_not_there(pictures, tmp_path):
  with pytest.raises(UserError, match='nowhere') as error:
    train.train(tuning(pictures, **HALVES, **START), tmp_path / 'run')
  assert '\n' not in str(error.value)
