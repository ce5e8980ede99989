import json
import subprocess
import sys

import pytest


def run(*arguments: str) -> subprocess.CompletedProcess:
  command = [sys.executable, '-m', 'afi_flax.cost', *arguments]
  return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_config_costs_what_its_network_does(tmp_path):
  config = 'configs/cifar100_afi_resnet32.py:stages=1'
  result = run('--config', config, f'--json={tmp_path}/rows.json', f'--csv={tmp_path}/rows.csv')
  assert (result.returncode, result.stderr) == (0, '')
  total = json.loads((tmp_path / 'rows.json').read_text())[-1]
  assert total['parameters'] == 468_212
  assert '468,212' in result.stdout
  assert (tmp_path / 'rows.csv').read_text().splitlines()[-1].startswith('total,,,468212,')


def test_a_file_that_cannot_be_written_is_a_mistake_in_one_line():
  result = run('--model=resnet20', '--json=/none/rows.json')
  assert result.returncode == 2
  assert result.stderr == 'error: cannot write /none/rows.json: No such file or directory\n'
  assert result.stdout == '', 'found out before the work'


@pytest.mark.slow
def test_one_thing_at_a_time():
  result = run('--model=resnet20', '--paper')
  assert result.returncode == 2
  assert result.stderr == 'error: give one of --model NAME, --config FILE and --paper\n'
