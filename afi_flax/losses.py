"""Losses, one value an example: what is averaged, and over what, is the caller's business."""

import jax
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Softmax cross-entropy: logits [B,K], labels i32 [B] in [0, K) -> f32 [B], in nats.

  >>> import jax.numpy as jnp
  >>> cross_entropy(jnp.zeros([1, 4]), jnp.array([2])).round(4)
  Array([1.3863], dtype=float32)
  """
  return optax.softmax_cross_entropy_with_integer_labels(logits.astype('float32'), labels)
