"""What `python -m afi_flax.explain` does: runs in, figures, tables and a page of them out."""

import dataclasses
import datetime
import json
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from afi_flax import files
from afi_flax.analysis import gallery, page, pictures
from afi_flax.analysis.contact_sheets import Caption, Explained
from afi_flax.analysis.examine import Examination, examine
from afi_flax.analysis.grad_cam import Cams, GradCam
from afi_flax.analysis.pictures import Picture
from afi_flax.data import sources
from afi_flax.errors import UserError, shown, unknown
from afi_flax.report import Console
from afi_flax.run import Preprocessing, Run, load_run

MANIFEST = 'explain.json'  # names the files of a page, which a later one may replace
_BATCH = 8  # pictures that Grad-CAM takes at a time


@dataclasses.dataclass(frozen=True)
class Request:
  """What is asked for.

  Attributes:
    workdir: the run's folder.
    baseline: another run's, of the same classes, to compare it with; '': none.
    images: files and folders; (): examples of the evaluation split.
    num_images: how many of a folder or of the split.
    seed: of their choice.
    stage: that Grad-CAM looks at, from 1; None: the last.
    plus_plus: Grad-CAM++.
    target: what Grad-CAM explains: 'predicted', 'true', or the name of a class.
    checkpoint: 'last', 'best' or a step, of both.
    data_dir: where the data are; None: where they were in training.
    train_examples: training pictures for the gap; None: as many as are evaluated; 0: none, no gap.
    out: the folder to write; '': explain/ in the workdir.
  """

  workdir: str
  baseline: str = ''
  images: tuple[str, ...] = ()
  num_images: int = 8
  seed: int = 0
  stage: int | None = None
  plus_plus: bool = False
  target: str = 'predicted'
  checkpoint: str = 'last'
  data_dir: str | None = None
  train_examples: int | None = None
  out: str = ''


@dataclasses.dataclass(frozen=True)
class Written:
  """What is there then: the folder, the names of its files, and the main figures as a table."""

  folder: pathlib.Path
  names: tuple[str, ...]
  table: str

  def summary(self) -> str:
    """For the end of a command."""
    kinds = {kind: sum(name.endswith(kind) for name in self.names) for kind in ('png', 'csv')}
    return (
      f'{self.table}\nWrote {shown(str(self.folder / "index.html"))}, {kinds["png"]} figures (PNG) '
      f'and {kinds["csv"]} tables (CSV) beside it'
    )


def explain(request: Request, console: Console) -> Written:
  """Looks into a run, beside another one if that is asked for.

  Args:
    request: what is asked for.
    console: that shows the progress.

  Raises:
    UserError: runs, data or pictures that are not there or do not go together; a folder that
      cannot be written, or holds what no page has; a stage that there is not.
  """
  folder = _folder(request)
  runs = _load(request)
  run = list(runs.values())[-1]
  networks = {
    label: GradCam(each, request.stage, request.plus_plus) for label, each in runs.items()
  }
  data = run.plan.data
  data_dir = data.data_dir if request.data_dir is None else request.data_dir
  source = sources.open_split(data.eval_dataset, data_dir, data.eval_split)
  chosen = _choose(request, run, source)
  classes, target = _target(request.target, run, chosen)
  explained = [
    _explain(label, each, runs[label].preprocessing, chosen, classes)
    for label, each in networks.items()
  ]
  _make(folder)
  examined = {}
  for label, each in runs.items():
    console.say(f'examining {label}')
    examined[label] = examine(
      each, data.eval_split, request.data_dir, console.evaluating, request.train_examples
    )
  console.say('drawing')
  stage = networks[list(runs)[-1]].stage
  parts = [
    gallery.summary(examined, _about(request, runs)),
    _grad_cam(request, run, stage, chosen, explained, target),
    gallery.reuse(examined),
    gallery.selectivity(examined),
    gallery.gap(examined),
    gallery.confusion(examined),
    gallery.per_class(examined),
    gallery.reliability(examined),
    _mistakes(examined, run, source),
  ]
  found = [part for part in parts if part is not None]
  contents = {name: content for part in found for name, content in part.files().items()}
  title = ' and '.join(reversed(runs))
  made = f'Made by afi_flax.explain on {datetime.date.today():%Y-%m-%d}'
  contents['index.html'] = page.render(title, made, [part.section for part in found]).encode()
  _write(folder, contents)
  return Written(folder, tuple(contents), gallery.in_words(examined))


def _folder(request: Request) -> pathlib.Path:
  """Where to write; UserError where that must not be."""
  if not request.out and '://' in request.workdir:
    raise UserError(
      f'--workdir {request.workdir} is in a bucket; add --out FOLDER, a folder on this machine'
    )
  if '://' in request.out:
    raise UserError(f'--out {request.out} must be a folder on this machine')
  folder = pathlib.Path(request.out or pathlib.Path(request.workdir, 'explain')).expanduser()
  files.check_ours(folder, MANIFEST, 'explain')
  return folder


def _load(request: Request) -> dict[str, Run]:
  """By label, the baseline first."""
  given = [*filter(None, (request.baseline,)), request.workdir]
  loaded = [load_run(workdir, request.checkpoint) for workdir in given]
  if request.baseline:
    _check_alike(*loaded)
  return dict(zip(_labels(loaded, given), loaded, strict=True))


def _check_alike(baseline: Run, run: Run) -> None:
  theirs, ours = baseline.class_names, run.class_names
  if theirs != ours:
    different = [k for k, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b]
    where = (
      f'class {different[0]} is {theirs[different[0]]!r} there and {ours[different[0]]!r} here'
      if different else f'{len(theirs)} there and {len(ours)} here'
    )  # fmt: skip
    raise UserError(f'--baseline has other classes than --workdir: {where}; give runs of the same')
  theirs, ours = (r.plan.data.eval_dataset for r in (baseline, run))
  if theirs != ours:
    raise UserError(
      f'--baseline is evaluated on {theirs!r} and --workdir on {ours!r}; give runs of the same data'
    )


def _labels(runs: Sequence[Run], workdirs: Sequence[str]) -> list[str]:
  """Names of the networks, told apart by AFI's stages, or by their folders."""
  models = [run.plan.model for run in runs]
  names = [
    m.name + (f', AFI in stage {"+".join(map(str, m.stages))}' if m.stages else '') for m in models
  ]
  if len(set(names)) < len(names):
    names = [f'{n} ({shown(w.rstrip("/"))})' for n, w in zip(names, workdirs, strict=True)]
  if len(set(names)) < len(names):
    names[0] += ', baseline'
  return names


def _choose(request: Request, run: Run, source: sources.Arrays | sources.Encoded) -> list[Picture]:
  """The pictures of Grad-CAM."""
  how = run.preprocessing
  if request.images:
    return pictures.named(request.images, run.class_names, how, request.num_images, request.seed)
  split = run.plan.data.eval_split
  return pictures.sample(source, split, how, request.num_images, request.seed)


def _target(target: str, run: Run, chosen: Sequence[Picture]) -> tuple[list[int] | None, str]:
  """The class of each picture that is explained, None for what is predicted; and in words."""
  if target == 'predicted':
    return None, 'the class that the network predicts'
  if target == 'true':
    if nameless := [picture.name for picture in chosen if picture.label is None]:
      raise UserError(
        f'--target=true, and the true class of {shown(nameless[0])} is not known; give the name of '
        'a class, or put the pictures into folders that are called like their classes'
      )
    return [picture.label for picture in chosen], 'the true class'
  for names in (run.readable_names, run.class_names):
    if target in names:
      return [names.index(target)] * len(chosen), f'the class {target!r}'
  options = ('predicted', 'true', *run.readable_names)
  raise unknown('--target', target, options)


def _explain(
  label: str,
  network: GradCam,
  how: Preprocessing,
  chosen: Sequence[Picture],
  classes: Sequence[int] | None,
) -> Explained:
  """Grad-CAM of all pictures, some at a time, in batches of one size."""
  images = pictures.batch(chosen, how)
  size = min(_BATCH, len(images))
  indices = np.arange(len(images) + -len(images) % size) % len(images)  # the last batch is padded
  wanted = None if classes is None else np.array(classes, np.int32)
  found = [
    network(images[some], None if wanted is None else wanted[some])
    for some in np.split(indices, len(indices) // size)
  ]
  names = (field.name for field in dataclasses.fields(Cams))
  joined = {n: np.concatenate([getattr(c, n) for c in found])[: len(images)] for n in names}
  return Explained(label, images, Cams(**joined))


def _make(folder: pathlib.Path) -> None:
  """UserError where it cannot be written, before the work."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as error:
    raise _cannot_write(folder, error) from error


def _about(request: Request, runs: Mapping[str, Run]) -> dict[str, dict[str, Any]]:
  """Facts of each run for the summary."""
  workdirs = [*filter(None, (request.baseline,)), request.workdir]
  return {
    label: {
      'workdir': workdir,
      'network': run.plan.model.name,
      'parameters': sum(x.size for x in jax.tree.leaves(run.variables['params'])),
      'step': run.step,
    }
    for (label, run), workdir in zip(runs.items(), workdirs, strict=True)
  }


def _grad_cam(
  request: Request,
  run: Run,
  stage: int,
  chosen: Sequence[Picture],
  explained: list[Explained],
  target: str,
) -> gallery.Part:
  captions = [
    Caption(() if p.label is None else (run.readable_names[p.label],), p.name) for p in chosen
  ]
  method = f'{"Grad-CAM++" if request.plus_plus else "Grad-CAM"}, stage {stage}'
  if request.target != 'predicted':
    method += f', for {target}'
  how = 'The pictures are those of --images.'
  if not request.images:
    how = (
      f'The pictures are {len(chosen)} of {run.plan.data.eval_split}, drawn by seed {request.seed}.'
    )
  return gallery.grad_cam(explained, captions, run.readable_names, method, target, how)


def _mistakes(
  examined: Mapping[str, Examination], run: Run, source: sources.Arrays | sources.Encoded
) -> gallery.Part | None:
  label, examination = list(examined.items())[-1]
  if not examination.mistakes:
    return None
  split, indices = run.plan.data.eval_split, [m.example for m in examination.mistakes]
  wrong = pictures.examples(source, split, indices)
  images = [picture.cut(run.preprocessing) for picture in wrong]
  return gallery.mistakes(label, examination, images, [picture.name for picture in wrong])


def _write(folder: pathlib.Path, contents: Mapping[str, bytes]) -> None:
  """Replaces what an earlier page has left; the page itself comes last, the manifest first."""
  manifest = json.dumps({'files': [MANIFEST, *contents]}, indent=1) + '\n'
  contents = {MANIFEST: manifest.encode(), **contents}
  try:
    earlier = set(files.listed(folder, MANIFEST)) & set(files.names(folder))
    with tempfile.TemporaryDirectory(dir=folder, prefix='.explain-') as unfinished:
      for name, content in contents.items():
        pathlib.Path(unfinished, name).write_bytes(content)
      for name in earlier - set(contents):
        (folder / name).unlink()
      for name in contents:
        pathlib.Path(unfinished, name).replace(folder / name)
  except OSError as error:
    raise _cannot_write(folder, error) from error


def _cannot_write(folder: pathlib.Path, error: OSError) -> UserError:
  return UserError(f'cannot write to {folder}: {error.strerror}; give another folder by --out')
