"""The same run on one process and on several: its losses side by side.

  python -m benchmarks.processes --json results/processes/losses.json
  python -m benchmarks.processes --counts 1,2,8 --steps 200

The processes talk to each other as hosts do. Each run has as many CPU devices in all as there are
processes at most, so that all do the same sums; only the order of adding up over processes may
differ, and training makes such a difference grow.
"""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

from absl import flags

from afi_flax import commands
from afi_flax.analysis import tables
from afi_flax.errors import UserError
from afi_flax.workdir import Workdir
from benchmarks import common

_CONFIG = 'configs/digits_afi_resnet20.py'
_COUNTS = flags.DEFINE_list('counts', ['1', '2', '4'], 'Numbers of processes.')


def free_port() -> int:
  """A port that is free, as is the next one, which JAX takes."""
  while True:
    with socket.socket() as one, socket.socket() as two:
      one.bind(('', 0))
      port = one.getsockname()[1]
      with contextlib.suppress(OSError, OverflowError):
        two.bind(('', port + 1))
        return port


def train(folder: pathlib.Path, count: int, devices: int) -> list[float]:
  """Losses of the first steps, on so many processes with so many devices in all."""
  command = [
    sys.executable, '-m', 'afi_flax.main', '--config', _CONFIG, '--workdir', str(folder),
    f'--config.run.max_steps={common.STEPS.value}', '--config.run.log_every_steps=1',
  ]  # fmt: skip
  if count > 1:
    command += [f'--coordinator=127.0.0.1:{free_port()}', f'--processes={count}']
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices // count)}
  running = [
    subprocess.Popen(
      [*command, f'--process={i}'], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    for i in range(count)
  ]
  for process, (_, error) in [(process, process.communicate()) for process in running]:
    if process.returncode:
      raise UserError(f'a run on {count} processes failed: {error.decode()[-1000:]}')
  return [r['loss'] for r in Workdir(folder).read_metrics() if r['split'] == 'train']


def show(losses: dict[int, list[float]]) -> str:
  """{processes: losses} as a table, and how far apart they are at most."""
  first, *others = losses
  rows = []
  for step, values in enumerate(zip(*losses.values(), strict=True), start=1):
    row = {'step': step}
    for count, value in zip(losses, values, strict=True):
      row |= {f'{count} process{"es" * (count > 1)}': f'{value:.7f}'}
    rows.append(row)
  lines = [tables.text(rows), '']
  for count in others:
    pairs = zip(losses[first], losses[count], strict=True)
    most = max(abs(a - b) / abs(a) for a, b in pairs)
    lines.append(f'{count} against {first}: at most {most:.1e} of the loss apart')
  return '\n'.join(lines)


def main(_) -> None:
  counts = [int(count) if count.isdecimal() else 0 for count in _COUNTS.value]
  devices = max(counts)
  if not all(count and devices % count == 0 for count in counts):
    raise UserError(f'--counts {",".join(_COUNTS.value)} must all divide the largest, as 1,2,4 do')
  if common.JSON.value:
    tables.check_writable(common.JSON.value)
  losses = {}
  with tempfile.TemporaryDirectory() as folder:
    for count in counts:
      print(f'training on {count} x {devices // count} ...', file=sys.stderr, flush=True)
      losses[count] = train(pathlib.Path(folder) / str(count), count, devices)
  print(show(losses))
  if common.JSON.value:
    common.write_json(common.JSON.value, config=_CONFIG, devices=devices, losses=losses)


if __name__ == '__main__':
  commands.run(main)
