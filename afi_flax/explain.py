r"""Look inside a trained network, or two of them: figures, tables, and a page that has them all.

  python -m afi_flax.explain --workdir runs/afi32 --baseline runs/resnet32
  python -m afi_flax.explain --workdir runs/afi32 --images cat.jpg photos --stage 2

Writes to explain/ in the run's folder, or to --out: index.html, one file that opens anywhere, and
each of its figures as a PNG with its numbers as CSV:

  grad_cam       what made the network decide as it did, on pictures (the paper's Figure 2)
  reuse          which earlier blocks AFI reuses, how that differs between classes, how evenly
  selectivity    class selectivity of channels, stage by stage (the paper's Figure 4), and by depth
  gap            training minus evaluation accuracy
  confusion, per_class, reliability, mistakes    how good it is, and at what
  summary.csv    top-1, top-5, ECE (shares, 0..1), NLL (nats) of each run
  explain.json   the names of these files, which the next page here replaces

The whole evaluation split is looked at, and as many training pictures, which takes as long as a few
evaluations; --train_examples=0 does without the training split, and without the gap. What an
earlier page left in the folder is replaced; a folder with other files is refused.
"""

from absl import flags

from afi_flax import checkpoint, commands
from afi_flax.analysis import explain, pictures
from afi_flax.errors import UserError
from afi_flax.report import Console

_WORKDIR = flags.DEFINE_string('workdir', None, 'The folder of the run.')
_BASELINE = flags.DEFINE_string('baseline', '', 'That of another run of the same classes.')
_IMAGES = flags.DEFINE_multi_string(
  'images', [], 'Pictures for Grad-CAM: files, and folders, of which a sample is taken; by default '
  'a sample of the evaluation split. In a folder called like a class they are taken to be of it.'
)  # fmt: skip
_NUM_IMAGES = flags.DEFINE_integer(
  'num_images', 8, 'Pictures in a sample.', lower_bound=1, upper_bound=pictures.MOST
)
_SEED = flags.DEFINE_integer('seed', 0, 'Of the sample.', lower_bound=0)
_STAGE = flags.DEFINE_integer('stage', None, 'That Grad-CAM looks at, from 1; the last by default.')
_PLUS_PLUS = flags.DEFINE_bool('plus_plus', False, 'Grad-CAM++ instead of Grad-CAM.')
_TARGET = flags.DEFINE_string(
  'target', 'predicted', 'What Grad-CAM explains: the class that is predicted (predicted), the '
  'true one (true), or a class by its name.',
)  # fmt: skip
_CHECKPOINT = flags.DEFINE_string('checkpoint', 'last', 'last, best or a step, of both runs.')
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Where the data are, if not where they were.')
_TRAIN_EXAMPLES = flags.DEFINE_integer(
  'train_examples', None, 'Training pictures to look at for the gap; by default as many as are '
  'evaluated. 0: none, which leaves the gap out and needs no training split.', lower_bound=0,
)  # fmt: skip
_OUT = flags.DEFINE_string('out', '', 'The folder to write, instead of explain/ in --workdir.')


def main(_) -> None:
  if not _WORKDIR.value:
    raise UserError('no --workdir; give the folder of a run, such as --workdir runs/afi32')
  checkpoint.quiet_orbax()
  commands.keep_compiled_programs()
  request = explain.Request(
    workdir=_WORKDIR.value,
    baseline=_BASELINE.value,
    images=tuple(_IMAGES.value),
    num_images=_NUM_IMAGES.value,
    seed=_SEED.value,
    stage=_STAGE.value,
    plus_plus=_PLUS_PLUS.value,
    target=_TARGET.value,
    checkpoint=_CHECKPOINT.value,
    data_dir=_DATA_DIR.value,
    train_examples=_TRAIN_EXAMPLES.value,
    out=_OUT.value,
  )
  console = Console()
  try:
    written = explain.explain(request, console)
  finally:
    console.close()
  print(written.summary())


if __name__ == '__main__':
  commands.run(main)
