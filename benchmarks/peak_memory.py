"""Peak memory of training and inference: the paper's Table 6, with XLA in PyTorch's place.

  python -m benchmarks.peak_memory --json results/memory/peak_memory.json
  python -m benchmarks.peak_memory --networks resnet152,afi_resnet152 --dtype bfloat16

The steps are those of real runs with the paper's ImageNet recipe, compiled from shapes alone: no
picture, weight or activation is ever allocated, so a laptop can tell what a large batch needs.
Peak is what XLA lays out for the compiled program: weights, optimiser state, batch and results, and
one arena for all that is temporary, in which arrays share a place when their times allow it. It is
exact for the backend that it is compiled for, and for no other: the CPU's here, or a TPU's with
--topology v5e:2x2, which needs `pip install -e '.[tpu]'` but no TPU. Ratios are to the first
network of the list.
"""

import time

import jax
from absl import flags

from afi_flax import commands, config, models
from afi_flax.analysis import fit, memory, tables
from afi_flax.errors import UserError
from afi_flax.models.fusion import REMATS
from benchmarks import common

_NETWORKS = flags.DEFINE_list(
  'networks', 'resnet50,afi_resnet50,densenet121', 'What to measure; the first is compared with.'
)
_REMATS = flags.DEFINE_list(
  'remats', ','.join(REMATS), 'For training: which values of model.remat.'
)
_SIZE = flags.DEFINE_integer('image_size', 224, 'Side of the pictures, in pixels.')
_TOPOLOGY = flags.DEFINE_string('topology', '', 'Compile for one chip of this TPU: v5e:2x2.')


def measure(plan: config.Plan, device: jax.Device, training: bool) -> int:
  """Peak bytes of a step of the run; prints what it finds."""
  start = time.perf_counter()
  program = (common.train_program if training else common.eval_program)(plan, device)
  peak = memory.peak_bytes(program.lower().compile())
  task = f'training, remat {plan.model.remat}' if training else 'inference'
  seconds = time.perf_counter() - start
  print(
    f'{plan.model.name}, {task}: {peak / memory.MIB:,.0f} MiB (compiled in {seconds:.0f} s)',
    flush=True,
  )
  return peak


def supports(name: str, remat: str) -> bool:
  """Whether the network can be made with this value of model.remat."""
  models.create_model(name)  # an unknown name is the user's mistake
  try:
    models.create_model(name, remat=remat)
  except UserError:
    return False
  return True


def show(peaks: dict[tuple[str, str], int], first: str) -> str:
  """{(network, 'inference' or remat): bytes} as a table."""

  def ratio(peak, key):
    return f'{peak / peaks[key]:.3f}' if key in peaks else ''

  rows = [
    {
      'network': name,
      'task': 'inference' if task == 'inference' else 'training',
      'remat': '' if task == 'inference' else task,
      'MiB': f'{peak / memory.MIB:,.0f}',
      f'to {first}': ratio(peak, (first, task)),
      f'to {first}, remat none': '' if task == 'inference' else ratio(peak, (first, 'none')),
    }
    for (name, task), peak in peaks.items()
  ]
  return tables.text(rows)


def main(_) -> None:
  for remat in _REMATS.value:
    if remat not in REMATS:
      raise UserError(f'--remats {remat!r} must be some of {", ".join(REMATS)}')
  device = fit.find_devices(_TOPOLOGY.value)[0]
  peaks, batch, dtype = {}, common.BATCH_SIZE.value or 64, common.DTYPE.value
  for name in _NETWORKS.value:
    for remat in _REMATS.value:
      if supports(name, remat):
        plan = common.imagenet_plan(name, remat, batch, _SIZE.value, dtype)
        peaks[name, remat] = measure(plan, device, training=True)
    plan = common.imagenet_plan(name, 'none', batch, _SIZE.value, dtype)
    peaks[name, 'inference'] = measure(plan, device, training=False)
  target = f'one chip of TPU {_TOPOLOGY.value}' if _TOPOLOGY.value else device.device_kind
  print(
    f'\nPeak memory, batch {batch} of {_SIZE.value} pixels, {dtype}, compiled for '
    f'{target}\n\n{show(peaks, _NETWORKS.value[0])}'
  )
  if common.JSON.value:
    common.write_json(
      common.JSON.value,
      compiled_for=target,
      batch_size=batch,
      image_size=_SIZE.value,
      dtype=dtype,
      peak_mib=[
        {'network': name, 'task_or_remat': task, 'mib': round(peak / memory.MIB, 1)}
        for (name, task), peak in peaks.items()
      ],
    )


if __name__ == '__main__':
  commands.run(main)
