"""The optimisers and the learning rate, as the papers' recipes, PyTorch and timm define them."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from afi_flax import config
from afi_flax.models import parts

PyTree = Any

LARS_TRUST = 1e-3  # You et al., and timm


def schedule(optim: config.Optim) -> optax.Schedule:
  """The learning rate of step n, from 0.

  Warm-up is linear from 0, and takes the first steps away from the schedule proper rather than
  delaying it. 'step' multiplies the rate by `factor` from each boundary on; 'cosine' falls to 0 at
  `total_steps`.
  """
  if optim.schedule == 'cosine':
    rest = optax.cosine_decay_schedule(optim.peak_lr, optim.total_steps - optim.warmup_steps)
  else:
    # In a short run several boundaries can be one step.
    at = optim.boundaries
    drops = {b - optim.warmup_steps: optim.factor ** at.count(b) for b in at}
    rest = optax.piecewise_constant_schedule(optim.peak_lr, drops)
  if not optim.warmup_steps:
    return rest
  rise = optax.linear_schedule(0.0, optim.peak_lr, optim.warmup_steps)
  return optax.join_schedules([rise, rest], [optim.warmup_steps])


def make(optim: config.Optim) -> optax.GradientTransformation:
  """The optimiser, after the gradient's norm was clipped where that is asked for.

  `sgd`: PyTorch's order: g <- g + decay * p; m <- momentum * m + g; p <- p - lr * m.
  `lars`: likewise, with g <- trust * (g + decay * p) for each tensor, see `scale_by_lars`.
  `adamw`: p <- p - lr * (m / (sqrt(v) + 1e-8) + decay * p), m and v corrected for their start.
  `lamb`: p <- p - lr * trust * u, u = m / (sqrt(v) + 1e-6) + decay * p, trust = |p| / |u|.

  Momentum is Adam's first rate; its second is 0.999. Where `decay_vectors` is off, tensors of one
  dimension (biases, scales) have neither decay nor a trust ratio, as in timm. The norm is clipped
  before the decay is added, as by `torch.nn.utils.clip_grad_norm_`.

  With `rates`, each module's lr is multiplied by its own factor. With `frozen`, `init` takes all
  parameters and makes no state for those modules; `update` takes the others only.
  """
  mask = None if optim.decay_vectors else _not_vectors
  decay = optax.add_decayed_weights(optim.weight_decay, mask)
  rate = optax.scale_by_learning_rate(schedule(optim))
  momentum = optim.momentum
  if optim.name == 'sgd':
    steps = (decay, optax.sgd(schedule(optim), momentum=momentum, nesterov=optim.nesterov))
  elif optim.name == 'lars':
    trust = _where(scale_by_lars(optim.weight_decay), mask)
    steps = (trust, optax.trace(momentum, optim.nesterov), rate)
  elif optim.name == 'adamw':
    steps = (optax.scale_by_adam(b1=momentum, eps=1e-8), decay, rate)
  else:
    trust = _where(optax.scale_by_trust_ratio(), mask)
    steps = (optax.scale_by_adam(b1=momentum, eps=1e-6), decay, trust, rate)
  clip = optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity()
  if optim.rates:
    steps = (*steps, _scale_modules(dict(optim.rates)))
  chain = optax.chain(clip, *steps)
  if not optim.frozen:
    return chain
  return chain._replace(init=lambda params: chain.init(parts.without(optim.frozen, params)))


def scale_by_lars(weight_decay: float) -> optax.GradientTransformation:
  """g -> trust * (g + decay * p), trust = 1e-3 |p| / (|g| + decay * |p| + 1e-8), for each tensor.

  You et al., "Large Batch Training of Convolutional Networks"; 1 where |p| or |g| is 0.
  """

  def scaled(g: jax.Array, p: jax.Array) -> jax.Array:
    of_p, of_g = jnp.linalg.norm(p.ravel()), jnp.linalg.norm(g.ravel())
    trust = LARS_TRUST * of_p / (of_g + weight_decay * of_p + 1e-8)
    return jnp.where((of_p > 0) & (of_g > 0), trust, 1.0) * (g + weight_decay * p)

  return optax.stateless(lambda updates, params: jax.tree.map(scaled, updates, params))


def _scale_modules(rates: dict[str, float]) -> optax.GradientTransformation:
  """Updates of each module of a network times its factor."""

  def scaled(updates, params):
    return {
      name: jax.tree.map(lambda u, rate=rates[name]: rate * u, below)
      for name, below in updates.items()
    }

  return optax.stateless(scaled)


def moving_average(average: PyTree, values: PyTree, decay: float, step: int | jax.Array) -> PyTree:
  """The exponential moving average one update on: d * average + (1 - d) * values.

  d = min(decay, (1 + step) / (10 + step)), step from 0, so that the first weights, which say
  nothing, are soon forgotten (as TensorFlow's ExponentialMovingAverage given num_updates).
  """
  d = jnp.minimum(decay, (1 + step) / (10 + step)).astype('float32')
  return jax.tree.map(lambda a, v: d * a + (1 - d) * v, average, values)


def _not_vectors(params: PyTree) -> PyTree:
  return jax.tree.map(lambda p: p.ndim > 1, params)


def _where(transformation: optax.GradientTransformation, mask) -> optax.GradientTransformation:
  return optax.masked(transformation, mask) if mask else transformation
