import jax

from afi_flax import config
from afi_flax.analysis import memory
from configs import common as recipes


def peak(function, **options):
  x = jax.ShapeDtypeStruct((512, 512), 'float32')  # 1 MiB
  return memory.peak_bytes(jax.jit(function, **options).lower(x).compile()) / memory.MIB


def test_peak_counts_arguments_results_and_what_is_between():
  assert 2 <= peak(lambda x: x + 1) < 2.01  # the argument and the result
  assert 1 <= peak(lambda x: x + 1, donate_argnums=0) < 1.01  # in place of the argument
  assert 3 <= peak(lambda x: jax.lax.cummax(x @ x)) < 4.01  # the product too


def test_steps_are_those_of_the_recipe():
  """The batch has the shapes and dtypes of a run; the state is donated, the batch is not."""
  recipe = recipes.cifar('cifar10', 'resnet20')
  recipe.batch_size = 4
  lowered = memory.train_program(config.resolve(recipe), jax.devices()[0]).lower()
  arguments = jax.tree.leaves(lowered.args_info)
  batch = [a for a in arguments if not a.donated]
  assert [(a.shape, str(a.dtype)) for a in batch] == [((4, 32, 32, 3), 'uint8'), ((4,), 'int32')]
  assert len(arguments) - len(batch) > 100
