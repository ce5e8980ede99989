import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import determinism


def test_one_bit_is_a_difference():
  one = {'params': {'w': np.ones(3, 'float32')}}
  other = {'params': {'w': np.nextafter(one['params']['w'], 2)}}
  assert determinism.equal([one, one])
  assert not determinism.equal([one, one, other])


@pytest.mark.slow
@pytest.mark.fault('determinism', 'one command, run anew', 'equal to the bit')
def test_command(tmp_path):
  path = tmp_path / 'rows.json'
  command = f'-m benchmarks.determinism --steps=4 --json={path}'
  subprocess.run([sys.executable, *command.split()], check=True)
  plain, deterministic = json.loads(path.read_text())['rows']
  assert plain['equal bits'] == deterministic['equal bits'] == 'yes'
  assert plain['pictures/s'] > 0
