"""Losses, one value an example: what is averaged, and over what, is the caller's business."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Softmax cross-entropy, in nats.

  >>> import jax.numpy as jnp
  >>> cross_entropy(jnp.zeros([1, 4]), jnp.array([2])).round(4)
  Array([1.3863], dtype=float32)

  Args:
    logits: [B,K].
    labels: i32 [B] in [0, K), or f32 [B,K], targets that sum to 1, of `soft_targets`.

  Returns:
    f32 [B].
  """
  logits = logits.astype('float32')
  if labels.ndim == 2:
    return optax.softmax_cross_entropy(logits, labels)
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def any_label_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """-log of the probability that the class is one of an example's labels, in nats.

  >>> import jax.numpy as jnp
  >>> any_label_cross_entropy(jnp.zeros([1, 4]), jnp.array([[2, 0, -1]])).round(4)
  Array([0.6931], dtype=float32)

  Args:
    logits: [B,K].
    labels: i32 [B,L], different ones in [0, K), padded with -1.

  Returns:
    f32 [B]; inf without a label.
  """
  logits = logits.astype('float32')
  own = jnp.where(labels >= 0, jnp.take_along_axis(logits, labels, axis=-1), -jnp.inf)
  return jax.nn.logsumexp(logits, axis=-1) - jax.nn.logsumexp(own, axis=-1)


def binary_cross_entropy(
  logits: jax.Array, targets: jax.Array, threshold: float = 0.0
) -> jax.Array:
  """Every class is a question of its own, whose answers' losses are averaged over the classes.

  As timm's BinaryCrossEntropy, of "ResNet strikes back".

  >>> import jax.numpy as jnp
  >>> binary_cross_entropy(jnp.zeros([1, 4]), jnp.array([[0.0, 0.7, 0.3, 0.0]])).round(4)
  Array([0.6931], dtype=float32)

  Args:
    logits: [B,K].
    targets: f32 [B,K] in 0..1, of `soft_targets`, mixed or not.
    threshold: targets above it count as 1 and the others as 0; 0: they stay as they are.

  Returns:
    f32 [B], in nats.
  """
  if threshold:
    targets = (targets > threshold).astype('float32')
  return optax.sigmoid_binary_cross_entropy(logits.astype('float32'), targets).mean(axis=-1)


def soft_targets(labels: jax.Array, num_classes: int, smoothing: float = 0.0) -> jax.Array:
  """Labels i32 [B] -> f32 [B,K]: 1 - smoothing for the label, and smoothing / K for every class.

  >>> import jax.numpy as jnp
  >>> soft_targets(jnp.array([1]), 4, smoothing=0.5)
  Array([[0.125, 0.625, 0.125, 0.125]], dtype=float32)
  """
  return jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + jnp.float32(
    smoothing / num_classes
  )
