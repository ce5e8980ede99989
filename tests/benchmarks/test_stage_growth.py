import json
import subprocess
import sys

import jax.numpy as jnp
import pytest

from benchmarks import stage_growth


@pytest.mark.parametrize('kind', stage_growth.KINDS)
def test_every_block_sees_the_channels_that_it_should(kind):
  w = stage_growth._WIDTH
  _, shapes = stage_growth.make_gradient(kind, 4, 'none', jnp.zeros([2, 8, 8, w]))
  seen = [shapes[f'block{k}']['conv2']['conv']['kernel'].shape[2] for k in (1, 2, 3, 4)]
  own = [shapes[f'block{k}']['conv1']['conv']['kernel'].shape[3] for k in (1, 2, 3, 4)]
  assert own == ([w] * 4 if kind == 'plain' else [w, w // 2, w // 2, w // 2])
  assert seen == ([w, w, 3 * w // 2, 2 * w] if kind == 'concatenation' else [w] * 4)


def test_exponent():
  assert stage_growth.exponent([4, 8, 16], [3 * n**2 for n in (4, 8, 16)]) == pytest.approx(2)


@pytest.mark.slow
def test_command(tmp_path):
  """Memory: AFI's grows as the plain stage's, concatenation's faster."""
  command = f'-m benchmarks.stage_growth --json={tmp_path}/a.json --plot={tmp_path}/a.png'
  subprocess.run([sys.executable, *command.split(), '--blocks=4,16'], check=True)
  figures = json.loads((tmp_path / 'a.json').read_text())['figures']
  mib = {(f['kind'], f['blocks']): f['peak MiB'] for f in figures}
  growth = {kind: mib[kind, 16] / mib[kind, 4] for kind in stage_growth.KINDS}
  assert growth['AFI'] < 4.2
  assert growth['concatenation'] > 1.3 * growth['AFI']
  assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')
  assert all(f['ms a gradient'] > 0 for f in figures)


@pytest.mark.slow
def test_lengths_that_are_no_lengths():
  command = [sys.executable, '-m', 'benchmarks.stage_growth', '--blocks=8,4']
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert (done.returncode, done.stderr.count('\n')) == (2, 1)
  assert done.stderr.startswith('error: --blocks 8,4 must be two or more numbers that rise')
