"""Metrics as sums over examples, divided once, when they are read.

A mean of the batches' means would weigh a short last batch wrongly; sums do not, and sums of
several steps, devices and processes simply add.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

Sums = dict[str, jax.Array]


def zeros() -> Sums:
  """The sums over no example."""
  return {
    'loss': jnp.zeros([], 'float32'),
    'top1': jnp.zeros([], 'int32'),
    'top5': jnp.zeros([], 'int32'),
    'examples': jnp.zeros([], 'int32'),
  }


def sums(logits: jax.Array, labels: jax.Array, losses: jax.Array, mask: jax.Array) -> Sums:
  """Sums over the examples whose mask is 1.

  Args:
    logits: f32 [B,K].
    labels: i32 [B]; or i32 [B,L], padded with -1, any of which is right. Top-1 is then ReaL's
      accuracy, and top-5 whether any of the five classes is right, which ReaL does not report.
    losses: f32 [B].
    mask: [B], 1 or 0.

  Returns:
    `loss` f32, and i32 counts: `top1` and `top5` (top-min(5, K)) hits, `examples`.
  """
  mask = mask > 0
  rank = label_rank(logits, labels) if labels.ndim == 1 else _best_rank(logits, labels)
  return {
    'loss': jnp.where(mask, losses, 0).sum(),
    'top1': _count(mask & (rank < 1)),
    'top5': _count(mask & (rank < min(5, logits.shape[-1]))),
    'examples': _count(mask),
  }


def _count(flags: jax.Array) -> jax.Array:
  """How many are set, i32. Summed in float32, exact to 2^24, as the gradients are: between devices
  they then travel together.
  """
  return flags.sum(dtype='float32').astype('int32')


def label_rank(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """How many classes come before the label's: i32 [B], 0 for a top-1 hit.

  Equal logits rank by index, as in argmax, so that a network that says nothing is not right; where
  logits are NaN, no label is right.

  >>> label_rank(jnp.array([[0.1, 0.7, 0.2]]), jnp.array([2]))
  Array([1], dtype=int32)
  """
  classes = jnp.arange(logits.shape[-1])[None]
  label = labels[:, None]
  own = jnp.take_along_axis(logits, label, axis=-1)
  after = (logits < own) | ((logits == own) & (classes >= label))
  return (~after).sum(axis=-1, dtype='int32')


def _best_rank(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """`label_rank` of the best of the labels i32 [B,L]: i32 [B], K without a label."""
  ranks = jax.vmap(label_rank, in_axes=(None, 1), out_axes=1)(logits, labels)
  return jnp.where(labels >= 0, ranks, logits.shape[-1]).min(axis=-1)


def means(parts: Iterable[Sums]) -> dict[str, float | int]:
  """Sums of any number of steps -> `loss`, `top1`, `top5` as means and `examples` as a count."""
  total = {k: 0 for k in zeros()}
  for part in jax.device_get(list(parts)):
    total = {k: total[k] + np.asarray(part[k]).item() for k in total}
  examples = total.pop('examples')
  return {k: v / examples if examples else float('nan') for k, v in total.items()} | {
    'examples': examples
  }
