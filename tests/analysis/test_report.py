import csv
import json

import pytest

from afi_flax.analysis import report, tables
from afi_flax.errors import UserError


def test_zoo_has_a_row_a_network():
  rows, shown = report.zoo('*resnet20')
  assert [r['network'] for r in rows] == [
    'afi_resnet20',
    'afi_se_resnet20',
    'cbam_resnet20',
    'eca_resnet20',
    'ge_resnet20',
    'resnet20',
    'se_resnet20',
  ]
  assert rows[5]['parameters'] == 278_324
  assert {r['classes'] for r in rows} == {100}
  assert shown.splitlines()[6].split() == [
    'resnet20',
    '32',
    '100',
    '278,324',
    '40.82',
    '1.32',
    '0.77',
  ]


def test_one_network_is_shown_by_stage():
  rows, shown = report.zoo('resnet20', size=16, num_classes=10)
  assert [r['stage'] for r in rows] == ['stem', 'stage1', 'stage2', 'stage3', 'head', 'total']
  assert sum(r['macs'] for r in rows[:-1]) == rows[-1]['macs']
  assert 'resnet20, 16 x 16 pixels' in shown
  assert '3 x [3x3 32, 3x3 32]' in shown


@pytest.mark.parametrize('pattern', ['densenet121', '*net1[12][01]'])
def test_pictures_that_are_too_small(pattern):
  with pytest.raises(UserError, match=r"image_size 16 leaves nothing .* 'densenet121'; use 32"):
    report.zoo(pattern, size=16)


def test_unknown_networks():
  with pytest.raises(UserError, match='no model matches'):
    report.zoo('vit*')
  with pytest.raises(UserError, match="did you mean 'resnet20'"):
    report.zoo('resnet200')


def test_paper_marks_where_we_disagree():
  rows, shown = report.paper_tables(with_memory=False)
  lines = {line.split()[0]: line.split() for line in shown.splitlines() if line}
  assert lines['resnet32'] == ['resnet32', '71.16', '472,756', '472.76K', '=', '2.23', '2.23', '=']
  assert lines['afi_resnet110'][2:6] == ['1,334,820', '1.35M', '-1.12%', '6.23']
  assert lines['afi_resnet50_b'][-2:] == ['[4]', '[1]']
  assert lines['afi_mobilenetv2_cifar_eca'][3] == '-'
  for row in rows:
    differs = False in (row['parameters_agree'], row['gflops_agree'])
    assert ('[' in ''.join(lines[row['network']])) == differs, row['network']
  assert len(rows) == 26
  for number in (4, 5, 2):
    assert f'Table {number}:' in shown


def test_memory_has_a_reason_where_the_ratio_differs():
  row = {'network': 'n', 'task': 'testing', 'mib': 9, 'mib_paper': 9, 'ratio_paper': 0.698}
  assert report._memory_beside(row | {'ratio': 0.698}, 5)['why'] == ''
  assert report._memory_beside(row | {'ratio': 0.699}, 5)['why'] == '[5]'


def test_whether_a_file_can_be_written_is_found_out_without_writing(tmp_path):
  tables.check_writable(tmp_path / 'new')
  assert not list(tmp_path.iterdir())
  (tmp_path / 'old').write_text('kept')
  tables.check_writable(tmp_path / 'old')
  assert (tmp_path / 'old').read_text() == 'kept'
  with pytest.raises(UserError, match=r'cannot write .*/old/file: Not a directory'):
    tables.check_writable(tmp_path / 'old' / 'file')


def test_rows_as_files(tmp_path):
  rows = [{'name': 'a, b', 'n': 1}, {'name': 'c', 'm': None}]
  tables.write_json(rows, tmp_path / 'x.json')
  assert json.loads((tmp_path / 'x.json').read_text()) == rows
  tables.write_csv(rows, tmp_path / 'x.csv')
  with open(tmp_path / 'x.csv') as file:
    assert list(csv.DictReader(file)) == [
      {'name': 'a, b', 'n': '1', 'm': ''},
      {'name': 'c', 'n': '', 'm': ''},
    ]
