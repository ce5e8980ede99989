"""Decodes damaged pictures, one after the other, and says how that went: run by its test.

`python -m tests.data.fuzz_decode FIRST COUNT FOLDER`. Input i is made from its number, and lies in
FOLDER/input before it is decoded: so it can be decoded again, even if it ended the process. Each
must give a picture or an UnreadableError, within _SECONDS of CPU time and _MEMORY of memory.
"""

import json
import os
import pathlib
import re
import resource
import signal
import sys
import time
import zlib

import numpy as np

from afi_flax.data import decode
from tests.data import odd_pictures

_SECONDS = 20  # of CPU time for one input; the system kills the process that takes longer
_MEMORY = 1 << 30  # bytes that the process may ask for, beside those of the start
_PIXELS = 1 << 20  # in place of decode.MAX_PIXELS, for speed, and for how little memory that takes
_EXTREMES = (0, 1, 2, 0x7F, 0x80, 0xFF, 999, 20_000, 0x7FFF, 65_500, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def corpus() -> list[bytes]:
  """All kinds of small pictures, and the smallest real JPEGs where those are."""
  found = [kind.data for kind in odd_pictures.kinds().values()]
  folder = pathlib.Path(os.environ.get('AFI_FLAX_DATA', '') or '/nonexistent')
  real = sorted(folder.glob('imagenet-samples/val/*/*.JPEG'), key=lambda file: file.stat().st_size)
  return found + [file.read_bytes() for file in real[:5]]


def mutated(pictures: list[bytes], number: int) -> bytes:
  """Input `number`: one of the pictures with one to three damages."""
  rng = np.random.default_rng(number)
  data = bytearray(pictures[rng.integers(len(pictures))])
  for _ in range(rng.integers(1, 4)):
    data = _damaged(data, pictures, rng)
  return bytes(_with_new_sums(data) if rng.integers(2) else data)


def _with_new_sums(data: bytearray) -> bytearray:
  """A PNG with the check sums of its chunks as they should be, or its damages would end there."""
  at = 8
  while data[:4] == b'\x89PNG' and at + 12 <= len(data):
    end = at + 8 + int.from_bytes(data[at : at + 4])
    data[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4)
    at = end + 4
  return data


def _damaged(data: bytearray, pictures: list[bytes], rng: np.random.Generator) -> bytearray:
  if len(data) < 2:
    return data
  # Half of the damages are in the first 100 bytes, where the headers are.
  at = int(rng.integers(min(len(data), 100) if rng.random() < 0.5 else len(data)))
  block = data[at : at + int(rng.integers(1, 65))]
  match int(rng.integers(8)):
    case 0:
      data[at] ^= 1 << int(rng.integers(8))
    case 1:
      data[at : at + len(block)] = rng.bytes(len(block))
    case 2:
      data[at : at + len(block)] = bytes([rng.choice([0, 255])]) * len(block)
    case 3:
      del data[max(at, 8) :]
    case 4:
      data[at:at] = block
    case 5:
      del data[at : at + len(block)]
    case 6:
      other = pictures[rng.integers(len(pictures))]
      data[at:] = other[int(rng.integers(len(other))) :]
    case 7:
      size = int(rng.choice([1, 2, 4]))
      value = int(rng.choice(_EXTREMES)) & ((1 << 8 * size) - 1)
      data[at : at + size] = value.to_bytes(size, 'big' if rng.random() < 0.5 else 'little')
  return data


def decoded(data: bytes, number: int) -> bool:
  """Whether it was, by both ways; if not, it must be said as it should."""
  rng = np.random.default_rng(number)
  size = int(rng.integers(1, 40))
  try:
    height, width = decode.picture_size(data)
    (y, y2), (x, x2) = (sorted(rng.uniform(0, side, 2)) for side in (height, width))
    box = (y, x, max(y2 - y, 1e-3), max(x2 - x, 1e-3))
    images = [
      decode.crop_resize(data, box, size, antialias=bool(rng.integers(2))),
      decode.resize_centre_crop(data, size + int(rng.integers(5)), size),
    ]
  except decode.UnreadableError as e:
    if isinstance(e.__cause__, MemoryError):
      raise AssertionError(f'more than {_MEMORY >> 20} MiB') from e
    return False
  for image in images:
    assert (image.shape, image.dtype) == ((size, size, 3), np.uint8)
  return True


def memory(kind: str) -> int:
  """Bytes that the process has asked for (VmSize), holds (VmRSS) or held at the most (VmHWM)."""
  status = pathlib.Path('/proc/self/status').read_text()
  return int(re.search(rf'{kind}:\s+(\d+) kB', status)[1]) << 10


def main(first: int, count: int, folder: pathlib.Path) -> None:
  """Prints one JSON object: inputs, decoded, refused, seconds, MiB at the most and left over."""
  pictures = corpus()
  decode.MAX_PIXELS = _PIXELS
  decode._MAX_SCANNED = 20 * _PIXELS
  resource.setrlimit(resource.RLIMIT_AS, 2 * (memory('VmSize') + _MEMORY,))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  whole, slowest, begin, warm = 0, (0.0, first), time.perf_counter(), 0
  at_start = memory('VmRSS')
  with open(folder / 'input', 'wb', buffering=0) as file:
    for i in range(first, first + count):
      if i - first == count // 4:  # what is kept for reuse is there by now
        warm = memory('VmRSS')
      data = mutated(pictures, i)
      os.pwrite(file.fileno(), data, 0)
      file.truncate(len(data))
      signal.setitimer(signal.ITIMER_PROF, _SECONDS)  # SIGPROF, which nobody catches
      start = time.process_time()
      try:
        whole += decoded(data, i)
      except BaseException:
        print(f'input {i}, {len(data)} bytes, in {folder}/input', file=sys.stderr)
        raise
      slowest = max(slowest, (time.process_time() - start, i))
  signal.setitimer(signal.ITIMER_PROF, 0)
  record = {
    'inputs': count,
    'decoded': whole,
    'refused': count - whole,
    'seconds': round(time.perf_counter() - begin, 1),
    'peak_mib': (memory('VmHWM') - at_start) >> 20,
    'left_mib': (memory('VmRSS') - warm) >> 20,
    'slowest_ms': round(1000 * slowest[0], 1),
    'slowest': slowest[1],
  }
  print(json.dumps(record))


if __name__ == '__main__':
  main(int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]))
