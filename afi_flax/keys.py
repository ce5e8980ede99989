"""Keys of JAX whose bits are `random_draws`' hash: a network's first weights are drawn with them.

JAX's own generator, Threefry, is compiled anew for each of a network's tensors: on two cores 14 s
for AFI-ResNet-32, or 4 s without optimisation, and AFI-ResNet-50's numbers then take 4 s to make.
With these few integer operations it takes 3 s (AFI-ResNet-32) and 5 s (AFI-ResNet-50), all in all.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.extend import random as extend

from afi_flax import random_draws

Array = jax.Array


def key(seed: int | Array) -> Array:
  """A typed key [], as `jax.random` takes it, whose data is u32 [1]. It draws 32-bit numbers only.

  >>> import jax
  >>> jax.random.normal(key(0), [2, 3]).shape
  (2, 3)

  Args:
    seed: its low 32 bits count.

  Raises:
    ValueError: when a draw from it wants bits of another width (float16, bfloat16, float64).
  """
  return jax.random.key(seed, impl=_HASH)


def _seed(seed: Array) -> Array:
  return jnp.asarray(seed).astype('uint32')[None]


@jax.jit  # lowered once for all tensors, as are the bits for all of one shape
def _fold_in(key: Array, data: Array) -> Array:
  return random_draws.bits(key[0], data)[None]


def _split(key: Array, shape: tuple[int, ...]) -> Array:
  return _bits(key, 32, shape)[..., None]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _bits(key: Array, width: int, shape: tuple[int, ...]) -> Array:
  """uint32 of the shape, each the hash of the key and its place."""
  if width != 32:
    raise ValueError(f'keys of afi_flax.keys have 32 bits a draw, not {width}; draw a 32-bit dtype')
  return random_draws.bits(key[0], jax.lax.iota('uint32', math.prod(shape))).reshape(shape)


_HASH = extend.define_prng_impl(
  key_shape=(1,),
  seed=_seed,
  split=_split,
  random_bits=_bits,
  fold_in=_fold_in,
  name='afi_hash',
  tag='afi',
)
