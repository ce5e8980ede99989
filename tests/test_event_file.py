import struct

import pytest

from afi_flax.event_file import EventFile


def crc32c(data):
  """Bit by bit, as RFC 3720 defines it."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
  return crc ^ 0xFFFFFFFF


def records_of(data):
  """Payloads of a TFRecord file, whose checksums must be right."""

  def masked(part):
    crc = crc32c(part)
    return ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) % 2**32

  while data:
    (length,), (crc,) = struct.unpack('<Q', data[:8]), struct.unpack('<I', data[8:12])
    payload = data[12 : 12 + length]
    assert len(payload) == length
    assert crc == masked(data[:8])
    assert struct.unpack('<I', data[12 + length : 16 + length]) == (masked(payload),)
    yield payload
    data = data[16 + length :]


def fields_of(message):
  """[(number, value)] of a protocol buffer message."""
  fields = []
  position = 0

  def varint():
    nonlocal position
    value = shift = 0
    while True:
      byte = message[position]
      position += 1
      value |= (byte & 127) << shift
      shift += 7
      if byte < 128:
        return value

  while position < len(message):
    key = varint()
    if key & 7 == 0:
      value = varint()
    else:
      length = {1: 8, 5: 4}.get(key & 7) or varint()
      value = message[position : position + length]
      position += length
      if key & 7 != 2:
        (value,) = struct.unpack('<d' if length == 8 else '<f', value)
    fields.append((key >> 3, value))
  return fields


def scalars_of(path):
  """{(step, tag): value} and the step from which older events are void."""
  assert crc32c(b'123456789') == 0xE3069283
  scalars, purge_step = {}, None
  for number, event in enumerate(records_of(path.read_bytes())):
    fields = dict(fields_of(event))
    if number == 0:
      assert fields[3] == b'brain.Event:2'
    elif 7 in fields:
      assert fields_of(fields[7]) == [(1, 1)]  # status START
      purge_step = fields[2]
    else:
      for _, value in fields_of(fields[5]):
        tag, scalar = dict(fields_of(value))[1], dict(fields_of(value))[2]
        scalars[fields[2], tag.decode()] = scalar
  return scalars, purge_step


def test_holds_every_scalar(tmp_path):
  file = EventFile(tmp_path / 'events', purge_step=1)
  file.add(100, {'train/loss': 1.234, 'train/learning_rate': 0.1})
  file.add(70_000, {'test/loss': 2.0, f'a tag {"that is long " * 20}': -1e-9})
  (path,) = (tmp_path / 'events').iterdir()
  scalars, purge_step = scalars_of(path)  # before closing: what is written is there
  file.close()
  assert 'tfevents' in path.name  # by which TensorBoard finds it
  assert purge_step == 1
  assert scalars == pytest.approx(
    {
      (100, 'train/loss'): 1.234,
      (100, 'train/learning_rate'): 0.1,
      (70_000, 'test/loss'): 2.0,
      (70_000, f'a tag {"that is long " * 20}'): -1e-9,
    },
    rel=1e-6,
  )


def test_a_second_file_comes_after_the_first_and_says_what_it_voids(tmp_path):
  for start in (0, 200):
    file = EventFile(tmp_path, purge_step=start + 1)
    file.add(start + 100, {'train/loss': 1.0})
    file.close()
  first, second = sorted(tmp_path.iterdir())
  assert scalars_of(first) == ({(100, 'train/loss'): 1.0}, 1)
  assert scalars_of(second) == ({(300, 'train/loss'): 1.0}, 201)
