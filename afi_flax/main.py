"""Trains a network, or evaluates a trained one.

  python -m afi_flax.main --config configs/cifar100_afi_resnet32.py --workdir runs/first
  python -m afi_flax.main --mode=eval --workdir runs/first --checkpoint=best

Any key of the config can be set, --config.batch_size=512; what stands behind a colon picks a
variant, --config configs/cifar100_afi_resnet32.py:b. The same command goes on with a run that was
stopped. Exit status: 0 done; 2 a mistake in what was asked for, which one line names; 75 stopped by
a signal with the state saved, to be started again.
"""

import os
import re

import jax
from absl import flags
from ml_collections import config_flags

from afi_flax import checkpoint, commands, evaluate, report
from afi_flax.errors import UserError
from afi_flax.train import train

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'What to train: configs/NAME.py[:VARIANT].'
)
_WORKDIR = flags.DEFINE_string('workdir', None, "The run's folder; the same command resumes it.")
_MODE = flags.DEFINE_enum('mode', 'train', ['train', 'eval'], 'train also evaluates as it goes.')
_CHECKPOINT = flags.DEFINE_string('checkpoint', 'last', 'For eval: last, best or a step.')
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'Of several processes: HOST:PORT of the first.'
)
_PROCESSES = flags.DEFINE_integer('processes', 1, 'How many there are.')
_PROCESS = flags.DEFINE_integer('process', 0, 'Which one this is, from 0.')


def main(_) -> None:
  if not _WORKDIR.value:
    raise UserError('no --workdir; give a folder for the run, such as --workdir runs/first')
  checkpoint.quiet_orbax()
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    jax.config.update('jax_compilation_cache_dir', os.path.expanduser('~/.cache/afi_flax/compiled'))
  if (_PROCESSES.value > 1) != bool(_COORDINATOR.value):
    raise UserError('several processes need both --processes and --coordinator HOST:PORT')
  if _COORDINATOR.value:
    if not re.fullmatch(r'.+:\d+', _COORDINATOR.value):
      raise UserError(f'--coordinator {_COORDINATOR.value!r} must be HOST:PORT')
    jax.distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  if _MODE.value == 'eval':
    record = evaluate.evaluate_run(_WORKDIR.value, _CHECKPOINT.value, _CONFIG.value)
    if jax.process_index() == 0:
      print(f'step {record["step"]}  {report.describe_evaluation(record)}')
  elif _CONFIG.value is None:
    raise UserError('no --config; give one, such as --config configs/digits_afi_resnet20.py')
  else:
    train(_CONFIG.value, _WORKDIR.value)


if __name__ == '__main__':
  commands.run(main)
