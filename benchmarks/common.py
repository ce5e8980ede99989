"""What the benchmarks share: the run that is measured, times, files."""

import importlib.metadata
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
from absl import flags

from afi_flax import config, optim
from afi_flax.analysis import memory
from afi_flax.models import create_model
from configs import common as recipes

JSON = flags.DEFINE_string('json', '', 'Where to write the figures.')
ROUNDS = flags.DEFINE_integer('rounds', 5, 'How often each is measured.', lower_bound=1)
BACKBONES = flags.DEFINE_list('backbones', [], 'Which networks; none: all that are of interest.')
BATCH_SIZE = flags.DEFINE_integer('batch_size', 0, 'Pictures in a batch; 0: as usual.')
DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of the computation.')
DATA_DIR = flags.DEFINE_string('data_dir', '', 'Where the pictures are.')
STEPS = flags.DEFINE_integer('steps', 20, 'Of those that train: how long.', lower_bound=2)


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
  return memory.train_program(model, optimizer, plan.data, plan.step, plan.batch_size, [device])


def eval_program(plan: config.Plan, device: jax.Device) -> memory.Program:
  """Its evaluation step, with the batch size of its training."""
  model = create_model(**vars(plan.model))
  return memory.eval_program(model, plan.data, plan.batch_size, [device])


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


def write_json(path: str, **record: Any) -> None:
  """Writes the record with the versions and the machine that it holds for."""
  versions = {name: importlib.metadata.version(name) for name in ('jax', 'jaxlib', 'flax')}
  about = {'versions': versions, 'backend': jax.default_backend(), 'cpu_cores': os.cpu_count()}
  pathlib.Path(path).write_text(json.dumps(about | record, indent=1) + '\n')
