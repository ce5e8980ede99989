"""Training on a data set that the device holds, beside batches from the host; seeds together.

  python -m benchmarks.on_device --json results/on_device_cpu.json

The CIFAR recipe on CIFAR-100 where `--data_dir` has it, else on random pictures of its size. The
host's batches by themselves, training on them and training with `data.on_device` are measured in
turn, by the very code that a run uses, and medians over the rounds are given. Then a few steps in a
loop on the device, and the same called one by one from the host; and of three seeds: as one
program, by `jax.vmap` over their states, and of one seed after another.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from afi_flax import (
  commands,
  config,
  feed,
  models,
  on_device,
  optim,
  report,
  sharding,
  speed,
  state,
  steps,
)
from afi_flax.analysis import tables
from afi_flax.data import pipeline, sources
from afi_flax.errors import UserError
from benchmarks import common
from configs import common as recipes

_NETWORK = flags.DEFINE_string('network', 'resnet20', 'What is trained.')
_SECONDS = flags.DEFINE_float('seconds', 3.0, 'Of a measurement, about.', lower_bound=0.1)
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Trained together.', lower_bound=2)
HOST, FROM_HOST, ON_DEVICE = 'host pipeline alone', 'training from the host', 'training on device'


class Setting:
  """A run that is measured, on the first device."""

  def __init__(self, network: str, data_dir: str, batch_size: int = 64):
    recipe = recipes.cifar('cifar100', network)
    recipe.batch_size, recipe.data.data_dir = batch_size, data_dir
    try:
      self.source = sources.open_split('cifar100', data_dir, 'train')
    except UserError as error:
      print(f'random pictures: {error}')
      recipe.data.dataset = 'fake_cifar'
      self.source = sources.open_split('fake_cifar', '', 'train')
    self.plan = config.resolve(recipe)
    self.mesh = sharding.make_mesh(jax.devices()[:1])
    self.model = models.create_model(**vars(self.plan.model))
    self.optimizer = optim.make(self.plan.optim)
    self.clock = speed.Clock(self.plan, self.model, self.mesh)

  def new_state(self, seed: int = 0) -> state.TrainState:
    """Before the first step."""
    whole = sharding.replicated(self.mesh)
    return state.Initial(self.model, self.optimizer, self.plan.data.image_size, seed, whole).state()

  def host_batches(self) -> Iterator[pipeline.Batch]:
    """Without end."""
    return pipeline.train_batches(
      self.source,
      seed=self.plan.seed,
      data_step=0,
      batch_size=self.plan.batch_size,
      augment=self.plan.data.augment,
      image_size=self.plan.data.image_size,
    )


def trainer(made: feed.HostFeed | feed.DeviceFeed, start: state.TrainState) -> Callable[[int], Any]:
  """(steps) -> trains so many on, and waits for them."""
  now, console = start, report.Console(enabled=False)

  def train(count: int) -> None:
    nonlocal now
    while count:
      taken = made.take(now, min(count, made.most), console)
      now, count = taken.state, count - taken.count
    jax.block_until_ready(now)

  return train


def measure(setting: Setting, rounds: int, seconds: float) -> list[dict[str, Any]]:
  """A row for the host's batches, for training on them, and for training on the device."""
  given = (
    setting.plan, setting.source, setting.model, setting.optimizer, setting.mesh, setting.clock,
  )  # fmt: skip
  from_host, device = feed.HostFeed(*given, lambda: False), feed.DeviceFeed(*given)
  batches = setting.host_batches()
  with from_host.begun(0), device.begun(0):
    ways = {
      HOST: lambda count: list(itertools.islice(batches, count))[-1:],
      FROM_HOST: trainer(from_host, setting.new_state()),
      ON_DEVICE: trainer(device, setting.new_state()),
    }
    counts = {way: steps_in(run, seconds) for way, run in ways.items()}
    calls = {way: functools.partial(run, counts[way]) for way, run in ways.items()}
    medians = common.median_seconds(calls, rounds)
  each = {way: medians[way] / counts[way] for way in ways}
  return [
    {
      'way': way,
      'pictures_per_second': round(setting.plan.batch_size / each[way], 1),
      'ms': round(1e3 * each[way], 3),
      'to_host': round(each[FROM_HOST] / each[way], 3),
      'steps': counts[way],
      'rounds': rounds,
    }
    for way in ways
  ]


def steps_in(run: Callable[[int], Any], seconds: float, most: int = 2**20) -> int:
  """How many steps, up to `most`, take about so long, after those that compile."""
  run(3)
  count, took = 1, 0.0
  while took < seconds / 10 and count < most:
    count = min(2 * count, most)
    start = time.perf_counter()
    run(count)
    took = time.perf_counter() - start
  return min(max(2, round(count * seconds / took)), most)


class Bodies:
  """Training steps of some seeds, and what they start from."""

  def __init__(self, setting: Setting, seeds: int):
    plan, mesh = setting.plan, setting.mesh
    step = steps.make_train_step(setting.model, setting.optimizer, plan.data, plan.step)
    self._like = sharding.replicated(mesh)
    self._body = on_device.make_train_body(step, plan.seed, plan.data.augment, mesh)
    self._pictures = on_device.upload(setting.source, plan.data.train_split, mesh)
    num_examples, batch_size = len(setting.source), plan.batch_size
    self._orders = [
      on_device.send_order(num_examples, seed, batch_size, 0, mesh) for seed in range(seeds)
    ]
    self._carries = [
      (setting.new_state(seed), jnp.zeros([on_device.WINDOW, 3])) for seed in range(seeds)
    ]

  def in_turn(self, seeds: int, loops: bool | None = None) -> Callable[[int], None]:
    """(steps) -> trains the first seeds so many on, one after another."""
    carries = jax.tree.map(jnp.copy, self._carries[:seeds])
    chunks = self._compiled(self._body, loops, carries[0], self._orders[0])

    def train(count: int) -> None:
      for seed in range(seeds):
        carries[seed] = chunks(carries[seed], 0, count, self._pictures, self._orders[seed])

    return train

  def together(self) -> Callable[[int], None]:
    """The same of all seeds, in one program."""
    stack = functools.partial(jax.tree.map, lambda *leaves: jnp.stack(leaves))
    carry, order = stack(*self._carries), stack(*self._orders)
    chunks = self._compiled(jax.vmap(self._body, in_axes=(None, 0, None, 0)), None, carry, order)

    def train(count: int) -> None:
      nonlocal carry
      carry = chunks(carry, 0, count, self._pictures, order)

    return train

  def _compiled(self, body: on_device.Body, loops: bool | None, carry, order) -> on_device.Chunks:
    chunks = on_device.Chunks(body, self._like, {}, loops)
    arguments = carry, self._pictures, order
    chunks.program = chunks.step.lower(*chunks.arguments(*arguments)).compile()
    return chunks


def measure_pair(
  ways: dict[str, Callable[[int], None]], rounds: int, seconds: float
) -> dict[str, Any]:
  """Milliseconds a step of two ways, and the ratio of the first's to the second's."""
  first, second = ways
  # As many for both, so few that the slower one, too, comes to an end.
  count = steps_in(ways[second], seconds / 6, on_device.WINDOW)
  calls = {way: functools.partial(run, count) for way, run in ways.items()}
  medians = common.median_seconds(calls, rounds)
  return {
    'steps': count,
    'rounds': rounds,
    **{f'{way}_ms': round(1e3 * took / count, 3) for way, took in medians.items()},
    'ratio': round(medians[first] / medians[second], 3),
  }


def measure_loop(setting: Setting, rounds: int, seconds: float) -> dict[str, Any]:
  """Steps that loop on the device, and steps called by the host."""
  bodies = Bodies(setting, 1)
  ways = {'loop': bodies.in_turn(1, loops=True), 'calls': bodies.in_turn(1, loops=False)}
  return measure_pair(ways, rounds, seconds)


def measure_seeds(setting: Setting, seeds: int, rounds: int, seconds: float) -> dict[str, Any]:
  """Steps of several seeds, as one program and one after another."""
  bodies = Bodies(setting, seeds)
  ways = {'together': bodies.together(), 'in_turn': bodies.in_turn(seeds)}
  return {'seeds': seeds} | measure_pair(ways, rounds, seconds)


def show(rows: list[dict[str, Any]], loop: dict[str, Any], seeds: dict[str, Any]) -> str:
  """All as a table and two sentences."""
  table = tables.text(
    [
      {
        'way': row['way'],
        'pictures/s': f'{row["pictures_per_second"]:,.0f}',
        'ms a step': f'{row["ms"]:.2f}',
        'to host': f'{row["to_host"]:.2f}',
      }
      for row in rows
    ]
  )
  return (
    f'{table}\n'
    f'steps in a loop: {loop["loop_ms"]:.2f} ms, called one by one {loop["calls_ms"]:.2f} ms, '
    f'ratio {loop["ratio"]:.2f}\n'
    f'{seeds["seeds"]} seeds: {seeds["together_ms"]:.2f} ms a step in one program, '
    f'{seeds["in_turn_ms"]:.2f} ms one after another, ratio {seeds["ratio"]:.2f}'
  )


def main(_) -> None:
  if common.JSON.value:
    tables.check_writable(common.JSON.value)
  setting = Setting(_NETWORK.value, common.DATA_DIR.value)
  rows = measure(setting, common.ROUNDS.value, _SECONDS.value)
  loop = measure_loop(setting, common.ROUNDS.value, _SECONDS.value)
  seeds = measure_seeds(setting, _SEEDS.value, common.ROUNDS.value, _SECONDS.value)
  about = {
    'network': _NETWORK.value,
    'dataset': setting.plan.dataset.name,
    'batch_size': setting.plan.batch_size,
    'device': jax.devices()[0].device_kind,
  }
  print(f'{", ".join(map(str, about.values()))}\n{show(rows, loop, seeds)}')
  if common.JSON.value:
    common.write_json(common.JSON.value, **about, rows=rows, loop=loop, seeds=seeds)


if __name__ == '__main__':
  commands.run(main)
