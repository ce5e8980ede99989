"""Start of training: how long each CIFAR network's train step takes to trace and to compile.

  python -m benchmarks.compile_time --json results/compile_time/compile_time.json

The step is that of a real run, batch 64. Every network is compiled from nothing as often as
`--rounds` says, AFI's right after its plain network's, and medians are given; `to plain` is the
ratio of the whole, tracing and compiling.
"""

import statistics
import time

import jax
from absl import flags

from afi_flax import commands, config, models
from afi_flax.analysis import cost
from benchmarks import common
from configs import common as recipes

_BACKBONES = flags.DEFINE_list(
  'backbones',
  'resnet20,resnet32,resnet44,resnet56,resnet110,resnext29_32x4d,mobilenetv2_cifar,'
  'shufflenetv2_x1_0_cifar',
  'Which networks, each plain, with AFI and with AFI-B.',
)
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'How often each is compiled.')


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


def main(_) -> None:
  jax.config.update('jax_enable_compilation_cache', False)
  rows, shown = [], []
  for backbone in _BACKBONES.value:
    names = (backbone, f'afi_{backbone}', f'afi_{backbone}_b')
    times = {name: [] for name in names}
    for _ in range(_ROUNDS.value):
      for name in names:
        times[name].append(seconds(name))
    for name in names:
      trace, compile_ = map(statistics.median, zip(*times[name], strict=True))
      plain = rows[-1]['plain_seconds'] if name != backbone else trace + compile_
      whole = cost.total(cost.count(models.create_model(name, 100), 32))
      rows.append(
        {
          'network': name,
          'parameters': whole.parameters,
          'gflops': round(cost.PAPER_PICTURES * whole.paper_flops / 1e9, 4),
          'trace_seconds': round(trace, 2),
          'compile_seconds': round(compile_, 2),
          'plain_seconds': round(plain, 2),
          'ratio_to_plain': round((trace + compile_) / plain, 2),
        }
      )
      shown.append(
        (
          name,
          f'{whole.parameters:,}',
          f'{rows[-1]["gflops"]:.2f}',
          f'{trace:.1f}',
          f'{compile_:.1f}',
          f'{(trace + compile_) / plain:.2f}',
        )
      )
      print(*shown[-1], flush=True)
  header = ('network', 'parameters', 'GFLOPs', 'trace s', 'compile s', 'to plain')
  print(f'\n{common.table(header, shown)}')
  if common.JSON.value:
    common.write_json(common.JSON.value, rounds=_ROUNDS.value, batch_size=64, rows=rows)


if __name__ == '__main__':
  commands.run(main)
