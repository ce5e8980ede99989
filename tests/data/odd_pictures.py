"""Small whole pictures of every kind that is decoded, made in memory, and bombs of the same kinds.

Each kind is a name, the file's bytes and the pixels that it shows, so that tests of decoding, of
damage and of fuzzing have one list.
"""

import base64
import dataclasses
import io
import struct
import zlib

import cv2
import numpy as np
import simplejpeg
from PIL import Image

# Arithmetic-coded, 16 x 16: red grows to the right and green downwards by 16, blue is 128.
_ARITHMETIC = base64.b85decode(
  '|JeWF01!$>Nk#wx0RR9200961|JwjV00IF40RaI50RaI50s;a81OoyB0s;jD1Oo&H1qKEN1qKEN2MGuU2MGrT1_%oX2?`1d'
  '3JL}Y3k(Yi3<(Mf3jf;xLjeK;0s;a81p@;G3I_%U3JMAe3JMAe3JMAe3JMAe3JMAe3JMAe3JMAe3JMAe3JMAe3JMAe3JMAe'
  '3JMAe3JU+p01*fP5C9MZ0TBQK5di}c0sqVZ3IGrg1pyEd1^?Or3<CiG0ucid06zf#0OKYE1OT<N{tIeE*5FthJQ7^G{v)9U'
  'A7c9&2ioo7w9|E`Pc6%+;R&oweu7z?R@-Wpf{F1n*O(CwTnTuwyK)=O6HKe@XD`}#1I(=d*#'
)


@dataclasses.dataclass(frozen=True)
class Kind:
  """A picture's bytes, and what it shows: u8 [H,W,3], exactly or to `tolerance` on average."""

  data: bytes
  pixels: np.ndarray
  tolerance: float = 0


def encode(image: Image.Image, file_format: str, **options) -> bytes:
  """The picture's file."""
  file = io.BytesIO()
  image.save(file, file_format, **options)
  return file.getvalue()


def picture(height: int = 40, width: int = 48, seed: int = 0) -> Image.Image:
  """A smooth one in colours."""
  coarse = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
  return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def rgb(image: Image.Image) -> np.ndarray:
  """u8 [H,W,3]."""
  return np.asarray(image.convert('RGB'))


# ---- formats that PIL does not write


def tiff(entries: list[tuple[int, int, int, int | bytes]]) -> bytes:
  """A TIFF of one page from (tag, type, count, value or, of bytes, where they are)."""
  at = 8 + 2 + 12 * len(entries) + 4
  fields, blobs = b'', b''
  for tag, kind, count, value in entries:
    if isinstance(value, bytes):
      blobs, value = blobs + value, at + len(blobs)
    fields += struct.pack('<HHII', tag, kind, count, value)
  head = b'II*\0' + struct.pack('<IH', 8, len(entries))
  return head + fields + struct.pack('<I', 0) + blobs


def tiled_tiff(side: int, tile: int, level: int = 0) -> bytes:
  """Grey of one level, side x side pixels, in one deflated tile of tile x tile."""
  packer = zlib.compressobj(9)
  packed = b''.join(packer.compress(bytes([level]) * tile) for _ in range(tile)) + packer.flush()
  size = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1)]
  tiles = [(322, 4, 1, tile), (323, 4, 1, tile), (324, 4, 1, packed), (325, 4, 1, len(packed))]
  return tiff([*size, (277, 3, 1, 1), *tiles])


def rle_bmp(width: int, height: int, level: int = 255) -> bytes:
  """A run-length coded BMP with a grey palette, all of one level."""
  row = b''.join(bytes([min(255, width - x), level]) for x in range(0, width, 255))
  body = (row + b'\0\0') * height + b'\0\1'
  palette = b''.join(bytes([i, i, i, 0]) for i in range(256))
  start = 14 + 40 + len(palette)
  info = struct.pack('<IiiHHIIiiII', 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
  head = b'BM' + struct.pack('<IHHI', start + len(body), 0, 0, start)
  return head + info + palette + body


def png_chunk(name: bytes, body: bytes) -> bytes:
  """With its length and check sum."""
  return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))


def in_png(chunk: bytes) -> bytes:
  """A small PNG with this before its pixels."""
  data = encode(picture(), 'PNG')
  at = data.index(b'IDAT') - 4
  return data[:at] + chunk + data[at:]


def jpeg_of_scans(side: int, scans: int) -> bytes:
  """A progressive JPEG of side x side pixels, each scan some bytes that go over all of them."""
  source = encode(Image.new('RGB', (16, 16)), 'JPEG', progressive=True)
  at, head = 2, b'\xff\xd8'
  while source[at + 1] != 0xDA:
    segment = bytearray(source[at : at + 2 + int.from_bytes(source[at + 2 : at + 4])])
    if segment[1] == 0xC2:
      segment[5:9] = struct.pack('>HH', side, side)
    head, at = head + bytes(segment), at + len(segment)
  # One code, of one bit: the next 2^14 + (14 bits) blocks are as they were.
  head += b'\xff\xc4' + struct.pack('>HB', 20, 0x10) + bytes([1] + [0] * 15) + b'\xe0'
  bits = ('0' + '1' * 14) * -(-(((side + 7) // 8) ** 2) // 32767)
  packed = int(bits + '1' * (-len(bits) % 8), 2).to_bytes(-(-len(bits) // 8))
  scan = b'\xff\xda' + struct.pack('>H', 8) + bytes([1, 1, 0, 1, 63, 0])
  return head + (scan + packed.replace(b'\xff', b'\xff\0')) * scans + b'\xff\xd9'


def kinds() -> dict[str, Kind]:
  """Every kind of whole picture, by name."""
  return _in_colour() | _of_other_modes() | _jpegs() | _lossy_webps()


def _with_alpha() -> Image.Image:
  image = picture()
  image.putalpha(image.convert('L'))
  return image


def _exif() -> Image.Exif:
  exif = Image.Exif()
  exif[0x0112] = 6  # turned: ignored
  return exif


def _in_colour() -> dict[str, Kind]:
  """Without loss."""
  image, alpha = picture(), _with_alpha()
  deep = np.random.default_rng(0).integers(0, 2**16, (40, 48, 4), dtype=np.uint16)
  pixels = rgb(image)
  exact = {
    'PNG': encode(image, 'PNG'),
    'PNG with alpha': encode(alpha, 'PNG'),
    'PNG with EXIF': encode(image, 'PNG', exif=_exif()),
    '16-bit colour PNG': cv2.imencode('.png', deep[..., :3])[1].tobytes(),
    '16-bit PNG with alpha': cv2.imencode('.png', deep)[1].tobytes(),
    'animated PNG': encode(image, 'PNG', save_all=True, append_images=[picture(seed=1)]),
    'BMP': encode(image, 'BMP'),
    'BMP with alpha': encode(alpha, 'BMP'),
    'lossless WebP': encode(image, 'WEBP', lossless=True),
    'animated WebP': encode(
      image, 'WEBP', lossless=True, save_all=True, append_images=[picture(seed=1)]
    ),
    'TIFF': encode(image, 'TIFF'),
    'TIFF of two pages': encode(image, 'TIFF', save_all=True, append_images=[picture(seed=1)]),
    'TIFF with alpha': encode(alpha, 'TIFF'),
    'LZW TIFF': encode(image, 'TIFF', compression='tiff_lzw'),
    'deflated TIFF': encode(image, 'TIFF', compression='tiff_deflate'),
    'PackBits TIFF': encode(image, 'TIFF', compression='packbits'),
    'PPM': encode(image, 'PPM'),
  }
  found = {name: Kind(data, pixels) for name, data in exact.items()}
  corner = pixels[:10, :12]  # PIL reads it slowly
  plain = b'P3 12 10 255\n' + b' '.join(b'%d' % x for x in corner.ravel())
  found['plain PPM'] = Kind(plain, corner)
  for name in ('16-bit colour PNG', '16-bit PNG with alpha'):
    found[name] = Kind(exact[name], (deep[..., 2::-1] >> 8).astype(np.uint8))
  return found


def _of_other_modes() -> dict[str, Kind]:
  """Without loss: grey, palettes, inks, black and white."""
  image, alpha = picture(), _with_alpha()
  grey, cmyk, palette = image.convert('L'), image.convert('CMYK'), image.quantize(64)
  frames = [picture(seed=i).quantize(64) for i in range(3)]
  animated = {'save_all': True, 'append_images': frames[1:]}
  deep_grey = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
  others = [
    ('grey PNG', encode(grey, 'PNG'), grey),
    ('grey PNG with alpha', encode(alpha.convert('LA'), 'PNG'), grey),
    ('16-bit grey PNG', encode(deep_grey, 'PNG'), grey),
    ('16-bit grey TIFF', encode(deep_grey, 'TIFF'), grey),
    ('16-bit PGM', encode(deep_grey, 'PPM'), grey),
    ('black and white PNG', encode(image.convert('1'), 'PNG'), image.convert('1')),
    ('palette PNG', encode(palette, 'PNG'), palette),
    ('palette PNG with transparency', encode(palette, 'PNG', transparency=b'\0' * 9), palette),
    ('GIF', encode(palette, 'GIF'), palette),
    ('animated GIF', encode(frames[0], 'GIF', transparency=0, **animated), frames[0]),
    ('palette BMP', encode(palette, 'BMP'), palette),
    ('run-length BMP', rle_bmp(48, 40, 77), Image.new('L', (48, 40), 77)),
    ('CMYK TIFF', encode(cmyk, 'TIFF'), cmyk),
    ('palette TIFF', encode(palette, 'TIFF'), palette),
    ('fax TIFF', encode(image.convert('1'), 'TIFF', compression='group4'), image.convert('1')),
    ('tiled TIFF', tiled_tiff(40, 64, 77), Image.new('L', (40, 40), 77)),
    ('PBM', encode(image.convert('1'), 'PPM'), image.convert('1')),
    ('PGM', encode(grey, 'PPM'), grey),
  ]
  return {name: Kind(data, rgb(shown)) for name, data, shown in others}


def _jpegs() -> dict[str, Kind]:
  image = picture()
  grey, cmyk, pixels = image.convert('L'), image.convert('CMYK'), rgb(image)
  jpegs = [
    ('JPEG', {}, image),
    ('JPEG 4:4:4', {'subsampling': 0}, image),
    ('grey JPEG', {}, grey),
    ('CMYK JPEG', {}, cmyk),
    ('progressive JPEG', {'progressive': True}, image),
    ('progressive CMYK JPEG', {'progressive': True}, cmyk),
    ('JPEG with restarts', {'restart_marker_rows': 1}, image),
    ('JPEG with EXIF', {'exif': _exif()}, image),
  ]
  found = {}
  for name, options, shown in jpegs:
    found[name] = Kind(encode(shown, 'JPEG', quality=95, **options), rgb(shown), 3)
  two = encode(image, 'MPO', quality=95, save_all=True, append_images=[picture(seed=1)])
  found['JPEG of two pictures'] = Kind(two, pixels, 3)
  found['TIFF of a JPEG'] = Kind(encode(image, 'TIFF', compression='jpeg', quality=95), pixels, 3)
  bomb = b'Exif\0\0' + jpeg_of_size(65_500, 65_500)
  data = encode(cmyk, 'JPEG', quality=95)
  data = data[:2] + b'\xff\xe1' + (len(bomb) + 2).to_bytes(2) + bomb + data[2:]
  found['JPEG with a bomb as its thumbnail'] = Kind(data, rgb(cmyk), 3)
  inks = np.ascontiguousarray(255 - np.asarray(cmyk))  # the wrong way round, as Adobe has them
  found['YCCK JPEG'] = Kind(simplejpeg.encode_jpeg(inks, 95, 'CMYK', '444'), rgb(cmyk), 3)
  ramp = 16 * np.arange(16)
  slope = np.stack(np.broadcast_arrays(ramp[None], ramp[:, None], 128), axis=-1).astype(np.uint8)
  found['arithmetic-coded JPEG'] = Kind(_ARITHMETIC, slope, 1)
  return found


def _lossy_webps() -> dict[str, Kind]:
  image, alpha = picture(), _with_alpha()
  return {
    'WebP': Kind(encode(image, 'WEBP', quality=95), rgb(image), 5),
    'WebP with alpha': Kind(encode(alpha, 'WEBP', quality=95), rgb(image), 8),
  }


# ---- small files that would take much memory or time


def _with(data: bytes, at: int, field: bytes) -> bytes:
  return data[:at] + field + data[at + len(field) :]


def jpeg_of_size(width: int, height: int, **options) -> bytes:
  """Says so, and has the bytes of a small one."""
  data = encode(picture(), 'JPEG', **options)
  marker = b'\xff\xc2' if options.get('progressive') else b'\xff\xc0'
  return _with(data, data.index(marker) + 5, struct.pack('>HH', height, width))


def png_of_size(width: int, height: int) -> bytes:
  """As jpeg_of_size."""
  data = encode(picture(), 'PNG')
  header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  return data[:8] + png_chunk(b'IHDR', header) + data[33:]


def bombs() -> dict[str, bytes]:
  """By name; the sides are 20,000 pixels, or what a format has at most."""
  field = struct.Struct('<HII').pack  # as a tag has it: type, count, value
  gif, bmp = encode(picture().quantize(64), 'GIF'), encode(picture(), 'BMP')
  webp = encode(picture(), 'WEBP', lossless=True)
  much, sides = struct.pack('<HH', 20_000, 20_000), struct.pack('<II', 20_000, 20_000)
  strips = [(258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, bytes(9)), (279, 4, 1, 9)]
  text = b'k\0\0' + zlib.compress(bytes(8 << 20))
  return {
    'JPEG': jpeg_of_size(20_000, 20_000),
    'JPEG as large as can be': jpeg_of_size(65_500, 65_500),
    'progressive JPEG': jpeg_of_size(20_000, 20_000, progressive=True),
    'CMYK JPEG': _cmyk_of_size(20_000),
    'JPEG of 1,000 scans': jpeg_of_scans(8000, 1000),
    'PNG': png_of_size(20_000, 20_000),
    'PNG as large as can be': png_of_size((1 << 31) - 1, (1 << 31) - 1),
    'PNG of one row': png_of_size((1 << 31) - 1, 1),
    'PNG with a long text': in_png(png_chunk(b'zTXt', text)),
    'PNG with many texts': in_png(
      png_chunk(b'zTXt', b'k\0\0' + zlib.compress(bytes(1_000_000))) * 100
    ),
    'PNG with a large profile': in_png(png_chunk(b'iCCP', text)),
    'GIF with a large screen': _with(gif, 6, much),
    'GIF with a large frame': _with(gif, gif.index(b'\x2c\0\0\0\0') + 5, much),
    'WebP': _with(webp, 21, (16_383 | 16_383 << 14 | 0 << 28).to_bytes(4, 'little')),
    'BMP': _with(bmp, 18, sides),
    'BMP from the top': _with(bmp, 18, struct.pack('<ii', 20_000, -20_000)),
    'run-length BMP': rle_bmp(255, 1)[:18] + sides + rle_bmp(255, 1)[26:],
    'run-length BMP of empty rows': _with(rle_bmp(1, 5000), 18, struct.pack('<I', 5000)),
    'PPM': b'P6 20000 20000 255\n' + bytes(99),
    'PPM of 10 bits': b'P6 4000 4000 1000\n' + bytes(99),
    'plain PPM': b'P3 4000 4000 255\n' + b'0 ' * 99,
    'TIFF': tiff([(256, 4, 1, 20_000), (257, 4, 1, 20_000), *strips]),
    'TIFF with a large tile': tiled_tiff(16, 64).replace(field(4, 1, 64), field(4, 1, 14_000)),
  }


def _cmyk_of_size(side: int) -> bytes:
  data = encode(picture().convert('CMYK'), 'JPEG')
  return _with(data, data.index(b'\xff\xc0') + 5, struct.pack('>HH', side, side))


def jpeg_with_fill(fill: int = 4_000_000) -> bytes:
  """A whole picture, with so many bytes in which a marker could begin before its last one."""
  data = encode(picture(), 'JPEG', progressive=True)
  return data[:-2] + b'\xff' * fill + b'\0' + data[-2:]


def tiff_of_many_tags(tags: int = 20_000, size: int = 1_000_000) -> bytes:
  """A whole picture of 10 x 10, each of whose tags says that it has the same bytes as the next."""
  head = [(256, 4, 1, 10), (257, 4, 1, 10), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
  at = 8 + 2 + 12 * (len(head) + 4 + tags) + 4
  head += [(273, 4, 1, at), (277, 3, 1, 1), (278, 4, 1, 10), (279, 4, 1, 100)]
  return tiff(head + [(40_000 + i, 1, size, at) for i in range(tags)]) + bytes(size)
