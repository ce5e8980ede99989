"""Batches whose numbers are not finite: what is written down, and how the run goes on."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afi_flax import config, nonfinite, preprocess, run, train
from afi_flax.checkpoint import Checkpoints
from afi_flax.data import sources
from afi_flax.errors import UserError
from afi_flax.workdir import Workdir
from benchmarks.processes import free_port
from configs import digits_afi_resnet20 as digits

GOOD, BAD = (1.5, 2.0, 1.0), (np.nan, np.inf, 0.0)


def watch(folder, policy='skip', limit=3, said=None):
  how = config.resolve(digits.get_config('smoke')).run
  how = config.dataclasses.replace(how, on_nonfinite=policy, max_nonfinite=limit)
  folder.mkdir(exist_ok=True)
  say = (lambda text: None) if said is None else said.append
  return nonfinite.Watch(how, Workdir(folder), 0, 0, say)


def follow(watch, *steps):
  for number, numbers in enumerate(steps):
    watch.add(jnp.array(numbers), lambda k, first=number * 4: jnp.arange(first, first + 4))


def test_the_count_is_sure_once_the_device_has_been_waited_for(tmp_path):
  said = []
  watched = watch(tmp_path, said=said)
  follow(watched, GOOD, BAD, GOOD, GOOD)
  assert watched.step == 4
  assert watched.settle() == watched.step == 3
  line = (tmp_path / 'nonfinite.jsonl').read_text()
  record = json.loads(line, parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))
  assert Workdir(tmp_path).read_nonfinite() == [record]
  assert record == {
    'step': 2, 'data_step': 1, 'loss': 'nan', 'gradient_norm': 'inf', 'examples': [4, 5, 6, 7],
  }  # fmt: skip
  assert said == [
    'step 2: loss nan, gradient norm inf: batch 1 is left out (1 of at most 3, see '
    f'{tmp_path}/nonfinite.jsonl)'
  ]


def test_it_is_noticed_without_being_asked_for(tmp_path):
  with pytest.raises(UserError, match='step 1: loss nan, gradient norm inf; its examples are in'):
    follow(watch(tmp_path, 'raise'), BAD, *[GOOD] * nonfinite.MAX_AHEAD)


def test_statistics_alone(tmp_path):
  watched = watch(tmp_path, 'raise')
  follow(watched, (1.5, 2.0, 0.0))
  with pytest.raises(UserError, match='norm 2, but not all of batch norm is finite; its examples'):
    watched.settle()
  assert Workdir(tmp_path).read_nonfinite()[0]['loss'] == 1.5


def test_skipping_has_a_limit_that_outlives_a_restart(tmp_path):
  watched = watch(tmp_path, limit=2)
  follow(watched, BAD, BAD)
  assert watched.settle() == 0
  follow(again := watch(tmp_path, limit=2), BAD)
  with pytest.raises(UserError, match=r'one more than run\.max_nonfinite 2, all are in'):
    again.settle()


def test_rolling_back_names_the_next_batch(tmp_path):
  watched = watch(tmp_path, 'rollback')
  follow(watched, GOOD, BAD, BAD)
  with pytest.raises(nonfinite.RollBackError) as back:
    watched.settle()
  assert back.value.data_step == 2
  assert len(Workdir(tmp_path).read_nonfinite()) == 1, 'the second is another run of the loop'


def test_the_limit_holds_for_rolling_back(tmp_path):
  watched = watch(tmp_path, 'rollback', limit=0)
  follow(watched, BAD)
  with pytest.raises(UserError, match=r'run\.max_nonfinite 0'):
    watched.settle()


# What follows trains. Two pictures of the training set are poisoned: what they become is NaN.

POISONED = (29, 600)


# (The loss itself stays finite here: XLA's CPU takes the larger of NaN and 0 to be 0 in a ReLU.)


def poisoned(normalise):
  """`preprocess.normalise` that makes NaNs of these two pictures."""
  images = sources.open_split('digits', '', recipe('raise').data.train_split).images
  marks = images[list(POISONED)]

  def normalise_the_others(pictures, mean, std):
    same = (pictures[:, None] == marks[None]).all(axis=(2, 3, 4)).any(axis=1)
    return jnp.where(same[:, None, None, None], jnp.nan, normalise(pictures, mean, std))

  return normalise_the_others


@pytest.fixture
def poison(monkeypatch):
  monkeypatch.setattr(preprocess, 'normalise', poisoned(preprocess.normalise))


def recipe(policy, **keys):
  made = digits.get_config('')
  made.data.augment = 'none'  # so that they stay recognisable
  made.batch_size, made.epochs = 48, 1.5
  made.run.log_every_steps, made.run.save_every_steps = 4, 6
  made.run.eval_every_epochs = 0.4
  made.run.on_nonfinite = policy
  made.run.update(keys)
  return made


def left(folder):
  """What a run leaves behind, but for times: metrics, batches that were not finite, weights."""
  workdir = Workdir(folder)
  metrics = [
    {k: v for k, v in record.items() if k not in ('images_per_second', 'mfu')}
    for record in workdir.read_metrics()
  ]
  last, best = (run.load_run(folder, which) for which in ('last', 'best'))
  weights = jax.device_get((last.variables, best.variables))
  return metrics, workdir.read_nonfinite(), (last.step, best.step), weights


def assert_same(one, two):
  assert one[:3] == two[:3]
  jax.tree.map(np.testing.assert_array_equal, one[3], two[3])


@pytest.mark.slow
@pytest.mark.fault('numbers', 'a NaN in a batch', 'the run ends, the batch is written down')
def test_raise(tmp_path, poison):
  keys, folder = {'save_every_steps': 1, 'max_steps': 6}, tmp_path / 'raised'
  with pytest.raises(UserError, match=r'step \d+: loss .*, gradient norm nan; its examples'):
    train.train(recipe('raise', **keys), folder)
  (record,) = Workdir(folder).read_nonfinite()
  assert set(record['examples']) & set(POISONED)
  assert len(record['examples']) == 48
  assert record['data_step'] == record['step'] - 1
  checkpoints = Checkpoints(Workdir(folder).checkpoints)
  assert checkpoints.steps()[-1] == record['step'] - 1
  checkpoints.close()
  # The same command with another policy goes on with it.
  train.train(recipe('skip', **keys), folder)
  train.train(recipe('skip', **keys), tmp_path / 'skipped')
  assert_same(left(folder), left(tmp_path / 'skipped'))


@pytest.mark.slow
@pytest.mark.parametrize('policy', ['skip', 'rollback'])
@pytest.mark.fault('numbers', 'NaNs in batches, with stops between', 'skipped or rolled back alike')
def test_goes_on_past_them_stopped_or_not(tmp_path, poison, policy):
  """Stopped twice where nothing else is due, it is the run that was not."""
  train.train(recipe(policy), tmp_path / 'whole')
  metrics, events, steps, variables = whole = left(tmp_path / 'whole')
  total = config.resolve(recipe(policy)).optim.total_steps
  assert steps[0] == total == metrics[-1]['step']
  assert len(events) >= 2
  assert all(set(event['examples']) & set(POISONED) for event in events)
  assert all(np.isfinite(record['loss']) for record in metrics)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(variables))
  for stop in (17, 34, total):
    train.train(recipe(policy, max_steps=stop), tmp_path / 'stopped')
  assert_same(left(tmp_path / 'stopped'), whole)


@pytest.mark.slow
@pytest.mark.fault('numbers', 'more NaNs than max_nonfinite', 'the run ends')
def test_limit(tmp_path, poison):
  with pytest.raises(UserError, match=r'one more than run\.max_nonfinite 1'):
    train.train(recipe('skip', max_nonfinite=1), tmp_path)
  assert len(Workdir(tmp_path).read_nonfinite()) == 2


@pytest.mark.slow
@pytest.mark.fault('numbers', 'an update that overflows', 'the run ends, nothing is saved')
def test_an_update_that_overflows_is_not_saved(tmp_path):
  broken = recipe('skip', save_every_steps=1)
  broken.schedule.base_lr, broken.schedule.warmup_epochs = 1e3, 0.0
  broken.optimizer.weight_decay = 1e38  # of which no gradient knows
  with pytest.raises(UserError, match='too large for a float, so nothing is saved'):
    train.train(broken, tmp_path)
  assert not list(pathlib.Path(tmp_path).glob('checkpoints/[0-9]*'))


ONE_OF_TWO = """
import sys
import jax.numpy as jnp
from afi_flax import commands, preprocess, processes, train
from afi_flax.place import find_place
from tests.test_nonfinite import poisoned, recipe
port, index, folder = sys.argv[1:]
preprocess.normalise = poisoned(preprocess.normalise)

def main(_):
  with processes.together(find_place(f'127.0.0.1:{port}', 2, int(index)), {}):
    train.train(recipe('rollback', max_steps=20), folder)

sys.argv[1:] = []
commands.run(main)
"""


@pytest.mark.slow
@pytest.mark.fault('numbers', 'NaNs on several processes', 'rolled back alike, all ids written')
def test_two_processes(tmp_path, root):
  port, environment = (
    str(free_port()),
    os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(root)},
  )
  running = [
    subprocess.Popen(
      [sys.executable, '-c', ONE_OF_TWO, port, str(i), str(tmp_path)],
      env=environment, stderr=subprocess.PIPE, text=True,
    )
    for i in (0, 1)
  ]  # fmt: skip
  errors = [process.communicate(timeout=300)[1] for process in running]
  assert [process.returncode for process in running] == [0, 0], errors
  event, *_ = Workdir(tmp_path).read_nonfinite()
  assert len(set(event['examples'])) == 48
  assert set(event['examples']) & set(POISONED)
  assert left(tmp_path)[2][0] == 20
