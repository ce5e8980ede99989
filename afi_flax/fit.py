r"""Will it fit, without the hardware: compiles a run's real steps for TPUs that need not be there.

  python -m afi_flax.fit --config configs/imagenet_afi_resnet50.py --topology v5e:4x8 \
    --config.model.dtype=bfloat16 --config.batch_size=4096
  python -m afi_flax.fit --config configs/cifar100_afi_resnet32.py          for this machine

Prints the memory that training and evaluation need on a chip beside what it has, the network's
FLOPs in a step, what the chips exchange, and how long the run takes at least: its memory traffic,
by the compiler's estimate, at full bandwidth, or its FLOPs at full speed. TPUs need
`pip install -e '.[tpu]'` and minutes of compiling; how many depends on the network, hardly on the
number of chips. --json FILE adds the figures as a row to a list in that file, in the place of an
older row of the same run.
"""

import concurrent.futures
import multiprocessing
import time

from absl import flags
from ml_collections import config_flags

from afi_flax import commands
from afi_flax.analysis import fit, tables
from afi_flax.errors import UserError
from afi_flax.report import Console

_CONFIG = config_flags.DEFINE_config_file('config', None, 'The run: configs/NAME.py[:VARIANT].')
_TOPOLOGY = flags.DEFINE_string('topology', '', "v5e:4x8, v4:2x2x1; '': this machine's devices.")
_JSON = flags.DEFINE_string('json', None, 'A list of rows to add this one to.')


def main(_) -> None:
  if _CONFIG.value is None:
    raise UserError('no --config; give one, such as --config configs/imagenet_afi_resnet50.py')
  if _JSON.value:  # mistakes show before the work
    tables.check_writable(_JSON.value)
    tables.read_rows(_JSON.value)
  given = flags.FLAGS['config']
  about = {
    'config': config_flags.get_config_filename(given),
    'overrides': config_flags.get_override_values(given),
    'topology': _TOPOLOGY.value,
    'bn_scope': _CONFIG.value.batch_norm.scope,
  }
  row, cure = _in_another_process(_CONFIG.value.to_dict(), _TOPOLOGY.value, about)
  print(fit.describe(row))
  if _JSON.value:
    tables.replace_row(row, _JSON.value, ('config', 'overrides', 'topology'))
  if row['hbm_mib'] and max(row['peak_mib'], row['eval_peak_mib']) > row['hbm_mib']:
    raise UserError(f'it does not fit; {cure}')


def _in_another_process(run: dict, topology: str, about: fit.Row) -> tuple[fit.Row, str]:
  """`fit.measure`, watched: libtpu ends the process that it fails in, and takes minutes."""
  console, start = Console(), time.monotonic()
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
    future = pool.submit(fit.measure, run, topology, about)
    while not future.done():
      concurrent.futures.wait([future], timeout=0.5)
      seconds = time.monotonic() - start
      console.show(0, 1, [f'compiling for {topology or "this machine"}', f'{seconds:.0f} s'])
    console.close()
    try:
      return future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
      raise UserError(
        f'the compiler of --topology {topology!r} ended without a word, or for want of memory; '
        'its messages are above; v5e topologies are known to work'
      ) from error


if __name__ == '__main__':
  commands.run(main)
