"""What `model.remat` saves and what it costs: peak memory and time of a training step.

  python -m benchmarks.remat --json results/memory/remat.json --plot results/memory/remat.png

ResNet-32 and AFI-ResNet-32 with the paper's CIFAR recipe, batch 64, on the default device. Steps of
all networks are timed in turns, so that what slows the machine slows them all; the times are
medians, and on a machine that others use too, only their ratios mean something.
"""

import time

import jax
import numpy as np

from afi_flax import commands, config, models, optim, sharding, state
from afi_flax.analysis import memory, tables
from afi_flax.models.fusion import REMATS
from benchmarks import common, plots
from configs import common as recipes

_NETWORKS = ('resnet32', 'afi_resnet32')
_ROUNDS = 15  # timed steps of each


class Training:
  """A run on made-up pictures that takes a step when it is called.

  Attributes:
    peak: bytes that the step needs.
    compile_seconds: that tracing and compiling it took.
  """

  def __init__(self, plan: config.Plan):
    device = jax.devices()[0]
    program = common.train_program(plan, device)
    start = time.perf_counter()
    self._step = program.lower().compile()
    self.compile_seconds = time.perf_counter() - start
    self.peak = memory.peak_bytes(self._step)
    mesh = sharding.make_mesh([device])
    self._state = state.Initial(
      models.create_model(**vars(plan.model)),
      optim.make(plan.optim),
      plan.data.image_size,
      plan.seed,
      sharding.replicated(mesh),
    ).state()
    random = np.random.default_rng(0)
    size = plan.data.image_size
    batch = {
      'image': random.integers(0, 256, (plan.batch_size, size, size, 3), 'uint8'),
      'label': random.integers(0, plan.model.num_classes, plan.batch_size, 'int32'),
      'epoch': np.zeros(plan.batch_size, 'int32'),
      'example': np.arange(plan.batch_size, dtype='int32'),
    }
    self._batch = sharding.put_batch(batch, mesh)

  def __call__(self) -> jax.Array:
    """One more step; f32 [3], the loss first."""
    self._state, numbers = self._step(self._state, self._batch)
    return numbers


def make_plan(name: str, remat: str) -> config.Plan:
  """A run with the paper's CIFAR recipe."""
  recipe = recipes.cifar('cifar100', name)
  recipe.model.remat = remat
  return config.resolve(recipe)


def draw(path: str, peaks: dict, seconds: dict) -> None:
  """Time of a step over peak memory, both as shares of the first network's without remat."""
  from matplotlib import figure

  first = next(iter(peaks))
  fig = figure.Figure(figsize=(6.5, 4.2), dpi=150, layout='constrained', facecolor='white')
  axes = fig.subplots()
  plots.style(axes, f'what model.remat saves and costs, relative to {first[0]} without it')
  for i, name in enumerate(_NETWORKS):
    x = [peaks[name, remat] / peaks[first] for remat in REMATS]
    y = [seconds[name, remat] / seconds[first] for remat in REMATS]
    axes.plot(x, y, color=plots.COLOURS[i], marker='o', linewidth=1.2, label=name)
    for place, remat in zip(zip(x, y, strict=True), REMATS, strict=True):
      axes.annotate(
        remat, place, (6, (6, -12)[i]), textcoords='offset points', fontsize=8,
        color=plots.COLOURS[i],
      )  # fmt: skip
  axes.set_xlabel('peak memory', fontsize=9, color='#333333')
  axes.set_ylabel('time of a training step', fontsize=9, color='#333333')
  axes.set_xlim(left=0)
  axes.set_ylim(0, 1.1 * axes.get_ylim()[1])  # room for the uppermost word
  axes.legend(frameon=False, fontsize=8, loc='lower left')
  fig.savefig(path)


def main(_) -> None:
  runs = {}
  for name in _NETWORKS:
    for remat in REMATS:
      start = time.perf_counter()
      runs[name, remat] = Training(make_plan(name, remat))
      print(f'{name}, remat {remat}: ready in {time.perf_counter() - start:.0f} s', flush=True)
  seconds = common.median_seconds(runs, _ROUNDS)
  peaks = {key: run.peak for key, run in runs.items()}

  def ratio(values, name, remat):
    return f'{values[name, remat] / values[name, "none"]:.2f}'

  rows = [
    {
      'network': name,
      'remat': remat,
      'MiB': f'{peaks[name, remat] / memory.MIB:,.0f}',
      'to none': ratio(peaks, name, remat),
      'ms a step': f'{seconds[name, remat] * 1000:,.0f}',
      'to none ': ratio(seconds, name, remat),
    }
    for name, remat in runs
  ]
  kind = jax.devices()[0].device_kind
  print(f'\nTraining, batch 64 of 32 pixels, on {kind}; medians of {_ROUNDS} steps\n')
  print(tables.text(rows))
  if plots.PLOT.value:
    draw(plots.PLOT.value, peaks, seconds)
  if common.JSON.value:
    figures = [
      {
        'network': name,
        'remat': remat,
        'peak_mib': peaks[key] / memory.MIB,
        'seconds': seconds[key],
      }
      for key in runs
      for name, remat in [key]
    ]
    common.write_json(common.JSON.value, device=kind, rounds=_ROUNDS, figures=figures)


if __name__ == '__main__':
  commands.run(main)
