"""What lies in a run's folder: config, lock, metrics, signals.

config.json     the resolved config; a run that is started again must be given the same one
dataset.json    name, class names and sizes of the data set
metrics.jsonl   one JSON object a line: training lines and evaluation lines
nonfinite.jsonl  likewise, of batches whose numbers were not finite
curves.png      the picture of them
checkpoints/    the last ones            best/      the best one by evaluation
unreadable/     checkpoints that could not be read, or that a resumed run left behind
events/         TensorBoard              profile/   XProf
export/         the network in other formats, a folder each
lock            held by the run that trains here

The folder may be one in a bucket. What grows line by line is then written to a temporary folder of
this machine and uploaded; a run that goes on elsewhere first fetches it.
"""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from absl import logging
from flax.traverse_util import flatten_dict

from afi_flax import bucket, files
from afi_flax.config import MAY_DIFFER, MUST_AGREE, complete
from afi_flax.errors import FailedError, UserError

Json = Any  # what json.loads returns

# Seconds that a shared file system may take to show what another host wrote: an NFS client may go
# on saying for 30 s (its acdirmin) that there is no such file.
_PATIENCE = 45.0
_BUCKET_PATIENCE = 120.0  # the writer may have to wait until a dead run's lock is void
_SHOWN = 5  # differing keys that an error names


class Workdir:
  """The folder of one run; the only place that names a path in it."""

  def __init__(self, folder: str | os.PathLike):
    """Opens nothing yet; `folder` need not exist and is made absolute."""
    self.folder = files.absolute(folder)
    self._in_bucket = files.in_bucket(self.folder)
    self._written = self.folder  # where what grows line by line is
    self._writer = True
    self._running = False  # it could be written when the run began
    self._lock: bucket.Lock | None = None
    self._lock_file: int | None = None  # its descriptor, on a disk
    self._mirror: bucket.Mirror | None = None

  @property
  def config_path(self) -> files.Path:
    return self.folder / 'config.json'

  @property
  def dataset_path(self) -> files.Path:
    return self.folder / 'dataset.json'

  @property
  def metrics_path(self) -> files.Path:
    return self._written / 'metrics.jsonl'

  @property
  def nonfinite_path(self) -> files.Path:
    return self._written / 'nonfinite.jsonl'

  @property
  def curves_path(self) -> files.Path:
    return self._written / 'curves.png'

  @property
  def lock_path(self) -> files.Path:
    return self.folder / 'lock'

  @property
  def checkpoints(self) -> files.Path:
    return self.folder / 'checkpoints'

  @property
  def best(self) -> files.Path:
    return self.folder / 'best'

  @property
  def events_dir(self) -> files.Path:
    return self._written / 'events'

  @property
  def profile(self) -> files.Path:
    return self._written / 'profile'

  @property
  def exports(self) -> files.Path:
    return self.folder / 'export'

  @contextlib.contextmanager
  def open_for_training(
    self,
    config: dict[str, Json],
    dataset: dict[str, Json],
    writer: bool = True,
    token: int | None = None,
  ) -> Iterator[None]:
    """Makes the folder, checks that it holds this run or none, and locks it while entered.

    Args:
      config: as a person set it. Keys that may differ replace those of the run that is there.
      dataset: name, class_names, num_train, num_eval.
      writer: whether this process writes: the first one of a run. In the others, what would write
        does nothing.
      token: a random number that the processes have agreed on, which the writer puts into the lock
        and the others look for; None: they do not.

    Raises:
      UserError: the folder cannot be written, is in use, or holds a run of another config or data;
        this process finds another folder than the writer.
    """
    self._writer = writer
    with contextlib.ExitStack() as stack:
      if writer:
        with self.writing():
          if not self._in_bucket:
            self.folder.mkdir(parents=True, exist_ok=True)
          stack.callback(self._take_lock(token))
      elif token is not None:
        self._await_writer(token)
      with self.writing():
        if self._in_bucket:
          stack.enter_context(self._uploading())
        self._check(config, dataset)
        if writer:
          _write(self.config_path, json.dumps(config, indent=2) + '\n')
          _write(self.dataset_path, json.dumps(dataset, indent=2) + '\n')
      self._running = True
      try:
        yield
      finally:
        self._running = False

  def poll(self) -> None:
    """For every step; cheap.

    Raises:
      UserError: another run has taken the lock away.
      FailedError: another one may have, as the bucket could not be written for too long; the
        folder, on a disk, is not there any more.
    """
    if self._lock is not None and (lost := self._lock.poll()) is not None:
      raise UserError(
        f'workdir {self.folder} was taken over by {_holder(lost)}, as nothing was heard '
        'from this one for a while; leave it to that one, or take another --workdir'
      )
    # Else the next checkpoint would begin another folder of that name, without what was there.
    if self._lock_file is not None and not self._holds(self._lock_file):
      raise FailedError(
        f'workdir {self.folder} was moved, deleted or replaced while the run went on; put it back '
        'and start the same command again, or take another --workdir'
      )

  def _holds(self, file: int) -> bool:
    """Whether what is locked is the file that is there."""
    with self.writing():
      try:
        return os.path.samestat(os.fstat(file), os.stat(self.lock_path))
      except (FileNotFoundError, NotADirectoryError):
        return False

  def sync(self) -> None:
    """Polls, and brings the metrics to a bucket: no checkpoint should get there before them."""
    self.poll()
    if self._mirror is not None:
      self._mirror.sync(patience=5.0)

  def shown(self, path: files.Path) -> str:
    """Where others find a file of this run: in the bucket, where the run is in one."""
    return str(self.folder / path.relative_to(self._written))

  def check_config(
    self,
    config: dict[str, Json],
    may_differ: tuple[str, ...] = MAY_DIFFER,
    must_agree: tuple[str, ...] = MUST_AGREE,
  ) -> None:
    """UserError if the run has another config, but for keys that may differ and need not agree."""
    stored, given = complete(self.read_config()), complete(config)
    if differ := _differences(stored, given, may_differ, must_agree):
      raise UserError(
        f'workdir {self.folder} holds a run of another config: {differ}; '
        'take another --workdir, or the stored values'
      )

  @property
  def is_new(self) -> bool:
    """Whether no run has begun in it; UserError where that cannot be found out."""
    with self.writing():
      return not files.exists(self.config_path)

  def read_config(self) -> dict[str, Json]:
    """The config of the run; UserError where there is none."""
    return self._read_json(self.config_path)

  def read_dataset(self) -> dict[str, Json]:
    """The data set of the run: name, class_names, num_train, num_eval; UserError without a run."""
    return self._read_json(self.dataset_path)

  def append_metrics(self, record: dict[str, Json]) -> None:
    """Adds one line, such as {'step': 100, 'split': 'train', 'loss': 1.2, ...}, and flushes it."""
    self._append(self.metrics_path, record)

  def read_metrics(self) -> list[dict[str, Json]]:
    """All records, in order; a last line that a killed run left unfinished is ignored."""
    return _read_lines(self.metrics_path)

  def append_nonfinite(self, record: dict[str, Json]) -> None:
    """Adds a batch whose numbers are not finite: {'step', 'data_step', 'loss', 'gradient_norm',
    'examples'}.
    """
    self._append(self.nonfinite_path, record)

  def read_nonfinite(self) -> list[dict[str, Json]]:
    """All of them, as `read_metrics`."""
    return _read_lines(self.nonfinite_path)

  def cut_back(self, step: int, data_step: int) -> None:
    """Removes what the run will write anew when it goes on from a state (0, 0: from the start).

    Training lines stay up to and with `step`. Evaluation lines stay before it: an evaluation that
    is due at `step` itself is run again. Batches that were not finite stay before `data_step`.
    """
    self._keep(self.metrics_path, lambda record: _precedes(record, step))
    self._keep(self.nonfinite_path, lambda record: record['data_step'] < data_step)

  def _append(self, path: files.Path, record: dict[str, Json]) -> None:
    if self._writer:
      with self.writing(), path.open('a') as file:
        file.write(json.dumps(record) + '\n')

  def _keep(self, path: files.Path, wanted: Callable[[dict[str, Json]], bool]) -> None:
    if self._writer and files.exists(path):
      kept = [record for record in _read_lines(path) if wanted(record)]
      with self.writing():
        _write(path, ''.join(json.dumps(record) + '\n' for record in kept))

  def _take_lock(self, token: int | None) -> Callable[[], None]:
    """Returns what gives it back."""
    now = datetime.datetime.now().astimezone().isoformat(' ', 'seconds')
    own = {'host': socket.gethostname(), 'pid': os.getpid(), 'since': now, 'token': token}
    content = json.dumps(own | {'nonce': secrets.token_hex(8)}).encode() + b'\n'
    if self._in_bucket:
      self._lock = bucket.Lock(self.lock_path)
      if (holder := self._lock.take(content)) is not None:
        raise self._in_use(holder)
      return self._lock.release
    lock = os.open(self.lock_path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
      # The kernel gives the lock of a dead process back; what such a one left in the file is void.
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      os.truncate(lock, 0)
      os.write(lock, content)
      os.fsync(lock)  # an NFS client may keep it to itself for as long as the file is open
    except BlockingIOError:
      holder = os.read(lock, 1000)
      os.close(lock)
      raise self._in_use(holder) from None
    except OSError:
      os.close(lock)
      raise
    self._lock_file = lock
    return self._close_lock

  def _close_lock(self) -> None:
    lock, self._lock_file = self._lock_file, None
    os.close(lock)

  def _in_use(self, holder: bytes) -> UserError:
    return UserError(
      f'workdir {self.folder} is in use by {_holder(holder)}; '
      'wait for it, stop it, or take another --workdir'
    )

  def _await_writer(self, token: int) -> None:
    deadline = time.monotonic() + (_BUCKET_PATIENCE if self._in_bucket else _PATIENCE)
    while True:
      # Without a lock, or one that says it otherwise, it is the same: not yet.
      with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads(files.read(self.lock_path))['token'] == token:
          return
      if time.monotonic() > deadline:
        raise UserError(
          f'workdir {self.folder} on {socket.gethostname()} is not the one that process 0 writes; '
          'give a --workdir that all hosts share, such as one in a bucket, gs://BUCKET/FOLDER'
        )
      time.sleep(0.5 if self._in_bucket else 0.1)

  @contextlib.contextmanager
  def _uploading(self) -> Iterator[None]:
    """While entered, what grows is written on this machine; at the end all is in the bucket."""
    local = pathlib.Path(tempfile.mkdtemp(prefix='afi_flax-'))
    for path in (self.metrics_path, self.nonfinite_path):
      if self._writer and files.exists(path):
        (local / path.name).write_bytes(files.read(path))
    self._written, self._mirror = local, bucket.Mirror(local, self.folder)
    try:
      yield
    except BaseException:
      if why := self._end_uploading(local):
        logging.error('%s', why)  # what ended the run goes first
      raise
    if why := self._end_uploading(local):
      raise FailedError(why)

  def _end_uploading(self, local: pathlib.Path) -> str | None:
    """Uploads the rest, unless the folder is another run's by now; why that failed, or None."""
    mirror, self._mirror, self._written = self._mirror, None, self.folder
    try:
      mirror.close(upload=self._lock is None or self._lock.lost is None)
    except OSError as error:
      return (
        f'the last metrics could not be uploaded to {self.folder}: {error.strerror}; '
        f'they are in {local}: copy them there'
      )
    shutil.rmtree(local)
    return None

  def _check(self, config: dict[str, Json], dataset: dict[str, Json]) -> None:
    if files.exists(self.config_path):
      self.check_config(config)
    if files.exists(self.dataset_path) and (differ := _differences(self.read_dataset(), dataset)):
      raise UserError(
        f'the data set has changed since the run in {self.folder} began: {differ}; '
        'take another --workdir, or the data set as it was'
      )

  def _read_json(self, path: files.Path) -> Json:
    try:
      value = json.loads(files.read(path))
      if not isinstance(value, dict):
        raise ValueError('not a JSON object')
      return value
    except (FileNotFoundError, NotADirectoryError):
      raise UserError(
        f'no run in {self.folder}: {path.name} is missing; give the --workdir of one'
      ) from None
    except (OSError, ValueError) as error:
      raise UserError(
        f'{path} cannot be read: {error}; put back a copy of it, or train in another --workdir'
      ) from error

  @contextlib.contextmanager
  def writing(self) -> Iterator[None]:
    """Inside it, a failure to write is an error that names the folder: FailedError in a run."""
    try:
      yield
    except OSError as error:
      kind = FailedError if self._running else UserError
      raise kind(
        f'cannot write to workdir {self.folder}: {error.strerror}; '
        'mend that, or take another --workdir'
      ) from error


class StopSignals:
  """While entered, SIGTERM and SIGINT only ask for a stop; a second SIGINT interrupts at once.

  For the main thread. After `jax.distributed.initialize`, which takes SIGTERM for itself.

  ```
  with StopSignals() as stop:
    while not stop.requested:
      ...
  ```
  """

  def __init__(self):
    self.requested: str | None = None  # 'SIGTERM' or 'SIGINT', the first that came
    self._interrupts = 0
    self._old: dict[int, Any] = {}

  def __enter__(self) -> 'StopSignals':
    self._old = {n: signal.signal(n, self._handle) for n in (signal.SIGTERM, signal.SIGINT)}
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _handle(self, number: int, frame: FrameType | None) -> None:
    self.requested = self.requested or signal.Signals(number).name
    self._interrupts += number == signal.SIGINT
    if self._interrupts > 1:
      raise KeyboardInterrupt
    # Not print: the signal may have come in the middle of one.
    os.write(2, f'\n{self.requested}: saving after this step; Ctrl-C now loses it\n'.encode())


def _write(path: files.Path, text: str) -> None:
  """Replaces a file as a whole: after a crash it holds the old text or the new."""
  if files.in_bucket(path):
    files.write(path, text)
    return
  temporary = path.with_name(f'.{path.name}.tmp')
  with temporary.open('w') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def _read_lines(path: files.Path) -> list[dict[str, Json]]:
  """Of a file of one JSON object a line, that need not be there."""
  if not files.exists(path):
    return []
  records = []
  for number, line in enumerate(files.read(path).split(b'\n')[:-1], 1):  # the last: unfinished
    try:
      records.append(json.loads(line))
    except ValueError:
      raise UserError(
        f'{path}, line {number} is not JSON: {line[:60]!r}; mend or delete that line'
      ) from None
  return records


def _as_json(value: Json) -> Json:
  """What comes back from a file: tuples as lists, keys as strings."""
  return json.loads(json.dumps(value))


def _precedes(record: dict[str, Json], step: int) -> bool:
  whole = record['split'] == 'train' and not record.get('partial')
  return record['step'] <= step if whole else record['step'] < step


def _holder(text: bytes) -> str:
  """Names the run that wrote this into the lock file."""
  try:
    return 'process {pid} on {host} since {since}'.format(**json.loads(text))
  except (ValueError, KeyError):  # it has not been written yet
    return 'another process'


def _differences(
  stored: dict, given: dict, may_differ: tuple[str, ...] = (), must_agree: tuple[str, ...] = ()
) -> str:
  """'key: stored -> given' of the first few keys that differ, or ''."""
  stored, given = (flatten_dict(_as_json(tree), sep='.') for tree in (stored, given))
  differ = []
  for key in sorted(stored | given):
    may = f'{key}.'.startswith(tuple(f'{name}.' for name in may_differ))
    if may and key not in must_agree:
      continue
    if key not in stored:
      differ.append(f'{key}: absent -> {given[key]!r}')
    elif key not in given:
      differ.append(f'{key}: {stored[key]!r} -> absent')
    elif stored[key] != given[key]:
      differ.append(key + _change(stored[key], given[key]))
  more = len(differ) - _SHOWN
  return ', '.join(differ[:_SHOWN]) + (f', and {more} more' if more > 0 else '')


def _change(old: Json, new: Json) -> str:
  """': old -> new'; of long lists, such as class names, only what fits in a line."""
  text = f': {old!r} -> {new!r}'
  if len(text) <= 100:
    return text
  if isinstance(old, list) and isinstance(new, list):
    if len(old) != len(new):
      return f': {len(old)} values -> {len(new)} values'
    i = next(i for i, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1])
    return f'[{i}]: {old[i]!r} -> {new[i]!r}'
  return text[:100] + '...'
