"""What takes the place of a lock and of appending, for a run whose folder is in a bucket.

A `Lock` is an object that its holder writes again and again, each time on condition that nobody
else has: https://cloud.google.com/storage/docs/request-preconditions. A `Mirror` uploads what
changes in a local folder.
"""

import contextlib
import math
import pathlib
import threading
import time

from absl import logging
from etils import epath

from afi_flax import files
from afi_flax.errors import FailedError


class Lock:
  """An object that one process holds for as long as it writes it again and again."""

  def __init__(self, path: epath.Path, beat: float = 10.0, limit: float = 60.0):
    """Takes nothing yet.

    Args:
      path: the object.
      beat: seconds between two heartbeats.
      limit: seconds without a heartbeat after which others take it.
    """
    self._lost: bytes | None = None
    self._heard = math.inf  # when the last heartbeat that got through was begun
    self._path, self._beat, self._limit = path, beat, limit
    self._content = b''
    self._generation = 0  # of the object as this process has written it
    self._released = threading.Event()
    self._thread = threading.Thread(target=self._keep, daemon=True)

  @property
  def lost(self) -> bytes | None:
    """What those wrote who have taken it away, b'' if that is not known; None while it is held.

    Without a heartbeat that has got through for as long as others wait for one, it is not held.
    """
    return b'' if self._unheard() else self._lost

  def poll(self) -> bytes | None:
    """What `lost` says; FailedError where no heartbeat has got through for too long."""
    if self._unheard():
      raise FailedError(
        f'{self._path} could not be written for {self._limit:g} s, so that another run may have '
        'taken it; the same command goes on when the bucket can be reached'
      )
    return self._lost

  def _unheard(self) -> bool:
    return self._lost is None and time.monotonic() - self._heard > self._limit

  def take(self, content: bytes) -> bytes | None:
    """Takes it, after a wait where its holder may be dead.

    Args:
      content: says who holds it; no two processes may write the same.

    Returns:
      None, or what the living holder wrote.

    Raises:
      OSError: the bucket cannot be read or written.
    """
    self._content = content
    if not self._put(generation=0) and (holder := self._take_over()) is not None:
      return holder
    self._thread.start()
    return None

  def release(self) -> None:
    """Gives it back, if it is still held."""
    self._released.set()
    self._thread.join()
    if self._lost is None:
      # A failure is not worth an error: without heartbeats the lock is void after a while.
      with contextlib.suppress(OSError), files.os_errors(self._path):
        files.blob(self._path).delete(if_generation_match=self._generation, timeout=self._beat)

  def _take_over(self) -> bytes | None:
    """Watches the holder's heartbeat, and takes its place unless it is seen to live."""
    if (seen := self._look()) is None:
      return None if self._put(generation=0) else b''
    generation, age, holder = seen
    # The age is by two clocks that may differ, so even an old one is given the time of a beat.
    wait = max(1.5 * self._beat, self._limit - max(age, 0.0))
    logging.warning(
      '%s is held by %s, last heard of %.0f s ago; waiting up to %.0f s for a sign of life',
      self._path, holder.decode(errors='replace').strip(), age, wait,
    )  # fmt: skip
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline:
      time.sleep(min(self._beat / 10, 1.0))
      if (seen := self._look()) is None:  # given back
        return None if self._put(generation=0) else b''
      if seen[0] != generation:
        return seen[2]
    return None if self._put(generation) else b''

  def _put(self, generation: int) -> bool:
    """Writes it if it is of that generation (0: if there is none); whether it did."""
    start = time.monotonic()
    try:
      with files.os_errors(self._path):
        blob = files.blob(self._path)
        blob.upload_from_string(
          self._content, if_generation_match=generation, timeout=self._beat, retry=None
        )
        self._generation, self._heard = blob.generation, start
    except FileExistsError:
      seen = self._look()
      if seen is None or seen[2] != self._content:
        return False
      # Written by an earlier request, whose answer was lost.
      self._generation, self._heard = seen[0], min(self._heard, start)
    return True

  def _look(self) -> tuple[int, float, bytes] | None:
    """Generation, age in seconds by this machine's clock and content; None where there is none."""
    while True:
      try:
        with files.os_errors(self._path):
          blob = files.blob(self._path)
          blob.reload(timeout=self._beat)
          age = time.time() - blob.updated.timestamp()
          content = blob.download_as_bytes(if_generation_match=blob.generation, timeout=self._beat)
        return blob.generation, age, content
      except FileExistsError:
        continue  # it has been written in between
      except FileNotFoundError:
        return None

  def _keep(self) -> None:
    failing = False
    while not self._released.wait(self._beat):
      try:
        if not self._put(self._generation):
          seen = self._look()
          self._lost = seen[2] if seen else b''
          return
        failing = False
      except Exception as error:  # whatever it is, nobody else would see to the lock
        # If others take it meanwhile, the next heartbeat finds it out.
        if not failing:
          logging.warning('no heartbeat to %s: %s; trying again', self._path, error)
        failing = True


class Mirror:
  """Uploads a local folder's files whenever they have changed, from a thread of its own.

  A failure is logged once and the upload tried again, until it succeeds or `close` raises it.
  """

  def __init__(self, local: pathlib.Path, folder: epath.Path, interval: float = 10.0):
    """Starts.

    Args:
      local: what is uploaded; names that begin with a dot or end with .tmp are left out.
      folder: where to.
      interval: seconds between two uploads; more where one takes over a twentieth of that.
    """
    self._local, self._folder, self._interval = local, folder, interval
    self._uploaded: dict[str, tuple[int, int]] = {}  # mtime in ns and size, by name
    self._uploading = threading.Lock()
    self._failing = False
    self._closing = threading.Event()
    self._thread = threading.Thread(target=self._keep, daemon=True)
    self._thread.start()

  def sync(self, patience: float) -> bool:
    """Uploads what has changed, now; False, and a line in the log, where that fails.

    Args:
      patience: seconds for which each file is tried.
    """
    try:
      self._upload(patience)
    except OSError as error:
      if not self._failing:
        logging.warning(
          'cannot upload metrics to %s: %s; training goes on, and it is tried again',
          self._folder, error.strerror,
        )  # fmt: skip
      self._failing = True
    else:
      if self._failing:
        logging.warning('metrics are uploaded to %s again', self._folder)
      self._failing = False
    return not self._failing

  def close(self, upload: bool = True, patience: float = 60.0) -> None:
    """Ends it, with a last upload.

    Args:
      upload: False leaves what has changed since the last one as it is.
      patience: seconds for which each file is tried.

    Raises:
      OSError: something could not be uploaded.
    """
    self._closing.set()
    self._thread.join()
    if upload:
      self._upload(patience)

  def _keep(self) -> None:
    wait = self._interval
    while not self._closing.wait(wait):
      start = time.monotonic()
      uploaded = self.sync(self._interval)
      wait = max(self._interval, 20 * (time.monotonic() - start) * uploaded)

  def _upload(self, patience: float) -> None:
    with self._uploading:
      for name in files.names(self._local):
        base = name.rpartition('/')[2]
        if base.startswith('.') or base.endswith('.tmp'):
          continue
        stat = (self._local / name).stat()
        state = (stat.st_mtime_ns, stat.st_size)
        if self._uploaded.get(name) != state:
          files.write(self._folder / name, files.read(self._local / name), patience)
          self._uploaded[name] = state
