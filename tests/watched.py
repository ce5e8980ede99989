"""The command, which also writes down what it is doing: for tests that end it at some moment.

  python -m tests.watched FOLDER FLAGS OF afi_flax.main

FOLDER/PID.jsonl gets a line for each thing that begins or ends, before the process goes on, so that
what was written last is what a killed process was doing.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time
from concurrent.futures import Future

import jax
import numpy as np

from benchmarks.processes import free_port

START = 'start-up'  # of Python, JAX, the data, and what is restored
COMPILE, STEP, EVALUATE, SAVE = 'compile', 'step', 'evaluation', 'save'
LISTENS = 'listens'  # to signals, from here on
EVALUATED, SEALED = 'evaluated', 'sealed'  # what began before is complete


class Watched:
  """A process of the command that writes marks; `flags` as for `afi_flax.main`."""

  def __init__(self, folder: pathlib.Path, *flags, devices: int = 1, **env: str):
    folder.mkdir(parents=True, exist_ok=True)
    self._folder = folder
    self.process = subprocess.Popen(
      list(map(str, (sys.executable, '-m', 'tests.watched', folder, *flags))),
      env={
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir,
        'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
        **env,
      },
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )

  def marks(self, what: str | None = None) -> list[dict]:
    """What it has done so far: 'what', 'at' (seconds), and more; of one kind where it is given."""
    path = self._folder / f'{self.process.pid}.jsonl'
    with contextlib.suppress(FileNotFoundError):
      lines = path.read_text().split('\n')[:-1]
      return [m for m in map(json.loads, lines) if what in (None, m['what'])]
    return []

  def until(self, what: str, count: int = 1) -> bool:
    """Waits until that has begun so many times; False if the process ended before."""
    while len(self.marks(what)) < count:
      if self.process.poll() is not None:
        return False
      time.sleep(0.002)
    return True

  def end(self, timeout: float = 300.0) -> str:
    """Waits for its end; what it said on stderr."""
    return self.process.communicate(timeout=timeout)[1]


def together(
  folder: pathlib.Path, count: int, *flags, devices: int = 1, beat: float | None = None
) -> list[Watched]:
  """Starts the processes of one run; `beat`: seconds between their signs of life, if not as is."""
  if count > 1:
    flags += (f'--coordinator=127.0.0.1:{free_port()}', f'--processes={count}')
  env = {'WATCHED_BEAT': str(beat)} if beat else {}
  return [Watched(folder, *flags, f'--process={i}', devices=devices, **env) for i in range(count)]


def ids(watched: list[Watched]) -> dict[int, list[int]]:
  """The examples of each step, in the order of the batch, of the processes of one run."""
  of_each = [{m['step']: m['ids'] for m in w.marks(STEP)} for w in watched]
  steps = set.intersection(*map(set, of_each))  # one that is killed may be a step behind
  return {step: [i for share in of_each for i in share[step]] for step in sorted(steps)}


def _watch(folder: str) -> None:
  """Makes the command write its marks into the folder."""
  from afi_flax import evaluate, feed, processes
  from afi_flax.checkpoint import Checkpoints
  from afi_flax.workdir import StopSignals

  file = os.open(f'{folder}/{os.getpid()}.jsonl', os.O_WRONLY | os.O_CREAT | os.O_APPEND)

  def mark(what: str, **more) -> None:
    line = json.dumps({'what': what, 'at': time.time(), **more})
    os.write(file, f'{line}\n'.encode())

  compile_, evaluate_ = feed.compile_step, evaluate.Evaluator.__call__
  save = Checkpoints.save
  seal, enter = Checkpoints._seal, StopSignals.__enter__

  def compile_and_mark(plan, mesh, step, arguments):
    mark(COMPILE)
    compiled = compile_(plan, mesh, step, arguments)
    step = None

    def take_step(state, batch):
      nonlocal step
      step = (int(state.step) if step is None else step) + 1
      mark(STEP, step=step, ids=_own_rows(batch['example']))
      return compiled.result().program(state, batch)

    marking = Future()
    marking.set_result(feed.Compiled(take_step, ''))
    return marking

  def evaluate_and_mark(self, *args):
    mark(EVALUATE)
    record = evaluate_(self, *args)
    mark(EVALUATED)
    return record

  def save_and_mark(self, step, *args, **options):
    mark(SAVE, step=step, folder=self._folder.name)
    save(self, step, *args, **options)

  def seal_and_mark(self, step):
    seal(self, step)
    mark(SEALED, step=step, folder=self._folder.name)

  def listen_and_mark(self):
    entered = enter(self)
    mark(LISTENS)
    return entered

  feed.compile_step = compile_and_mark
  evaluate.Evaluator.__call__ = evaluate_and_mark
  Checkpoints.save, Checkpoints._seal = save_and_mark, seal_and_mark
  StopSignals.__enter__ = listen_and_mark
  if beat := os.environ.get('WATCHED_BEAT'):
    processes._BEAT, processes._SILENCE = float(beat), 5 * float(beat)


def _own_rows(example: jax.Array) -> list[int]:
  """This process's rows of an array over all processes' devices."""
  shards = sorted(example.addressable_shards, key=lambda shard: shard.index[0].start or 0)
  return np.concatenate([np.asarray(shard.data) for shard in shards]).tolist()


if __name__ == '__main__':
  from afi_flax import commands, main

  _watch(sys.argv.pop(1))
  commands.run(main.main)
