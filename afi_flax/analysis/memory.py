"""Steps of a run, compiled from shapes alone: their memory and sums over devices, as XLA has it."""

import collections
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import optax
from flax import linen as nn

from afi_flax import config, sharding, state, steps
from afi_flax.analysis import devices as hardware
from afi_flax.errors import UserError

MIB = 2**20
EVAL_CURE = 'use a smaller --config.eval_batch_size'
# '%x = (f32[64]{0:T(128)}, f32[]) all-reduce(': the shapes of the result and the kind.
_COLLECTIVE = re.compile(
  r' = (\S.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\('
)
_ARRAY = re.compile(r'\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]')


class Program(NamedTuple):
  """A step of a run, ready to be lowered."""

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
  devices: Sequence[jax.Device],
) -> Program:
  """A training step, as `afi_flax.train` makes it.

  Args:
    model: made with the plan's `model.remat`.
    optimizer: its state is part of the arguments.
    data: normalisation and picture size.
    how: as in the run's plan.
    batch_size: B, over all devices.
    devices: what to compile for; of a topology that is not there, too.
  """
  mesh = sharding.make_mesh(devices)
  step = steps.jit_train_step(model, optimizer, data, how, sharding.replicated(mesh))
  ema = how.regularisation.ema_decay > 0
  now = state.abstract(model, optimizer, data.image_size, sharding.replicated(mesh), ema)
  return Program(step, (now, train_batch(data.image_size, batch_size, mesh)))


def eval_program(
  model: nn.Module, data: config.Data, batch_size: int, devices: Sequence[jax.Device]
) -> Program:
  """An evaluation step, likewise."""
  mesh = sharding.make_mesh(devices)
  step = steps.jit_eval_step(model, data, sharding.replicated(mesh))
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


def check_fits(compiled: jax.stages.Compiled, devices: Sequence[jax.Device], cure: str) -> str:
  """Says what a program needs of its device's memory, or that it has too little.

  Args:
    compiled: for these devices.
    devices: equal ones; what they have may be unknown, and then nothing is checked.
    cure: for the error.

  Returns:
    '5,696 of 16,384 MiB'; without the second number where that is not known.

  Raises:
    UserError: it needs more than there is.
  """
  needed, there = peak_bytes(compiled), hardware.memory_bytes(devices)
  if there is None:
    return f'{needed / MIB:,.0f} MiB'
  if needed > there:
    raise UserError(
      f'the step needs {needed / MIB:,.0f} MiB of memory on each device, which has '
      f'{there / MIB:,.0f}; {cure}'
    )
  return f'{needed / MIB:,.0f} of {there / MIB:,.0f} MiB'


def compile_or_explain(lowered: jax.stages.Lowered, cure: str) -> jax.stages.Compiled:
  """Compiles a step.

  Raises:
    UserError: the compiler, as a TPU's does, finds by itself that memory is too small.
  """
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    reason = re.search(r'Used (\S+) of (\S+) ', str(error))
    what = (
      f'needs {reason[1]} of the {reason[2]}' if reason else 'needs more memory than the device'
    )
    raise UserError(f'the step {what} of a device; {cure}') from error


def train_cure(plan: config.Plan, device_count: int) -> str:
  """What to do where a run's training step does not fit: what it does not do already."""
  share = plan.batch_size // device_count
  options = []
  parts = (n for n in range(plan.step.micro_batches + 1, share + 1) if share % n == 0)
  if (more := next(parts, None)) is not None:
    options.append(f'--config.micro_batches={more} or more')
  if plan.model.remat != 'block':
    options.append('--config.model.remat=block')
  if plan.model.dtype != 'bfloat16':
    options.append('--config.model.dtype=bfloat16')
  return f'use {", ".join([*options, "a smaller --config.batch_size"])}'


class Collectives(NamedTuple):
  """Operations of one kind between devices."""

  number: int
  bytes: int  # of their results on each device; of one in the background its operands may count too


def collectives(compiled: jax.stages.Compiled) -> dict[str, Collectives]:
  """{'all-reduce': ...}: what a compiled program exchanges between devices; in a loop, once.

  Read from its text, in which an operation that goes on in the background has a start and a done.
  """
  found = collections.defaultdict(list)
  for shape, kind in _COLLECTIVE.findall(compiled.as_text()):
    found[kind].append(_shape_bytes(shape))
  return {kind: Collectives(len(sizes), sum(sizes)) for kind, sizes in sorted(found.items())}


def _shape_bytes(shape: str) -> int:
  """Bytes of the arrays in 'f32[64,3]{1,0}' or '(f32[64], bf16[2,2])'."""
  total = 0
  for _, bits, sizes in _ARRAY.findall(shape):
    total += math.prod(int(n) for n in sizes.split(',') if n) * max(int(bits or 8) // 8, 1)
  return total


def train_batch(size: int, batch_size: int, mesh: jax.sharding.Mesh) -> steps.Batch:
  """Shapes of a batch of training pictures of `size` pixels, as `sharding.put_batch` makes it."""
  return _batch(size, batch_size, mesh, epoch='int32', example='int32')


def _batch(size: int, batch_size: int, mesh: jax.sharding.Mesh, **more: str) -> steps.Batch:
  """Shapes of a batch, with `more` of one number an example: {name: dtype}."""

  def abstract(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.split(mesh))

  return {
    'image': abstract((batch_size, size, size, 3), 'uint8'),
    **{name: abstract((batch_size,), d) for name, d in {'label': 'int32', **more}.items()},
  }
