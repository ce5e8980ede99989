"""Writes the array_record files that training reads, by download or from archives that you have.

python -m afi_flax.prepare --dataset cifar100
python -m afi_flax.prepare --dataset imagenet2012 --archives FOLDER --data_dir FOLDER
"""

from absl import flags

from afi_flax import commands
from afi_flax.data import prepare
from afi_flax.errors import UserError

_DATASET = flags.DEFINE_string('dataset', None, 'What to prepare: cifar10, cifar100, imagenet2012.')
_DATA_DIR = flags.DEFINE_string('data_dir', '', "Where to write; TFDS's own default where empty.")
_ARCHIVES = flags.DEFINE_string('archives', '', 'Folder of original archives; empty: download.')


def main(_) -> None:
  if not _DATASET.value:
    raise UserError('no --dataset; give one, such as --dataset cifar100')
  print(prepare.prepare(_DATASET.value, _DATA_DIR.value, _ARCHIVES.value))


if __name__ == '__main__':
  commands.run(main)
