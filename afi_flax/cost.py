"""What networks cost: parameters, FLOPs, activations; and the paper's tables beside ours.

  python -m afi_flax.cost --model afi_resnet50            one network, stage by stage
  python -m afi_flax.cost --model 'afi_*resnet*'          a row for every network that matches
  python -m afi_flax.cost --config configs/cifar100_afi_resnet32.py:stages=1
  python -m afi_flax.cost --paper --json FILE             Tables 2, 4, 5, 6, and where we disagree

Shapes only are computed, so this takes a second for most networks on any machine, and a minute for
all 701 of them; Table 6, which is about memory, compiles four programs, which takes a minute.

In the files of --json and --csv, whole numbers for one picture: parameters; macs, the
multiply-accumulates; paper_flops, the operations that the paper counts, which its tables, and the
text here, give for 32 pictures; activations, the numbers (not bytes) that come out of convolutions.
With --paper: parameters; gflops, 1e9 paper_flops for 32 pictures; mib, 2^20 bytes of memory.
"""

from absl import flags
from ml_collections import config_flags

from afi_flax import commands, config
from afi_flax.analysis import report, tables
from afi_flax.errors import UserError
from afi_flax.models import create_model

_MODEL = flags.DEFINE_string('model', None, 'A network, or a shell pattern such as afi_*.')
_CONFIG = config_flags.DEFINE_config_file('config', None, "A config's network and picture size.")
_PAPER = flags.DEFINE_bool('paper', False, "The paper's tables beside ours.")
_SIZE = flags.DEFINE_integer(
  'image_size', 0, "Pixels; 0: the network's own, 32 or 224.", lower_bound=0
)
_CLASSES = flags.DEFINE_integer(
  'classes', 0, '0: 100 for pictures of 32 pixels, 1000 for others.', lower_bound=0
)
_JSON = flags.DEFINE_string(
  'json', None, 'Write the rows to this file too, in the units that are given above.'
)
_CSV = flags.DEFINE_string('csv', None, 'Write the same rows to this file, as CSV.')


def main(_) -> None:
  if sum(map(bool, (_MODEL.value, _CONFIG.value, _PAPER.value))) != 1:
    raise UserError('give one of --model NAME, --config FILE and --paper')
  if not _MODEL.value and (_SIZE.value or _CLASSES.value):
    raise UserError('--image_size and --classes go with --model only')
  for path in filter(None, (_JSON.value, _CSV.value)):
    tables.check_writable(path)
  if _PAPER.value:
    rows, shown = report.paper_tables()
  elif _CONFIG.value:
    plan = config.resolve(_CONFIG.value)
    model = create_model(**vars(plan.model))
    rows, shown = report.network(plan.model.name, model, plan.data.image_size)
  else:
    rows, shown = report.zoo(_MODEL.value, _SIZE.value, _CLASSES.value)
  print(shown)
  if _JSON.value:
    tables.write_json(rows, _JSON.value)
  if _CSV.value:
    tables.write_csv(rows, _CSV.value)


if __name__ == '__main__':
  commands.run(main)
