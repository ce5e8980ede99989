"""The training and the evaluation step: pure functions of the state and a batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from afi_flax import config, losses, metrics, preprocess
from afi_flax.state import TrainState

Batch = dict[str, jax.Array]


def make_train_step(
  model: nn.Module, optimizer: optax.GradientTransformation, data: config.Data
) -> Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]:
  """(state, {'image' u8 [B,H,W,3], 'label' i32 [B]}) -> the state one update on, the loss f32 [].

  The loss is the mean over the global batch, and batch norm's statistics are the global batch's:
  with the batch split over devices the compiler adds what must be added between them.
  """

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
    images = preprocess.normalise(batch['image'], data.mean, data.std)

    def loss_fn(params):
      logits, updated = model.apply(
        {'params': params, 'batch_stats': state.batch_stats},
        images,
        train=True,
        mutable=['batch_stats'],
      )
      per_example = losses.cross_entropy(logits, batch['label'])
      return per_example.mean(), (logits, per_example, updated['batch_stats'])

    (loss, (logits, per_example, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      state.params
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    sums = metrics.sums(logits, batch['label'], per_example, jnp.ones_like(per_example))
    updated = TrainState(
      step=state.step + 1,
      data_step=state.data_step + 1,
      params=optax.apply_updates(state.params, updates),
      batch_stats=batch_stats,
      opt_state=opt_state,
      metric_sums=jax.tree.map(jnp.add, state.metric_sums, sums),
    )
    return updated, loss

  return train_step


def compiler_options(remat: str) -> dict[str, str] | None:
  """What `jax.jit` of the train step needs so that `model.remat` saves memory on the CPU too.

  XLA's CPU compiler removes the barriers of `jax.checkpoint` and then merges what is to be computed
  again with its first computation, which keeps all of it in memory.
  """
  if remat == 'none' or jax.default_backend() != 'cpu':
    return None
  return {'xla_disable_hlo_passes': 'cse_barrier_expander'}


def make_eval_step(model: nn.Module, data: config.Data) -> Callable[[dict, Batch], metrics.Sums]:
  """(variables, {'image', 'label', 'mask' f32 [B]}) -> sums over the examples whose mask is 1."""

  def eval_step(variables: dict, batch: Batch) -> metrics.Sums:
    images = preprocess.normalise(batch['image'], data.mean, data.std)
    logits = model.apply(variables, images, train=False)
    per_example = losses.cross_entropy(logits, batch['label'])
    return metrics.sums(logits, batch['label'], per_example, batch['mask'])

  return eval_step
