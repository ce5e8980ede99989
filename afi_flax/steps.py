"""The training and the evaluation step: pure functions of the state and a batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from afi_flax import config, losses, metrics, optim, preprocess
from afi_flax.models import parts
from afi_flax.state import TrainState

Batch = dict[str, jax.Array]


def make_train_step(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  data: config.Data,
  how: config.Step,
) -> Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]:
  """(state, {'image' u8 [B,H,W,3], 'label' i32 [B]}) -> the state one update on, f32 [3].

  The three are the loss, the gradient's L2 norm, and 1 where they and the statistics of batch norm
  are finite. Where they are not, the state that comes back is the one that came in, but for
  `data_step`: the batch is consumed, and leaves no other trace.

  The loss is the mean over the global batch, and batch norm's statistics are the global batch's,
  or each of `how.batch_norm_parts` equal parts' own: with the batch split over devices the compiler
  adds what must be added between them. Random erasing and stochastic depth also want the batch's
  'epoch' and 'example', i32 [B].

  With `how.micro_batches` m the gradient is the mean of m gradients computed one after another, of
  examples i, i + m, i + 2m, ... each, in a fraction of the memory. Batch norm then normalises each
  by its own statistics (or parts of it), and the running ones follow all of them in turn.

  Modules in `how.frozen` compute what they do in evaluation; their parameters and statistics, and
  the moving averages of these, stay as they are to the bit. The gradient is of the others only,
  and is not computed any further back than to the first of them.
  """
  regularisation, decay, frozen = how.regularisation, how.regularisation.ema_decay, how.frozen

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
    images, targets, more = _inputs(batch, state.data_step, model, data, how)
    trained = parts.without(frozen, state.params)

    def gradient(batch_stats, images, targets, more):
      def loss_fn(trained):
        with parts.evaluating(frozen):
          logits, updated = model.apply(
            {'params': state.params | trained, 'batch_stats': batch_stats},
            images,
            train=how.batch_norm_parts,
            mutable=['batch_stats'],
            **more,
          )
        per_example = _losses(logits, targets, regularisation)
        return per_example.mean(), (logits, per_example, updated['batch_stats'])

      (_, out), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained)
      return grads, *out

    inputs = (images, targets, more)
    if how.micro_batches == 1:
      grads, logits, per_example, batch_stats = gradient(state.batch_stats, *inputs)
    else:
      grads, logits, per_example, batch_stats = _in_turn(
        gradient, trained, state.batch_stats, inputs, how.micro_batches
      )
    loss, norm = per_example.mean(), _norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm) & _all_finite(batch_stats)
    # Or XLA's CPU compiler puts the whole of it into the loop of every parameter.
    finite = jax.lax.optimization_barrier(finite)
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    sums = metrics.sums(logits, batch['label'], per_example, jnp.ones_like(per_example))
    params = state.params | optax.apply_updates(trained, updates)
    variables = {'params': params, 'batch_stats': batch_stats}
    updated = TrainState(
      step=state.step + 1,
      data_step=state.data_step + 1,
      params=params,
      batch_stats=batch_stats,
      opt_state=opt_state,
      metric_sums=jax.tree.map(jnp.add, state.metric_sums, sums),
      ema=_moving_average(state, variables, decay, frozen) if decay else None,
    )
    left_out = state.replace(data_step=updated.data_step)
    # Not on a copy of the updated state: the choice is made where each number is computed.
    chosen = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, left_out)
    return chosen, jnp.stack([loss, norm, finite.astype('float32')])

  return train_step


def _moving_average(
  state: TrainState, variables: dict, decay: float, frozen: tuple[str, ...]
) -> dict:
  """`state.ema` one update on; of what is frozen it stays, where rounding would move it."""
  averages, values = (
    {name: parts.without(frozen, tree) for name, tree in trees.items()}
    for trees in (state.ema, variables)
  )
  moved = optim.moving_average(averages, values, decay, state.step)
  return {name: state.ema[name] | moved[name] for name in moved}


def _norm(tree) -> jax.Array:
  """The L2 norm of all numbers, f32 []; the squares of one shape are traced once."""
  return jnp.sqrt(sum(_sum_of_squares(x) for x in jax.tree.leaves(tree)))


@jax.jit
def _sum_of_squares(x: jax.Array) -> jax.Array:
  return (x * x).sum()


def _all_finite(tree) -> jax.Array:
  """bool []."""
  return jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def _in_turn(gradient: Callable, params, batch_stats, inputs, micro_batches: int) -> tuple:
  """What `gradient` returns for the whole batch, computed for one part of it after another.

  Part i has examples i, i + m, i + 2m, ...: each device has its share of every part.
  """

  def one(carry, part):
    total, batch_stats = carry
    grads, logits, per_example, batch_stats = gradient(batch_stats, *part)
    return (jax.tree.map(jnp.add, total, grads), batch_stats), (logits, per_example)

  def cut(x):  # [B,...] -> [m,B/m,...]
    return jnp.moveaxis(x.reshape(-1, micro_batches, *x.shape[1:]), 1, 0)

  def join(x):  # and back
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])

  nothing = (jax.tree.map(jnp.zeros_like, params), batch_stats)
  (total, batch_stats), outputs = jax.lax.scan(one, nothing, jax.tree.map(cut, inputs))
  logits, per_example = jax.tree.map(join, outputs)
  return jax.tree.map(lambda x: x / micro_batches, total), logits, per_example, batch_stats


def _inputs(
  batch: Batch,
  data_step: jax.Array,
  model: nn.Module,
  data: config.Data,
  how: config.Step,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
  """Pictures f32, targets (i32 [B], or f32 [B,K] where they are soft), and what else to apply.

  Mixed, normalised, then erased: timm's order with its prefetcher, as its train.py does by default.
  """
  r, images, targets = how.regularisation, batch['image'], batch['label']
  if r.loss == 'bce' or r.label_smoothing or r.mixup or r.cutmix:
    targets = losses.soft_targets(targets, model.num_classes, r.label_smoothing)
  if r.mixup or r.cutmix:
    images, targets = preprocess.mix(images, targets, r.mixup, r.cutmix, how.seed, data_step)
  images = preprocess.normalise(images, data.mean, data.std)
  if r.erasing:
    images = preprocess.erase(images, r.erasing, how.seed, batch['epoch'], batch['example'])
  if not r.drop_path:
    return images, targets, {}
  counters = batch['epoch'], batch['example']
  keep = preprocess.branch_scales(r.drop_path, r.num_blocks, how.seed, *counters)
  return images, targets, {'keep': keep}


def _losses(
  logits: jax.Array, targets: jax.Array, regularisation: config.Regularisation
) -> jax.Array:
  """f32 [B]."""
  if regularisation.loss == 'bce':
    return losses.binary_cross_entropy(logits, targets, regularisation.target_threshold)
  return losses.cross_entropy(logits, targets)


def jit_train_step(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  data: config.Data,
  how: config.Step,
  sharding: jax.sharding.Sharding,
  deterministic: bool = False,
) -> jax.stages.Wrapped:
  """`make_train_step` as it is run: the state, of that sharding, makes room for the next.

  `deterministic` is `run.deterministic` of the config.
  """
  (device, *_) = sharding.device_set
  return jax.jit(
    make_train_step(model, optimizer, data, how),
    donate_argnums=0,
    out_shardings=sharding,
    compiler_options=compiler_options(deterministic, device),
  )


def compiler_options(deterministic: bool, device: jax.Device) -> dict[str, str | bool]:
  """What `jax.jit` needs of a step so that it is fast, and so that `run.deterministic` holds.

  XLA's CPU compiler removes barriers, `jax.checkpoint`'s too, before it merges equal computations
  and fuses what is elementwise; here they stay. And its newer code for convolutions (YNNPACK, the
  default of jaxlib 0.10) takes twice as long for the gradient of a kernel as its older one (Eigen).
  The GPU compiler otherwise adds up in the order in which threads happen to come (atomics), and
  takes of several kernels the one that happens to be faster when it compiles. The CPU and TPUs
  repeat a step to the bit anyway.
  """
  if device.platform == 'cpu':
    return {
      'xla_disable_hlo_passes': 'cse_barrier_expander',
      'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE',
    }
  if device.platform == 'gpu' and deterministic:
    return {'xla_gpu_deterministic_ops': True}
  return {}


def jit_eval_step(
  model: nn.Module,
  data: config.Data,
  sharding: jax.sharding.Sharding,
  deterministic: bool = False,
) -> jax.stages.Wrapped:
  """`make_eval_step` as it is run; its sums have that sharding. `deterministic` as in training."""
  (device, *_) = sharding.device_set
  return jax.jit(
    make_eval_step(model, data),
    out_shardings=sharding,
    compiler_options=compiler_options(deterministic, device),
  )


def make_eval_step(model: nn.Module, data: config.Data) -> Callable[[dict, Batch], metrics.Sums]:
  """(variables, {'image', 'label', 'mask' f32 [B]}) -> sums over the examples whose mask is 1.

  The label is i32 [B], or i32 [B,L] where an example has any number of them, padded with -1.
  """

  def eval_step(variables: dict, batch: Batch) -> metrics.Sums:
    images = preprocess.normalise(batch['image'], data.mean, data.std)
    logits = model.apply(variables, images, train=False)
    loss = losses.cross_entropy if batch['label'].ndim == 1 else losses.any_label_cross_entropy
    per_example = loss(logits, batch['label'])
    return metrics.sums(logits, batch['label'], per_example, batch['mask'])

  return eval_step
