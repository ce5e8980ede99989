"""Memory of a run's steps, by XLA's own account, before any array is made."""

from typing import NamedTuple

import jax

from afi_flax import config, models, optim, sharding, state, steps

MIB = 2**20


class Program(NamedTuple):
  """A step of a run, ready to be lowered for one device."""

  step: jax.stages.Wrapped
  arguments: tuple  # shapes, dtypes and shardings

  def lower(self) -> jax.stages.Lowered:
    """Traces the step."""
    return self.step.lower(*self.arguments)


def train_program(plan: config.Plan, device: jax.Device) -> Program:
  """The training step of a run on one device, as `afi_flax.train` makes it."""
  mesh = sharding.make_mesh([device])
  model, optimizer = models.create_model(**vars(plan.model)), optim.make(plan.optim)
  on_cpu = device.platform == 'cpu'
  step = jax.jit(
    steps.make_train_step(model, optimizer, plan.data),
    donate_argnums=0,
    out_shardings=sharding.replicated(mesh),
    compiler_options=steps.compiler_options(plan.model.remat) if on_cpu else None,
  )
  return Program(step, (_state(model, optimizer, plan, mesh), _batch(plan, mesh)))


def eval_program(plan: config.Plan, device: jax.Device) -> Program:
  """The evaluation step of a run on one device, with the batch size of its training."""
  mesh = sharding.make_mesh([device])
  model, optimizer = models.create_model(**vars(plan.model)), optim.make(plan.optim)
  step = jax.jit(steps.make_eval_step(model, plan.data), out_shardings=sharding.replicated(mesh))
  variables = _state(model, optimizer, plan, mesh).variables
  return Program(step, (variables, _batch(plan, mesh, mask='float32')))


def peak_bytes(compiled: jax.stages.Compiled) -> int:
  """Bytes that a program needs on its device while it runs, by XLA's own account of its buffers.

  Arguments (weights, optimiser state, the batch), results that do not take the place of a donated
  argument, and the arena that XLA lays all temporary arrays out in. (XLA's own field
  `peak_memory_in_bytes` leaves the arena out on the CPU.)
  """
  sizes = compiled.memory_analysis()
  results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
  return sizes.argument_size_in_bytes + results + sizes.temp_size_in_bytes


def _state(model, optimizer, plan: config.Plan, mesh: jax.sharding.Mesh) -> state.TrainState:
  return state.abstract(model, optimizer, plan.data.image_size, sharding.replicated(mesh))


def _batch(plan: config.Plan, mesh: jax.sharding.Mesh, **more: str) -> steps.Batch:
  """Shapes of a batch, with `more` of one number an example: {name: dtype}."""

  def abstract(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.split(mesh))

  size = plan.data.image_size
  return {
    'image': abstract((plan.batch_size, size, size, 3), 'uint8'),
    **{name: abstract((plan.batch_size,), d) for name, d in {'label': 'int32', **more}.items()},
  }
