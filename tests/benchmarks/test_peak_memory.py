import json
import subprocess
import sys

import pytest

from afi_flax.errors import UserError
from benchmarks import peak_memory


def test_table_compares_with_the_first_network():
  mib = 2**20
  peaks = {
    ('resnet50', 'none'): 1000 * mib,
    ('resnet50', 'fusion'): 500 * mib,
    ('resnet50', 'inference'): 100 * mib,
    ('afi_resnet50', 'fusion'): 450 * mib,
    ('afi_resnet50', 'inference'): 90 * mib,
  }
  rows = [line.split() for line in peak_memory.show(peaks, 'resnet50').splitlines()[1:]]
  assert rows[1] == ['resnet50', 'training', 'fusion', '500', '1.000', '0.500']
  assert rows[3] == ['afi_resnet50', 'training', 'fusion', '450', '0.900', '0.450']
  assert rows[4] == ['afi_resnet50', 'inference', '90', '0.900']


def test_what_has_remat():
  assert peak_memory.supports('afi_resnet50', 'fusion')
  assert peak_memory.supports('densenet121', 'none')
  assert not peak_memory.supports('densenet121', 'fusion')
  with pytest.raises(UserError, match='unknown model'):
    peak_memory.supports('resnet51', 'fusion')


@pytest.mark.slow
def test_command(tmp_path):
  """On small networks and pictures: AFI needs as much, remat half of it, inference least."""
  path = tmp_path / 'memory.json'
  command = f'-m benchmarks.peak_memory --networks=resnet20,afi_resnet20 --json={path}'
  options = '--image_size=32 --batch_size=32 --remats=none,block'
  subprocess.run([sys.executable, *command.split(), *options.split()], check=True)
  figures = json.loads(path.read_text())['peak_mib']
  mib = {(f['network'], f['task_or_remat']): f['mib'] for f in figures}
  assert len(mib) == 6
  assert mib['afi_resnet20', 'none'] == pytest.approx(mib['resnet20', 'none'], rel=0.05)
  for name in ('resnet20', 'afi_resnet20'):
    assert mib[name, 'none'] > 1.9 * mib[name, 'block'] > 1.9 * mib[name, 'inference']


@pytest.mark.slow
@pytest.mark.parametrize(
  ('options', 'says'),
  [
    ('--networks=resnet51', "unknown model 'resnet51'"),
    ('--remats=all', "--remats 'all' must be some of none, fusion, block"),
    ('--topology=v0:1x1', '--topology '),
  ],
)
def test_a_mistake_is_one_line_and_exits_2(options, says):
  command = [sys.executable, '-m', 'benchmarks.peak_memory', options]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 2
  assert done.stderr.startswith(f'error: {says}')
  assert done.stderr.count('\n') == 1
