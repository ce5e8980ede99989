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
    'resnet20',
    'se_resnet20',
  ]
  assert rows[2]['parameters'] == 278_324
  assert {r['classes'] for r in rows} == {100}
  assert shown.splitlines()[3].split() == [
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
  assert len(rows) == 26
  for number in (4, 5, 2):
    assert f'Table {number}:' in shown


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
