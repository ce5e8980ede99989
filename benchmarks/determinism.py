"""Whether two runs of one command end in the same bits, and what `run.deterministic` costs.

  python -m benchmarks.determinism --steps 60 --json results/determinism_cpu.json
  python -m benchmarks.determinism --recipe configs/imagenet_afi_resnet50.py:smoke --steps 100

Every run is a process of its own that compiles for itself: a GPU's compiler chooses between kernels
by their speed, and may choose otherwise the next time. Runs with and without the switch take turns.
"""

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import jax
import numpy as np
from absl import flags

from afi_flax import commands, run
from afi_flax.analysis import tables
from afi_flax.errors import UserError
from afi_flax.workdir import Workdir
from benchmarks import common

_RECIPE = flags.DEFINE_string('recipe', 'configs/digits_afi_resnet20.py', 'The config to train.')
_RUNS = flags.DEFINE_integer('runs', 2, 'How many runs of each kind.', lower_bound=2)


def train(folder: pathlib.Path, deterministic: bool) -> tuple[dict, list[float]]:
  """The weights at the end of a run, and its pictures/s at each log line but the first."""
  every = max(1, common.STEPS.value // 6)
  command = [
    sys.executable, '-m', 'afi_flax.main', '--config', _RECIPE.value, '--workdir', str(folder),
    f'--config.run.deterministic={deterministic}', f'--config.run.max_steps={common.STEPS.value}',
    f'--config.run.log_every_steps={every}', f'--config.epochs={common.STEPS.value}.0',
  ]  # fmt: skip
  # Memory is left for this process, which compares.
  env = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false', **os.environ}
  done = subprocess.run(
    command, env=env | {'JAX_ENABLE_COMPILATION_CACHE': 'false'}, capture_output=True, text=True
  )
  if done.returncode:
    raise UserError(f'a run failed: {done.stderr[-1000:]}')
  records = [r for r in Workdir(folder).read_metrics() if r['split'] == 'train']
  return jax.device_get(run.load_run(folder).variables), [
    record['images_per_second'] for record in records[1:]
  ]


def equal(runs: list[dict]) -> bool:
  """Whether the weights of all runs are the same, bit for bit."""
  first, *others = [[np.asarray(x).tobytes() for x in jax.tree.leaves(one)] for one in runs]
  return all(first == other for other in others)


def main(_) -> None:
  if common.JSON.value:
    tables.check_writable(common.JSON.value)
  weights, speeds = {False: [], True: []}, {False: [], True: []}
  with tempfile.TemporaryDirectory() as folder:
    for number in range(_RUNS.value):
      for deterministic in (False, True):
        print(f'run {number + 1}, deterministic={deterministic} ...', file=sys.stderr, flush=True)
        end, rates = train(pathlib.Path(folder) / f'{number}-{deterministic}', deterministic)
        weights[deterministic].append(end)
        speeds[deterministic] += rates
  medians = {kind: statistics.median(rates) for kind, rates in speeds.items()}
  rows = [
    {
      'run.deterministic': str(kind),
      'equal bits': 'yes' if equal(weights[kind]) else 'no',
      'pictures/s': round(medians[kind]),
      'of the other': f'{medians[kind] / medians[False]:.2f}',
    }
    for kind in (False, True)
  ]
  steps, device = common.STEPS.value, jax.devices()[0].device_kind
  print(f'{_RECIPE.value}, {steps} steps, {_RUNS.value} runs of each kind, {device}')
  print(tables.text(rows))
  if common.JSON.value:
    common.write_json(common.JSON.value, config=_RECIPE.value, steps=common.STEPS.value, rows=rows)


if __name__ == '__main__':
  commands.run(main)
