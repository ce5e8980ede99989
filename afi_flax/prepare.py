"""`python -m afi_flax.prepare --dataset cifar100 --data_dir D [--archives A]`.

Writes the array_record files that training reads, by download or from archives in the folder A.
"""

import sys

from absl import app, flags

from afi_flax.data import prepare
from afi_flax.errors import UserError

_DATASET = flags.DEFINE_string('dataset', None, 'What to prepare, e.g. cifar100.', required=True)
_DATA_DIR = flags.DEFINE_string('data_dir', '', "Where to write; TFDS's own default where empty.")
_ARCHIVES = flags.DEFINE_string('archives', '', 'Folder of original archives; empty: download.')


def main(argv: list[str]) -> None:
  del argv
  try:
    print(prepare.prepare(_DATASET.value, _DATA_DIR.value, _ARCHIVES.value))
  except UserError as e:
    print(f'error: {e}', file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
  app.run(main)
