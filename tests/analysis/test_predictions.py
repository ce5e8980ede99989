import csv
import dataclasses
import io
import itertools
import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from afi_flax import config, sharding
from afi_flax.analysis import predictions
from afi_flax.analysis.predictions import Guess, Prediction, predict
from afi_flax.data import decode
from afi_flax.errors import FailedError, UserError
from afi_flax.run import Preprocessing, Run
from configs import digits_afi_resnet20
from tests.data.conftest import write_picture

CLASSES = ('ant', 'bee', 'cat', 'dog', 'eel', 'fox', 'gnu')


class Linear(nn.Module):
  """The smallest network."""

  @nn.compact
  def __call__(self, x, train):
    return nn.Dense(len(CLASSES))(x.reshape(len(x), -1))


@pytest.fixture(scope='module')
def run():
  """As `load_run` opens one: the weights are on all devices."""
  model = Linear()
  variables = model.init(jax.random.key(0), jnp.zeros([1, 16, 16, 3]), train=False)
  variables = sharding.put_whole(variables, sharding.make_mesh())
  plan = config.resolve(digits_afi_resnet20.get_config())
  how = Preprocessing(16, 20, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
  return Run(model, variables, CLASSES, how, step=7, plan=plan)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """Thirty pictures of several sizes."""
  folder = tmp_path_factory.mktemp('pictures')
  paths = [folder / f'{i:02}.{("png", "jpg")[i % 2]}' for i in range(30)]
  for i, path in enumerate(paths):
    write_picture(path, seed=i, size=(20 + i, 40 - i))
  return paths


def by_hand(run, path):
  """Probabilities of one picture, f32 [K]."""
  image = decode.resize_centre_crop(path.read_bytes(), 20, 16)
  variables = jax.device_get(run.variables)
  logits = run.model.apply(variables, run.preprocessing(image[None]), train=False)
  return np.asarray(jax.nn.softmax(logits))[0]


@pytest.mark.parametrize('batch_size', [None, 1, 8, 13])
def test_the_most_probable_classes_in_the_order_of_the_files(run, files, batch_size):
  found = list(predict(run, files, top=3, batch_size=batch_size))
  assert [p.file for p in found] == list(map(str, files))
  for path, prediction in zip(files, found, strict=True):
    probabilities = by_hand(run, path)
    assert [g.name for g in prediction.top] == [CLASSES[k] for k in np.argsort(-probabilities)[:3]]
    given = [g.probability for g in prediction.top]
    np.testing.assert_allclose(given, np.sort(probabilities)[:-4:-1], rtol=1e-4)
    assert prediction.error is None


def test_no_more_than_there_are(run, files):
  (found,) = predict(run, files[:1], top=100)
  assert sorted(g.name for g in found.top) == sorted(CLASSES)
  assert sum(g.probability for g in found.top) == pytest.approx(1, abs=1e-5)
  assert list(predict(run, [])) == []


def test_on_fewer_devices(run, files):
  mesh = sharding.make_mesh(jax.devices()[:2])
  variables = sharding.put_whole(jax.device_get(run.variables), mesh)
  there = dataclasses.replace(run, variables=variables)
  one, all_ = (
    [g.probability for p in predict(r, files, mesh=m) for g in p.top]
    for r, m in ((there, mesh), (run, None))
  )
  np.testing.assert_allclose(one, all_, rtol=1e-5)


def test_a_file_that_cannot_be_read_has_its_place(run, files, tmp_path):
  (tmp_path / 'a.png').write_text('no picture')
  paths = [tmp_path / 'a.png', *files[:9], tmp_path / 'gone.png', tmp_path, *files[9:11]]
  found = list(predict(run, paths, batch_size=8))
  assert [p.file for p in found] == list(map(str, paths))
  reasons = {p.file: p.error for p in found if p.error is not None}
  assert reasons == {
    str(tmp_path / 'a.png'): 'not a picture of a known format',
    str(tmp_path / 'gone.png'): 'No such file or directory',
    str(tmp_path): 'Is a directory',
  }
  assert all(bool(p.top) == (p.error is None) for p in found)
  good = {p.file: p.top[0] for p in found if p.top}
  for path, expected in zip(files, predict(run, files[:11]), strict=False):
    assert good[str(path)].name == expected.top[0].name
    assert good[str(path)].probability == pytest.approx(expected.top[0].probability, rel=1e-5)


def test_results_come_while_paths_are_still_read(run, files):
  """Of an endless stream of paths, and only so many are taken as may be on their way."""
  taken = 0

  def endless():
    nonlocal taken
    for path in itertools.cycle(files):
      taken += 1
      yield path

  stream = predict(run, endless(), batch_size=8, top=1)
  found = list(itertools.islice(stream, 4))
  stream.close()
  assert [p.file for p in found] == list(map(str, files[:4]))
  assert taken <= 16 * 8 + 8, 'the first part'


def test_parts_grow_to_a_limit(monkeypatch):
  monkeypatch.setattr(predictions, '_LARGEST_PART', 400)
  parts = list(predictions._parts(map(str, range(1200)), batch_size=4))
  assert [len(part) for part in parts] == [64, 128, 256, 400, 352]
  assert list(itertools.chain(*parts)) == list(map(str, range(1200)))


def test_one_program_for_all_parts(run, files, monkeypatch):
  monkeypatch.setattr(predictions, '_FIRST_PART', 1)
  compiled = []
  original = predictions._compile
  monkeypatch.setattr(predictions, '_compile', lambda *args: compiled.append(1) or original(*args))
  found = list(predict(run, files, batch_size=8, top=1))
  assert [p.file for p in found] == list(map(str, files))
  assert compiled == [1]


@pytest.mark.parametrize(
  ('there', 'wanted', 'devices', 'batch'),
  [(1, 64, 1, 1), (3, 64, 1, 4), (33, 40, 1, 40), (64, 64, 8, 64), (1, 64, 8, 8), (17, 64, 8, 32)],
)
def test_few_pictures_make_a_small_batch(there, wanted, devices, batch):
  assert predictions._batch_size(there, wanted, devices) == batch


@pytest.mark.slow
def test_in_worker_processes_it_is_the_same(run, files):
  assert list(predict(run, files, batch_size=8, workers=2)) == list(
    predict(run, files, batch_size=8)
  )


def test_mistakes(run, files):
  for bad in ({'top': 0}, {'batch_size': 0}, {'workers': -1}):
    ((name, value),) = bad.items()
    with pytest.raises(UserError, match=f'^{name} {value} must be at least {value + 1}$'):
      predict(run, files, **bad)
  lost = jax.tree.map(lambda x: x * np.float32('nan'), run.variables)
  with pytest.raises(
    UserError, match=r'00.png are not finite: the weights of step 7 are of no use'
  ):
    list(predict(dataclasses.replace(run, variables=lost), files[:1]))


# ---- as text

LONG = '/a/' + 'very/' * 12 + 'long.png'
FOUND = (
  Prediction('a.jpg', (Guess('oak_tree', 0.98765432), Guess('a, "b"', 1.23456789e-9)), None),
  Prediction(LONG, (Guess('bee', 1.0), Guess('ant', 0.0)), None),
  Prediction('b\n\udcff.png', (), 'not a picture'),
)  # fmt: skip


def test_for_a_person():
  short = ''.join(predictions.formatted(FOUND, 'text', top=2, longest=14))
  assert short.splitlines()[:2] == [
    'a.jpg            98.8%  oak_tree',
    '                  0.0%  a, "b"',
  ]
  for longest in (None, len(LONG)):
    text = ''.join(predictions.formatted(FOUND, 'text', top=2, longest=longest))
    assert text.splitlines() == [
      'a.jpg',
      '   98.8%  oak_tree',
      '    0.0%  a, "b"',
      LONG,
      '  100.0%  bee',
      '    0.0%  ant',
      'b\\n\\udcff.png',
      '  cannot be read: not a picture',
    ]


def test_csv():
  lines = predictions.formatted(FOUND, 'csv', top=2)
  header, *rows = csv.reader(io.StringIO(''.join(lines), newline=''))
  assert header == ['file', 'class_1', 'probability_1', 'class_2', 'probability_2', 'error']
  assert rows == [
    ['a.jpg', 'oak_tree', '0.987654', 'a, "b"', '1.23457e-09', ''],
    [LONG, 'bee', '1.0', 'ant', '0.0', ''],
    ['b\n\udcff.png', '', '', '', '', 'not a picture'],
  ]


def test_json():
  lines = list(predictions.formatted(FOUND, 'json', top=2))
  assert all(line.isascii() and line.count('\n') == 1 for line in lines)
  first, _, last = map(json.loads, lines)
  assert first == {
    'file': 'a.jpg',
    'top': [
      {'class': 'oak_tree', 'probability': 0.987654},
      {'class': 'a, "b"', 'probability': 1.23457e-09},
    ],
  }
  assert last == {'file': 'b\n\udcff.png', 'error': 'not a picture'}


def test_a_file_keeps_the_bytes_of_a_path(tmp_path):
  path = tmp_path / 'rows.csv'
  path.write_text('old and longer than what takes its place, of which there are but two lines' * 9)
  assert predictions.write(predictions.formatted(FOUND, 'csv', top=2), str(path))
  assert b'"b\n\xff.png",,,,,not a picture\n' in path.read_bytes()
  assert path.read_bytes().startswith(b'file,class_1,')


def test_each_line_is_there_as_soon_as_it_is_made(tmp_path):
  path, lengths = tmp_path / 'rows', []

  def texts():
    for _ in range(3):
      yield 'line\n'
      lengths.append(path.stat().st_size)

  predictions.write(texts(), str(path))
  assert lengths == [5, 10, 15]


def test_a_full_disk_and_a_reader_that_has_enough(tmp_path):
  with pytest.raises(FailedError, match=r'^cannot write /dev/full: No space left on device; mend'):
    predictions.write(['a\n', 'b\n'], '/dev/full')
  with pytest.raises(UserError, match=r'^cannot write /none/rows: No such file'):
    predictions.write(['a\n'], '/none/rows')
  end, start = os.pipe()
  os.close(end)
  assert not predictions.write(['a\n', 'b\n'], f'/dev/fd/{start}')
  os.close(start)


def test_a_tally():
  told = []
  tally = predictions.Tally(lambda *what: told.append(what))
  before = time.monotonic()
  assert tuple(tally(FOUND)) == FOUND
  assert (tally.files, tally.unreadable) == (3, 1)
  (_, since), *_ = told
  assert told == [(1, since), (2, since), (3, since)]
  assert before <= since <= time.monotonic()
