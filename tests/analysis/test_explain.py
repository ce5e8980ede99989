import dataclasses
import json
import os
import pathlib
import types

import pytest

from afi_flax.analysis import explain
from afi_flax.errors import UserError
from afi_flax.report import Console


def run(name='resnet20', classes=('a', 'b'), stages=None, dataset='digits'):
  """What is asked of a run before the work."""
  plan = types.SimpleNamespace(
    model=types.SimpleNamespace(name=name, stages=stages),
    data=types.SimpleNamespace(eval_dataset=dataset),
  )
  return types.SimpleNamespace(plan=plan, class_names=classes)


@pytest.mark.parametrize(
  ('runs', 'labels'),
  [
    ([run('resnet20'), run('afi_resnet20')], ['resnet20', 'afi_resnet20']),
    ([run(), run()], ['resnet20 (x/a)', 'resnet20 (b)']),
    ([run('afi_x'), run('afi_x', stages=(1, 3))], ['afi_x', 'afi_x, AFI in stage 1+3']),
    ([run()], ['resnet20']),
  ],
)
def test_runs_are_told_apart(runs, labels):
  assert explain._labels(runs, ['x/a', 'b/'][: len(runs)]) == labels


def test_a_run_beside_itself():
  assert explain._labels([run(), run()], ['a', 'a']) == ['resnet20 (a), baseline', 'resnet20 (a)']


def test_runs_must_go_together():
  explain._check_alike(run(), run('afi_resnet20'))
  with pytest.raises(UserError, match="class 1 is 'c' there and 'b' here"):
    explain._check_alike(run(classes=('a', 'c')), run())
  with pytest.raises(UserError, match='3 there and 2 here'):
    explain._check_alike(run(classes=('a', 'b', 'c')), run())
  with pytest.raises(UserError, match="'cifar10' and --workdir on 'digits'"):
    explain._check_alike(run(dataset='cifar10'), run())


def test_where_it_is_written():
  request = explain.Request('runs/a')
  assert str(explain._folder(request)) == 'runs/a/explain'
  assert str(explain._folder(dataclasses.replace(request, out='b'))) == 'b'
  bucket = dataclasses.replace(request, workdir='gs://x/a')
  assert str(explain._folder(dataclasses.replace(bucket, out='b'))) == 'b'
  with pytest.raises(UserError, match='in a bucket; add --out'):
    explain._folder(bucket)
  with pytest.raises(UserError, match='--out gs://x/b must be a folder on this machine'):
    explain._folder(dataclasses.replace(request, out='gs://x/b'))


def test_what_an_earlier_page_left_is_replaced(tmp_path):
  request = explain.Request('runs/a', out=str(tmp_path))
  explain._write(tmp_path, {'gap.png': b'old', 'reuse.png': b'old', 'index.html': b'old'})
  assert explain._folder(request) == tmp_path
  explain._write(tmp_path, {'gap.png': b'new', 'index.html': b'new'})
  found = {path.name: path.read_text() for path in tmp_path.iterdir()}
  assert json.loads(found.pop(explain.MANIFEST)) == {
    'files': ['explain.json', 'gap.png', 'index.html']
  }
  assert found == {'gap.png': 'new', 'index.html': 'new'}


def test_what_no_page_has_is_left_alone(tmp_path):
  request = explain.Request('runs/a', out=str(tmp_path))
  explain._write(tmp_path, {'index.html': b'ours'})
  (tmp_path / 'gap.png').write_text('mine')
  with pytest.raises(UserError, match=r"holds 'gap.png', which no explain wrote; .*--out, or move"):
    explain.explain(request, Console(False))  # found out before the run is opened
  (tmp_path / explain.MANIFEST).unlink()
  (tmp_path / 'gap.png').unlink()
  with pytest.raises(UserError, match=r"holds 'index.html', which no explain wrote"):
    explain._folder(request)
  with pytest.raises(UserError, match=r'index.html is a file; give another --out'):
    explain._folder(dataclasses.replace(request, out=str(tmp_path / 'index.html')))


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'cannot write to .*/file/x: .*--out'):
    explain._make(tmp_path / 'file' / 'x')


def test_names_that_are_no_text_are_shown():
  name = os.fsdecode(b'caf\xe9')
  assert explain._labels([run(), run()], [name, 'a'])[0] == 'resnet20 (caf\\udce9)'
  assert 'caf\\udce9/index.html' in explain.Written(pathlib.Path(name), (), '').summary()
