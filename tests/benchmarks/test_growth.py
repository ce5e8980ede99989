import subprocess
import sys

import pytest

from benchmarks import growth


def made_up(ms_per_read=0.5, ms_per_fused_block=-2.0):
  """Rows of networks whose times are as the fit has it."""
  found = {}
  for name in growth.BACKBONES:
    stages = growth.blocks(name)
    plain = 20.0 + 10.0 * sum(stages)
    extra = ms_per_read * growth.reads(stages) + ms_per_fused_block * growth.fused(stages)
    found[name, 64] = {'ms': plain, 'mib': 100.0, 'compile_s': 2.0}
    found[f'afi_{name}', 64] = {'ms': plain + extra, 'mib': 110.0, 'compile_s': 5.0}
  return growth.by_depth(found)


def test_reads_and_fused_blocks():
  assert growth.blocks('resnet32') == (5, 5, 5)
  assert growth.reads([5, 5, 5]) == 3 * (1 + 2 + 3 + 4)
  assert growth.fused([5, 1, 3]) == 4 + 0 + 2


def test_fit_finds_what_the_times_were_made_of():
  fit = growth.fit(made_up())
  assert fit.ms_per_read == pytest.approx(0.5)
  assert fit.ms_per_fused_block == pytest.approx(-2.0)
  assert fit.plain_ms_per_block == pytest.approx(10.0)
  assert fit.r_squared == pytest.approx(1.0)
  assert fit.worst_ms < 1e-9


def test_fit_says_how_far_off_it_is():
  rows = made_up()
  rows[-3]['ms'] += 9.0  # afi_resnet56
  fit = growth.fit(rows)
  assert 1.0 < fit.worst_ms < 9.0
  assert fit.r_squared < 0.999


def test_rows_of_depth():
  plain, afi = made_up()[:2]
  assert (plain['reads'], plain['fused_blocks'], plain['ms_to_plain']) == (0, 0, 1.0)
  assert (afi['reads'], afi['fused_blocks'], afi['compile_s_to_plain']) == (9, 6, 2.5)
  assert afi['mib_to_plain'] == 1.1


def test_rows_of_devices_differ_in_nothing_else():
  def row(chips, batch_per_chip=128, config='a.py', **overrides):
    return {
      'config': config,
      'overrides': {'batch_size': chips * batch_per_chip, **overrides},
      'network': 'resnet50',
      'chips': chips,
      'batch_per_chip': batch_per_chip,
      'peak_mib': 100.0 + chips,
      'all_reduce_mib': 50.0,
    }

  rows = [row(32), row(4), row(8, 64), row(8, scope='device'), row(8, config='a.py:b')]
  assert growth.by_devices(rows) == [
    {
      'network': 'resnet50',
      'chips': chips,
      'batch_per_chip': 128,
      'mib_per_chip': 100.0 + chips,
      'all_reduce_mib_per_chip': 50.0,
    }
    for chips in (4, 32)
  ]


def test_table():
  rows = made_up()
  batch = growth.by_batch({('resnet20', 16): {'ms': 8.0, 'mib': 32.0, 'compile_s': 1.0}})
  lines = growth.show(rows, batch, [], growth.fit(rows)).splitlines()
  assert lines[2].split() == (
    ['afi_resnet20', '3', '3', '3', '9', '102.5', '(0.93)', '110', '(1.10)', '5.0', '(2.50)']
  )
  assert lines[12].startswith('AFI adds 0.5000 ms a read of an earlier map and -2.000 ms a block')
  assert lines[-1].split() == ['resnet20', '16', '8.0', '0.500', '32', '2.00']


@pytest.mark.slow
def test_picture(tmp_path):
  rows = made_up()
  batch = growth.by_batch(
    {('resnet20', size): {'ms': 8.0, 'mib': 32.0, 'compile_s': 1.0} for size in (16, 32)}
  )
  chips = growth.by_devices(growth.tables.read_rows(str(growth._TPU)))
  assert {row['network'] for row in chips} >= {'resnet50', 'afi_resnet50'}
  growth.draw(str(tmp_path / 'a.png'), rows, batch, chips, growth.fit(rows))
  assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
def test_too_few_networks():
  command = [sys.executable, '-m', 'benchmarks.growth', '--backbones=resnet20,resnet32']
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert (done.returncode, done.stderr.count('\n')) == (2, 1)
  assert done.stderr.startswith('error: --backbones resnet20,resnet32 must be three or more of')
