"""Start of training: how long each CIFAR network's train step takes to trace and to compile.

  python -m benchmarks.compile_time --json results/compile_time/compile_time.json

The step is that of a real run, batch 64. Every network is compiled from nothing as often as
`--rounds` says, AFI's right after its plain network's, and medians are given; `to plain` is the
ratio of the whole, tracing and compiling. GFLOPs are in the paper's convention, for 32 pictures.
The file is written after every compilation, so that a run that is ended early leaves what it has.
"""

import functools
import statistics
import time
from collections.abc import Mapping, Sequence

import jax

from afi_flax import commands, config, models
from afi_flax.analysis import cost, tables
from benchmarks import common
from configs import common as recipes

BACKBONES = [name for name, entry in models.BACKBONES.items() if entry.image_size == 32]

Times = Mapping[str, Sequence[tuple[float, float]]]  # {network: (seconds to trace, to compile)}


def forms(backbone: str) -> tuple[str, str, str]:
  """The plain network, AFI and AFI-B."""
  return backbone, f'afi_{backbone}', f'afi_{backbone}_b'


def seconds(name: str) -> tuple[float, float]:
  """Wall time of tracing and of compiling, with nothing left of what was compiled before."""
  jax.clear_caches()
  plan = config.resolve(recipes.cifar('cifar100', name))
  program = common.train_program(plan, jax.devices()[0])
  start = time.perf_counter()
  lowered = program.lower()
  traced = time.perf_counter()
  lowered.compile()
  return traced - start, time.perf_counter() - traced


@functools.cache
def count(name: str) -> cost.Cost:
  """Of the network with 100 classes."""
  return cost.total(cost.count(models.create_model(name, 100), 32))


def summarise(times: Times) -> list[dict[str, str | int | float]]:
  """A row for every network that was compiled, plain ones before their AFI forms, with medians."""
  rows, plain = [], None
  for name, both in times.items():
    trace, compile_ = map(statistics.median, zip(*both, strict=True))
    if not name.startswith('afi_'):  # its AFI forms come next
      plain = trace + compile_
    rows.append(
      {
        'network': name,
        'parameters': count(name).parameters,
        'gflops': round(cost.PAPER_PICTURES * count(name).paper_flops / 1e9, 4),
        'trace_seconds': round(trace, 2),
        'compile_seconds': round(compile_, 2),
        'ratio_to_plain': round((trace + compile_) / plain, 2),
        'rounds': len(both),
      }
    )
  return rows


def show(rows: Sequence[tables.Row]) -> str:
  """The rows as a table."""
  return tables.text(
    [
      {
        'network': row['network'],
        'parameters': row['parameters'],
        'GFLOPs': f'{row["gflops"]:.2f}',
        'trace s': f'{row["trace_seconds"]:.1f}',
        'compile s': f'{row["compile_seconds"]:.1f}',
        'to plain': f'{row["ratio_to_plain"]:.2f}',
      }
      for row in rows
    ]
  )


def measure(backbones: Sequence[str], rounds: int, path: str) -> list[dict[str, str | int | float]]:
  """Compiles all; says so, and writes the rows until then to `path` if it is not '', after each."""
  times, done = {}, 0
  for backbone in backbones:
    for _ in range(rounds):
      for name in forms(backbone):
        times.setdefault(name, []).append(seconds(name))
        done += 1
        total = 3 * rounds * len(backbones)
        print(f'{done} of {total}: {name} in {sum(times[name][-1]):.1f} s', flush=True)
        if path:
          common.write_json(path, batch_size=64, rows=summarise(times))
  return summarise(times)


def main(_) -> None:
  jax.config.update('jax_enable_compilation_cache', False)
  backbones = common.BACKBONES.value or BACKBONES
  for backbone in backbones:  # a mistake shows before the work
    for name in forms(backbone):
      models.create_model(name)
  if common.JSON.value:
    tables.check_writable(common.JSON.value)
  print(f'\n{show(measure(backbones, common.ROUNDS.value, common.JSON.value))}')


if __name__ == '__main__':
  commands.run(main)
