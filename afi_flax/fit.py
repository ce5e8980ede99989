r"""Will it fit, without the hardware: compiles a run's real steps for TPUs that need not be there.

  python -m afi_flax.fit --config configs/imagenet_afi_resnet50.py --topology v5e:4x8 \
    --config.model.dtype=bfloat16 --config.batch_size=4096
  python -m afi_flax.fit --config configs/cifar100_afi_resnet32.py          for this machine

Prints the memory that training and evaluation need on a chip beside what it has, the network's
FLOPs in a step, what the chips exchange, and how long the run takes at least: its memory traffic,
by the compiler's estimate, at full bandwidth, or its FLOPs at full speed. TPUs need
`pip install 'jax[tpu]'` and minutes of compiling; how many depends on the network, hardly on the
number of chips. --json FILE adds the figures as a row to a list in that file, in the place of an
older row of the same run.
"""

import concurrent.futures
import multiprocessing
import os
import time

import ml_collections
from absl import flags
from ml_collections import config_flags

from afi_flax import commands, config
from afi_flax.analysis import fit, memory, tables
from afi_flax.errors import UserError
from afi_flax.report import Console

_CONFIG = config_flags.DEFINE_config_file('config', None, 'The run: configs/NAME.py[:VARIANT].')
_TOPOLOGY = flags.DEFINE_string('topology', '', "v5e:4x8, v4:2x2x1; '': this machine's devices.")
_JSON = flags.DEFINE_string('json', None, 'A list of rows to add this one to.')
_KEY = ('config', 'overrides', 'topology')  # what a row is about


def main(_) -> None:
  if _CONFIG.value is None:
    raise UserError('no --config; give one, such as --config configs/imagenet_afi_resnet50.py')
  if _JSON.value:  # mistakes show before the work
    tables.check_writable(_JSON.value)
    _rows(_JSON.value)
  given = flags.FLAGS['config']
  about = {
    'config': config_flags.get_config_filename(given),
    'overrides': config_flags.get_override_values(given),
    'topology': _TOPOLOGY.value,
    'bn_scope': _CONFIG.value.batch_norm.scope,
  }
  row, cure = _in_another_process(_CONFIG.value.to_dict(), _TOPOLOGY.value, about)
  print(_describe(row))
  if _JSON.value:
    _add(row, _JSON.value)
  if row['hbm_mib'] and max(row['peak_mib'], row['eval_peak_mib']) > row['hbm_mib']:
    raise UserError(f'it does not fit; {cure}')


def _measure(run: dict, topology: str, about: fit.Row) -> tuple[fit.Row, str]:
  """The figures, and what to do if they are too large."""
  devices = fit.find_devices(topology)
  plan = config.resolve(ml_collections.ConfigDict(run), len(devices))
  training, evaluation = (fit.compile_step(plan, devices, training) for training in (True, False))
  cure = memory.train_cure(plan, len(devices))
  if evaluation.peak > training.peak:
    cure = memory.EVAL_CURE
  return fit.row(plan, devices, training, evaluation, **about), cure


def _in_another_process(run: dict, topology: str, about: fit.Row) -> tuple[fit.Row, str]:
  """`_measure`, watched: libtpu ends the process that it fails in, and takes minutes."""
  console, start = Console(), time.monotonic()
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
    future = pool.submit(_measure, run, topology, about)
    while not future.done():
      concurrent.futures.wait([future], timeout=0.5)
      seconds = time.monotonic() - start
      console.show(0, 1, [f'compiling for {topology or "this machine"}', f'{seconds:.0f} s'])
    console.close()
    try:
      return future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
      raise UserError(
        f'the compiler of --topology {topology!r} ended without a word, or for want of memory; '
        'its messages are above; v5e topologies are known to work'
      ) from error


def _describe(row: fit.Row) -> str:
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


def _add(row: fit.Row, path: str) -> None:
  """Writes the rows that are in the file, without one of the same run, and this one."""
  others = [old for old in _rows(path) if any(old.get(key) != row[key] for key in _KEY)]
  tables.write_json([*others, row], path)


def _rows(path: str) -> list[fit.Row]:
  return tables.read_json(path) if os.path.exists(path) else []


if __name__ == '__main__':
  commands.run(main)
