"""How fast training and evaluation steps are: beside PyTorch, the plain network and the machine.

  make bench-setup                                       # once: PyTorch and timm, to compare with
  .venv-parity/bin/python -m benchmarks.step --json results/step_cpu.json
  .venv-parity/bin/python -m benchmarks.step --backbones resnet50 --batch_size 256 \\
    --dtype bfloat16 --json results/step_gpu.json

The steps are those of real runs with the paper's recipes, on one random batch that is on the device
already. A backbone's forms (plain, AFI, AFI-B) and PyTorch's plain network take turns, and medians
over the rounds are given; one call takes as many steps as a tenth of a second holds. PyTorch runs
in both memory layouts on the CPU, and the faster counts; on a GPU channels-last, compiled.

ratio_to_torch is our speed over PyTorch's (above 1 is faster); ratio_to_plain the time over our
plain network's, beside the ratio of their FLOPs in the paper's convention. roofline is the least
time that the machine could take, by its measured speed of a matrix product and of memory, over the
time that was taken: FLOPs are the network's own, bytes what XLA counts for the compiled step.
"""

import importlib.metadata
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from afi_flax import commands, config, models, optim, state
from afi_flax.analysis import cost, tables
from benchmarks import common, machine, peers
from configs import common as recipes

BACKBONES = (
  'resnet32', 'resnet110', 'mobilenetv2_cifar', 'resnext29_32x4d', 'shufflenetv2_x1_0_cifar',
  'resnet50',
)  # fmt: skip
FORMS = {'plain': '{}', 'afi': 'afi_{}', 'afi_b': 'afi_{}_b'}
MODES = ('train', 'eval')
_FORMS = flags.DEFINE_list('forms', list(FORMS), 'In which forms; the first is compared with.')
_PER_CALL = 0.1  # seconds

Call = Callable[[int], Any]  # takes so many steps, and waits for the last


class Ours:
  """The compiled steps of one network."""

  def __init__(self, name: str, batch_size: int, dtype: str):
    self.plan = plan(name, batch_size, dtype)
    self.model = models.create_model(**vars(self.plan.model))
    self.device = jax.devices()[0]
    programs = {
      'train': common.train_program(self.plan, self.device),
      'eval': common.eval_program(self.plan, self.device),
    }
    self.programs = {mode: program.lower().compile() for mode, program in programs.items()}
    self._batches = {mode: _random(program.arguments[1]) for mode, program in programs.items()}
    optimizer, how = optim.make(self.plan.optim), programs['train'].arguments[0].step.sharding
    size = self.plan.data.image_size
    self._state = state.Initial(self.model, optimizer, size, 0, how, ema=False).state()

  def calls(self) -> dict[str, Call]:
    """{'train': f, 'eval': f}."""
    return {'train': self._train, 'eval': self._evaluate}

  def _train(self, number: int) -> None:
    for _ in range(number):
      self._state, numbers = self.programs['train'](self._state, self._batches['train'])
    numbers.block_until_ready()

  def _evaluate(self, number: int) -> None:
    variables = self._state.eval_variables
    for _ in range(number):
      sums = self.programs['eval'](variables, self._batches['eval'])
    jax.block_until_ready(sums)

  def flops(self, mode: str) -> float:
    """Of a step: two for each multiply-accumulate, three times as many with the gradients."""
    train = cost.train_flops(self.model, self.plan.data.image_size) * self.plan.batch_size
    return train if mode == 'train' else train / 3

  def accessed(self, mode: str) -> float:
    """Bytes that a step reads and writes, as XLA counts them."""
    return self.programs[mode].cost_analysis()['bytes accessed']

  def paper_flops(self) -> int:
    """Of one picture."""
    return cost.total(cost.count(self.model, self.plan.data.image_size)).paper_flops


def plan(name: str, batch_size: int, dtype: str) -> config.Plan:
  """The paper's recipe for the network; batch size 0: 64, or 16 of ImageNet's size."""
  for backbone, entry in models.BACKBONES.items():
    if name in [form.format(backbone) for form in FORMS.values()]:
      small = entry.image_size == 32
  if not small:
    return common.imagenet_plan(name, batch_size=batch_size or 16, dtype=dtype)
  recipe = recipes.cifar('cifar100', name)
  recipe.batch_size = batch_size or 64
  recipe.model.dtype = dtype
  return config.resolve(recipe)


def _random(batch: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
  """Pictures and labels, and a mask of ones."""
  draw = np.random.default_rng(0)
  high = {'image': 256, 'label': 10, 'mask': 2}
  return {
    key: jax.device_put(
      draw.integers(key == 'mask', high.get(key, 2), x.shape).astype(x.dtype), x.sharding
    )
    for key, x in batch.items()
  }


def milliseconds(calls: Mapping[tuple, Call], rounds: int) -> dict[tuple, float]:
  """Median time of a step of each, after a call that does not count; they take turns."""
  numbers, times = {}, {key: [] for key in calls}
  for key, call in calls.items():
    call(1)
    start = time.perf_counter()
    call(1)
    numbers[key] = max(1, round(_PER_CALL / (time.perf_counter() - start)))
  for _ in range(rounds):
    for key, call in calls.items():
      start = time.perf_counter()
      call(numbers[key])
      times[key].append((time.perf_counter() - start) / numbers[key])
  return {key: 1000 * statistics.median(values) for key, values in times.items()}


def measure(
  backbone: str, forms: Sequence[str], batch_size: int, dtype: str, rounds: int, limits
) -> list[dict[str, Any]]:
  """The rows of one backbone."""
  names = [FORMS[form].format(backbone) for form in forms]
  ours = {}
  for name in names:
    print(f'compiling {name} ...', file=sys.stderr, flush=True)
    ours[name] = Ours(name, batch_size, dtype)
  calls = {(name, mode): call for name in names for mode, call in ours[name].calls().items()}
  calls |= _peers(backbone, ours[names[0]].plan, dtype)
  took = milliseconds(calls, rounds)
  rows = []
  for name in names:
    for mode in MODES:
      ms, one = took[name, mode], ours[name]
      theirs = _theirs(took, mode) if name == backbone else {}
      layout = min(theirs, key=theirs.get, default=None)
      limit = 1000 * limits.seconds(one.flops(mode), one.accessed(mode))
      rows.append(
        {
          'network': name,
          'mode': mode,
          'device': one.device.device_kind,
          'batch_size': one.plan.batch_size,
          'dtype': dtype,
          'ms': round(ms, 3),
          'torch_ms': theirs[layout] if layout else None,
          'ratio_to_torch': round(theirs[layout] / ms, 3) if layout else None,
          'ratio_to_plain': round(ms / took[names[0], mode], 3),
          'flops_ratio_to_plain': round(one.paper_flops() / ours[names[0]].paper_flops(), 3),
          'pictures_per_second': round(1000 * one.plan.batch_size / ms, 1),
          'gflops': round(one.flops(mode) / 1e9, 2),
          'mib_moved': round(one.accessed(mode) / 2**20, 1),
          'roofline': round(limit / ms, 3),
          'torch_layout': layout,
          'torch_ms_by_layout': theirs or None,
          'rounds': rounds,
        }
      )
  return rows


def _theirs(took: Mapping[tuple, float], mode: str) -> dict[str, float]:
  """{layout: milliseconds of PyTorch's step}."""
  return {key[2]: round(ms, 3) for key, ms in took.items() if key[:2] == ('torch', mode)}


def _peers(backbone: str, plan: config.Plan, dtype: str) -> dict[tuple, Call]:
  """{('torch', mode, layout): call}."""
  if why := peers.missing(backbone):
    print(f'{backbone}: not compared with PyTorch, {why}', flush=True)
    return {}
  on_gpu = jax.default_backend() == 'gpu'
  calls = {}
  for layout in ['channels_last'] if on_gpu else peers.LAYOUTS:
    size, classes = plan.data.image_size, plan.model.num_classes
    steps = peers.make_steps(backbone, plan.batch_size, size, classes, dtype, layout)
    calls |= {('torch', mode, layout): call for mode, call in steps.items()}
  return calls


def show(rows: Sequence[tables.Row]) -> str:
  """The rows as a table."""

  def cell(value, digits):
    return None if value is None else f'{value:.{digits}f}'

  return tables.text(
    [
      {
        'network': row['network'],
        'mode': row['mode'],
        'ms': cell(row['ms'], 1),
        'PyTorch ms': cell(row['torch_ms'], 1) or '',
        'speed to PyTorch': cell(row['ratio_to_torch'], 2) or '',
        'time to plain': cell(row['ratio_to_plain'], 2),
        'FLOPs to plain': cell(row['flops_ratio_to_plain'], 2),
        'pictures/s': cell(row['pictures_per_second'], 0),
        'MiB moved': row['mib_moved'],
        'of the limit': f'{row["roofline"]:.0%}',
      }
      for row in rows
    ]
  )


def main(_) -> None:
  backbones, dtype = common.BACKBONES.value or BACKBONES, common.DTYPE.value
  for backbone in backbones:  # a mistake shows before the work
    for form in _FORMS.value:
      models.create_model(FORMS[form].format(backbone))
  if common.JSON.value:
    tables.check_writable(common.JSON.value)
  limits = machine.measure(dtype)
  about = {
    'limit_gflops_per_second': round(limits.flops / 1e9, 1),
    'limit_gb_per_second': round(limits.bandwidth / 1e9, 1),
    **{
      name: importlib.metadata.version(name)
      for name in ('jax', 'torch', 'timm')
      if importlib.util.find_spec(name)
    },
  }
  print(', '.join(f'{key} {value}' for key, value in about.items()), flush=True)
  rows = []
  for backbone in backbones:
    new = measure(
      backbone, _FORMS.value, common.BATCH_SIZE.value, dtype, common.ROUNDS.value, limits
    )
    rows += [row | about for row in new]
    print(f'\n{show(new)}\n', flush=True)
    if common.JSON.value:
      tables.write_json(rows, common.JSON.value)
  print(show(rows))


if __name__ == '__main__':
  commands.run(main)
