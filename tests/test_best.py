"""Which checkpoint is the best of a run that is stopped and goes on."""

from concurrent.futures import Future

import jax.numpy as jnp
import pytest

from afi_flax import evaluate, feed, train
from afi_flax.checkpoint import Checkpoints
from afi_flax.workdir import Workdir
from configs import digits_afi_resnet20 as digits


@pytest.fixture(autouse=True)
def steps_that_only_count(monkeypatch):
  def count(state, _):
    counted = state.replace(step=state.step + 1, data_step=state.data_step + 1)
    return counted, jnp.ones(3)  # loss, gradient norm, all is finite

  compiled = Future()
  compiled.set_result(feed.Compiled(count, ''))
  monkeypatch.setattr(feed, 'compile_step', lambda *_: compiled)


@pytest.fixture
def top1(monkeypatch):
  """What the next evaluations find, in their order."""
  coming = []

  def evaluate_(*_):
    numbers = {'split': 'test', 'loss': 1.0, 'top1': coming.pop(0), 'top5': 1.0}
    return numbers | {'examples': 359, 'images_per_second': 1.0}

  monkeypatch.setattr(evaluate.Evaluator, '__call__', evaluate_)
  return coming


def best_steps(folder, max_steps):
  """Goes on to a step, evaluating after every third; what best/ holds then."""
  config = digits.get_config('')
  config.model.name, config.batch_size = 'resnet20', 48
  config.run.eval_every_epochs, config.run.max_steps = 0.1, max_steps
  train.train(config, folder)
  best = Checkpoints(Workdir(folder).best)
  best.close()
  return best.steps()


@pytest.mark.slow
def test_what_max_steps_finds_where_it_ends_is_not_the_best_of_a_longer_run(tmp_path, top1):
  top1 += [0.5, 0.9]
  assert best_steps(tmp_path, 4) == [3, 4]
  top1 += [0.9]
  assert best_steps(tmp_path, 4) == [3, 4], 'as long as it ends there'
  assert not (tmp_path / 'unreadable').exists()
  top1 += [0.4, 0.3]
  assert best_steps(tmp_path, 7) == [3]
  assert not top1
