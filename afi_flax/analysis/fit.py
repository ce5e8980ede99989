"""Whether a run fits on devices that are not there, and what it would do on them.

The programs are those that `afi_flax.train` runs, compiled ahead of time by the compiler of the
devices: for TPUs that is libtpu's, which needs no TPU.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections

from afi_flax import config, optim
from afi_flax.analysis import cost, memory, tables
from afi_flax.analysis import devices as hardware
from afi_flax.errors import UserError
from afi_flax.models import create_model

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says of one program, of each device where nothing else is said."""

  peak: int  # bytes of memory
  seconds: float  # to compile
  accessed: float  # bytes read and written in memory, as the compiler counts them
  collectives: dict[str, memory.Collectives]


def measure(run: dict[str, Any], topology: str, about: Row) -> tuple[Row, str]:
  """What a run's two steps need and do on so many devices.

  Args:
    run: the config as a dictionary, which can be sent to another process.
    topology: as for `find_devices`.
    about: what else the row is to say.

  Returns:
    The figures, and what to do if they are too large.

  Raises:
    UserError: as `find_devices`, `config.resolve` and `compile_step` do.
  """
  devices = find_devices(topology)
  plan = config.resolve(ml_collections.ConfigDict(run), len(devices))
  training, evaluation = (compile_step(plan, devices, training) for training in (True, False))
  cure = memory.train_cure(plan, len(devices))
  if evaluation.peak > training.peak:
    cure = memory.EVAL_CURE
  return row(plan, devices, training, evaluation, **about), cure


def find_devices(topology: str) -> Sequence[jax.Device]:
  """The devices of a TPU topology, such as v5e:4x8, that need not be there; '': this machine's.

  Call it before anything else starts JAX's devices: with a topology, JAX itself computes on the
  CPU.

  Raises:
    UserError: libtpu is not installed, in use by another process, or knows no such topology.
  """
  if not topology:
    return jax.devices()
  # libtpu asks for the machine it is on, which is none of its own.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  jax.config.update('jax_platforms', 'cpu')
  from jax.experimental import topologies

  try:
    return topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  except Exception as error:  # libtpu raises what it likes
    if importlib.util.find_spec('libtpu') is None:
      raise UserError("--topology needs libtpu: pip install -e '.[tpu]'") from error
    if 'libtpu_lockfile' in str(error):
      raise UserError('libtpu is in use by another process; wait until that ends') from error
    reason = ' '.join(str(error).split())[:200]
    raise UserError(
      f'--topology {topology!r} cannot be compiled for ({reason}); give a shape such as v5e:4x8 or '
      'v4:2x2x1'
    ) from error


def compile_step(plan: config.Plan, devices: Sequence[jax.Device], training: bool) -> Compiled:
  """Compiles a run's training or evaluation step.

  Args:
    plan: resolved for this number of devices.
    devices: what to compile for.
    training: False: the evaluation step.

  Raises:
    UserError: the compiler finds that the step does not fit in the devices' memory.
  """
  model = create_model(**vars(plan.model))
  if training:
    optimizer = optim.make(plan.optim)
    program = memory.train_program(model, optimizer, plan.data, plan.step, plan.batch_size, devices)
  else:
    batch = plan.padded_eval_batch(len(devices))
    program = memory.eval_program(model, plan.data, batch, devices)
  lowered = program.lower()
  start = time.perf_counter()
  cure = memory.train_cure(plan, len(devices)) if training else memory.EVAL_CURE
  compiled = memory.compile_or_explain(lowered, cure)
  seconds = time.perf_counter() - start
  return Compiled(
    peak=memory.peak_bytes(compiled),
    seconds=seconds,
    accessed=(compiled.cost_analysis() or {}).get('bytes accessed', 0.0),
    collectives=memory.collectives(compiled),
  )


def row(
  plan: config.Plan,
  devices: Sequence[jax.Device],
  training: Compiled,
  evaluation: Compiled,
  **about: Any,
) -> Row:
  """One line of figures: `about`, then numbers in the units that their names end in.

  `..._at_best`: if the step did nothing but its operations at the chips' peak, or nothing but what
  it reads and writes (by the compiler's estimate) at their full bandwidth, whichever takes longer;
  hours are of the whole run, its evaluations left out. With micro_batches the step is a loop, whose
  traffic the compiler counts once: those numbers are then None.
  """
  there = hardware.memory_bytes(devices)
  model = create_model(**vars(plan.model))
  flops = cost.train_flops(model, plan.data.image_size, plan.step.frozen) * plan.batch_size
  traffic = _traffic(plan, devices, training, flops)
  if plan.step.micro_batches > 1:
    traffic = dict.fromkeys(traffic)
  return {
    **about,
    'network': plan.model.name,
    'dtype': plan.model.dtype,
    'remat': plan.model.remat,
    'micro_batches': plan.step.micro_batches,
    'image_size': plan.data.image_size,
    'chips': hardware.count_chips(devices),
    'devices': len(devices),
    'batch_per_chip': plan.batch_size // hardware.count_chips(devices),
    'peak_mib': round(training.peak / memory.MIB, 1),
    'hbm_mib': there and there // memory.MIB,
    'gflops_per_step': round(flops / 1e9, 1),
    **traffic,
    'compile_s': round(training.seconds, 1),
    'eval_peak_mib': round(evaluation.peak / memory.MIB, 1),
    'eval_compile_s': round(evaluation.seconds, 1),
    'jax': jax.__version__,
    'libtpu': _version('libtpu') if devices[0].platform == 'tpu' else None,
  }


def _traffic(
  plan: config.Plan, devices: Sequence[jax.Device], training: Compiled, flops: float
) -> Row:
  seconds = hardware.seconds_at_best(devices, flops, training.accessed)
  sums = training.collectives.get('all-reduce', memory.Collectives(0, 0))
  return {
    'all_reduces': sums.number,
    'all_reduce_mib': round(sums.bytes / memory.MIB, 2),
    'other_collectives': {
      kind: found.number for kind, found in training.collectives.items() if kind != 'all-reduce'
    },
    'accessed_mib': round(training.accessed / memory.MIB),
    'step_ms_at_best': seconds and round(1e3 * seconds, 2),
    'hours_at_best': seconds and round(plan.optim.total_steps * seconds / 3600, 2),
  }


def describe(row: Row) -> str:
  """The figures of a row for people."""
  table = tables.text(
    [
      {
        'step': step,
        'peak MiB a device': round(row[f'{prefix}peak_mib']),
        'of': row['hbm_mib'],
        'compiled in s': round(row[f'{prefix}compile_s']),
      }
      for step, prefix in (('training', ''), ('evaluation', 'eval_'))
    ]
  )
  step = f'A training step: {row["gflops_per_step"]:,} GFLOP in all'
  if row['accessed_mib'] is not None:
    others = [f'{n} {kind}' for kind, n in row['other_collectives'].items()]
    sums = f'{row["all_reduces"]} all-reduces of {row["all_reduce_mib"]:,.1f} MiB'
    step += (
      f'; each device reads and writes {row["accessed_mib"]:,} MiB, and takes part in '
      f'{", ".join([sums, *others])}'
    )
  if row['hours_at_best'] is not None:
    step += (
      f'; at best {row["step_ms_at_best"]:,.1f} ms, {row["hours_at_best"]:,.1f} hours for the run'
    )
  return '\n'.join(
    (
      f'{row["network"]} ({row["dtype"]}), {row["batch_per_chip"]} pictures of {row["image_size"]} '
      f'pixels a chip, {row["chips"]} chips, batch_norm.scope {row["bn_scope"]}',
      table,
      step,
    )
  )


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None
