"""The optimiser and the learning rate, as the paper's recipes and PyTorch define them."""

import optax

from afi_flax import config


def schedule(optim: config.Optim) -> optax.Schedule:
  """The learning rate of step n, from 0.

  Warm-up is linear from 0, and takes the first steps away from the schedule proper rather than
  delaying it. 'step' multiplies the rate by `factor` from each boundary on; 'cosine' falls to 0 at
  `total_steps`.
  """
  if optim.schedule == 'cosine':
    rest = optax.cosine_decay_schedule(optim.peak_lr, optim.total_steps - optim.warmup_steps)
  else:
    drops = {b - optim.warmup_steps: optim.factor for b in optim.boundaries}
    rest = optax.piecewise_constant_schedule(optim.peak_lr, drops)
  if not optim.warmup_steps:
    return rest
  rise = optax.linear_schedule(0.0, optim.peak_lr, optim.warmup_steps)
  return optax.join_schedules([rise, rest], [optim.warmup_steps])


def make(optim: config.Optim) -> optax.GradientTransformation:
  """SGD with momentum and coupled weight decay.

  PyTorch's order: g <- g + decay * p, on every parameter; m <- momentum * m + g; p <- p - lr * m.
  The norm is clipped before the decay is added, as by `torch.nn.utils.clip_grad_norm_`.
  """
  return optax.chain(
    optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity(),
    optax.add_decayed_weights(optim.weight_decay),
    optax.sgd(schedule(optim), momentum=optim.momentum, nesterov=optim.nesterov),
  )
