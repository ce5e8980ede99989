r"""What a trained network takes your pictures for: the most probable classes of each.

  python -m afi_flax.predict --workdir runs/first --images cat.jpg photos 'more/**/*.png'
  find . -name '*.jpg' | python -m afi_flax.predict --workdir runs/first --images - --format csv
  python -m afi_flax.predict --workdir runs/first --images photos --format json | jq .top[0]

Results come in the order of the pictures, while later ones are still being read. A picture that
cannot be read has a line that says why, and is no reason to stop.

--format text   file, then probabilities in per cent and classes
--format csv    file, class_1, probability_1, class_2, ..., error: with a header; UTF-8
--format json   an object a line: {"file": ..., "top": [{"class": ..., "probability": ...}, ...]},
                or {"file": ..., "error": ...}

Probabilities (0 to 1) are the softmax of the network's outputs, with the weights that evaluation
takes. Exit status: 0 where at least one picture was read; 2 where none was, or for a mistake, which
one line names; 74 where something failed, such as the disk.
"""

import contextlib
import sys

from absl import flags

from afi_flax import checkpoint, commands, run
from afi_flax.analysis import predictions, tables
from afi_flax.data import picture_files
from afi_flax.errors import UserError
from afi_flax.report import Console

_WORKDIR = flags.DEFINE_string('workdir', None, 'The folder of the run.')
_IMAGES = flags.DEFINE_multi_string(
  'images', [], "Files, folders and quoted patterns, one or more; -: paths from standard input, "
  'one a line.'
)  # fmt: skip
_CHECKPOINT = flags.DEFINE_string('checkpoint', 'last', 'last, best or a step.')
_TOP = flags.DEFINE_integer('top', 5, 'Classes a picture, at most.', lower_bound=1)
_FORMAT = flags.DEFINE_enum('format', 'text', ['text', 'csv', 'json'], 'Of what is printed.')
_OUT = flags.DEFINE_string('out', None, 'A file to write instead of printing.')
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', None, "Pictures at a time; by default as in the run's evaluation.", lower_bound=1
)
_WORKERS = flags.DEFINE_integer(
  'workers', 0, 'Processes that decode pictures; 0: threads do.', lower_bound=0
)


def main(_) -> None:
  if not _WORKDIR.value:
    raise UserError('no --workdir; give the folder of a run, such as --workdir runs/first')
  if _OUT.value:
    tables.check_writable(_OUT.value)
  listed = _listed(_IMAGES.value)
  total, longest = (listed.count, listed.longest) if listed else (None, None)
  checkpoint.quiet_orbax()
  commands.keep_compiled_programs()
  loaded = run.load_run(_WORKDIR.value, _CHECKPOINT.value)
  top = min(_TOP.value, len(loaded.class_names))
  how = {'top': top, 'batch_size': _BATCH_SIZE.value, 'workers': _WORKERS.value}
  console = Console(enabled=bool(_OUT.value) or not sys.stdout.isatty())
  tally = predictions.Tally(lambda done, since: console.working('predicting', done, total, since))
  paths = listed or picture_files.from_lines(sys.stdin.buffer)
  found = predictions.predict(loaded, paths, **how)
  with contextlib.closing(console), contextlib.closing(found):
    texts = predictions.formatted(tally(found), _FORMAT.value, top, longest)
    all_written = predictions.write(texts, _OUT.value)
  if all_written:
    _tell_of_unreadable(tally.unreadable, tally.files)


def _listed(images: list[str]) -> picture_files.Listed | None:
  """None: they are on standard input."""
  if not images:
    raise UserError("no --images; give files, folders, patterns such as 'photos/*.png', or -")
  if images == ['-']:
    return None
  if '-' in images:
    raise UserError('--images - reads all paths from standard input; give no others')
  return picture_files.find(images)


def _tell_of_unreadable(unreadable: int, files: int) -> None:
  if not files:
    raise UserError('no paths on standard input; --images - wants one a line')
  if unreadable == files:
    raise UserError(f'none of {files:,} files could be read; the lines above say why')
  if unreadable:
    print(f'{unreadable:,} of {files:,} files could not be read', file=sys.stderr)


if __name__ == '__main__':
  commands.run(main)
