"""Trains a network, or evaluates a trained one.

  python -m afi_flax.main --config configs/cifar100_afi_resnet32.py --workdir runs/first
  python -m afi_flax.main --mode=eval --workdir runs/first --checkpoint=best

Any key of the config can be set, --config.batch_size=512; what stands behind a colon picks a
variant, --config configs/cifar100_afi_resnet32.py:b. The same command goes on with a run that was
stopped. Exit status: 0 done; 2 a mistake in what was asked for, which one line names; 74 something
that it needs failed, such as the disk, which one line names; 75 stopped by a signal with the state
saved, to be started again; anything else, a failure.

On several hosts the same command runs on each. Cloud TPU, GKE and SLURM tell it which of them it
is, elsewhere --coordinator, --processes and --process do.
"""

import jax
from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import config_flags

from afi_flax import checkpoint, commands, evaluate, processes, report
from afi_flax.errors import UserError
from afi_flax.place import find_place
from afi_flax.train import train

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'What to train: configs/NAME.py[:VARIANT].'
)
_WORKDIR = flags.DEFINE_string('workdir', None, "The run's folder; the same command resumes it.")
_MODE = flags.DEFINE_enum('mode', 'train', ['train', 'eval'], 'train also evaluates as it goes.')
_CHECKPOINT = flags.DEFINE_string('checkpoint', 'last', 'For eval: last, best or a step.')
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'Of several processes: HOST:PORT of the first; JAX takes PORT + 1 there.'
)
_PROCESSES = flags.DEFINE_integer('processes', 1, 'How many there are.')
_PROCESS = flags.DEFINE_integer('process', 0, 'Which one this is, from 0.')
_START_TIMEOUT = flags.DEFINE_float(
  'start_timeout', 300.0, 'Seconds in which all processes must have come up.', lower_bound=1.0
)
# What each host may have its own of.
_OWN = ('data.data_dir', 'run.workers')


def main(_) -> None:
  if not _WORKDIR.value:
    raise UserError('no --workdir; give a folder for the run, such as --workdir runs/first')
  checkpoint.quiet_orbax()
  commands.keep_compiled_programs()
  place = find_place(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  with processes.together(place, _agreed(), _START_TIMEOUT.value):
    if _MODE.value == 'eval':
      record = evaluate.evaluate_run(_WORKDIR.value, _CHECKPOINT.value, _CONFIG.value)
      if jax.process_index() == 0:
        print(f'step {record["step"]}  {report.describe_evaluation(record)}')
    elif _CHECKPOINT.present:
      raise UserError('--checkpoint is for --mode=eval; a run goes on from its last checkpoint')
    elif _CONFIG.value is None:
      raise UserError('no --config; give one, such as --config configs/digits_afi_resnet20.py')
    else:
      train(_CONFIG.value, _WORKDIR.value)


def _agreed() -> dict[str, str]:
  """What all processes of a run must have been given alike."""
  config = flatten_dict(_CONFIG.value.to_dict(), sep='.') if _CONFIG.value else {}
  return {
    'JAX': jax.__version__,
    '--mode': _MODE.value,
    '--checkpoint': _CHECKPOINT.value,
    **{f'--config.{key}': repr(value) for key, value in config.items() if key not in _OWN},
  }


if __name__ == '__main__':
  commands.run(main)
