import glob
import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from afi_flax.data import augment, decode
from tests.data.odd_pictures import encode, picture


def noise(height, width) -> Image.Image:
  return Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
  )


def by_pil(image: Image.Image, box, size) -> np.ndarray:
  """Cropped, then resized, anti-aliased: as torchvision and timm do it."""
  y, x, h, w = box
  cropped = image.convert('RGB').crop((x, y, x + w, y + h))
  return np.asarray(cropped.resize((size, size), Image.Resampling.BILINEAR))


def difference(a: np.ndarray, b: np.ndarray) -> float:
  return np.abs(a.astype(float) - b).mean()


@pytest.mark.parametrize(('kind', 'file_format'), [('u2', 'TIFF'), ('u2', 'PPM'), ('i4', 'PPM')])
def test_16_bit_grey_is_scaled_however_pil_names_it(kind, file_format):
  pixels = np.arange(20 * 30).reshape(20, 30) * 100
  got = decode.crop_resize(
    encode(Image.fromarray(pixels.astype(kind)), file_format), (0, 0, 20, 20), 20
  )
  np.testing.assert_array_equal(got, np.stack([pixels[:, :20] >> 8] * 3, axis=-1))


@pytest.mark.parametrize('kind', ['f4', 'i4'])
def test_grey_without_a_scale_is_refused(kind):
  pixels = np.arange(20 * 30).reshape(20, 30) % 256
  data = encode(Image.fromarray(pixels.astype(kind)), 'TIFF')
  with pytest.raises(decode.UnreadableError, match=r'^grey levels are .* no defined scale'):
    decode.crop_resize(data, (0, 0, 20, 20), 20)


@pytest.mark.parametrize('size', [32, 75, 200])
def test_jpegs_are_within_tolerance_of_pils_full_decode(size):
  """At 32 libjpeg-turbo decodes to a quarter, at 75 whole; 200 enlarges."""
  data = encode(picture(300, 400), 'JPEG', quality=90)
  box = (30, 50, 240, 270)
  want = by_pil(Image.open(io.BytesIO(data)), box, size)
  assert difference(decode.crop_resize(data, box, size), want) < 1.5


def test_scaled_decoding_keeps_twice_the_pixels_and_is_used(monkeypatch):
  shapes = []
  real = simplejpeg.decode_jpeg
  monkeypatch.setattr(
    simplejpeg, 'decode_jpeg', lambda *a, **k: shapes.append((out := real(*a, **k)).shape) or out
  )
  data = encode(picture(800, 1000), 'JPEG')
  decode.crop_resize(data, (0, 0, 800, 1000), 100)  # needs 200 x 200 and more
  decode.crop_resize(data, (0, 0, 400, 500), 100)
  decode.crop_resize(data, (0, 0, 200, 250), 100)
  decode.crop_resize(data, (600, 750, 200, 250), 100)
  decode.crop_resize(data, (0, 0, 800, 1000), 400, antialias=False)  # needs 400 x 400
  # Below the second and third crop nothing is decoded: 404 and 204 rows, up to a multiple of 8.
  assert shapes == [(200, 250, 3), (204, 500, 3), (208, 1000, 3), (800, 1000, 3), (400, 500, 3)]


@pytest.mark.parametrize('subsampling', ['4:4:4', '4:2:2', '4:2:0', 'grey'])
@pytest.mark.parametrize('bottom', [57, 60, 61, 64, 95])
def test_what_is_left_undecoded_below_the_crop_does_not_change_it(subsampling, bottom):
  image = noise(96, 88)
  if subsampling == 'grey':
    data = encode(image.convert('L'), 'JPEG')
  else:
    data = encode(image, 'JPEG', subsampling=subsampling)
  whole = simplejpeg.decode_jpeg(data, 'RGB')
  got = decode.crop_resize(data, (bottom - 50, 20, 50, 50), 50)
  np.testing.assert_array_equal(got, whole[bottom - 50 : bottom, 20:70])


@pytest.mark.parametrize('options', [{'progressive': True}, {'restart_marker_rows': 1}])
def test_other_ways_to_code_a_jpeg_are_as_close(options):
  data = encode(picture(300, 400), 'JPEG', quality=90, **options)
  box = (10, 50, 140, 170)
  want = by_pil(Image.open(io.BytesIO(data)), box, 100)
  assert difference(decode.crop_resize(data, box, 100), want) < 1.5


def test_a_jpeg_that_was_cut_off_is_not_hidden_by_a_crop_above_the_damage():
  data = encode(noise(160, 200), 'JPEG')
  with pytest.raises(decode.UnreadableError):
    decode.crop_resize(data[: len(data) * 3 // 4], (0, 0, 40, 40), 16)


@pytest.mark.parametrize('shrink', [1.2, 1.5, 2.0, 3.3, 7.0])
def test_anti_aliasing_averages_and_is_left_out_on_demand(shrink):
  """Noise of deviation s becomes weaker, as PIL makes it; without averaging it stays."""
  image = noise(350, 350)
  data, size = encode(image, 'PNG'), round(350 / shrink)
  box = (0, 0, 350, 350)
  want = by_pil(image, box, size)
  smooth = decode.crop_resize(data, box, size)
  rough = decode.crop_resize(data, box, size, antialias=False)
  assert smooth.std() == pytest.approx(want.std(), rel=0.12)
  assert rough.std() > 1.1 * smooth.std()
  assert difference(smooth, want) < 0.7 * difference(rough, want)


@pytest.mark.parametrize('antialias', [True, False])
@pytest.mark.parametrize('box', [(0, 0, 1, 1), (0, 0, 3, 500), (2, 499, 1, 1), (0, 7, 3, 2)])
def test_the_narrowest_boxes(box, antialias):
  for file_format in ('JPEG', 'PNG'):
    got = decode.crop_resize(encode(picture(3, 500), file_format), box, 8, antialias)
    assert got.shape == (8, 8, 3)


@pytest.mark.parametrize(('height', 'width'), [(97, 143), (143, 97), (300, 300), (20, 35)])
def test_evaluation_crop_equals_resize_and_then_crop(height, width):
  image = picture(height, width)
  short = min(height, width)
  resized = image.resize((64 * width // short, 64 * height // short), Image.Resampling.BILINEAR)
  y, x = round((resized.height - 56) / 2), round((resized.width - 56) / 2)
  want = np.asarray(resized)[y : y + 56, x : x + 56]
  got = decode.resize_centre_crop(encode(image, 'PNG'), 64, 56)
  assert np.abs(got.astype(int) - want).max() <= 1


JPEG, PNG = encode(picture(), 'JPEG'), encode(picture(), 'PNG')


@pytest.mark.parametrize(
  'data',
  [
    b'',
    b'no picture',
    JPEG[:100],
    JPEG[: len(JPEG) // 2],
    PNG[: len(PNG) // 2],
    b'\xff\xd8\xff',
    b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n',
  ],
  ids=['empty', 'text', 'no data', 'half JPEG', 'half PNG', 'three bytes', 'EPS'],
)
def test_unreadable_bytes_raise_a_value_error(data):
  with pytest.raises(decode.UnreadableError):
    decode.resize_centre_crop(data, 16, 16)
  assert issubclass(decode.UnreadableError, ValueError)


def test_the_reason_is_for_people():
  for data, reason in [(b'', 'an empty file'), (b'text', 'not a picture of a known format')]:
    with pytest.raises(decode.UnreadableError, match=f'^{reason}$'):
      decode.resize_centre_crop(data, 16, 16)


def real_differences(folder: str, step: int, size: int, antialias: bool) -> list[float]:
  files = sorted(glob.glob(f'{folder}/imagenet-samples/val/*/*.JPEG'))[::step]
  found = []
  for i, file in enumerate(files):
    with open(file, 'rb') as opened:
      data = opened.read()
    box = augment.random_resized_box(*decode.picture_size(data), 0, 0, i)
    want = by_pil(Image.open(io.BytesIO(data)), box, size)
    found.append(difference(decode.crop_resize(data, box, size, antialias), want))
  return found


def test_real_pictures_are_close_to_pils_full_decode(real_data):
  assert np.mean(real_differences(real_data, 25, 64, True)) < 1.5


@pytest.mark.slow
@pytest.mark.parametrize('size', [64, 160, 224])
def test_all_real_pictures_are_close_to_pils_full_decode(real_data, size):
  smooth = real_differences(real_data, 1, size, True)
  assert len(smooth) == 500
  assert np.mean(smooth) < 1.5
  assert np.mean(smooth) < np.mean(real_differences(real_data, 1, size, False))
