"""The processes of one run: how they begin together and end together.

Before JAX starts, all of them answer a roll call at the first one's HOST:PORT; a process
that does not come up, or that was given another command, ends the others in one line. The
connections then stay open, beside JAX's own: a process that fails says why, and all end at once,
where a collective operation would wait for it. One that hangs, or whose host has vanished, is found
by its silence: each says every few seconds that it is alive.
"""

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping

import jax

from afi_flax.commands import leave
from afi_flax.errors import AbsentError, FailedError, StoppedError, UserError
from afi_flax.place import Place, bracketed

_FAILURE = 1  # exit status of what nobody has foreseen
_PARTING = 5.0  # seconds that a process which ends gives the others to hear why
_OPENING = 30.0  # seconds that process 0 may take from the roll call until JAX listens there
_GRACE = 2.0  # seconds in which the reason for another process's end comes in
_BEAT = 10.0  # seconds between two signs of life; compiling and waiting for a device let them out
_SILENCE = 50.0  # seconds without one after which a process counts as lost


@contextlib.contextmanager
def together(
  place: Place | None, agreed: Mapping[str, str], timeout: float = 300.0
) -> Iterator[None]:
  """Starts JAX on all processes of a run; while entered, if one fails all end.

  Process 0 prints a table of all of them. A process that fails for itself ends as it would alone;
  the others print `error: process 1 (host): why` and end with the same status. On a process that is
  alone it does nothing.

  Args:
    place: this process's, as `find_place` returns it.
    agreed: what must be the same on all, key -> value.
    timeout: seconds in which all must have come up.

  Raises:
    AbsentError: a process did not come up.
    FailedError: process 0 ended before all had.
    UserError: two are the same, what must be agreed differs, or JAX cannot listen at process 0 or
      be reached there.
  """
  if place is None:
    yield
    return
  group = _Group(place)
  with group.failing_together():
    if place.index == 0:
      rows = group.call_roll(dict(agreed), timeout)
      print(_table(place, rows), file=sys.stderr, flush=True)
    else:
      group.answer_roll(dict(agreed), timeout)
      group.await_jax(_OPENING)
    _start_jax(place, timeout)
    yield


def _start_jax(place: Place, timeout: float) -> None:
  address = place.address(place.port + 1)
  try:
    jax.distributed.initialize(
      address,
      place.count,
      place.index,
      local_device_ids=place.local_devices,
      cluster_detection_method='deactivate',
      initialization_timeout=max(int(timeout), 1),
    )
  except jax.errors.JaxRuntimeError as error:
    why = ' '.join(str(error).split())[:200]
    raise UserError(
      f'JAX cannot start its coordinator at {address}: {why}; '
      'end what uses that port, or give --coordinator another one, of which JAX takes the next'
    ) from error


def _table(place: Place, rows: list[dict]) -> str:
  """The processes with their hosts and where they are."""
  lines = [('process', 'host', 'address')]
  lines += [(str(i), row['host'], row['address']) for i, row in enumerate(rows)]
  widths = [max(len(line[i]) for line in lines) for i in (0, 1)]
  table = (f'{a:<{widths[0]}}  {b:<{widths[1]}}  {c}' for a, b, c in lines)
  return '\n'.join((f'{place.count} processes, as said by {place.told_by}:', *table))


class _Peer:
  """A connection to another process: JSON, one object a line."""

  def __init__(self, connection: socket.socket, name: str):
    self.name = name
    self.done = False  # it has nothing more to do, and may go
    self.silent = False  # it was not heard in time
    self.thread: threading.Thread | None = None
    self._socket = connection
    self._lines = connection.makefile('rb')

  def send(self, **message) -> None:
    """Says something; one that is gone does not hear it."""
    with contextlib.suppress(OSError):
      self._socket.sendall(json.dumps(message).encode() + b'\n')

  def hear(self, timeout: float | None) -> dict:
    """The next message; {} where the other is gone, silent or speaks otherwise."""
    try:
      self._socket.settimeout(timeout)
      message = json.loads(self._lines.readline(1_000_000))
      return message if isinstance(message, dict) else {}
    except TimeoutError:
      self.silent = True
      return {}
    except (OSError, ValueError):
      return {}

  @property
  def address(self) -> str:
    host, port = self._socket.getpeername()[:2]
    return f'{bracketed(host.removeprefix("::ffff:"))}:{port}'

  def close(self) -> None:
    self._lines.close()
    self._socket.close()


class _Group:
  """The processes, joined as a star: the first one hears all others and tells them."""

  def __init__(self, place: Place):
    self.place = place
    self._peers: list[_Peer] = []
    self._ending = threading.Lock()  # taken for good by the first who finds that this ends

  def call_roll(self, agreed: dict[str, str], timeout: float) -> list[dict]:
    """For process 0: waits for all others; host and address of each process."""
    place, deadline = self.place, time.monotonic() + timeout
    rows = {0: {'host': socket.gethostname(), 'address': place.address(place.port)}}
    objections = []
    with self._listen(place.port) as server:
      while len(self._peers) < place.count - 1:  # all, so that all hear of an objection
        left = deadline - time.monotonic()
        if left <= 0:
          if objections:
            raise UserError(objections[0])
          raise self._absent(set(range(place.count)) - set(rows), timeout)
        server.settimeout(left)
        with contextlib.suppress(TimeoutError):
          if objection := self._admit(server.accept()[0], agreed, rows):
            objections.append(objection)
    if objections:
      raise UserError(objections[0])
    self._listen(place.port + 1).close()  # JAX would end roughly where others find a stranger
    ordered = [rows[i] for i in range(place.count)]
    for peer in self._peers:
      peer.send(rows=ordered)
      self._watch(peer)
    self._start_beating()
    return ordered

  def _listen(self, port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
      return socket.create_server(('', port), family=family, backlog=1024, dualstack_ipv6=both)
    except OSError as error:
      raise UserError(
        f'process 0 cannot listen on port {port} of {socket.gethostname()}: {error.strerror}; '
        'end what uses it, or give --coordinator another one; JAX takes the next'
      ) from error

  def _admit(self, connection: socket.socket, agreed: dict[str, str], rows: dict) -> str:
    """Hears who it is and enters it; why it cannot be, or ''."""
    peer = _Peer(connection, 'a stranger')
    hello = peer.hear(_PARTING)
    if not {'index', 'count', 'host', 'agreed'} <= set(hello):
      peer.close()  # not one of ours: a port scan, say
      return ''
    self._peers.append(peer)
    index, host = hello['index'], hello['host']
    peer.name = f'process {index} ({host})'
    if hello['count'] != self.place.count:
      return (
        f'{peer.name} was told that there are {hello["count"]} processes, process 0 that there are '
        f'{self.place.count}; give all the same --processes'
      )
    if index in rows:
      there = rows[index]
      return (
        f'both {there["host"]} ({there["address"]}) and {host} ({peer.address}) say that they are '
        f'process {index}; give each its own --process'
      )
    rows[index] = {'host': host, 'address': peer.address}
    differs = _difference(agreed, hello['agreed'])
    return differs and f'{peer.name} and process 0 differ in {differs}; give all the same command'

  def _absent(self, missing: set[int], timeout: float) -> AbsentError:
    names = [self.place.name(i) for i in sorted(missing)]
    listed = ', '.join(names[:8]) + (f' and {len(names) - 8} more' if len(names) > 8 else '')
    return AbsentError(
      f'{listed} of {self.place.count} did not come up within {timeout:g} s; '
      'see why in the output there, or give more --start_timeout'
    )

  def answer_roll(self, agreed: dict[str, str], timeout: float) -> list[dict]:
    """For the others: calls in at process 0, and waits until it says that all have."""
    place = self.place
    connection, why = self._reach_first(place.port, timeout)
    if not connection:
      raise AbsentError(
        f'{place.name(0)} at {place.address(place.port)} did not come up within {timeout:g} s: '
        f'{why}; see why in the output there, or give more --start_timeout'
      )
    peer = _Peer(connection, place.name(0))
    self._peers.append(peer)
    peer.send(index=place.index, count=place.count, host=socket.gethostname(), agreed=agreed)
    # Process 0 may have come up as late as this one may, and then waits as long as that.
    answer = peer.hear(timeout + _PARTING)
    if 'rows' not in answer:
      self._peers.clear()  # the others know already
      peer.close()
      raise _of_status(answer) or FailedError(
        f'{peer.name} ended while the processes were starting; see its output, and start them again'
      )
    self._watch(peer)
    self._start_beating()
    return answer['rows']

  def await_jax(self, timeout: float) -> None:
    """For the others: waits until JAX's coordinator can be reached, without which JAX aborts."""
    port = self.place.port + 1
    connection, why = self._reach_first(port, timeout)
    if not connection:
      raise UserError(
        f"JAX's coordinator at {self.place.address(port)} cannot be reached: {why}; "
        f'let both ports, {port - 1} and {port}, through the firewall'
      )
    connection.close()

  def _reach_first(self, port: int, timeout: float) -> tuple[socket.socket | None, str]:
    """A connection to process 0; or why there was none within so many seconds."""
    deadline = time.monotonic() + timeout
    while True:
      try:
        connection = socket.create_connection((self.place.host, port), timeout=10)
        # Where process 0 would be on this very host, a connection can be one to itself.
        if connection.getsockname() != connection.getpeername():
          return connection, ''
        connection.close()
        why = 'nobody listens there'
      except OSError as error:
        why = error.strerror or str(error)
      if time.monotonic() > deadline:
        return None, why
      time.sleep(0.2)

  def _watch(self, peer: _Peer) -> None:
    peer.thread = threading.Thread(target=self._hear_out, args=(peer,), daemon=True)
    peer.thread.start()

  def _start_beating(self) -> None:
    def beat() -> None:
      while True:
        time.sleep(_BEAT)
        for peer in self._peers:
          peer.send(alive=True)

    threading.Thread(target=beat, daemon=True).start()

  def _hear_out(self, peer: _Peer) -> None:
    """Listens until the other process is done, gone, silent or has failed."""
    while message := peer.hear(_SILENCE):
      if 'done' in message:
        peer.done = True
      elif 'failed' in message:
        self._end_for(message['failed'], message['status'], source=peer)
    if not peer.done:
      gone = 'ended without saying why'
      silent = f'has not been heard for {_SILENCE:g} s, so it hangs or its host is gone'
      why = f'{peer.name} {silent if peer.silent else gone}; see its output'
      self._end_for(why, _FAILURE, source=peer)

  def _end_for(self, why: str, status: int, source: _Peer) -> None:
    """Ends this process, for what happened in another one."""
    if not self._ending.acquire(blocking=False):
      return  # it is ending by itself
    self._tell(why, status)
    start = '\n' if sys.stderr.isatty() else ''  # there a progress bar stands in the line
    os.write(2, f'{start}error: {why}\n'.encode())
    self._await_leaving(but=source)
    leave(status)

  @contextlib.contextmanager
  def failing_together(self) -> Iterator[None]:
    """Tells the others how the work inside it ended."""
    try:
      yield
    except StoppedError:  # which they agreed on
      self._say_done()
      raise
    except UserError as error:
      self._fail(str(error), error.status)
      raise
    except KeyboardInterrupt:
      self._fail('interrupted', 130)
      raise
    except BaseException as error:
      # The end of another process shows as an error here, too. What it says comes first.
      time.sleep(_GRACE)
      why = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
      self._fail(f'{why}; see its output', _FAILURE)
      raise
    else:
      self._say_done()

  def _say_done(self) -> None:
    for peer in self._peers:
      peer.send(done=True)

  def _fail(self, why: str, status: int) -> None:
    """Tells the others why this one ends, and sees to it that it does."""
    atexit.register(leave, status)  # before JAX's, which would wait for the others
    if self._ending.acquire(blocking=False):
      text = f'{self._own_name()}: {why}' if self._started() else why
      self._tell(text, status)
      self._await_leaving()
      for peer in self._peers:
        if not peer.thread:  # which else closes it
          peer.close()
    elif self._started():
      time.sleep(_PARTING)  # the thread that has heard of another's failure ends the process

  def _started(self) -> bool:
    return any(peer.thread for peer in self._peers)

  def _own_name(self) -> str:
    return f'process {self.place.index} ({socket.gethostname()})'

  def _tell(self, why: str, status: int) -> None:
    for peer in self._peers:
      peer.send(failed=why, status=status)

  def _await_leaving(self, but: _Peer | None = None) -> None:
    """The first one leaves last, as JAX ends the others roughly when it is gone."""
    deadline = time.monotonic() + _PARTING
    for peer in self._peers:
      if peer is not but and peer.thread:
        peer.thread.join(max(deadline - time.monotonic(), 0))


def _of_status(message: dict) -> UserError | None:
  """What process 0 says that ended it, as an error of the same exit status; None: nothing."""
  if 'failed' not in message:
    return None
  kinds = {kind.status: kind for kind in (UserError, AbsentError, FailedError)}
  return kinds.get(message['status'], FailedError)(message['failed'])


def _difference(own: dict[str, str], other: dict[str, str]) -> str:
  """The first keys whose values differ: 'key (own -> other)', or ''."""
  keys = [k for k in sorted(own | other) if own.get(k) != other.get(k)]
  shown = ', '.join(f'{k} ({other.get(k, "absent")} and {own.get(k, "absent")})' for k in keys[:3])
  return shown + (f' and {len(keys) - 3} more' if len(keys) > 3 else '')
