"""Event files for TensorBoard, which hold scalars.

They are TFRecords of `Event` messages, encoded by hand since that is all of the format that scalars
need. https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/util/event.proto
(tensorboardX imports PyTorch where it is installed, hangs the run when the disk is full, and
overwrites its file when a run restarts within the same second.)
"""

import contextlib
import os
import socket
import struct
import time


class EventFile:
  """Writes scalars for TensorBoard, flushed at every call."""

  def __init__(self, folder: str | os.PathLike, purge_step: int):
    """Opens a new file in `folder`; older files' events from `purge_step` on are not shown."""
    os.makedirs(folder, exist_ok=True)
    name = f'events.out.tfevents.{time.time_ns()}.{socket.gethostname()}'  # read in order of name
    self._file = open(os.path.join(folder, name), 'xb')  # noqa: SIM115 - open as long as the run
    try:
      self._write(0, _message(3, b'brain.Event:2'))  # file_version
      self._write(purge_step, _message(7, b'\x08\x01'))  # session_log.status = START
    except OSError:  # nobody gets this to close it
      with contextlib.suppress(OSError):
        self.close()
      raise

  def add(self, step: int, scalars: dict[str, float]) -> None:
    """Writes one value for each tag."""
    values = (
      _message(1, tag.encode()) + b'\x15' + struct.pack('<f', value)  # tag, simple_value
      for tag, value in scalars.items()
    )
    self._write(step, _message(5, b''.join(_message(1, value) for value in values)))  # summary

  def close(self) -> None:
    """Ends the file; nothing can be added after."""
    self._file.close()

  def _write(self, step: int, what: bytes) -> None:
    event = b'\x09' + struct.pack('<d', time.time()) + b'\x10' + _varint(step) + what
    length = struct.pack('<Q', len(event))
    self._file.write(length + _masked_crc(length) + event + _masked_crc(event))
    self._file.flush()


def _varint(n: int) -> bytes:
  out = bytearray()
  while n > 127:
    out.append(n & 127 | 128)
    n >>= 7
  return bytes([*out, n])


def _message(field: int, content: bytes) -> bytes:
  return bytes([field << 3 | 2]) + _varint(len(content)) + content


def _crc_table() -> list[int]:
  table = list(range(256))
  for _ in range(8):
    table = [n >> 1 ^ (0x82F63B78 if n & 1 else 0) for n in table]
  return table


_CRC_TABLE = _crc_table()


def _masked_crc(data: bytes) -> bytes:
  """CRC-32C, masked as TFRecords have it."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 255]
  crc ^= 0xFFFFFFFF
  return struct.pack('<I', ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
