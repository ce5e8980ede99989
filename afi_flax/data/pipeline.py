"""The stream of batches: a pure function of (seed, batch number), and of nothing else.

Example n of the training stream is position n mod N of epoch n div N, in that epoch's permutation
of the split's N examples. Global batch k is examples k*B to (k+1)*B; process p of P gets rows
[p*b, (p+1)*b) of it, b = B/P. So a run resumes at any batch at once, and neither processes nor
workers change what it sees. Small sets are batched in memory; encoded pictures are decoded in
threads or in worker processes.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from absl import logging

from afi_flax import random_draws
from afi_flax.data import augment as augment_lib
from afi_flax.data import decode, distort, imagenet, sources
from afi_flax.data import workers as worker_processes
from afi_flax.errors import UserError, shown

Batch = dict[str, np.ndarray]
Array = Any  # numpy.ndarray or jax.Array

_TRIES = 16  # pictures tried in a row for one place in a training batch
_BAD = np.dtype([('example', np.int32), ('reason', 'S100')])  # one that cannot be read; or -1
_STREAM_END = 1 << 60  # positions
_ENDING = 5.0  # seconds for a thread to end
_ASKING = 0.5  # seconds between two looks at whether to wait on


def train_batches(
  source: sources.Arrays | sources.Encoded,
  *,
  seed: int,
  data_step: int,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  augment: str,
  image_size: int,
  workers: int = 0,
  max_unreadable: int = 100,
  distortion: distort.Distortion | None = None,
  antialias: bool = True,
) -> Iterator[Batch]:
  """This process's share of the training batches, from number data_step on, without end.

  A picture that cannot be read is replaced by the next one (by example number) that can.

  Args:
    source: from `sources.open_split`.
    seed: of the run.
    data_step: number of the first batch, from 0.
    batch_size: of the global batch.
    process_index: this process's number.
    process_count: of all processes that share the global batch.
    augment: one of `augment.IN_MEMORY` or `augment.ENCODED`.
    image_size: of the square pictures, in pixels.
    workers: processes that decode; 0 decodes in threads. In-memory sets need none.
    max_unreadable: how many different pictures may be unreadable, in this process.
    distortion: what is done to each picture after `augment`; None: nothing.
    antialias: of the resize in `augment`, where it has one; False is faster.

  Returns:
    Iterator of {'image' u8 [b,S,S,3], 'label' i32 [b], 'example' i32 [b], 'epoch' i32 [b]};
    closing it ends the workers.

  Raises:
    UserError: at once for arguments that do not fit; while iterating, past max_unreadable.
    FailedError: while iterating: a worker hangs, or too many have died.
  """
  share = _share(batch_size, process_count)
  if isinstance(source, imagenet.RealLabels):
    raise UserError(
      'imagenet2012_real has several labels a picture, to evaluate with; train on imagenet2012 and '
      'give it as data.eval_dataset'
    )
  known = augment_lib.IN_MEMORY if _in_memory(source) else augment_lib.ENCODED
  if augment not in known:
    kind = 'a set decoded in memory' if _in_memory(source) else 'encoded pictures'
    raise UserError(
      f'data.augment {augment!r} does not go with {kind}; use one of {", ".join(known)}'
    )
  if _in_memory(source):
    _check_size(source, image_size)
    starts = itertools.count(data_step * batch_size + process_index * share, batch_size)
    rows = np.arange(share)
    orders = (train_order(len(source), seed, start + rows) for start in starts)
    return (_host_train_batch(source, *order, seed, augment, distortion) for order in orders)
  element = _TrainElement(source, seed, augment, image_size, distortion, antialias)
  mine = slice(data_step * process_count + process_index, None, process_count)
  batches = _encoded_batches(element, _STREAM_END, share, mine, workers)
  return _drop_bad(batches, source, max_unreadable, 'replaced by the next')


def eval_batches(
  source: sources.Arrays | sources.Encoded,
  *,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  image_size: int,
  resize: int | None = None,
  workers: int = 0,
  max_unreadable: int = 100,
) -> Iterator[Batch]:
  """One pass over a split in its own order, every example exactly once over all processes.

  All batches have one shape and all processes equally many: the end is padded with mask 0.

  Args:
    source: from `sources.open_split`.
    batch_size: of the global batch.
    process_index: this process's number.
    process_count: of all processes that share the global batch.
    image_size: of the centre crop, in pixels.
    resize: short side in pixels before the crop; None is image_size. Encoded pictures only.
    workers: as in `train_batches`.
    max_unreadable: as in `train_batches`.

  Returns:
    Iterator of {'image' u8 [b,S,S,3], 'label' i32 [b], 'example' i32 [b], 'mask' f32 [b]}; mask is
    1 for a real example and 0 for padding (example -1) and for a picture that cannot be read. Of
    imagenet2012_real, 'label' is i32 [b,L], padded with -1, and mask 0 for pictures without one.

  Raises:
    UserError, FailedError: as `train_batches`.
  """
  share = _share(batch_size, process_count)
  resize = image_size if resize is None else resize
  if resize < image_size:
    raise UserError(
      f'data.eval_resize {resize} is less than data.image_size {image_size}; make it as large'
    )
  num_batches = -(-len(source) // batch_size)
  if _in_memory(source):
    _check_size(source, image_size)
    if resize != image_size:
      raise UserError(
        f'data.eval_resize {resize}: pictures in memory are not resized; use {image_size}'
      )
    starts = (k * batch_size + process_index * share for k in range(num_batches))
    return (eval_batch(source, start + np.arange(share)) for start in starts)
  element = _EvalElement(source, resize, image_size)
  positions = num_batches * batch_size
  mine = slice(process_index, None, process_count)
  batches = _encoded_batches(element, positions, share, mine, workers)
  return _drop_bad(batches, source, max_unreadable, 'left out of the evaluation')


def read_batches(
  source: sources.Encoded, *, batch_size: int, image_size: int, resize: int, workers: int = 0
) -> Iterator[tuple[Batch, dict[int, str]]]:
  """One pass over encoded pictures by one process: the pixels of `eval_batches`, and what failed.

  Args:
    source: as for `eval_batches`.
    batch_size: of every batch.
    image_size: of the centre crop, in pixels.
    resize: short side in pixels before the crop.
    workers: as in `train_batches`.

  Returns:
    Iterator of a batch as of `eval_batches`, and of each of its examples that cannot be read, why.

  Raises:
    FailedError: while iterating: a worker hangs, or too many have died.
  """
  element = _EvalElement(source, resize, image_size)
  positions = -(-len(source) // batch_size) * batch_size
  batches = _encoded_batches(element, positions, batch_size, slice(None), workers)
  with contextlib.closing(batches):
    for batch in batches:
      bad = batch.pop('bad').tolist()
      yield batch, {example: reason.decode(errors='replace') for example, reason in bad}


def prefetch(
  batches: Iterable[Any],
  put: Callable[[Any], Any],
  depth: int = 2,
  give_up: Callable[[], bool] = lambda: False,
) -> Iterator[Any]:
  """Applies `put` (host batch -> device batch) in a thread, up to `depth` batches ahead.

  Args:
    batches: what to read; closed with this iterator where it can be.
    put: applied to each batch, in the thread.
    depth: batches that wait at most.
    give_up: asked while there is no batch to return; where it says so, the iterator ends.

  Returns:
    Iterator of what `put` returns. Exceptions of `batches` and `put` are raised by it; closing it
    ends the thread.
  """
  waiting: queue.Queue = queue.Queue(depth)
  stop = threading.Event()

  def offer(item) -> None:
    while not stop.is_set():
      try:
        return waiting.put(item, timeout=0.1)
      except queue.Full:
        continue

  def work() -> None:
    try:
      for batch in batches:
        if stop.is_set():
          break
        offer((put(batch), None))
      offer((None, StopIteration()))
    except BaseException as e:  # whatever it is, it belongs to the consumer
      offer((None, e))
    finally:
      if hasattr(batches, 'close'):
        batches.close()

  thread = threading.Thread(target=work, name='prefetch', daemon=True)
  thread.start()
  try:
    while True:
      try:
        batch, error = waiting.get(timeout=_ASKING)
      except queue.Empty:
        if give_up():
          return
        continue
      if isinstance(error, StopIteration):
        return
      if error is not None:
        raise error
      yield batch
  finally:
    stop.set()
    thread.join(_ENDING)  # one that waits for data that do not come ends with the process


def _in_memory(source) -> bool:
  return isinstance(source, sources.Arrays)


def _share(batch_size: int, process_count: int) -> int:
  if batch_size <= 0 or batch_size % process_count:
    near = max(batch_size // process_count, 1) * process_count
    raise UserError(
      f'batch size {batch_size} is not divisible by {process_count} processes; '
      f'use {near} or {near + process_count}'
    )
  return batch_size // process_count


def _check_size(source: sources.Arrays, image_size: int) -> None:
  if source.images.shape[1:3] != (image_size, image_size):
    height, width = source.images.shape[1:3]
    raise UserError(
      f'data.image_size {image_size}: the pictures are {width} x {height}; use {width}'
    )


# ---- order


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
  return random_draws.permutation(n, seed, epoch).astype(np.int32)


_one_at_a_time = threading.Lock()  # or each of many threads would sort at the start of an epoch


def _epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
  with _one_at_a_time:
    return _permutation(n, seed, epoch)


# ---- in memory


def train_order(n: int, seed: int, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """What stands at these positions (int64) of the training stream of n examples.

  Returns:
    Epoch and example: i32, of the shape of `position`.
  """
  epoch, place = np.divmod(position, n)
  example = np.empty(position.shape, np.int32)
  for e in np.unique(epoch):
    example[epoch == e] = _epoch_order(n, seed, int(e))[place[epoch == e]]
  return epoch.astype(np.int32), example


def train_batch(
  source: sources.Arrays, epoch: Array, example: Array, seed: int, augment: str
) -> dict[str, Array]:
  """The batch of these examples: on the device, and with the same numbers, where the arrays are.

  Args:
    source: of numpy's or of jax's arrays, as all that is given.
    epoch: i32 [b].
    example: i32 [b].
    seed: of the run.
    augment: one of `augment.IN_MEMORY`.

  Returns:
    As `train_batches`.
  """
  images = augment_lib.arrays(augment, source.images[example], seed, epoch, example)
  return {'image': images, 'label': source.labels[example], 'example': example, 'epoch': epoch}


def _host_train_batch(
  source: sources.Arrays,
  epoch: np.ndarray,
  example: np.ndarray,
  seed: int,
  augment: str,
  distortion: distort.Distortion | None,
) -> Batch:
  batch = train_batch(source, epoch, example, seed, augment)
  if distortion:
    rows = zip(batch['image'], epoch.tolist(), example.tolist(), strict=True)
    batch['image'] = np.stack([distortion(image, seed, e, i) for image, e, i in rows])
  return batch


def eval_batch(source: sources.Arrays, position: Array) -> dict[str, Array]:
  """The examples at these positions [b], those past the end masked; of numpy's or jax's arrays.

  Returns:
    As `eval_batches`.
  """
  real = position < len(source)
  at = position * real
  return {
    'image': source.images[at] * real[:, None, None, None],
    'label': source.labels[at] * real,
    'example': (at - ~real).astype(np.int32),
    'mask': real.astype(np.float32),
  }


# ---- encoded, in threads or workers


@dataclasses.dataclass(frozen=True)
class _TrainElement:
  """Position in the stream -> one example; 'bad' are the examples that it had to pass over."""

  source: sources.Encoded
  seed: int
  augment: str
  image_size: int
  distortion: distort.Distortion | None
  antialias: bool

  def __call__(self, position: int) -> Batch:
    n = len(self.source)
    epoch, place = divmod(int(position), n)
    wanted = int(_epoch_order(n, self.seed, epoch)[place])
    bad = np.array([(-1, b'')] * _TRIES, _BAD)
    for k in range(_TRIES):
      example = (wanted + k) % n
      try:
        data, label = self.source.read(example)
        image = augment_lib.encoded(
          self.augment, data, self.image_size, self.seed, epoch, example, self.antialias
        )
      except (OSError, decode.UnreadableError) as e:
        bad[k] = example, _reason(e)
        continue
      if self.distortion:
        image = self.distortion(image, self.seed, epoch, example)
      return _element(image, label, example, bad) | {'epoch': np.int32(epoch)}
    why = bad['reason'][0].decode(errors='replace')
    raise UserError(
      f'{_TRIES} pictures in a row cannot be read, {self.source.name(wanted)} the first ({why}); '
      'repair or remove them'
    )


@dataclasses.dataclass(frozen=True)
class _EvalElement:
  """Position in the padded split -> one example, or an empty one with mask 0."""

  source: sources.Encoded
  resize: int
  image_size: int

  def __call__(self, position: int) -> Batch:
    example = int(position)
    bad = np.array([(-1, b'')], _BAD)
    if example < len(self.source):
      try:
        data, label = self.source.read(example)
        image = decode.resize_centre_crop(data, self.resize, self.image_size)
        return _element(image, label, example, bad) | {'mask': np.float32(np.max(label) >= 0)}
      except (OSError, decode.UnreadableError) as e:
        bad[0] = example, _reason(e)
    else:
      example = -1
    image = np.zeros((self.image_size, self.image_size, 3), np.uint8)
    return _element(image, _no_label(self.source), example, bad) | {'mask': np.float32(0)}


def _no_label(source: sources.Encoded) -> int | np.ndarray:
  """Of what does not count, in the shape of the others."""
  real = isinstance(source, imagenet.RealLabels)
  return np.full(source.labels.shape[1], -1) if real else 0


def _reason(error: Exception) -> bytes:
  """One short line; of an OSError without the file's name, which the warning has already."""
  text = getattr(error, 'strerror', None) or str(error)
  return shown(' '.join(text.split())).encode()


def _element(image: np.ndarray, label: int | np.ndarray, example: int, bad: np.ndarray) -> Batch:
  return {'image': image, 'label': np.int32(label), 'example': np.int32(example), 'bad': bad}


@dataclasses.dataclass(frozen=True)
class _EncodedBatch:
  """Number of a batch -> the batch: elements number * share to (number + 1) * share."""

  element: _TrainElement | _EvalElement
  share: int

  def __call__(self, number: int) -> Batch:
    positions = range(int(number) * self.share, (int(number) + 1) * self.share)
    rows = [self.element(position) for position in positions]
    batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return batch | {'bad': batch['bad'][batch['bad']['example'] >= 0]}


def _encoded_batches(
  element: _TrainElement | _EvalElement, positions: int, share: int, mine: slice, workers: int
) -> Iterator[Batch]:
  """Those batches of `share` elements whose numbers `mine` picks.

  Batched before it is sliced by process, and sliced before the workers: so neither changes which
  examples a batch has.
  """
  make, numbers = _EncodedBatch(element, share), range(positions // share)[mine]
  if workers:
    return worker_processes.batches(make, numbers, workers)
  return _in_threads(make, numbers)


def _in_threads(make: _EncodedBatch, numbers: range) -> Iterator[Batch]:
  """In order, one for each thread ahead."""
  threads = max(2, min(16, os.cpu_count() or 2))  # each holds a batch
  pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix='decode')
  waiting = iter(numbers)
  ahead = collections.deque(pool.submit(make, n) for n in itertools.islice(waiting, threads))
  try:
    while ahead:
      first = ahead.popleft()
      ahead.extend(pool.submit(make, n) for n in itertools.islice(waiting, 1))
      yield first.result()
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


def _drop_bad(
  batches: Iterator[Batch], source: sources.Encoded, limit: int, outcome: str
) -> Iterator[Batch]:
  """Takes 'bad' out of the batches; names each unreadable picture once, and counts them."""
  seen = set()
  with contextlib.closing(batches):
    for batch in batches:
      for example, reason in batch.pop('bad').tolist():
        if example in seen:
          continue
        seen.add(example)
        name, why = source.name(example), reason.decode(errors='replace')
        logging.warning('cannot read %s (example %d): %s; %s', name, example, why, outcome)
        if len(seen) > limit:
          raise UserError(
            f'{len(seen)} {"picture" if len(seen) == 1 else "pictures"} cannot be read and '
            f'data.max_unreadable is {limit}; the last is {name} ({why}). '
            'Repair or remove what is damaged, or raise the limit.'
          )
      yield batch
