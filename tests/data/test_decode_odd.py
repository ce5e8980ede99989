"""Odd but whole pictures are decoded right; what would take much memory or time is refused."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from afi_flax.data import decode
from tests.data import odd_pictures
from tests.data.odd_pictures import encode, picture, rgb

KINDS, BOMBS = odd_pictures.kinds(), odd_pictures.bombs()

whole = pytest.mark.fault(
  'picture', 'odd but whole: CMYK, alpha, 16 bit, GIF, TIFF, 1 x 1, ...', 'decoded right'
)
bomb = pytest.mark.fault(
  'picture', 'bombs: 20,000 x 20,000, 1,000 scans, texts, tiles, ...', 'refused undecoded'
)


@whole
@pytest.mark.parametrize('name', KINDS)
def test_every_kind_is_decoded_right(name):
  kind = KINDS[name]
  height, width, _ = kind.pixels.shape
  assert decode.picture_size(kind.data) == (height, width)
  side = min(height, width)
  y, x = (height - side) // 2, (width - side) // 2
  want = kind.pixels[y : y + side, x : x + side].astype(float)
  for got in (
    decode.crop_resize(kind.data, (y, x, side, side), side),
    decode.resize_centre_crop(kind.data, side, side),
  ):
    assert (got.shape, got.dtype) == ((side, side, 3), np.uint8)
    assert np.abs(got - want).mean() <= kind.tolerance


@whole
@pytest.mark.parametrize('file_format', ['JPEG', 'PNG', 'GIF', 'BMP', 'WEBP', 'TIFF', 'PPM'])
def test_a_picture_of_one_pixel(file_format):
  data = encode(Image.new('RGB', (1, 1), (90, 90, 90)), file_format)
  for got in (
    decode.crop_resize(data, (0, 0, 1, 1), 9),
    decode.resize_centre_crop(data, 10, 9),
  ):
    np.testing.assert_allclose(got, np.full((9, 9, 3), 90), atol=1)


@whole
def test_pictures_that_are_far_longer_than_wide():
  for file_format, side in (('PNG', 100_000), ('JPEG', 65_500)):
    data = encode(Image.new('RGB', (side, 1), (90, 90, 90)), file_format)
    for got in (
      decode.crop_resize(data, (0, 0, 1, side), 9, antialias=False),
      decode.crop_resize(data, (0, 0.25, 0.5, side - 0.5), 9, antialias=False),
      decode.crop_resize(data, (0, side - 40, 1, 40), 9),
      decode.resize_centre_crop(data, 10, 9),
    ):
      np.testing.assert_allclose(got, np.full((9, 9, 3), 90), atol=1)


@whole
def test_a_large_picture_is_converted_strip_by_strip(monkeypatch):
  data = encode(picture(), 'PNG')
  monkeypatch.setattr(decode, '_STRIP', 3 * 48 + 1)
  got = decode.crop_resize(data, (0, 0, 40, 40), 40)
  np.testing.assert_array_equal(got, rgb(picture())[:, :40])


@whole
def test_what_follows_a_jpeg_are_not_its_scans(monkeypatch):
  """Telephones put a film there, which has such bytes by chance; so have previews before it."""
  monkeypatch.setattr(decode, '_MAX_SCANNED', 12 * 40 * 48)
  data = encode(picture(), 'JPEG', progressive=True)
  note = b'\xff\xed' + (2 + 200).to_bytes(2) + b'\xff\xda' * 100
  data = data[:2] + note + data[2:] + b'\xff\xda\0\2' * 1000
  assert decode.picture_size(data) == (40, 48)
  monkeypatch.setattr(decode, '_MAX_SCANNED', 5 * 40 * 48)
  with pytest.raises(decode.UnreadableError, match=r'^a JPEG of 10 scans, each over 48'):
    decode.picture_size(data)


@bomb
@pytest.mark.parametrize('name', BOMBS)
def test_a_bomb_is_refused_before_it_is_decoded(name, monkeypatch):
  monkeypatch.setattr(Image.Image, 'crop', lambda *_: pytest.fail('decoded'))
  monkeypatch.setattr(decode, '_decode', lambda *_: pytest.fail('decoded'))
  with pytest.raises(decode.UnreadableError) as e:
    decode.resize_centre_crop(BOMBS[name], 16, 16)
  assert '\n' not in str(e.value)
  assert len(str(e.value)) < 100


@bomb
def test_all_bombs_together_take_little_memory_and_time(tmp_path, root):
  """In a process of its own, which must not ask for more, and without a warning of PIL's."""
  bombs = [*BOMBS.values(), odd_pictures.tiff_of_many_tags(), odd_pictures.jpeg_with_fill()]
  for i, data in enumerate(bombs):
    (tmp_path / str(i)).write_bytes(data)
  code = (
    'import json, pathlib, resource, sys\n'
    'from afi_flax.data import decode\n'
    'from tests.data.fuzz_decode import memory\n'
    'limit = memory("VmSize") + (256 << 20)\n'
    'resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n'
    'resource.setrlimit(resource.RLIMIT_CPU, (60, 60))\n'
    'before, said = memory("VmRSS"), []\n'
    'for file in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n'
    '  try:\n'
    '    said.append(decode.resize_centre_crop(file.read_bytes(), 16, 16).shape)\n'
    '  except decode.UnreadableError as e:\n'
    '    said.append(str(e))\n'
    'print(json.dumps([said, memory("VmHWM") - before]))\n'
  )
  command = [sys.executable, '-W', 'default', '-c', code, str(tmp_path)]
  done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
  said, grown = json.loads(done.stdout)
  assert done.stderr == ''
  # The last is a whole picture, whose tags would be 20 GB if all were believed.
  assert sum(isinstance(one, str) for one in said) == len(BOMBS)
  assert not any('Memory' in one for one in said)
  assert grown < 64 << 20


# Prints by a file's name how much more memory its process held at the most while it was decoded.
MEASURE = """
import json, pathlib, sys
from afi_flax.data import decode
from tests.data.fuzz_decode import memory
grown = {}
for file in sorted(pathlib.Path(sys.argv[1]).iterdir()):
  data, size = file.read_bytes(), int(sys.argv[2])
  pathlib.Path('/proc/self/clear_refs').write_text('5')  # what was held until now does not count
  before = memory('VmRSS')
  decode.crop_resize(data, (0, 0, size, size), 16)
  grown[file.name] = memory('VmHWM') - before
print(json.dumps(grown))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access('/proc/self/clear_refs', os.W_OK), reason='needs Linux')
def test_memory_by_pixels(tmp_path, root):
  """At most 12 bytes a pixel, of WebP 16, and 10 MiB, as the README says."""
  size = 1600
  image = Image.fromarray(rgb(picture(size, size)))
  alpha, palette, ink = image.convert('RGBA'), image.quantize(64), image.convert('CMYK')
  alpha.putalpha(image.convert('L'))
  deep = Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16) * 257)
  for form in ('JPEG', 'PNG', 'GIF', 'BMP', 'PPM', 'TIFF', 'WEBP'):
    (tmp_path / form).write_bytes(encode(image, form))
  for form in ('PNG', 'TIFF', 'WEBP'):
    (tmp_path / f'{form} with alpha').write_bytes(encode(alpha, form))
  (tmp_path / 'WEBP lossless').write_bytes(encode(alpha, 'WEBP', lossless=True, method=0))
  for form in ('JPEG', 'TIFF'):
    (tmp_path / f'{form} of inks').write_bytes(encode(ink, form))
  for form in ('PNG', 'GIF'):
    (tmp_path / f'{form} with a palette').write_bytes(encode(palette, form))
  for form in ('PNG', 'TIFF'):
    (tmp_path / f'{form} of 16 bits').write_bytes(encode(deep, form))
  (tmp_path / 'JPEG progressive').write_bytes(encode(image, 'JPEG', progressive=True))
  (tmp_path / 'JPEG of inks progressive').write_bytes(encode(ink, 'JPEG', progressive=True))
  done = subprocess.run(
    [sys.executable, '-c', MEASURE, str(tmp_path), str(size)],
    env=os.environ | {'MALLOC_MMAP_THRESHOLD_': '65536'},  # what is freed is not kept for reuse
    cwd=root,
    capture_output=True,
    text=True,
    check=True,
  )
  grown = json.loads(done.stdout)
  print({name: round((most - (10 << 20)) / size**2, 1) for name, most in grown.items()})
  for name, most in grown.items():
    assert most <= (16 if 'WEBP' in name else 12) * size**2 + (10 << 20), name
