"""What AFI reuses: the fusion weights s~ of a network's blocks, over a whole split."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Reuse:
  """Of one block: how much of R_k each of the N earlier blocks of its stage gives.

  Attributes:
    sources: their names, 'stage2_block1' first.
    mean: f64 [N], s~ averaged over channels and pictures; it sums to 1.
    spread: f64 [N], standard deviation, over classes, of the classes' means; 0: the weights do not
      depend on the class. Of the classes that have examples.
    entropy: of s~ over the N sources, divided by log N, averaged over channels and pictures; 1: all
      sources weigh the same, 0: one alone counts; NaN where N is 1.
  """

  sources: tuple[str, ...]
  mean: np.ndarray
  spread: np.ndarray
  entropy: float


def of_pictures(weights: jax.Array) -> jax.Array:
  """s~ f32 [B,N,c] -> f32 [B,N+1]: its means over channels, then that of its entropy, in nats."""
  entropy = jax.scipy.special.entr(weights).sum(axis=1)  # [B,c]; entr(0) is 0
  return jnp.concatenate([weights.mean(axis=2), entropy.mean(axis=1, keepdims=True)], axis=1)


def summarise(block: str, sums: np.ndarray, counts: np.ndarray) -> Reuse:
  """The summary of a block.

  Args:
    block: its name, such as 'stage2_block3'.
    sums: f64 [K,N+1], of `of_pictures` over the pictures of each class.
    counts: i64 [K], pictures of each class.
  """
  number = sums.shape[1] - 1
  stage = block.partition('_')[0]
  *mean, entropy = sums.sum(axis=0) / counts.sum()
  there = counts > 0
  spread = (sums[there, :-1] / counts[there, None]).std(axis=0)
  return Reuse(
    sources=tuple(f'{stage}_block{k + 1}' for k in range(number)),
    mean=np.array(mean),
    spread=spread,
    entropy=float(entropy / np.log(number)) if number > 1 else float('nan'),
  )
