import csv
import io
import os

import numpy as np
import pytest

from afi_flax.analysis import gallery, page, style
from tests.analysis.examinations import examination, two_runs


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  """Figures are not drawn: what they hold is tested elsewhere."""
  picture = style.png(style.new(1, 1))
  monkeypatch.setattr(style, 'png', lambda fig: picture)


def rows(part, name):
  return list(csv.DictReader(io.StringIO(part.files()[name].decode())))


def test_selectivity_has_a_row_a_channel():
  runs = two_runs()
  part = gallery.selectivity(runs)
  found = rows(part, 'selectivity.csv')
  assert len(found) == 2 * 6 * 16
  assert found[0] == {'run': 'plain', 'block': 'stage1_block2', 'channel': '0', 'selectivity': ''}
  one = next(r for r in found if list(r.values())[:3] == ['afi', 'stage2_block3', '5'])
  assert float(one['selectivity']) == runs['afi'].selectivity['stage2_block3'][5]
  assert [picture.file for picture in part.section.pictures] == [
    'selectivity.png',
    'selectivity_by_depth.png',
    'selectivity_stage1.png',
  ]


def test_reuse_has_a_row_a_source():
  runs = two_runs()
  found = rows(gallery.reuse(runs), 'reuse.csv')
  assert len(found) == 2 * (1 + 2 + 3)
  three = runs['afi'].reuse['stage2_block4']
  for k, row in enumerate(found[-3:]):
    assert (row['run'], row['block'], row['source']) == (
      'afi',
      'stage2_block4',
      f'stage2_block{k + 1}',
    )
    assert (float(row['mean']), float(row['spread'])) == (three.mean[k], three.spread[k])
    assert float(row['entropy']) == three.entropy
  assert found[0]['entropy'] == ''


def test_two_afi_networks_have_a_figure_each():
  part = gallery.reuse({'a': examination(), 'b': examination()})
  assert [p.file for p in part.section.pictures] == ['reuse_baseline.png', 'reuse.png']


def test_what_is_not_there_has_no_part():
  plain = examination(afi=False, selectivity={}, train_top1=None)
  runs = {'plain': plain}
  assert gallery.reuse(runs) is None
  assert gallery.selectivity(runs) is None
  assert gallery.gap(runs) is None
  assert gallery.reuse({'afi': examination(blocks=2)}) is None, 'no block has a choice'


def test_per_class_counts():
  run = examination(classes=3, confusion=np.array([[3, 1, 0], [0, 0, 0], [0, 2, 0]]))
  keys = ('class', 'examples', 'right', 'accuracy', 'predicted', 'precision')
  found = rows(gallery.per_class({'run': run}), 'per_class.csv')
  assert [tuple(row[key] for key in keys) for row in found] == [
    ('class0', '4', '3', '0.75', '3', '1.0'),
    ('class1', '0', '0', '', '3', '0.0'),
    ('class2', '2', '0', '0.0', '0', ''),
  ]


def test_names_that_are_no_text_keep_their_bytes():
  names = (os.fsdecode(b'caf\xe9'), 'thé', 'c')
  part = gallery.per_class({'run': examination(classes=3, class_names=names)})
  assert [line.split(b',')[1] for line in part.files()['per_class.csv'].splitlines()] == [
    b'class', b'caf\xe9', 'thé'.encode(), b'c'
  ]  # fmt: skip
  assert 'caf\\udce9' in page.render('a', 'b', [part.section]).encode().decode()


def test_confusions_are_those_off_the_diagonal():
  run = examination(classes=3, confusion=np.array([[9, 2, 0], [5, 1, 2], [0, 0, 7]]))
  found = rows(gallery.confusion({'run': run}), 'confusion.csv')
  assert found[0] == {
    'run': 'run', 'true': 'class1', 'predicted': 'class0', 'count': '5', 'share': '0.625'
  }  # fmt: skip
  assert len(found) == 3


def test_a_network_without_mistakes():
  perfect = examination(classes=3, confusion=np.diag([4, 4, 4]), mistakes=())
  part = gallery.confusion({'run': perfect})
  assert part.section.tables == ()
  assert rows(part, 'confusion.csv') == []


def test_summary_and_words_for_a_terminal():
  runs = two_runs(top1=0.5, train_top1=0.7531)
  about = {label: {'workdir': f'runs/{label}', 'step': 100} for label in runs}
  part = gallery.summary(runs, about)
  found = rows(part, 'summary.csv')
  assert [row['run'] for row in found] == ['plain', 'afi']
  assert found[1] == {
    'run': 'afi', 'workdir': 'runs/afi', 'step': '100', 'split': 'test', 'examples': '120',
    'top1': '0.5', 'top5': '0.95', 'nll_nats': '1.234', 'ece': '0.0789', 'train_top1': '0.7531',
  }  # fmt: skip
  (table,) = part.section.tables
  shown = {row['']: row['afi'] for row in table.rows}
  assert shown['gap'] == '+25.31 points (+14.4 to +35.7)'
  assert shown['evaluated on'] == 'test, 120 examples'
  assert '+25.31 points' in gallery.in_words(runs)


def test_mistakes_and_pictures_are_named():
  run = examination()
  images = [np.zeros((8, 8, 3), np.uint8)] * len(run.mistakes)
  part = gallery.mistakes('afi', run, images, [f'{k}.png' for k in range(len(images))])
  found = rows(part, 'mistakes.csv')
  first = run.mistakes[0]
  assert found[0] == {
    'run': 'afi', 'example': '0', 'picture': '0.png', 'true': f'class{first.true}',
    'predicted': f'class{first.predicted}', 'probability': '0.9',
  }  # fmt: skip


def test_empty_bins_are_empty_cells():
  found = rows(gallery.reliability({'run': examination()}), 'reliability.csv')
  assert found[0] == {
    'run': 'run', 'from': '0.0', 'to': '0.2', 'predictions': '0', 'confidence': '', 'accuracy': ''
  }  # fmt: skip
  assert float(found[4]['accuracy']) == 0.95
  assert sum(int(row['predictions']) for row in found) == 120
