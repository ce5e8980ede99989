import io
import itertools
import json

import numpy as np
import pytest
from absl import flags
from PIL import Image

from afi_flax.data import augment
from afi_flax.errors import UserError
from benchmarks import input_pipeline


def write(path, image, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  image.save(path, **options)


@pytest.fixture
def folder(tmp_path):
  """Four JPEGs that count, two of them in colour; a CMYK one and a PNG by the name of a JPEG."""
  coarse = np.random.default_rng(0).integers(0, 255, (6, 6, 3), dtype=np.uint8)
  image = Image.fromarray(coarse).resize((120, 90), Image.Resampling.BICUBIC)
  for i in range(2):
    write(tmp_path / 'val' / 'ant' / f'{i}.JPEG', image, quality=90)
    write(tmp_path / 'val' / 'bee' / f'{i}.jpg', image.convert('L'), quality=90)
  write(tmp_path / 'cmyk.jpg', image.convert('CMYK'))
  write(tmp_path / 'png.jpg', image, format='PNG')
  return tmp_path


def test_reads_what_all_ways_can_decode(folder):
  tasks = input_pipeline.read_tasks(str(folder), 100)
  assert [Image.open(io.BytesIO(task.data)).mode for task in tasks] == ['RGB', 'RGB', 'L', 'L']
  assert tasks[2].box == augment.random_resized_box(90, 120, 0, 0, 2)
  assert [task.flipped for task in tasks] == [False, True, False, True]
  assert len(input_pipeline.read_tasks(str(folder), 3)) == 3
  with pytest.raises(UserError, match='no JPEGs in'):
    input_pipeline.read_tasks(str(folder / 'val' / 'cat'), 3)


def test_all_ways_make_the_same_pictures(folder):
  tasks = input_pipeline.read_tasks(str(folder), 100)
  ways = input_pipeline.make_ways(tasks, 48)
  assert next(iter(ways)) == 'PIL'
  assert all(image.shape == (48, 48, 3) for way in ways.values() for image in way())
  levels = input_pipeline.levels(ways)
  assert levels['PIL'] == 0
  assert 0 < levels['afi_flax'] < 1.5
  assert max(levels.values()) < 4  # one that is not flipped is 30 away


def test_what_is_not_installed_is_left_out_and_said(folder, monkeypatch, capsys):
  monkeypatch.setattr(input_pipeline.importlib.util, 'find_spec', lambda name: None)
  ways = input_pipeline.make_ways(input_pipeline.read_tasks(str(folder), 1), 8)
  assert list(ways) == ['PIL', 'afi_flax', 'afi_flax, antialias=False']
  assert 'tf.data: skipped, tensorflow is not installed' in capsys.readouterr().out


def test_every_round_makes_all_pictures_of_each_way_in_turn(monkeypatch):
  clock, made = itertools.count(), []
  monkeypatch.setattr(input_pipeline.time, 'process_time', lambda: next(clock))

  def way(name):
    return lambda: (made.append(name) or name for _ in range(2))

  times = input_pipeline.cpu_seconds({'a': way('a'), 'b': way('b')}, 2)
  assert made == ['a', 'a', 'b', 'b'] * 3
  assert times == {'a': [1, 1], 'b': [1, 1]}


def test_medians_and_ratios_of_the_same_round():
  times = {'PIL': [2.0, 4.0, 4.0], 'afi_flax': [1.0, 1.0, 4.0], 'tf.data': [1.0, 3.0, 2.0]}
  levels = {'PIL': 0.0, 'afi_flax': 0.75, 'tf.data': 2.0}
  rows = input_pipeline.summarise(times, levels, 10)
  assert rows[1] == {
    'way': 'afi_flax',
    'pictures_per_cpu_second': 10.0,
    'to_pil': 2.0,
    'to_tf_data': 1.0,
    'levels': 0.75,
  }
  del times['tf.data']
  [_, without] = input_pipeline.summarise(times, levels, 10)
  assert without['to_tf_data'] is None
  assert input_pipeline.show([without]).splitlines()[1].split() == [
    'afi_flax',
    '10',
    '2.00',
    '-',
    '0.75',
  ]


def test_writes_what_it_prints(folder, tmp_path, capsys):
  path = tmp_path / 'speed.json'
  flags.FLAGS(['', f'--data_dir={folder}', '--size=16', '--rounds=1', f'--json={path}'])
  input_pipeline.main(None)
  written = json.loads(path.read_text())
  assert (written['size'], written['pictures'], written['rounds']) == (16, 4, 1)
  assert written['rows'][0]['way'] == 'PIL'
  assert 'simplejpeg' in written['decoders']
  assert '4 JPEGs to 16 pixels, 1 rounds' in capsys.readouterr().out
