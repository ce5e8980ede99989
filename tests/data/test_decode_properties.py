"""Any picture, box and size: the right shape, and close to what PIL makes of it."""

import io

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from afi_flax.data import decode
from tests.data.odd_pictures import encode

# (format, mode, options): every one that PIL writes and that has a scale.
FORMATS = [
  *[('JPEG', mode, {'quality': 90}) for mode in ('L', 'RGB', 'CMYK')],
  *[('JPEG', 'RGB', kind) for kind in ({'progressive': True}, {'subsampling': 0})],
  *[('PNG', mode, {}) for mode in ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I;16')],
  *[('WEBP', mode, {'lossless': True}) for mode in ('RGB', 'RGBA')],
  *[('TIFF', mode, {'compression': 'tiff_lzw'}) for mode in ('1', 'L', 'P', 'RGB', 'CMYK', 'I;16')],
  *[('BMP', mode, {}) for mode in ('1', 'L', 'P', 'RGB', 'RGBA')],
  *[('PPM', mode, {}) for mode in ('1', 'L', 'RGB', 'I;16')],
  ('GIF', 'P', {}),
]  # fmt: skip
SIDES = st.integers(1, 90)
any_examples = hypothesis.settings(
  deadline=None,
  derandomize=True,
  database=None,
  max_examples=60,
  suppress_health_check=list(hypothesis.HealthCheck),
)
fault = pytest.mark.fault(
  'picture', 'pictures, boxes and sizes as they come (property-based)', "near PIL's pixels"
)


def smooth(height: int, width: int, seed: int) -> Image.Image:
  coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
  return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def converted(image: Image.Image, mode: str) -> Image.Image:
  if mode == 'I;16':
    return Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16) * 257)
  if mode in ('LA', 'RGBA'):
    image = image.convert(mode)
    image.putalpha(99)
  return image.quantize(64) if mode == 'P' else image.convert(mode)


@st.composite
def pictures(draw) -> tuple[bytes, Image.Image, bool]:
  """A file; what PIL reads in it, 8 bits, RGB; and whether that is lossless."""
  file_format, mode, options = draw(st.sampled_from(FORMATS))
  image = converted(smooth(draw(SIDES), draw(SIDES), draw(st.integers(0, 99))), mode)
  data = encode(image, file_format, **options)
  if mode == 'I;16':
    grey = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return data, grey.convert('RGB'), True
  return data, Image.open(io.BytesIO(data)).convert('RGB'), file_format != 'JPEG'


def tolerance(image: Image.Image, size: int) -> float:
  """Levels on average: 8, or 16 of hardly any pixels, or 32 of dots in black and white."""
  if len(image.getcolors(90 * 90)) == 2:
    return 32
  return 16 if size < 4 else 8


@st.composite
def boxes(draw, height: int, width: int, whole: bool) -> decode.Box:
  """Within the picture, of whole pixels or of any parts of them."""
  if whole:
    y, x = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    return y, x, draw(st.integers(1, height - y)), draw(st.integers(1, width - x))
  y, x = draw(st.floats(0, height - 0.02)), draw(st.floats(0, width - 0.02))
  return y, x, draw(st.floats(0.01, height - y)), draw(st.floats(0.01, width - x))


@fault
@any_examples
@hypothesis.given(st.data(), pictures(), st.integers(1, 60), st.booleans(), st.booleans())
def test_a_training_crop(data, case, size, whole, antialias):
  """Of the right shape; for whole pixels near PIL's crop and resize."""
  file, image, _ = case
  assert decode.picture_size(file) == (image.height, image.width)
  y, x, h, w = box = data.draw(boxes(image.height, image.width, whole))
  got = decode.crop_resize(file, box, size, antialias)
  assert (got.shape, got.dtype) == ((size, size, 3), np.uint8)
  if whole and antialias:
    part = image.crop((x, y, x + w, y + h))
    want = np.asarray(part.resize((size, size), Image.Resampling.BILINEAR)).astype(float)
    assert np.abs(got - want).mean() <= tolerance(image, size)


@fault
@any_examples
@hypothesis.given(pictures(), st.integers(1, 60), st.integers(0, 20))
def test_an_evaluation_crop(case, size, more):
  """As torchvision: resized to a whole number of pixels, then cropped."""
  file, image, lossless = case
  resize, short = size + more, min(image.size)
  got = decode.resize_centre_crop(file, resize, size)
  assert (got.shape, got.dtype) == ((size, size, 3), np.uint8)
  sides = resize * image.width // short, resize * image.height // short
  x, y = (round((side - size) / 2) for side in sides)
  resized = image.resize(sides, Image.Resampling.BILINEAR)
  want = np.asarray(resized.crop((x, y, x + size, y + size))).astype(float)
  if lossless:  # the box is where PIL's resize has it, to the last bit of a float
    assert np.abs(got - want).max() <= 2
  assert np.abs(got - want).mean() <= tolerance(image, size)


@fault
@any_examples
@hypothesis.given(
  st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 600), st.integers(0, 99)
)
def test_the_centre_box_is_square_centred_and_inside(height, width, size, more):
  y, x, h, w = decode.centre_box(height, width, size + more, size)
  assert min(y, x) >= -1e-9
  assert y + h <= height + 1e-6
  assert x + w <= width + 1e-6
  scale = min(height, width) / (size + more)  # pixels of the picture for one of the result
  for at, side, length in ((y, h, height), (x, w, width)):
    assert side == pytest.approx(size * scale, rel=1 / (size + more))
    assert abs(at + side / 2 - length / 2) <= 0.51 * length / int(length / scale + 1e-9)
