"""Start-up: from the command to the end of the first training step, and where the time goes.

  python -m benchmarks.startup --json results/startup_cpu.json

Every start is a process of its own, timed from before it is made. `cold`: with no program in JAX's
compilation cache; `warm`: with those of the start before. Beside each, in turns, a script that
imports jax and compiles the very same training step. Medians over the rounds are given.

`jax` is what jax itself takes in that script: its import, and lowering and compiling the step. In
`script` there is besides what it must import to make the step (Flax, Optax, our networks), and its
tracing of the state's shapes. `to jax` is our time over the first. Evaluation is compiled later,
before the first evaluation.
"""

import itertools
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from afi_flax import commands
from afi_flax.analysis import tables
from afi_flax.errors import UserError
from afi_flax.workdir import Workdir
from benchmarks import common

_RECIPES = flags.DEFINE_list(
  'recipes',
  ['configs/cifar100_afi_resnet32.py:smoke', 'configs/imagenet_afi_resnet50.py:smoke'],
  'The configs to start.',
)
CACHES = ('cold', 'warm')
DATA = 'data'
# What is over, and the line on stderr that tells so. With JAX_LOG_COMPILES jax tells of lowering.
# From `trace` on the step is compiled, while the state is made and the first batch is waited for.
OURS = {
  'jax': '^mark jax',
  'imports': '^mark imports',
  DATA: None,  # when the run's folder is made
  'trace': r'Finished jaxpr to MLIR module conversion .*train_step',
  'state': 'starts from scratch$',
  'batch': '^Compil(ing|ed) the training step',
  'compile': '^Compiled the training step',
  'step': r'^ *1/\d+ ',
}
JAX = {name: f'^mark {name}' for name in ('jax', 'program', 'trace', 'compile')}

Phases = dict[str, float]  # seconds of each, in their order


def run(which: str, arguments: Sequence[str], cache: pathlib.Path) -> dict[str, float]:
  """Starts `benchmarks.start`, and ends it when it has said all; {what: when, 'start' first}."""
  awaited = {name: line for name, line in (OURS if which == 'ours' else JAX).items() if line}
  command = [sys.executable, '-m', 'benchmarks.start', which, *arguments]
  env = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': str(cache), 'JAX_LOG_COMPILES': '1'}
  env.pop('PYTHONDONTWRITEBYTECODE', None)  # or every start would compile all modules
  said, ends = [], {'start': time.time()}
  with subprocess.Popen(
    command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
  ) as process:
    for line in process.stderr:
      said.append(line)
      for name in [name for name, end in awaited.items() if re.search(end, line)]:
        ends[name] = time.time()
        del awaited[name]
      if not awaited:
        process.kill()  # what comes after is not timed
        return ends
  raise UserError(
    f'{" ".join(command)} ended before {next(iter(awaited))!r}: {"".join(said)[-1000:]}'
  )


def phases(ends: Mapping[str, float]) -> Phases:
  """Seconds between moments and those before them, by the name of the later one."""
  moments = sorted(ends.items(), key=lambda item: item[1])
  return {name: end - start for (_, start), (name, end) in itertools.pairwise(moments)}


def start_ours(recipe: str, folder: pathlib.Path, cache: pathlib.Path) -> Phases:
  """Of the command, in a new folder."""
  ends = run('ours', [f'--config={recipe}', f'--workdir={folder}'], cache)
  opened = Workdir(folder).config_path.stat().st_mtime  # the data is open when this is written
  return phases(ends | {DATA: opened})


def measure(recipe: str, rounds: int) -> dict[tuple[str, str], list[Phases]]:
  """{('ours' or 'jax', 'cold' or 'warm'): phases of every round}."""
  found = {(which, cache): [] for cache in CACHES for which in ('ours', 'jax')}
  for number in range(rounds):
    with tempfile.TemporaryDirectory() as name:
      folder = pathlib.Path(name)
      for which, cache in found:
        programs = folder / f'programs of {which}'
        if which == 'ours':
          one = start_ours(recipe, folder / cache, programs)
        else:
          one = phases(run('jax', [recipe], programs))
        found[which, cache].append(one)
        seconds = sum(one.values())
        print(f'round {number + 1}: {recipe}, {which}, {cache}: {seconds:.1f} s', flush=True)
  return found


def median(rounds: Sequence[Phases]) -> Phases:
  """Of each phase."""
  return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def summarise(
  recipe: str, found: Mapping[tuple[str, str], Sequence[Phases]]
) -> list[dict[str, Any]]:
  """A row for each state of the cache."""
  rows = []
  for cache in CACHES:
    ours, jax = found['ours', cache], found['jax', cache]
    total = statistics.median(sum(one.values()) for one in ours)
    script = statistics.median(sum(one.values()) for one in jax)
    own = statistics.median(sum(one.values()) - one['program'] for one in jax)
    rows.append(
      {
        'config': recipe,
        'cache': cache,
        'seconds': round(total, 2),
        'jax_seconds': round(own, 2),
        'script_seconds': round(script, 2),
        'ratio_to_jax': round(total / own, 2),
        'ratio_to_script': round(total / script, 2),
        'phases': {name: round(value, 2) for name, value in median(ours).items()},
        'jax_phases': {name: round(value, 2) for name, value in median(jax).items()},
        'rounds': len(ours),
      }
    )
  return rows


def show(rows: Sequence[tables.Row]) -> str:
  """A table of the whole and one of its parts."""
  whole = [
    {
      'config': row['config'],
      'cache': row['cache'],
      'to the first step, s': f'{row["seconds"]:.1f}',
      'jax s': f'{row["jax_seconds"]:.1f}',
      'script s': f'{row["script_seconds"]:.1f}',
      'to jax': f'{row["ratio_to_jax"]:.2f}',
      'to script': f'{row["ratio_to_script"]:.2f}',
    }
    for row in rows
  ]
  parts = []
  for row in rows:
    head = {'config': row['config'], 'cache': row['cache']}
    for who, key in (('ours', 'phases'), ('script', 'jax_phases')):
      values = {name: f'{row[key][name]:.1f}' if name in row[key] else '' for name in _columns()}
      parts.append({**head, 'seconds of': who, **values})
  return f'{tables.text(whole)}\n\n{tables.text(parts)}'


def _columns() -> list[str]:
  """All phases: the script's own one stands where ours has several."""
  names = list(OURS)
  names.insert(names.index('trace'), 'program')
  return names


def main(_) -> None:
  if common.JSON.value:
    tables.check_writable(common.JSON.value)
  rows = []
  for recipe in _RECIPES.value:
    rows += summarise(recipe, measure(recipe, common.ROUNDS.value))
    if common.JSON.value:
      common.write_json(common.JSON.value, rows=rows)
  print(f'\n{show(rows)}')


if __name__ == '__main__':
  flags.set_default(common.ROUNDS, 3)
  commands.run(main)
