"""Memory of a run's steps, by XLA's own account, before any array is made."""

from typing import NamedTuple

import jax
import optax
from flax import linen as nn

from afi_flax import config, sharding, state, steps

MIB = 2**20


class Program(NamedTuple):
  """A step of a run, ready to be lowered for one device."""

  step: jax.stages.Wrapped
  arguments: tuple  # shapes, dtypes and shardings

  def lower(self) -> jax.stages.Lowered:
    """Traces the step."""
    return self.step.lower(*self.arguments)


def train_program(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  data: config.Data,
  how: config.Step,
  batch_size: int,
  device: jax.Device,
  remat: str = 'none',
) -> Program:
  """A training step on one device, as `afi_flax.train` makes it.

  Args:
    model: made with this `remat`.
    optimizer: its state is part of the arguments.
    data: normalisation and picture size.
    how: as in the run's plan; parts of a batch are those of this device alone.
    batch_size: B.
    device: what to compile for; of a topology that is not there, too.
    remat: `model.remat` of the config.
  """
  mesh = sharding.make_mesh([device])
  step = steps.jit_train_step(model, optimizer, data, how, sharding.replicated(mesh), remat)
  regularisation = how.regularisation
  ema = regularisation.ema_decay > 0
  now = state.abstract(model, optimizer, data.image_size, sharding.replicated(mesh), ema)
  counters = {}
  if regularisation.erasing or regularisation.drop_path:
    counters = {'epoch': 'int32', 'example': 'int32'}
  return Program(step, (now, _batch(data.image_size, batch_size, mesh, **counters)))


def eval_program(
  model: nn.Module, data: config.Data, batch_size: int, device: jax.Device
) -> Program:
  """An evaluation step on one device, likewise."""
  mesh = sharding.make_mesh([device])
  step = jax.jit(steps.make_eval_step(model, data), out_shardings=sharding.replicated(mesh))
  now = state.abstract(model, optax.identity(), data.image_size, sharding.replicated(mesh))
  batch = _batch(data.eval_image_size, batch_size, mesh, mask='float32')
  return Program(step, (now.variables, batch))


def peak_bytes(compiled: jax.stages.Compiled) -> int:
  """Bytes that a program needs on its device while it runs, by XLA's own account of its buffers.

  Arguments (weights, optimiser state, the batch), results that do not take the place of a donated
  argument, and the arena that XLA lays all temporary arrays out in. (XLA's own field
  `peak_memory_in_bytes` leaves the arena out on the CPU.)
  """
  sizes = compiled.memory_analysis()
  results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
  return sizes.argument_size_in_bytes + results + sizes.temp_size_in_bytes


def _batch(size: int, batch_size: int, mesh: jax.sharding.Mesh, **more: str) -> steps.Batch:
  """Shapes of a batch, with `more` of one number an example: {name: dtype}."""

  def abstract(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.split(mesh))

  return {
    'image': abstract((batch_size, size, size, 3), 'uint8'),
    **{name: abstract((batch_size,), d) for name, d in {'label': 'int32', **more}.items()},
  }
