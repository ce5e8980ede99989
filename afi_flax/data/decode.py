"""Picture bytes -> u8 crop [size,size,3], with as few pixels decoded as the crop needs.

JPEGs go through libjpeg-turbo, which can decode straight to a half, a quarter, ... of the size; all
else, and the odd JPEG (CMYK, damaged but readable), goes through PIL. The format is told by the
content, not by a file's name. EXIF orientation is ignored, as torchvision and tf.data ignore it.
Resizing is PIL's bilinear, which averages over the pixels that it shrinks (anti-aliased).
"""

import io
import math

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

# PIL's own limit for a decompression bomb; at three bytes a pixel half a GiB.
MAX_PIXELS = 178_956_970
# A JPEG is decoded to a fraction of its size only if that leaves this many times the crop's pixels
# a side: within 1.5 levels of a full decode on average. At 1.5 times it would be 2.0 levels.
OVERSAMPLING = 2.0
# No EPS and the like: PIL hands those to outside programs.
_FORMATS = ('JPEG', 'PNG', 'GIF', 'BMP', 'WEBP', 'TIFF', 'PPM')
Image.init()  # or PIL knows only some of them

Box = tuple[float, float, float, float]  # y, x, height, width, in pixels of the whole picture


class UnreadableError(ValueError):
  """These bytes are not a picture that can be decoded."""


def picture_size(data: bytes) -> tuple[int, int]:
  """Height and width in pixels, from the header.

  Raises:
    UnreadableError: not a picture, or one of more than MAX_PIXELS pixels.
  """
  try:
    height, width = _jpeg_size(data) or _open(data).size[::-1]
  except UnidentifiedImageError as e:  # whose text is of the object in memory
    raise UnreadableError('not a picture of a known format' if data else 'an empty file') from e
  except Exception as e:  # PIL raises nearly anything on damaged headers
    raise UnreadableError(f'not a picture: {e}') from e
  if height * width > MAX_PIXELS:
    raise UnreadableError(f'{width} x {height} pixels are more than {MAX_PIXELS}')
  return height, width


def crop_resize(data: bytes, box: Box, size: int) -> np.ndarray:
  """u8 [size,size,3] RGB: the box of the picture, resized.

  Raises:
    UnreadableError: the picture is damaged, or not one.
  """
  height, width = picture_size(data)
  y, x, h, w = box
  least = (math.ceil(OVERSAMPLING * size * height / h), math.ceil(OVERSAMPLING * size * width / w))
  try:
    image = _decode(data, least)
  except Exception as e:  # as above
    raise UnreadableError(f'damaged picture: {e}') from e
  sy, sx = image.height / height, image.width / width
  corners = (x * sx, y * sy, min((x + w) * sx, image.width), min((y + h) * sy, image.height))
  return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=corners))


def resize_centre_crop(data: bytes, resize: int, size: int) -> np.ndarray:
  """u8 [size,size,3]: the centre of the picture whose short side is resized to `resize` pixels.

  The same pixels as torchvision's Resize(resize) and CenterCrop(size), in one step.
  """
  return crop_resize(data, centre_box(*picture_size(data), resize, size), size)


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
  return Image.open(io.BytesIO(data), formats=_FORMATS)


def _decode(data: bytes, least: tuple[int, int]) -> Image.Image:
  """An RGB picture of at least `least` pixels (height, width), or whole."""
  if _jpeg_size(data):
    try:  # strict: a damaged one raises, and PIL below is the judge of it
      pixels = simplejpeg.decode_jpeg(
        data, 'RGB', min_height=least[0], min_width=least[1], min_factor=2
      )
      return Image.fromarray(pixels)
    except ValueError:
      pass
  return _to_rgb(_open(data))


def _to_rgb(image: Image.Image) -> Image.Image:
  """The first frame, alpha dropped, 16-bit grey scaled to 8."""
  if image.mode.startswith('I'):
    grey = np.asarray(image).astype(np.int64) >> 8
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert('RGB')
  if image.mode == 'P':  # a palette may hold transparency, which PIL keeps only in RGBA
    image = image.convert('RGBA')
  return image.convert('RGB')
