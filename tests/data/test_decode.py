import glob
import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from afi_flax.data import augment, decode


def picture(height=160, width=200, seed=0) -> Image.Image:
  coarse = np.random.default_rng(seed).integers(0, 255, (8, 10, 3), dtype=np.uint8)
  return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def noise(height, width) -> Image.Image:
  return Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
  )


def encode(image: Image.Image, file_format: str, **options) -> bytes:
  file = io.BytesIO()
  image.save(file, file_format, **options)
  return file.getvalue()


def by_pil(image: Image.Image, box, size) -> np.ndarray:
  """Cropped, then resized, anti-aliased: as torchvision and timm do it."""
  y, x, h, w = box
  cropped = image.convert('RGB').crop((x, y, x + w, y + h))
  return np.asarray(cropped.resize((size, size), Image.Resampling.BILINEAR))


def difference(a: np.ndarray, b: np.ndarray) -> float:
  return np.abs(a.astype(float) - b).mean()


def grey16(image: Image.Image) -> Image.Image:
  return Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16) * 257)


@pytest.mark.parametrize(
  ('name', 'convert', 'file_format', 'tolerance'),
  [
    ('colour JPEG', lambda i: i, 'JPEG', 1.5),
    ('grey JPEG', lambda i: i.convert('L'), 'JPEG', 1),
    ('CMYK JPEG', lambda i: i.convert('CMYK'), 'JPEG', 1),
    ('PNG', lambda i: i, 'PNG', 0),
    ('grey PNG', lambda i: i.convert('L'), 'PNG', 0),
    ('16-bit grey PNG', grey16, 'PNG', 0),
    ('PNG with alpha', lambda i: i.convert('RGBA'), 'PNG', 0),
    ('GIF', lambda i: i.quantize(256), 'GIF', 0),
    ('WebP', lambda i: i, 'WEBP', 4),
    ('TIFF', lambda i: i, 'TIFF', 0),
    ('BMP', lambda i: i, 'BMP', 0),
  ],
)
def test_formats(name, convert, file_format, tolerance):
  image = picture()
  options = {'quality': 95} if file_format == 'JPEG' else {}
  data = encode(convert(image), file_format, **options)
  if 'grey' in name:
    image = image.convert('L')
  elif name == 'GIF':
    image = convert(image)
  assert decode.picture_size(data) == (160, 200)
  got = decode.crop_resize(data, (0, 20, 160, 160), 160)
  assert got.shape == (160, 160, 3)
  assert got.dtype == np.uint8
  assert difference(got, by_pil(image, (0, 20, 160, 160), 160)) <= tolerance


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


@pytest.mark.parametrize('channels', [3, 4])
def test_16_bit_colours_are_scaled_and_alpha_dropped(channels):
  pixels = np.random.default_rng(0).integers(0, 2**16, (20, 30, channels), dtype=np.uint16)
  data = cv2.imencode('.png', pixels)[1].tobytes()
  got = decode.crop_resize(data, (0, 0, 20, 20), 20)
  np.testing.assert_array_equal(got, pixels[:, :20, 2::-1] >> 8)


def test_grey_with_alpha_keeps_its_grey():
  image = picture().convert('LA')
  image.putalpha(7)
  got = decode.crop_resize(encode(image, 'PNG'), (0, 0, 160, 160), 160)
  np.testing.assert_array_equal(got, by_pil(image.getchannel('L'), (0, 0, 160, 160), 160))


def test_a_palette_with_transparency_and_an_animation_give_colours_without_a_warning():
  frames = [picture(seed=i).quantize(64) for i in range(2)]
  data = encode(frames[0], 'GIF', save_all=True, append_images=frames[1:], transparency=0)
  got = decode.crop_resize(data, (0, 0, 160, 200), 100)
  assert difference(got, by_pil(frames[0], (0, 0, 160, 200), 100)) < 2


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


def png_header(width: int, height: int) -> bytes:
  body = b'IHDR' + struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  chunk = struct.pack('>I', 13) + body + struct.pack('>I', zlib.crc32(body))
  return b'\x89PNG\r\n\x1a\n' + chunk


def jpeg_with_size(width: int, height: int) -> bytes:
  data = encode(picture(), 'JPEG')
  at = data.index(b'\xff\xc0') + 5  # the frame header's height and width
  return data[:at] + struct.pack('>HH', height, width) + data[at + 4 :]


@pytest.mark.parametrize('data', [png_header(20_000, 20_000), jpeg_with_size(20_000, 20_000)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(data, monkeypatch):
  monkeypatch.setattr(decode, '_decode', lambda *_: pytest.fail('decoded'))
  with pytest.raises(decode.UnreadableError):
    decode.crop_resize(data, (0, 0, 10, 10), 5)


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


def test_mutated_pictures_decode_or_are_unreadable():
  rng = np.random.default_rng(0)
  decoded = 0
  for data in (JPEG, PNG, encode(picture(), 'WEBP'), encode(picture().quantize(64), 'GIF')):
    for _ in range(50):
      mutated = np.frombuffer(data, np.uint8).copy()
      mutated[rng.integers(0, len(mutated), 3)] = rng.integers(0, 256, 3)
      try:
        decode.resize_centre_crop(mutated.tobytes(), 16, 16)
        decoded += 1
      except decode.UnreadableError:
        pass
  assert 0 < decoded < 200


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
