"""The folder of an export: what is in it, and what it may replace."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open

from afi_flax import load_run
from afi_flax.errors import UserError
from afi_flax.interop import exports, safetensors
from tests.interop import trained

EVALUATED = {'step': 7, 'split': 'test', 'loss': 1.25, 'top1': 0.5, 'top5': 0.9, 'examples': 100}


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('run')
  trained.save(folder, trained.config_of('afi_resnet20', 16), records=[EVALUATED])
  return folder


@pytest.fixture(scope='module')
def weights(workdir):
  """Its weights, exported."""
  return exports.export_run(workdir, 'safetensors')


@pytest.mark.slow
def test_what_is_in_it(workdir, weights):
  assert weights.folder == workdir / 'export' / 'safetensors'
  manifest = json.loads((weights.folder / 'export.json').read_text())
  there = sorted(path.name for path in weights.folder.iterdir())
  assert sorted(manifest['files']) == there
  assert there == ['README.md', 'class_names.json', 'export.json', 'model.safetensors']
  assert manifest['input'] == {
    'name': 'images',
    'shape': ['b', 16, 16, 3],
    'dtype': 'float32',
    'values': '(RGB / 255 - mean) / std',
  }
  assert manifest['output']['shape'] == ['b', 10]
  assert (manifest['image_size'], manifest['resize'], manifest['step']) == (16, 20, 7)
  assert json.loads((weights.folder / 'class_names.json').read_text()) == list('0123456789')
  assert '| test | 100 | 50.00% | 90.00% |' in (weights.folder / 'README.md').read_text()
  assert list(weights.folder.parent.iterdir()) == [weights.folder], 'nothing is left beside it'


@pytest.mark.slow
def test_safetensors_hold_names_and_config(workdir, weights):
  variables = load_run(workdir).variables
  with safe_open(weights.folder / safetensors.NAME, 'numpy') as file:
    names, metadata = set(file.keys()), file.metadata()
    kernel = file.get_tensor('params/stage1_block1/conv1/conv/kernel')
  assert 'batch_stats/stem/bn/mean' in names
  np.testing.assert_array_equal(
    kernel, variables['params']['stage1_block1']['conv1']['conv']['kernel']
  )
  assert set(metadata) == {'format', 'config', 'class_names', 'step'}
  assert (metadata['format'], metadata['step']) == ('afi_flax', '7')
  assert json.loads(metadata['class_names']) == list('0123456789')
  assert json.loads(metadata['config'])['model']['name'] == 'afi_resnet20'


@pytest.mark.slow
def test_the_moving_average_is_what_is_exported(tmp_path):
  config = trained.config_of('afi_resnet20', 16)
  config.ema_decay = 0.9
  trained.save(tmp_path, config)
  folder = exports.export_run(tmp_path, 'safetensors').folder
  average = load_run(tmp_path).variables['params']['head']['dense']['bias']
  with safe_open(folder / safetensors.NAME, 'numpy') as file:
    np.testing.assert_array_equal(file.get_tensor('params/head/dense/bias'), average)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('form', 'preprocessing'), [('stablehlo', True), ('onnx', False), ('safetensors', False)]
)
def test_the_card_loads_it(workdir, form, preprocessing, tmp_path, monkeypatch, capsys):
  chosen = exports.FORMATS[form]
  if chosen.needs:
    pytest.importorskip(chosen.needs, reason=f"needs pip install -e '.[{chosen.extra}]'")
  folder = exports.export_run(workdir, form, '7', preprocessing, tmp_path / 'new').folder
  monkeypatch.chdir(folder)
  names = {}
  exec(trained.python_of_card(folder), names)
  run = load_run(workdir)
  pixels = np.asarray(names['picture'])[None]
  want = run.model.apply(run.variables, run.preprocessing(pixels), train=False)
  np.testing.assert_allclose(names['logits'], want, rtol=0, atol=1e-4)
  assert len(capsys.readouterr().out.splitlines()) == 5


@pytest.mark.slow
def test_by_the_command(workdir, tmp_path):
  command = [sys.executable, '-m', 'afi_flax.export', '--workdir', workdir, '--format=stablehlo']
  done = subprocess.run(
    [*command, '--out', tmp_path / 'new', '--nopreprocessing'],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.startswith(f'step 7 as stablehlo in {tmp_path}/new; its logits differ')
  assert 'converting afi_resnet20 to stablehlo' in done.stderr
  assert json.loads((tmp_path / 'new/export.json').read_text())['input']['dtype'] == 'float32'


class FakeFormat:
  """Writes the step; computes what Flax does, or something else."""

  NAME, ABOUT, PACKAGES = 'model.fake', 'a test', ('jax',)

  def __init__(self, error=0.0):
    self._error = error

  def loading(self, network):
    return 'logits = None\n'

  def write(self, network, folder):
    self._network = network
    (folder / self.NAME).write_text(str(network.run.step))

  def load(self, folder):
    return lambda images: trained.logits(self._network, images) + np.float32(self._error)


@pytest.fixture
def fake(monkeypatch):
  monkeypatch.setitem(exports.FORMATS, 'fake', exports.Format(FakeFormat()))


@pytest.mark.slow
def test_an_export_is_replaced_and_nothing_else(workdir, fake, tmp_path):
  place = tmp_path / 'new'
  exports.export_run(workdir, 'fake', out=place)
  (place / 'model.fake').write_text('old')
  exports.export_run(workdir, 'fake', out=place)
  assert (place / 'model.fake').read_text() == '7'
  (place / 'notes.txt').write_text('mine')
  with pytest.raises(
    UserError, match=r"new holds 'notes.txt', which no export wrote; give another"
  ):
    exports.export_run(workdir, 'fake', out=place)
  assert (place / 'notes.txt').read_text() == 'mine'
  assert [path.name for path in tmp_path.iterdir()] == ['new']


@pytest.mark.slow
def test_what_differs_from_flax_is_not_left_there(workdir, monkeypatch, tmp_path):
  monkeypatch.setitem(exports.FORMATS, 'fake', exports.Format(FakeFormat(error=0.5)))
  with pytest.raises(UserError, match=r'differs from Flax by \S+ of the largest logit, more than'):
    exports.export_run(workdir, 'fake', out=tmp_path / 'new')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('kind', ['file', 'folder', 'manifest'])
def test_what_is_not_ours_is_left_alone(fake, kind, tmp_path):
  place = tmp_path / 'new'
  if kind == 'file':
    place.write_text('mine')
  else:
    place.mkdir()
    (place / ('export.json' if kind == 'manifest' else 'mine.txt')).write_text('[1]')
  says = 'is a file' if kind == 'file' else 'which no export wrote; give another --out'
  with pytest.raises(UserError, match=says):
    exports.export_run(tmp_path / 'run', 'fake', out=place)  # found out before it is opened
  assert place.exists()


def test_mistakes(tmp_path, monkeypatch):
  run = tmp_path / 'run'
  with pytest.raises(UserError, match=r"unknown format 'onx'; did you mean 'onnx'\?"):
    exports.export_run(run, 'onx')
  said = []
  with pytest.raises(UserError, match=r'no run in .*; give the --workdir of one'):
    exports.export_run(run, 'stablehlo', say=said.append)
  assert not said  # the error is one line
  with pytest.raises(UserError, match='exports are written to a disk'):
    exports.export_run(run, 'stablehlo', out='gs://bucket/folder')
  absent = dataclasses.replace(exports.FORMATS['onnx'], needs='none_such')
  monkeypatch.setitem(exports.FORMATS, 'onnx', absent)
  with pytest.raises(UserError, match=r"'onnx' needs none_such; pip install -e '\.\[onnx\]'"):
    exports.export_run(run, 'onnx')
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_mistakes_of_a_run(workdir):
  with pytest.raises(UserError, match=r'no checkpoint of step 8 in .*; there are: 7'):
    exports.export_run(workdir, 'stablehlo', '8')
  with pytest.raises(UserError, match='cannot write /proc/none/new'):
    exports.export_run(workdir, 'stablehlo', out='/proc/none/new')
