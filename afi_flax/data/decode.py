"""Picture bytes -> u8 crop [size,size,3], with as few pixels decoded as the crop needs.

JPEGs go through libjpeg-turbo, which can decode straight to a half, a quarter, ... of the size, and
is made to stop below the crop; all else, and the odd JPEG (CMYK, damaged but readable), goes
through PIL. The format is told by the content, not by a file's name. EXIF orientation is ignored,
as torchvision and tf.data ignore it.

Evaluation resizes by PIL's bilinear, which averages over the pixels that it shrinks (anti-aliased).
Training comes close to that, faster: a blur and a bilinear resize by OpenCV.

Nothing that a file says is believed before it is decoded. A picture of more than MAX_PIXELS pixels,
and one whose few bytes would keep a core busy for minutes, is refused by its header. What is left
takes up to 12 bytes of memory a pixel while it is decoded (WebP 16, which at MAX_PIXELS is 2.7 GiB;
a JPEG that libjpeg-turbo shrinks as it reads next to none, or 6 where it is progressive). Whatever
the bytes are, what comes back is a picture or an UnreadableError.
"""

import io
import math
import re
import warnings

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH

# PIL's own limit for a decompression bomb; at three bytes a pixel half a GiB.
MAX_PIXELS = 178_956_970
# Each scan of a progressive JPEG may go over all its pixels: 2 ms a million, and a scan may be of a
# hundred bytes. Real ones have about ten.
_MAX_SCANNED = 20 * MAX_PIXELS
# What PIL decodes in Python, at up to 3 microseconds a pixel.
_SLOW_CODECS = ('bmp_rle', 'ppm', 'ppm_plain')
_MAX_SLOW_PIXELS = 1 << 22
_STRIP = 1 << 20  # pixels that are converted at a time, so that no second picture is in memory
# A JPEG is decoded to a fraction of its size only if that leaves this many times the crop's pixels
# a side: within 1.5 levels of a full decode on average. At 1.5 times it would be 2.0 levels.
OVERSAMPLING = 2.0
# No EPS and the like: PIL hands those to outside programs.
_FORMATS = ('JPEG', 'PNG', 'GIF', 'BMP', 'WEBP', 'TIFF', 'PPM')
Image.init()  # or PIL knows only some of them
# They name no file and come once: what matters of them ends as an UnreadableError, which does.
warnings.filterwarnings('ignore', module=r'PIL\.')
cv2.setNumThreads(0)  # many pictures at a time, each in one thread

# Of a JPEG: what is not among these bytes stands alone, or belongs to the scan that it is in.
_MARKER = re.compile(rb'\xff([^\x00\x01\xd0-\xd8\xff])')

Box = tuple[float, float, float, float]  # y, x, height, width, in pixels of the whole picture


class UnreadableError(ValueError):
  """These bytes are not a picture that can be decoded."""


def picture_size(data: bytes) -> tuple[int, int]:
  """Height and width in pixels, from the header.

  Raises:
    UnreadableError: not a picture, or one that is too large or too slow to decode.
  """
  try:
    height, width = _jpeg_size(data) or _open(data).size[::-1]
  except UnreadableError:
    raise
  except UnidentifiedImageError as e:  # whose text is of the object in memory
    raise UnreadableError('not a picture of a known format' if data else 'an empty file') from e
  except Image.DecompressionBombError as e:
    raise UnreadableError(f'more than {MAX_PIXELS} pixels') from e
  except Exception as e:  # PIL raises nearly anything on damaged headers
    raise UnreadableError(f'not a picture: {_text(e)}') from e
  if not height * width:
    raise UnreadableError(f'{width} x {height} pixels are no picture')
  if height * width > MAX_PIXELS:
    raise UnreadableError(f'{width} x {height} pixels are more than {MAX_PIXELS}')
  if (scans := _scans(data)) * height * width > _MAX_SCANNED:
    raise UnreadableError(
      f'a JPEG of {scans} scans, each over {width} x {height} pixels, would take minutes'
    )
  return height, width


def crop_resize(data: bytes, box: Box, size: int, antialias: bool = True) -> np.ndarray:
  """u8 [size,size,3] RGB: the box cut out of the picture and resized, for training.

  Args:
    data: of the file.
    box: in the picture.
    size: of the result, in pixels.
    antialias: average over the pixels that are shrunk; False is faster.

  Raises:
    UnreadableError: the picture is damaged, or not one.
  """
  height, width = picture_size(data)
  y, x, h, w = box
  cut, height = _cut_below(data, math.ceil(y + h), height)
  times = OVERSAMPLING if antialias else 1.0
  least = math.ceil(times * size * height / h), math.ceil(times * size * width / w)
  pixels = _decode(cut, least, strict=cut is data)
  scale = round(8 * max(pixels.shape[:2]) / max(height, width)) / 8  # libjpeg-turbo's are eighths
  return _resize(pixels, (y * scale, x * scale, h * scale, w * scale), size, antialias)


def resize_centre_crop(data: bytes, resize: int, size: int) -> np.ndarray:
  """u8 [size,size,3]: the centre of the picture whose short side is resized to `resize` pixels.

  The same pixels as torchvision's Resize(resize) and CenterCrop(size), in one step.

  Raises:
    UnreadableError: the picture is damaged, or not one.
  """
  height, width = picture_size(data)
  y, x, h, w = centre_box(height, width, resize, size)
  pixels = _decode(
    data, (math.ceil(OVERSAMPLING * size * height / h), math.ceil(OVERSAMPLING * size * width / w))
  )
  sy, sx = pixels.shape[0] / height, pixels.shape[1] / width
  corners = (x * sx, y * sy, min((x + w) * sx, pixels.shape[1]), min((y + h) * sy, pixels.shape[0]))
  image = Image.fromarray(pixels)
  return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=corners))


def centre_box(height: int, width: int, resize: int, size: int) -> Box:
  """The box of `resize_centre_crop`, in pixels of the picture as it is."""
  short = min(height, width)
  new_height, new_width = resize * height // short, resize * width // short
  y, x = round((new_height - size) / 2), round((new_width - size) / 2)
  sy, sx = height / new_height, width / new_width
  return y * sy, x * sx, size * sy, size * sx


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
  """Height and width if libjpeg-turbo is to decode this, else None."""
  if data[:2] != b'\xff\xd8':
    return None
  try:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
  except ValueError:
    return None
  return None if colours in ('CMYK', 'YCCK') else (height, width)


def _open(data: bytes) -> Image.Image:
  """The header as PIL reads it.

  Raises:
    UnreadableError: decoding it would take minutes, or memory that its size does not show.
  """
  image = Image.open(io.BytesIO(data), formats=_FORMATS)
  slow = any(tile[0] in _SLOW_CODECS for tile in image.tile)
  if slow and image.width * image.height > _MAX_SLOW_PIXELS:
    raise UnreadableError(
      f'{image.format} of a rare kind, which takes minutes to decode; save it as PNG'
    )
  if image.format == 'TIFF' and TILEWIDTH in image.tag_v2:
    tile = image.tag_v2[TILEWIDTH], image.tag_v2.get(TILELENGTH, 1)
    if tile[0] * tile[1] > MAX_PIXELS:
      raise UnreadableError(f'tiles of {tile[0]} x {tile[1]} pixels are more than {MAX_PIXELS}')
  return image


def _text(error: Exception) -> str:
  return str(error) or type(error).__name__  # a MemoryError has no text


def _cut_below(data: bytes, bottom: int, height: int) -> tuple[bytes, int]:
  """The JPEG as if it ended a little below row `bottom`, and its height; or all of it.

  libjpeg-turbo stops after the rows that the header promises. The rows above `bottom` do not
  change: smooth upsampling of the colours reads two rows further, and four are left.
  """
  kept = -(-(bottom + 4) // 8) * 8
  # Of one that was cut off, or is too odd to be sure, libjpeg-turbo is to judge the whole.
  whole = data[:2] == b'\xff\xd8' and data[-2:] == b'\xff\xd9'
  at = _one_scan_height(data) if whole and kept < height else None
  if at is None:
    return data, height
  return data[:at] + kept.to_bytes(2) + data[at + 2 :], kept


def _scans(data: bytes) -> int:
  """How many scans a JPEG has before its end mark, after which a film may follow; 1 of others."""
  if data[:2] != b'\xff\xd8' or _one_scan_height(data) is not None:
    return 1
  at, scans = 2, 0
  while (found := _MARKER.search(data, at)) and found[1] != b'\xd9':
    scans += found[1] == b'\xda'
    at = found.end() + int.from_bytes(data[found.end() : found.end() + 2])
  return scans


def _one_scan_height(data: bytes) -> int | None:
  """Where a JPEG says its height, if it is coded from the top down, all colours at once; or None.

  It is not progressive, that is: libjpeg-turbo stops at the end of its first scan.
  """
  at, field, colours = 2, None, None
  while at + 10 < len(data) and data[at] == 0xFF:
    marker = data[at + 1]
    if marker in (0xC0, 0xC1):  # the frame: length, bits, height, width, number of colours
      field, colours = at + 5, data[at + 9]
    elif marker == 0xDA:  # the scan: length, number of colours
      return field if data[at + 4] == colours else None
    elif marker == 0xC2:
      return None
    at += 2 + int.from_bytes(data[at + 2 : at + 4])
  return None


def _decode(data: bytes, least: tuple[int, int], strict: bool = True) -> np.ndarray:
  """u8 [H,W,3] RGB of at least `least` pixels (height, width), or whole.

  Args:
    data: of the file.
    least: pixels that must be left, as far as there are so many.
    strict: whether PIL is to judge a JPEG that libjpeg-turbo warns of.

  Raises:
    UnreadableError: the picture is damaged, or has no scale.
  """
  try:
    if _jpeg_size(data):
      try:
        return simplejpeg.decode_jpeg(
          data, 'RGB', min_height=least[0], min_width=least[1], min_factor=2, strict=strict
        )
      except ValueError:
        pass
    return _pixels(_open(data))
  except UnreadableError:
    raise
  except Exception as e:  # as above
    raise UnreadableError(f'damaged picture: {_text(e)}') from e


def _resize(pixels: np.ndarray, box: Box, size: int, antialias: bool) -> np.ndarray:
  """u8 [size,size,3]: the box cut out of `pixels`, u8 [H,W,3], and resized."""
  y, x, h, w = box
  top, left = int(y), int(x)
  pixels = pixels[top : math.ceil(y + h), left : math.ceil(x + w)]
  step_y, step_x = h / size, w / size
  if antialias and max(step_y, step_x) > 1:
    (taps_y, sigma_y), (taps_x, sigma_x) = _gaussian(step_y), _gaussian(step_x)
    pixels = cv2.GaussianBlur(pixels, (taps_x, taps_y), sigma_x, sigmaY=sigma_y)
  if pixels.shape[:2] == (h, w):
    return cv2.resize(pixels, (size, size), interpolation=cv2.INTER_LINEAR)
  to_source = np.array(
    [[step_x, 0, x - left + step_x / 2 - 0.5], [0, step_y, y - top + step_y / 2 - 0.5]]
  )
  flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
  return cv2.warpAffine(
    pixels, to_source, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE
  )


def _gaussian(step: float) -> tuple[int, float]:
  """Taps and standard deviation, in pixels, of the blur before every `step`-th pixel is taken.

  PIL weighs pixels by a triangle of half-width `step`, variance step^2 / 6. The bilinear resize
  itself has that of a triangle of half-width 1; the blur has the difference.
  """
  variance = (step * step - 1) / 6
  if variance <= 0:
    return 1, 1.0
  if variance > 0.6:
    return 2 * math.ceil(2.5 * math.sqrt(variance)) + 1, math.sqrt(variance)
  # So narrow a one is not what its name says: three taps 1, g, 1 over their sum, of this variance.
  side = variance / (2 - 2 * variance)  # of the middle one's weight
  return 3, math.sqrt(-0.5 / math.log(side))


def _pixels(image: Image.Image) -> np.ndarray:
  """u8 [H,W,3]: the first frame, converted strip by strip.

  Raises:
    UnreadableError: grey levels in floats or in 32 bits, which say nowhere what white is.
  """
  # PIL's mode I is 16-bit grey in PNG and PGM; TIFF's own 16 bits are I;16, and its I is wider.
  if image.mode == 'F' or (image.mode == 'I' and image.format == 'TIFF'):
    kind = 'floats' if image.mode == 'F' else '32-bit or signed integers'
    raise UnreadableError(f'grey levels are {kind}, of no defined scale; save with 8 or 16 bits')
  image.load()  # before its size is asked for: TIFF's orientation may turn it
  pixels = np.empty((image.height, image.width, 3), np.uint8)
  rows = max(1, _STRIP // image.width)
  for y in range(0, image.height, rows):
    strip = image.crop((0, y, image.width, min(y + rows, image.height)))
    pixels[y : y + rows] = _to_rgb(strip)
  return pixels


def _to_rgb(image: Image.Image) -> Image.Image:
  """Alpha dropped, 16-bit grey scaled to 8."""
  if image.mode.startswith('I'):
    grey = np.asarray(image).astype(np.int64) >> 8
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert('RGB')
  if image.mode == 'P':  # a palette may hold transparency, which PIL keeps only in RGBA
    image = image.convert('RGBA')
  return image.convert('RGB')
