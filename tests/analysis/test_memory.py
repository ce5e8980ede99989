import jax

from afi_flax.analysis import memory


def peak(function, **options):
  x = jax.ShapeDtypeStruct((512, 512), 'float32')  # 1 MiB
  return memory.peak_bytes(jax.jit(function, **options).lower(x).compile()) / memory.MIB


def test_peak_counts_arguments_results_and_what_is_between():
  assert 2 <= peak(lambda x: x + 1) < 2.01  # the argument and the result
  assert 1 <= peak(lambda x: x + 1, donate_argnums=0) < 1.01  # in place of the argument
  assert 3 <= peak(lambda x: jax.lax.cummax(x @ x)) < 4.01  # the product too
