import jax
import jax.numpy as jnp

from afi_flax import config
from benchmarks import common
from configs import common as recipes


def test_times_are_medians_of_rounds_after_one_call_that_does_not_count(monkeypatch):
  now, order = [0.0], []
  monkeypatch.setattr(common.time, 'perf_counter', lambda: now[0])
  lasts = {'a': iter([100.0, 1.0, 9.0, 2.0]), 'b': iter([100.0, 5.0, 5.0, 6.0])}

  def call(name):
    now[0] += next(lasts[name])
    order.append(name)
    return jnp.zeros([])

  calls = {name: (lambda name=name: call(name)) for name in lasts}
  assert common.median_seconds(calls, rounds=3) == {'a': 2.0, 'b': 5.0}
  assert ''.join(order) == 'abababab'


def test_imagenet_plan():
  plan = common.imagenet_plan('afi_resnet50', 'block', 4, 64, 'bfloat16')
  assert (plan.model.name, plan.model.remat, plan.model.dtype) == (
    'afi_resnet50',
    'block',
    'bfloat16',
  )
  assert (plan.batch_size, plan.data.image_size, plan.model.num_classes) == (4, 64, 1000)


def test_steps_are_those_of_the_recipe():
  """The batch has the shapes and dtypes of a run; the state is donated, the batch is not."""
  recipe = recipes.cifar('cifar10', 'resnet20')
  recipe.batch_size = 4
  lowered = common.train_program(config.resolve(recipe), jax.devices()[0]).lower()
  arguments = jax.tree.leaves(lowered.args_info)
  batch = [a for a in arguments if not a.donated]
  one = ((4,), 'int32')  # epoch, example; label
  assert [(a.shape, str(a.dtype)) for a in batch] == [one, one, ((4, 32, 32, 3), 'uint8'), one]
  assert len(arguments) - len(batch) > 100
