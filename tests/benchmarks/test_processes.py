import json
import subprocess
import sys

import pytest

from benchmarks import processes


def test_table_shows_losses_side_by_side():
  lines = processes.show({1: [2.0, 1.0], 4: [2.0, 1.01]}).splitlines()
  assert lines[0].split('  ')[-1] == '4 processes'
  assert lines[2].split() == ['2', '1.0000000', '1.0100000']
  assert lines[-1] == '4 against 1: at most 1.0e-02 of the loss apart'


@pytest.mark.slow
def test_command(tmp_path):
  path = tmp_path / 'losses.json'
  command = f'-m benchmarks.processes --counts=1,2 --steps=2 --json={path}'
  subprocess.run([sys.executable, *command.split()], check=True)
  losses = json.loads(path.read_text())['losses']
  assert losses['1'] == pytest.approx(losses['2'], rel=1e-3)
  assert len(losses['1']) == 2
