"""The command, on a run that was trained: what it prints, and how it ends."""

import csv
import io
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import afi_flax
from afi_flax.data import decode
from afi_flax.train import train
from configs import image_folder
from tests.data.conftest import write_picture

CLASSES = ('ant', 'bee,\n"2"', 'ünï')


def start(*flags, **how) -> subprocess.Popen:
  command = [sys.executable, '-m', 'afi_flax.predict', *map(str, flags)]
  cache = jax.config.jax_compilation_cache_dir
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_COMPILATION_CACHE_DIR': cache}
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'stdin': subprocess.DEVNULL}
  return subprocess.Popen(command, env=env, **pipes | how)


def predict(*flags, lines: bytes | None = None, status: int = 0) -> tuple[bytes, str]:
  """Runs it to its end; what it printed, and what it said beside."""
  process = start(*flags, **({} if lines is None else {'stdin': subprocess.PIPE}))
  out, err = process.communicate(lines, timeout=300)
  assert process.returncode == status, err.decode()[-3000:]
  return out, err.decode()


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> pathlib.Path:
  """Four pictures of each of three classes, to train and to evaluate on."""
  root = tmp_path_factory.mktemp('pictures')
  for split in ('train', 'val'):
    for i in range(12):
      write_picture(root / split / CLASSES[i % 3] / f'{i}.png', seed=i, size=(30 + i, 25))
  return root


@pytest.fixture(scope='module')
def workdir(folder, tmp_path_factory) -> pathlib.Path:
  """A run of two steps, with a moving average of the weights."""
  config = image_folder.get_config()
  flags = {'data.data_dir': str(folder), 'data.image_size': 16, 'data.eval_resize': 18}
  flags |= {'model.name': 'resnet20', 'run.max_steps': 2, 'ema_decay': 0.5, 'batch_size': 8}
  config.update_from_flattened_dict(flags | {'eval_batch_size': 8})
  workdir = tmp_path_factory.mktemp('run')
  train(config, str(workdir))
  return workdir


def probabilities(workdir, path) -> np.ndarray:
  """f32 [K], by the library."""
  run = afi_flax.load_run(workdir)
  image = decode.resize_centre_crop(path.read_bytes(), 18, 16)
  apply = jax.jit(lambda v, x: run.model.apply(v, run.preprocessing(x), train=False))
  return np.asarray(jax.nn.softmax(apply(run.variables, image[None])))[0]


@pytest.mark.slow
def test_every_format(workdir, folder, tmp_path):
  val, broken = folder / 'val', tmp_path / 'broken.jpg'
  broken.write_text('no picture')
  images = val / 'ant', broken, f'{val}/ünï/*.png'
  paths = [*sorted((val / 'ant').iterdir()), broken, *sorted((val / 'ünï').iterdir())]
  given = '--workdir', workdir, '--images', *images
  told = '1 of 9 files could not be read\n'

  out, err = predict(*given, '--format=json')
  assert err == told
  found = list(map(json.loads, out.splitlines()))
  assert [row['file'] for row in found] == list(map(str, paths))
  assert found[4] == {'file': str(broken), 'error': 'not a picture of a known format'}
  top = found[0]['top']
  expected = probabilities(workdir, paths[0])
  assert [guess['class'] for guess in top] == [CLASSES[k] for k in np.argsort(-expected)]
  given_as = [guess['probability'] for guess in top]
  np.testing.assert_allclose(given_as, np.sort(expected)[::-1], rtol=1e-4)

  rows = tmp_path / 'rows.csv'
  out, err = predict(*given, '--format=csv', '--top=2', '--out', rows, '--batch_size=3')
  assert (out, err) == (b'', told)
  read = list(csv.DictReader(io.StringIO(rows.read_text(), newline='')))
  assert [row['file'] for row in read] == list(map(str, paths))
  assert [row['error'] for row in read if row['error']] == ['not a picture of a known format']
  for row, same in zip(read, found, strict=True):
    for rank, guess in enumerate(same.get('top', [])[:2], 1):
      assert row[f'class_{rank}'] == guess['class']
      assert float(row[f'probability_{rank}']) == pytest.approx(guess['probability'], rel=1e-4)

  out, err = predict(*given, '--top=1')
  lines = out.decode().splitlines()
  assert [line for line in lines if '%' in line or 'cannot' in line] == [
    line for line in lines if line.strip() not in map(str, paths)
  ]
  assert sum('cannot be read: not a picture of a known format' in line for line in lines) == 1


@pytest.mark.slow
def test_paths_from_standard_input(workdir, folder):
  paths = [os.fsencode(path) for path in sorted(folder.rglob('*.png'))[:5] if '\n' not in str(path)]
  lines = b'\n'.join([b'gone \xff.jpg', *paths])
  out, err = predict('--workdir', workdir, '--images', '-', '--format=csv', lines=lines)
  assert err == f'1 of {1 + len(paths)} files could not be read\n'
  header, first, *rest = out.splitlines()
  assert header.startswith(b'file,class_1,probability_1,')
  assert first == b'gone \xff.jpg,,,,,,,No such file or directory'
  assert len(rest) >= len(paths)
  assert all(any(line.startswith(path) for line in rest) for path in paths)


@pytest.mark.slow
def test_a_reader_that_has_enough(workdir, folder):
  """The command is still being told paths; it ends at once, and quietly."""
  process = start('--workdir', workdir, '--images', '-', '--batch_size=8', stdin=subprocess.PIPE)
  (path, *_) = sorted((folder / 'val' / 'ant').iterdir())
  line = os.fsencode(path) + b'\n'
  process.stdin.write(line * 600)
  process.stdin.flush()
  assert process.stdout.readline().startswith(line.rstrip()[:10])
  process.stdout.close()
  process.stdin.close()
  assert process.wait(60) == 0
  assert process.stderr.read() == b''
  process.stderr.close()


@pytest.mark.slow
def test_none_can_be_read(workdir, tmp_path):
  (tmp_path / 'a.png').touch()
  out, err = predict('--workdir', workdir, '--images', tmp_path, status=2)
  assert 'a.png' in out.decode()
  assert out.decode().endswith('cannot be read: an empty file\n')
  assert err == 'error: none of 1 files could be read; the lines above say why\n'
  out, err = predict('--workdir', workdir, '--images', '-', lines=b'', status=2)
  assert (out, err) == (b'', 'error: no paths on standard input; --images - wants one a line\n')


@pytest.mark.slow
@pytest.mark.parametrize(
  ('flags', 'says'),
  [
    (['--workdir=none'], "no --images; give files, folders, patterns such as 'photos/*.png'"),
    (['--workdir=none', '--images', 'README.md', 'a.png'], "no such file, folder or pattern: 'a."),
    (['--workdir=none', '--images', 'README.md'], 'none: config.json is missing; give the --workd'),
  ],
)  # fmt: skip
def test_mistakes(flags, says):
  out, err = predict(*flags, status=2)
  assert out == b''
  assert err.startswith('error: ')
  assert err.count('\n') == 1
  assert says in err
