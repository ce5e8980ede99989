"""Processes that make batches, and what becomes of one that dies or hangs.

A worker is a fresh Python that is told a function and the numbers of its batches, makes one after
the other and sends it over a socket. The socket is all that it holds: it ends when the other end is
closed, however the main process went, and no shared memory is left behind, as none is used. It
imports what the function needs, and not the program that started it.

A batch is a function of its number, so a worker that was killed is replaced by one that begins
where it stood. One that hangs ends the run: where a file system hangs, the next worker would too.
"""

import atexit
import contextlib
import ctypes
import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from afi_flax.errors import FailedError, UserError

Batch = dict[str, np.ndarray]

PATIENCE = 300.0  # seconds that a batch may take, with the start of its worker: disks can be slow
_AHEAD = 2  # batches of a worker that wait in the main process, while it makes another one
_REPLACEMENTS = 3  # for the killed workers of a stream
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_ENDING = 5.0  # seconds for a killed process to be gone
_START = 'import sys; from afi_flax.data import workers; workers.work(int(sys.argv[1]))'


def batches(make: Callable[[int], Batch], numbers: range, count: int) -> Iterator[Batch]:
  """What `make` returns for each of the numbers, in their order, made by `count` processes.

  Args:
    make: can be pickled, and knows a batch by its number alone.
    numbers: of the batches.
    count: worker i of them makes numbers[i], numbers[i + count], ...

  Returns:
    Iterator that starts the workers with the first batch and ends them when it is closed.

  Raises:
    FailedError: while iterating: a worker sent nothing for PATIENCE seconds, or too many died.
    UserError: while iterating: as `make` raised it.
    RuntimeError: while iterating: `make` raised something else.
  """
  workers: list[_Worker] = []
  replacements = 0
  try:
    task = pickle.dumps(make)  # as large as a data set's file names
    for i in range(count):
      workers.append(_Worker(f'{i} of {count}', task, numbers[i::count]))
    del task
    for k in range(len(numbers)):
      i = k % count
      while (batch := workers[i].take(PATIENCE)) is None:
        ended = workers[i].ended()
        workers[i].close()
        if replacements == _REPLACEMENTS:
          raise FailedError(
            f'{ended}, and {replacements} before it; use fewer run.workers or a smaller batch_size '
            'if memory was short (dmesg tells), then start the same command again'
          )
        replacements += 1
        logging.warning('%s; another one takes its place', ended)
        workers[i] = _Worker(f'{i} of {count}', pickle.dumps(make), numbers[k::count])
      yield batch
  finally:
    for worker in workers:
      worker.close()


def work(descriptor: int) -> None:
  """What a worker does, with the number of its open socket."""
  if sys.platform == 'linux':  # one that hangs, too, ends with the thread that started it
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  with socket.socket(fileno=descriptor) as main, contextlib.suppress(ConnectionError, EOFError):
    task, numbers = _receive(main)
    try:
      make = pickle.loads(task)
    except Exception as error:
      return _send(main, _failure(error))
    for number in numbers:
      try:
        batch = make(number)
      except Exception as error:
        return _send(main, _failure(error))
      _send(main, batch)


class _Failure(NamedTuple):
  """What to raise in the main process, and where in the worker it was raised."""

  kind: type[Exception]
  text: str
  trace: str


def _failure(error: Exception) -> _Failure:
  if isinstance(error, UserError):
    return _Failure(type(error), str(error), '')
  trace = ''.join(traceback.format_exception(error))
  return _Failure(RuntimeError, f'{type(error).__name__}: {error}', trace)


class _Worker:
  """A process, and the thread that reads what it sends."""

  def __init__(self, which: str, task: bytes, numbers: range):
    self._socket, theirs = socket.socketpair()
    with theirs, _signals_blocked():
      self._process = subprocess.Popen(
        [sys.executable, '-P', '-c', _START, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        env=os.environ | {'PYTHONPATH': os.pathsep.join(p or os.getcwd() for p in sys.path)},
      )
    # Where nobody closes it before: one that hangs would not notice that the main process is gone.
    atexit.register(self.close)
    self._name = f'worker {which} (process {self._process.pid})'
    self._room = threading.Semaphore(_AHEAD)
    self._closed = False
    self._sent: queue.SimpleQueue = queue.SimpleQueue()
    task_and_numbers = pickle.PickleBuffer(task), numbers
    self._reader = threading.Thread(target=self._read, args=(task_and_numbers,), daemon=True)
    self._reader.start()

  def take(self, patience: float) -> Batch | None:
    """The next batch; None where the process is gone. Raises as `batches` does."""
    try:
      sent = self._sent.get(timeout=patience)
    except queue.Empty:
      raise FailedError(
        f'{self._name} has sent no batch for {patience:g} s; see whether this host can read the '
        'files in data.data_dir, then start the same command again'
      ) from None
    if self._closed:
      raise RuntimeError('the stream of batches was closed')
    self._room.release()
    if not isinstance(sent, _Failure):
      return sent
    if issubclass(sent.kind, UserError):
      raise sent.kind(sent.text)
    error = sent.kind(f'{self._name}: {sent.text}')
    error.add_note(sent.trace)
    raise error

  def ended(self) -> str:
    """How the process ended, for one that is gone; FailedError where it ended by itself."""
    status = self._process.wait(_ENDING)
    if status >= 0:
      raise FailedError(
        f'{self._name} ended by itself with status {status}; see its output above, then start the '
        'same command again'
      )
    return f'{self._name} was ended by {signal.Signals(-status).name}'

  def close(self) -> None:
    """Ends the process and the thread; may be called again, and from another thread."""
    self._closed = True
    self._process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # the kernel may be busy for it
      self._process.wait(_ENDING)
    self._room.release()
    with contextlib.suppress(OSError):  # it is closed already
      self._socket.shutdown(socket.SHUT_RDWR)
    self._reader.join()
    atexit.unregister(self.close)
    self._socket.close()

  def _read(self, task: Any) -> None:
    try:
      _send(self._socket, task)
      while self._room.acquire() and not self._closed:
        self._sent.put(_receive(self._socket))
    except (OSError, EOFError):
      self._sent.put(None)
    except Exception as error:  # no memory for a batch, say
      self._sent.put(_failure(error))


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
  """What is started inside has SIGINT and SIGTERM blocked, and has it so for good.

  A terminal's Ctrl-C goes to all processes, as does the SIGTERM of many clusters: the main process
  needs the workers while it saves.
  """
  blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _send(connection: socket.socket, value: Any) -> None:
  """Sends anything that can be pickled, arrays without a copy."""
  buffers: list[pickle.PickleBuffer] = []
  pickled = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
  parts = [memoryview(pickled), *(buffer.raw() for buffer in buffers)]
  connection.sendall(struct.pack(f'!{1 + len(parts)}Q', len(parts), *(p.nbytes for p in parts)))
  for part in parts:
    connection.sendall(part)


def _receive(connection: socket.socket) -> Any:
  """What `_send` sent, its arrays writable; EOFError where the other end is closed."""
  (count,) = struct.unpack('!Q', _receive_bytes(connection, 8))
  lengths = struct.unpack(f'!{count}Q', _receive_bytes(connection, 8 * count))
  pickled, *buffers = [_receive_bytes(connection, length) for length in lengths]
  try:
    return pickle.loads(pickled, buffers=buffers)  # of this very program
  except (OSError, EOFError) as error:  # which else would say that the other end is gone
    raise pickle.UnpicklingError(f'{type(error).__name__}: {error}') from error


def _receive_bytes(connection: socket.socket, length: int) -> memoryview:
  left = whole = memoryview(np.empty(length, np.uint8))  # a bytearray would be filled with zeros
  while left:
    received = connection.recv_into(left, 0, socket.MSG_WAITALL)
    if not received:
      raise EOFError
    left = left[received:]
  return whole
