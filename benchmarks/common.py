"""What the benchmarks share: the run that is measured, times, tables, plots."""

import importlib.metadata
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
from absl import flags

from afi_flax import config, optim
from afi_flax.analysis import memory
from afi_flax.models import create_model
from configs import common as recipes

JSON = flags.DEFINE_string('json', '', 'Where to write the figures.')
PLOT = flags.DEFINE_string('plot', '', 'Where to draw them: a PNG file.')

COLOURS = ('#4C78A8', '#E4572E', '#54A24B', '#B279A2')  # as in the learning curves
_GREY = '#8A8F98'


def imagenet_plan(
  name: str,
  remat: str = 'none',
  batch_size: int = 64,
  image_size: int = 224,
  dtype: str = 'float32',
) -> config.Plan:
  """A run with the paper's ImageNet recipe."""
  recipe = recipes.imagenet(name)
  recipe.model.remat = remat
  recipe.model.dtype = dtype
  recipe.data.image_size = image_size
  recipe.data.eval_resize = 0
  recipe.batch_size = batch_size
  return config.resolve(recipe)


def train_program(plan: config.Plan, device: jax.Device) -> memory.Program:
  """The training step of a run."""
  model, optimizer = create_model(**vars(plan.model)), optim.make(plan.optim)
  return memory.train_program(
    model, optimizer, plan.data, plan.batch_size, device, plan.model.remat
  )


def eval_program(plan: config.Plan, device: jax.Device) -> memory.Program:
  """Its evaluation step, with the batch size of its training."""
  model = create_model(**vars(plan.model))
  return memory.eval_program(model, plan.data, plan.batch_size, device)


def median_seconds(
  calls: Mapping[Hashable, Callable[[], Any]], rounds: int
) -> dict[Hashable, float]:
  """Median wall time of every call over so many rounds, after one that does not count.

  A round makes each call once, so that what slows the machine for a while slows them all.
  """
  times = {name: [] for name in calls}
  for call in calls.values():
    jax.block_until_ready(call())
  for _ in range(rounds):
    for name, call in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      times[name].append(time.perf_counter() - start)
  return {name: statistics.median(values) for name, values in times.items()}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Aligned columns: names to the left, all else to the right."""
  cells = [list(header), *map(list, rows)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines = []
  for first, *rest in cells:
    aligned = (f'{cell:>{width}}' for cell, width in zip(rest, widths[1:], strict=True))
    lines.append('  '.join((f'{first:<{widths[0]}}', *aligned)).rstrip())
  return '\n'.join([lines[0], '-' * max(map(len, lines)), *lines[1:]])


def write_json(path: str, **record: Any) -> None:
  """Writes the record with the versions and the machine that it holds for."""
  versions = {name: importlib.metadata.version(name) for name in ('jax', 'jaxlib', 'flax')}
  about = {'versions': versions, 'backend': jax.default_backend(), 'cpu_cores': os.cpu_count()}
  pathlib.Path(path).write_text(json.dumps(about | record, indent=1) + '\n')


def style(axes, title: str) -> None:
  """The looks of the learning curves."""
  axes.set_title(title, loc='left', fontsize=10, color='#333333')
  axes.tick_params(labelsize=8, color=_GREY, labelcolor='#333333')
  axes.spines[['top', 'right']].set_visible(False)
  axes.spines[['left', 'bottom']].set_color(_GREY)
  axes.grid(axis='y', color='#EAECEF', linewidth=0.8)
  axes.set_axisbelow(True)
