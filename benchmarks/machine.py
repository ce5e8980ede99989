"""What the machine can do at best, by measurement: the two lines of a roofline."""

import dataclasses

import jax
import jax.numpy as jnp

from benchmarks import common


@dataclasses.dataclass(frozen=True)
class Limits:
  """Of one device.

  Attributes:
    flops: operations a second of a large matrix product.
    bandwidth: bytes a second, read and written, of an addition to an array that no cache holds.
  """

  flops: float
  bandwidth: float

  def seconds(self, flops: float, accessed: float) -> float:
    """The least time that so many operations and bytes can take."""
    return max(flops / self.flops, accessed / self.bandwidth)


def measure(dtype: str, rounds: int = 7) -> Limits:
  """The limits of the default device; a quarter of a GiB on the CPU, 3 GiB on others."""
  on_cpu = jax.default_backend() == 'cpu'
  side, length = (2048, 2**25) if on_cpu else (8192, 2**28)
  matrix, vector = jnp.ones([side, side], dtype), jnp.ones([length])
  product = jax.jit(lambda a: a @ a).lower(matrix).compile()
  # In place, and so without the first touch of fresh memory, which costs a CPU as much again.
  add = jax.jit(lambda a: a + 1, donate_argnums=0).lower(vector).compile()
  held = [vector]

  def stream():
    held[0] = add(held[0])
    return held[0]

  times = common.median_seconds({'flops': lambda: product(matrix), 'bytes': stream}, rounds)
  return Limits(2 * side**3 / times['flops'], 2 * 4 * length / times['bytes'])
