"""The command on real runs of a few steps."""

import io
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from afi_flax import train
from afi_flax.analysis import explain
from afi_flax.errors import UserError
from afi_flax.report import Console
from configs import digits_afi_resnet20

PICTURE = pathlib.Path(__file__).parent.parent / 'results' / 'explain_cifar100' / 'grad_cam.png'


def run(*arguments):
  command = [sys.executable, '-m', 'afi_flax.explain', *map(str, arguments)]
  return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Folders of a plain and an AFI run on fake pictures."""
  folder = tmp_path_factory.mktemp('runs')
  for name in ('resnet20', 'afi_resnet20'):
    config = digits_afi_resnet20.get_config('smoke')
    config.model.name = name
    train.train(config, folder / name)
  return folder


EXPECTED = {
  'index.html', 'grad_cam.png', 'grad_cam.csv', 'reuse.png', 'reuse.csv', 'selectivity.png',
  'selectivity.csv', 'selectivity_by_depth.png', 'selectivity_stage1.png',
  'selectivity_stage3.png', 'gap.png', 'gap.csv', 'confusion.png', 'confusion.csv', 'per_class.png',
  'per_class.csv', 'reliability.png', 'reliability.csv', 'mistakes.png', 'mistakes.csv',
  'summary.csv', 'explain.json',
}  # fmt: skip


@pytest.mark.slow
def test_two_runs_side_by_side(runs):
  workdir = runs / 'afi_resnet20'
  done = run('--workdir', workdir, '--baseline', runs / 'resnet20', '--num_images=3')
  assert done.returncode == 0, done.stderr
  written = {path.name: path.read_bytes() for path in (workdir / 'explain').iterdir()}
  assert set(written) == EXPECTED
  for name, content in written.items():
    if name.endswith('.png'):
      picture = np.asarray(Image.open(io.BytesIO(content)).convert('L'))
      assert picture.min() < 100 < 250 < picture.max(), name
  text = written['index.html'].decode()
  assert text.count('<img ') == sum(name.endswith('.png') for name in written)
  assert 'explain/index.html' in done.stdout
  lines = done.stdout.splitlines()
  assert lines[0].split() == ['resnet20', 'afi_resnet20']
  assert lines[-2].startswith('gap ')
  assert written['selectivity.csv'].count(b'\n') == 1 + 2 * 2 * (8 + 16 + 32)


@pytest.mark.slow
def test_one_run_and_pictures_of_ones_own(runs, tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / 'mine.png')
  out = tmp_path / 'out'
  done = run(
    '--workdir', runs / 'resnet20', '--images', tmp_path / 'mine.png', '--stage=1', '--plus_plus',
    '--train_examples=0', '--out', out, '--target=7',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert {p.name for p in out.iterdir()} == EXPECTED - {
    'reuse.png',
    'reuse.csv',
    'gap.png',
    'gap.csv',
  }
  assert 'mine.png' in (out / 'grad_cam.csv').read_text()
  assert 'Grad-CAM++, stage 1, for the class &#x27;7&#x27;' in (out / 'index.html').read_text()


@pytest.mark.slow
def test_a_mistake_ends_in_one_line():
  done = run('--workdir', 'no/run')
  assert (done.returncode, done.stdout) == (2, '')
  (line,) = done.stderr.splitlines()
  assert re.match(r'error: no run in .*/no/run: config.json is missing', line)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('request_', 'message'),
  [
    ({'stage': 4}, "stage 4: 'resnet20' has stages 1 to 3"),
    ({'images': ('no.png',)}, 'no.png cannot be read: No such file'),
    ({'checkpoint': '9'}, 'no checkpoint of step 9'),
    ({'target': '10'}, "unknown --target '10'"),
    (
      {'target': 'true', 'images': (str(PICTURE),)},
      '--target=true, and the true class of',
    ),
    ({'baseline': 'no/run'}, 'no run in .*/no/run'),
  ],
)
def test_mistakes_show_before_the_work(runs, request_, message):
  request = explain.Request(str(runs / 'resnet20'), **request_)
  before = list((runs / 'resnet20').iterdir())
  with pytest.raises(UserError, match=message):
    explain.explain(request, Console(False))
  assert list((runs / 'resnet20').iterdir()) == before
