"""Keys against the hash that their bits are, as numpy computes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from afi_flax import keys, random_draws, sharding


def test_bits_are_the_hash():
  found = jax.random.bits(jax.random.fold_in(keys.key(7), 1234), [3, 5])
  inner = random_draws.bits(7, 1234)
  wanted = random_draws.bits(inner, np.arange(15)).reshape(3, 5)
  np.testing.assert_array_equal(found, wanted)
  first, second = jax.random.split(keys.key(7))
  np.testing.assert_array_equal(jax.random.key_data(second), [random_draws.bits(7, 1)])
  assert (jax.random.bits(first, [8]) != jax.random.bits(second, [8])).all()


def test_never_change():
  """Or a run that is started again before its first checkpoint would be another run."""
  one = jax.random.fold_in(keys.key(0), 42)
  assert jax.random.bits(one, [3]).tolist() == [1524309651, 1999230557, 3433157871]
  np.testing.assert_allclose(
    jax.random.normal(one, [3]), [-0.372109, -0.086632, 0.839281], rtol=1e-5
  )


def test_seed_is_an_argument():
  draw = jax.jit(lambda seed: jax.random.bits(keys.key(seed), [4]))
  np.testing.assert_array_equal(draw(jnp.uint32(3)), jax.random.bits(keys.key(3), [4]))
  assert (draw(jnp.uint32(4)) != draw(jnp.uint32(3))).all()


def normals(seed, tensor):
  one = jax.random.fold_in(keys.key(seed), tensor)
  return np.asarray(jax.random.normal(one, [1000, 1000]), 'float64')


def test_normal_and_independent():
  """Moments of a million numbers; correlations with neighbours, other tensors and other seeds."""
  x = normals(seed=1, tensor=5)
  for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
    spread = np.sqrt(np.mean(x ** (2 * power)) / x.size)
    assert abs(np.mean(x**power) - moment) < 4 * spread
  others = (np.roll(x, 1), np.roll(x, 1000), normals(1, 6), normals(2, 5), normals(2, 6))
  for other in others:
    assert abs(np.mean(x * other)) < 4 / np.sqrt(x.size)


def test_split_over_devices():
  """The same numbers, however they lie on devices."""
  mesh = sharding.make_mesh()
  split = NamedSharding(mesh, PartitionSpec('data'))
  draw = jax.jit(lambda: jax.random.bits(keys.key(2), [16, 3]), out_shardings=split)
  np.testing.assert_array_equal(draw(), jax.random.bits(keys.key(2), [16, 3]))


def test_other_widths_are_refused():
  with pytest.raises(ValueError, match='have 32 bits a draw, not 16'):
    jax.random.bits(keys.key(0), [2], 'uint16')
