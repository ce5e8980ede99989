"""What a trained network takes pictures for: from paths to the most probable classes, as a stream.

Pictures are decoded as evaluation decodes them, by the same code. Nothing but the batches that are
on their way is in memory, however many paths there are.
"""

import collections
import contextlib
import csv
import io
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from afi_flax import sharding, steps
from afi_flax.analysis import memory
from afi_flax.data import picture_files, pipeline
from afi_flax.errors import FailedError, UserError, shown
from afi_flax.run import Run

# Worker processes, which are told all their paths at once, begin anew with each part of the paths.
# The first is small, so that a result need not wait for many paths; the last ones are hardly felt.
_FIRST_PART = 16  # batches
_LARGEST_PART = 1 << 16  # paths
_DIGITS = 6  # of a probability: as many as a float32 has
_FILE_COLUMN = 40  # characters of a text's first column at most

_File = tuple[str, str | None]  # its path; why it cannot be read, or None


class Guess(NamedTuple):
  """A class and its probability: the softmax of the logits, in float32."""

  name: str
  probability: float


class Prediction(NamedTuple):
  """What the network takes a picture for.

  Attributes:
    file: its path, as it was given.
    top: the most probable classes, the first the most; none of a file that cannot be read.
    error: why the file cannot be read; None where it can.
  """

  file: str
  top: tuple[Guess, ...]
  error: str | None


def predict(
  run: Run,
  paths: Iterable[str | os.PathLike[str]],
  *,
  top: int = 5,
  batch_size: int | None = None,
  workers: int = 0,
  mesh: Mesh | None = None,
) -> Iterator[Prediction]:
  """Predicts pictures in the order of their paths, while later ones are still being read.

  ```
  run = afi_flax.load_run('runs/quickstart', 'best')
  for prediction in predict(run, sorted(pathlib.Path('pictures').glob('*.png'))):
    print(prediction.file, prediction.top[0].name if prediction.top else prediction.error)
  ```

  One program is compiled: all batches have one shape, the last is padded. Every batch is divided
  over the devices of this process.

  Args:
    run: from `load_run`.
    paths: of picture files, in any format that is decoded; read as they are needed.
    top: classes a picture; as many as the run has where it has fewer.
    batch_size: pictures of a batch, rounded up to a multiple of the devices; None: that of the
      run's evaluation. Fewer where there are not so many paths.
    workers: processes that decode; 0: threads do.
    mesh: as given to `load_run`.

  Returns:
    Iterator of a prediction for each path; closing it ends threads and workers.

  Raises:
    UserError: at once for arguments out of range; while iterating, where a batch does not fit into
      memory, or the network's outputs are not finite.
    FailedError: while iterating: a worker hangs, or too many have died.
  """
  wanted = run.plan.eval_batch_size if batch_size is None else batch_size
  for name, value, least in ('top', top, 1), ('batch_size', wanted, 1), ('workers', workers, 0):
    if value < least:
      raise UserError(f'{name} {value} must be at least {least}')
  mesh = mesh or sharding.make_mesh()
  top, wanted = min(top, len(run.class_names)), -(-wanted // mesh.size) * mesh.size
  return _predictions(run, map(os.fspath, paths), top, wanted, workers, mesh)


def _predictions(
  run: Run, paths: Iterator[str], top: int, wanted: int, workers: int, mesh: Mesh
) -> Iterator[Prediction]:
  first = list(itertools.islice(paths, wanted))
  if not first:
    return
  batch_size = _batch_size(len(first), wanted, mesh.size)
  program = _compile(run, top, batch_size, mesh)
  batches = pipeline.prefetch(
    _host_batches(run, itertools.chain(first, paths), batch_size, workers),
    lambda batch: (batch[0], sharding.put_batch(batch[1], mesh)),
  )
  ahead = collections.deque()  # while the device works, the batch before is handed out
  with contextlib.closing(batches):
    for files, images in batches:
      ahead.append((files, program(run.variables, images)))
      if len(ahead) > 1:
        yield from _named(run, *ahead.popleft())
    for files, found in ahead:
      yield from _named(run, files, found)


def _batch_size(there: int, wanted: int, devices: int) -> int:
  """Pictures a batch, where the first `wanted` or all, which are fewer, are `there`.

  For fewer, powers of two a device: a program that was compiled before then often does again.
  """
  share = -(-there // devices)
  return min(1 << (share - 1).bit_length(), wanted // devices) * devices


def _compile(run: Run, top: int, batch_size: int, mesh: Mesh) -> jax.stages.Compiled:
  """(variables, u8 [B,S,S,3]) -> probabilities f32 [B,top], the largest first, and classes i32."""

  def step(variables: dict, images: jax.Array) -> Sequence[jax.Array]:
    logits = run.model.apply(variables, run.preprocessing(images), train=False)
    return jax.lax.top_k(jax.nn.softmax(logits.astype('float32')), top)

  size, whole = run.preprocessing.image_size, sharding.replicated(mesh)
  images = jax.ShapeDtypeStruct((batch_size, size, size, 3), 'uint8', sharding=sharding.split(mesh))
  options = steps.compiler_options(run.plan.run.deterministic, mesh.local_devices[0])
  lowered = jax.jit(step, out_shardings=whole, compiler_options=options).lower(
    run.variables, images
  )
  cure = 'use a smaller --batch_size'
  compiled = memory.compile_or_explain(lowered, cure)
  memory.check_fits(compiled, mesh.local_devices, cure)
  return compiled


def _host_batches(
  run: Run, paths: Iterator[str], batch_size: int, workers: int
) -> Iterator[tuple[list[_File], np.ndarray]]:
  """Files, and their pictures u8 [batch_size,S,S,3]: black where a file cannot be read, or ends."""
  sizes = {'image_size': run.preprocessing.image_size, 'resize': run.preprocessing.resize}
  for part in _parts(paths, batch_size):
    source = picture_files.Files(part)
    batches = pipeline.read_batches(source, batch_size=batch_size, workers=workers, **sizes)
    with contextlib.closing(batches):
      for batch, reasons in batches:
        there = [i for i in batch['example'].tolist() if i >= 0]
        yield [(part[i], reasons.get(i)) for i in there], batch['image']


def _parts(paths: Iterator[str], batch_size: int) -> Iterator[tuple[str, ...]]:
  """The paths, so many at a time as may be in memory; whole batches."""
  count, largest = _FIRST_PART, max(_FIRST_PART, _LARGEST_PART // batch_size)
  while part := tuple(itertools.islice(paths, count * batch_size)):
    yield part
    count = min(2 * count, largest)


def _named(run: Run, files: list[_File], found: Sequence[jax.Array]) -> Iterator[Prediction]:
  """Predictions of a batch's files, which its padding follows."""
  rows = zip(*(np.asarray(x).tolist() for x in found), strict=True)
  for (file, error), (probabilities, classes) in zip(files, rows, strict=False):
    if error is None and not all(map(math.isfinite, probabilities)):
      raise UserError(
        f'the outputs of the network for {shown(file)} are not finite: the weights of step '
        f'{run.step} are of no use; take another --checkpoint'
      )
    guesses = map(Guess, (run.readable_names[k] for k in classes), probabilities)
    yield Prediction(file, () if error is not None else tuple(guesses), error)


# ---- as text


def formatted(
  predictions: Iterable[Prediction], how: str, top: int, longest: int | None = None
) -> Iterator[str]:
  """Predictions as text: pieces of whole lines, each as soon as its prediction is there.

  Args:
    predictions: of `predict`.
    how: 'text': for a person, a file, and its classes below each other; 'csv': a header, then a
      line for each: file, class_1, probability_1, ..., error; 'json': an object a line, {"file",
      "top": [{"class", "probability"}, ...]}, or {"file", "error"}.
    top: classes that a prediction has.
    longest: characters of the longest path, where it is known, for 'text': short ones are a column
      beside the classes, others lines above them.
  """
  if how == 'csv':
    return _as_csv(predictions, top)
  if how == 'json':
    return _as_json(predictions)
  beside = longest is not None and longest <= _FILE_COLUMN
  return _as_text(predictions, longest if beside else 0)


def _as_text(predictions: Iterable[Prediction], width: int) -> Iterator[str]:
  """With a first column of that width; 0: files are lines of their own."""
  for file, top, error in predictions:
    cells = [f'{probability:6.1%}  {shown(name)}' for name, probability in top]
    if error is not None:
      cells = [f'cannot be read: {error}']
    above, beside = ('', shown(file)) if width else (f'{shown(file)}\n', '')
    labels = [beside] + [''] * (len(cells) - 1)
    rows = zip(labels, cells, strict=True)
    yield above + ''.join(f'{label.ljust(width)}  {cell}\n' for label, cell in rows)


def _as_csv(predictions: Iterable[Prediction], top: int) -> Iterator[str]:
  header = [f'{kind}_{rank}' for rank in range(1, top + 1) for kind in ('class', 'probability')]
  yield _csv_line(['file', *header, 'error'])
  for file, guesses, error in predictions:
    cells = [cell for name, probability in guesses for cell in (name, _rounded(probability))]
    yield _csv_line([file, *(cells or [''] * 2 * top), error or ''])


def _as_json(predictions: Iterable[Prediction]) -> Iterator[str]:
  for file, guesses, error in predictions:
    top = [{'class': name, 'probability': _rounded(p)} for name, p in guesses]
    rest: dict[str, Any] = {'top': top} if error is None else {'error': error}
    yield json.dumps({'file': file} | rest) + '\n'


def write(texts: Iterable[str], path: str | None = None) -> bool:
  """Writes each as soon as it comes; ends where whoever reads it has enough, as `| head` has.

  Args:
    texts: of `formatted`.
    path: a new file, or one to be replaced; None: standard output.

  Returns:
    Whether all was written.

  Raises:
    UserError: the file cannot be opened.
    FailedError: it cannot be written any more.
  """
  with _open(path) as file:
    for text in texts:
      try:
        file.write(text)
        file.flush()
      except OSError as error:
        # What is left in the buffer would fail again when the file is closed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
        if isinstance(error, BrokenPipeError):
          return False
        raise FailedError(
          f'cannot write {path or "to standard output"}: {error.strerror}; mend that, start again'
        ) from error
  return True


def _open(path: str | None) -> contextlib.AbstractContextManager[IO[str]]:
  """For the bytes of any path, which need not be text."""
  if path is None:
    sys.stdout.reconfigure(encoding='utf-8', errors='surrogateescape')
    return contextlib.nullcontext(sys.stdout)
  try:
    return open(path, 'w', encoding='utf-8', errors='surrogateescape')
  except OSError as error:
    raise UserError(f'cannot write {path}: {error.strerror}') from error


def _csv_line(cells: list) -> str:
  line = io.StringIO()
  csv.writer(line, lineterminator='\n').writerow(cells)
  return line.getvalue()


def _rounded(probability: float) -> float:
  return float(f'{probability:.{_DIGITS}g}')


class Tally:
  """Counts predictions that pass through it.

  Attributes:
    files: all of them.
    unreadable: those of them without a prediction.
  """

  def __init__(self, on_progress: Callable[[int, float], None] = lambda files, since: None):
    """`on_progress` is told, when the next one is asked for, how many there were, and since when.

    That is the time of the first, by `time.monotonic`: compiling is over by then.
    """
    self.files = self.unreadable = 0
    self._on_progress = on_progress

  def __call__(self, predictions: Iterable[Prediction]) -> Iterator[Prediction]:
    """The same predictions."""
    since = None
    for prediction in predictions:
      since = since or time.monotonic()
      self.files += 1
      self.unreadable += prediction.error is not None
      yield prediction
      self._on_progress(self.files, since)
