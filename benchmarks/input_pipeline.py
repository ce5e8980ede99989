"""Training pictures per second of CPU time: decode, random crop, resize, flip, beside other ways.

  python -m benchmarks.input_pipeline --data_dir FOLDER --json results/input_pipeline/speed.json

FOLDER holds JPEGs, in folders or not. Every way gets the same bytes, boxes and flips, makes u8
pictures one after the other, and is measured by the CPU time of the whole process, threads and all;
a round runs each of them once. `levels` is the mean absolute difference to PIL's pictures, 0..255.
torchvision's way (timm's too: it calls the same functions) and tf.data's are measured where
torchvision and TensorFlow are installed.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import io
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from absl import flags
from PIL import Image

from afi_flax import commands
from afi_flax.analysis import tables
from afi_flax.data import augment, decode
from afi_flax.errors import UserError
from benchmarks import common

_SIZE = flags.DEFINE_integer('size', 224, 'Pixels of the crop.', lower_bound=1)
_PICTURES = flags.DEFINE_integer('pictures', 500, 'How many of the pictures.', lower_bound=1)
SUFFIXES = ('.jpg', '.jpeg')
PACKAGES = (
  'simplejpeg',
  'opencv-python-headless',
  'pillow',
  'torchvision',
  'tensorflow',
  'tensorflow-cpu',
)


class Task(NamedTuple):
  """One picture to make."""

  data: bytes
  box: tuple[int, int, int, int]  # y, x, height, width
  flipped: bool


Way = Callable[[], Iterator[np.ndarray]]  # makes all pictures


def read_tasks(folder: str, limit: int) -> list[Task]:
  """The first JPEGs of the folder, by name, each with one box and one flip.

  CMYK and what is only named JPEG are left out: TensorFlow does not read them.
  """
  names = (p for p in sorted(pathlib.Path(folder).rglob('*')) if p.suffix.lower() in SUFFIXES)
  tasks = []
  for path in names:
    if len(tasks) == limit:
      break
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
      if image.format != 'JPEG' or image.mode not in ('RGB', 'L'):
        continue
    box = augment.random_resized_box(*decode.picture_size(data), 0, 0, len(tasks))
    tasks.append(Task(data, box, len(tasks) % 2 == 1))
  if not tasks:
    raise UserError(f'no JPEGs in {folder}; name a folder that holds some, at any depth')
  return tasks


def ours(task: Task, size: int, antialias: bool) -> np.ndarray:
  """What a training batch is made of."""
  image = decode.crop_resize(task.data, task.box, size, antialias)
  return cv2.flip(image, 1) if task.flipped else image


def by_pil(task: Task, size: int) -> np.ndarray:
  """The whole picture decoded by PIL, cropped, resized and flipped."""
  y, x, height, width = task.box
  with Image.open(io.BytesIO(task.data)) as opened:
    image = opened.convert('RGB')
  image = image.crop((x, y, x + width, y + height)).resize((size, size), Image.Resampling.BILINEAR)
  if task.flipped:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return np.asarray(image)


def torchvision_way(tasks: Sequence[Task], size: int) -> Way:
  """What RandomResizedCrop and RandomHorizontalFlip call, on PIL pictures."""
  import torch
  from torchvision.transforms import functional

  torch.set_num_threads(1)

  def make(task: Task) -> np.ndarray:
    with Image.open(io.BytesIO(task.data)) as opened:
      image = opened.convert('RGB')
    image = functional.resized_crop(image, *task.box, [size, size])
    return functional.pil_to_tensor(functional.hflip(image) if task.flipped else image).numpy()

  # [3,H,W], as it comes
  return lambda: (make(task).transpose(1, 2, 0) for task in tasks)


def tf_data_way(tasks: Sequence[Task], size: int, dct_method: str) -> Way:
  """decode_and_crop_jpeg, resize and flip in one map of one thread."""
  import tensorflow as tf

  def make(data, box, flipped):
    image = tf.image.decode_and_crop_jpeg(data, box, channels=3, dct_method=dct_method)
    image = tf.image.resize(image, [size, size])
    image = tf.cond(flipped, lambda: tf.image.flip_left_right(image), lambda: image)
    return tf.cast(image + 0.5, tf.uint8)

  options = tf.data.Options()
  options.threading.private_threadpool_size = 1
  options.threading.max_intra_op_parallelism = 1
  data, boxes, flipped = zip(*tasks, strict=True)
  slices = (list(data), np.array(boxes, np.int32), np.array(flipped))
  dataset = tf.data.Dataset.from_tensor_slices(slices).map(make).with_options(options)
  return lambda: dataset.as_numpy_iterator()


def make_ways(tasks: Sequence[Task], size: int) -> dict[str, Way]:
  """PIL's first; those whose library is not installed are left out, and said so."""

  def one_by_one(function, *args) -> Way:
    return lambda: (function(task, size, *args) for task in tasks)

  ways = {
    'PIL': one_by_one(by_pil),
    'afi_flax': one_by_one(ours, True),
    'afi_flax, antialias=False': one_by_one(ours, False),
  }
  others = (
    ('torchvision', 'torchvision', torchvision_way),
    ('tf.data', 'tensorflow', functools.partial(tf_data_way, dct_method='')),
    ('tf.data, fast DCT', 'tensorflow', functools.partial(tf_data_way, dct_method='INTEGER_FAST')),
  )
  for name, module, make in others:
    if importlib.util.find_spec(module):
      ways[name] = make(tasks, size)
    else:
      print(f'{name}: skipped, {module} is not installed')
  return ways


def levels(ways: Mapping[str, Way]) -> dict[str, float]:
  """Mean absolute difference of every way's pictures to the first's, in 0..255."""
  reference = list(next(iter(ways.values()))())

  def difference(way: Way) -> float:
    pairs = zip(way(), reference, strict=True)
    return statistics.fmean(np.abs(a.astype(np.int16) - b).mean() for a, b in pairs)

  return {name: float(difference(way)) for name, way in ways.items()}


def cpu_seconds(ways: Mapping[str, Way], rounds: int) -> dict[str, list[float]]:
  """CPU time of the process for all pictures, in every round, after one that does not count."""
  times = {name: [] for name in ways}
  for k in range(rounds + 1):
    for name, way in ways.items():
      start = time.process_time()
      for _ in way():
        pass
      if k:
        times[name].append(time.process_time() - start)
  return times


def summarise(
  times: Mapping[str, Sequence[float]], difference: Mapping[str, float], pictures: int
) -> list[dict[str, Any]]:
  """A row for every way: medians over the rounds, and of the ratios within a round."""

  def ratio(name: str, other: str) -> float | None:
    if other not in times:
      return None
    pairs = zip(times[other], times[name], strict=True)
    return round(statistics.median(theirs / mine for theirs, mine in pairs), 3)

  return [
    {
      'way': name,
      'pictures_per_cpu_second': round(pictures / statistics.median(values), 1),
      'to_pil': ratio(name, 'PIL'),
      'to_tf_data': ratio(name, 'tf.data'),
      'levels': round(difference[name], 3),
    }
    for name, values in times.items()
  ]


def show(rows: Sequence[Mapping[str, Any]]) -> str:
  """The rows as a table."""
  return tables.text(
    [
      {
        'way': row['way'],
        'pictures/s': f'{row["pictures_per_cpu_second"]:.0f}',
        'to PIL': f'{row["to_pil"]:.2f}',
        'to tf.data': row['to_tf_data'] and f'{row["to_tf_data"]:.2f}',
        'levels': f'{row["levels"]:.2f}',
      }
      for row in rows
    ]
  )


def main(_) -> None:
  if not common.DATA_DIR.value:
    raise UserError('no --data_dir; name a folder that holds JPEGs, at any depth')
  if common.JSON.value:
    tables.check_writable(common.JSON.value)
  tasks = read_tasks(common.DATA_DIR.value, _PICTURES.value)
  ways = make_ways(tasks, _SIZE.value)
  rows = summarise(cpu_seconds(ways, common.ROUNDS.value), levels(ways), len(tasks))
  print(f'{len(tasks)} JPEGs to {_SIZE.value} pixels, {common.ROUNDS.value} rounds\n{show(rows)}')
  if common.JSON.value:
    decoders = {}
    for name in PACKAGES:
      with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        decoders[name] = importlib.metadata.version(name)
    common.write_json(
      common.JSON.value,
      size=_SIZE.value,
      pictures=len(tasks),
      rounds=common.ROUNDS.value,
      decoders=decoders,
      rows=rows,
    )


if __name__ == '__main__':
  commands.run(main)
