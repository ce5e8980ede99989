import importlib.util
import json
import re
import subprocess
import sys

import pytest
from jax.experimental import topologies

from afi_flax.analysis import fit
from afi_flax.errors import UserError

CONFIG = '--config=configs/digits_afi_resnet20.py:smoke'


def run(*arguments: str) -> subprocess.CompletedProcess:
  command = [sys.executable, '-m', 'afi_flax.fit', *arguments]
  return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_row_takes_the_place_of_one_of_the_same_run(tmp_path):
  rows = tmp_path / 'rows.json'
  rows.write_text('[{"config": "another"}]')
  for size in (8, 16, 16):
    result = run(CONFIG, f'--config.batch_size={size}', f'--json={rows}')
    assert result.returncode == 0, result.stderr
  result_of_parts = run(CONFIG, '--config.micro_batches=4', f'--json={rows}')
  assert result_of_parts.returncode == 0, result_of_parts.stderr
  other, small, large, parts = json.loads(rows.read_text())
  assert parts['peak_mib'] < large['peak_mib']
  assert parts['all_reduces'] is None, 'in a loop, of which the compiler counts one round'
  assert other == {'config': 'another'}
  assert (small['batch_per_chip'], large['batch_per_chip']) == (8, 16)
  assert large['gflops_per_step'] == pytest.approx(2 * small['gflops_per_step'], abs=0.2)
  assert small['gflops_per_step'] > 0
  assert 0 < small['peak_mib'] < large['peak_mib'] < large['hbm_mib']
  assert small['all_reduces'] == 0
  assert f'{round(large["peak_mib"]):,}' in result.stdout


@pytest.mark.slow
def test_what_no_device_has(tmp_path):
  result = run(CONFIG, '--config.data.image_size=4096', '--config.data.eval_resize=4096')
  assert result.returncode == 2
  assert 'training' in result.stdout
  assert result.stderr.startswith('error: it does not fit; use --config.micro_batches=2 or more')


def test_mistakes(tmp_path):
  result = run()
  assert (result.returncode, result.stderr[:19]) == (2, 'error: no --config;')
  (tmp_path / 'rows.json').write_text('{}')
  result = run(CONFIG, f'--json={tmp_path}/rows.json')
  assert result.returncode == 2
  assert 'rows.json cannot be read: not a list of objects' in result.stderr


@pytest.mark.parametrize(
  ('libtpu', 'error', 'says'),
  [
    (None, 'no such module', r"^--topology needs libtpu: pip install -e '\.\[tpu\]'$"),
    ('here', 'held by\nlibtpu_lockfile of 3', '^libtpu is in use by another process; wait'),
    (
      'here',
      'no\nsuch shape',
      'no such shape.; give a shape such as v5e:4x8',
    ),
  ],
)
def test_why_a_topology_cannot_be_had(monkeypatch, libtpu, error, says):
  def refuse(**_):
    raise RuntimeError(error)

  monkeypatch.setattr(fit.importlib.util, 'find_spec', lambda name: libtpu)
  monkeypatch.setattr(topologies, 'get_topology_desc', refuse)
  for variable in ('TPU_SKIP_MDS_QUERY', 'TPU_WORKER_HOSTNAMES'):
    monkeypatch.setenv(variable, '')  # which it sets
  with pytest.raises(UserError, match=says):
    fit.find_devices('v5e:3x5')


@pytest.mark.slow
def test_a_topology_that_there_is_not():
  result = run(CONFIG, '--topology=v5e:3x5')
  assert result.returncode == 2
  if importlib.util.find_spec('libtpu') is None:
    assert result.stderr == "error: --topology needs libtpu: pip install -e '.[tpu]'\n"
  else:
    assert "--topology 'v5e:3x5' cannot be compiled for" in result.stderr
    assert 'v5e:4x8' in result.stderr


@pytest.mark.slow
def test_a_topology_that_is_not_there(tmp_path):
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip("needs libtpu: pip install -e '.[tpu]'")
  rows = tmp_path / 'rows.json'
  result = run(CONFIG, '--topology=v5e:2x2', f'--json={rows}')
  assert result.returncode == 0, result.stderr
  (row,) = json.loads(rows.read_text())
  assert (row['chips'], row['hbm_mib']) == (4, 16384)
  assert row['all_reduces'] > 0


def test_what_is_said_of_slices(root):
  """The rows under results/: nothing grows with the slice, and AFI adds no sum over chips."""
  rows = json.loads((root / 'results' / 'tpu_fit.json').read_text())
  runs = {}
  for row in rows:
    assert row['peak_mib'] < row['hbm_mib']
    if row['bn_scope'] == 'global':
      most = 303 if '152' in row['network'] else 99
      assert row['all_reduces'] <= most, (
        'one a convolution, forward and backward, and the gradients'
      )
    else:
      assert row['all_reduces'] <= (4 if '152' in row['network'] else 2), 'the gradients'
    runs.setdefault((row['config'], row['bn_scope']), {})[row['topology']] = row
  readme = (root / 'README.md').read_text()
  for network in ('resnet50', 'afi_resnet50', 'resnet152', 'afi_resnet152'):
    config = f'configs/imagenet_{network}.py'
    assert set(runs[config, 'device']) == {'v5e:2x2'}
    slices = runs[config, 'global']
    assert set(slices) == {'v5e:2x2', 'v5e:4x8', 'v5e:8x8'}
    peaks = [row['peak_mib'] for row in slices.values()]
    assert max(peaks) <= 1.01 * min(peaks)
    row = slices['v5e:4x8']
    sums = f'{row["all_reduces"]}, of {row["all_reduce_mib"]:.0f} MiB'
    cells = f'| {round(row["peak_mib"]):,} MiB | {sums} | {row["hours_at_best"]:.2f} hours |'
    assert cells in readme
    _check_docstring(root / config, {key: list(found.values()) for key, found in runs.items()})


def _check_docstring(path, runs):
  """What a config says of memory and hours on eight chips, of its own recipe and of A3."""
  words = ' '.join(path.read_text().split())
  name = f'configs/{path.name}'
  by_variant = {
    config.partition(':')[2]: found[0]
    for (config, scope), found in runs.items()
    if config.partition(':')[0] == name and scope == 'global'
  }
  for variant, row in by_variant.items():
    gib, hours = row['peak_mib'] / 1024, row['hours_at_best'] * row['chips'] / 8
    says = rf'`:{variant}` {gib:.1f}\).* hours \(`:{variant}` {hours:.1f}\)'
    if variant in ('', 'a3'):
      says = rf'{gib:.1f} (of 16 )?GiB.{{0,40}} at best, {hours:.1f} hours'
    assert re.search(says, words), (variant, says)
