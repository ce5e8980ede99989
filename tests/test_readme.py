"""The README's Python runs, and its commands name flags, configs and make targets that exist."""

import importlib
import itertools
import pathlib
import re
import shlex

import jax
import pytest

import afi_flax
from afi_flax.analysis import cost
from afi_flax.config import resolve
from afi_flax.models import create_model

README = pathlib.Path('README.md').read_text()
PYTHON = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
# (config, variant, top-1 with or without top-5, parameters, GFLOPs) of the table of networks.
ROWS = re.findall(
  r'^\| [^|]+ \| `configs/(\w+)\.py:?(\S*)` \| ([\d. /]+) \| ([\d,]+) \| ([\d.]+) \|',
  README,
  re.MULTILINE,
)
SHELL = '\n'.join(re.findall(r'```sh\n(.*?)```', README, re.DOTALL)).replace('\\\n', ' ')


class FakeRun:
  """Stands for `runs/quickstart`, which a test must not train."""

  model = create_model('resnet20', 10)
  class_names = tuple('0123456789')

  def __init__(self, workdir):
    assert workdir == 'runs/quickstart'
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), 'float32')
    init = jax.jit(lambda key: self.model.init(key, jax.numpy.zeros(images.shape), train=False))
    self.variables = init(jax.random.key(0))

  def preprocessing(self, images):
    return images / 255.0


@pytest.mark.parametrize('code', PYTHON, ids=range(len(PYTHON)))
def test_python(code, monkeypatch):
  monkeypatch.setattr(afi_flax, 'load_run', FakeRun, raising=False)
  names = {'__name__': '__main__'}
  exec(compile(code, 'README.md', 'exec'), names)
  if 'MyStage' in names:
    check_a_stage_of_your_own(names['MyStage'], names['x'], names['variables']['params'])


def check_a_stage_of_your_own(stage, x, afi):
  """Only the setting differs: blocks 2 to 4 compute half as much and reuse the other half."""
  plain = jax.eval_shape(stage().init, jax.random.key(0), x)['params']
  for name in ('block1', 'block2', 'block3', 'block4'):
    fused = name != 'block1'
    assert 'fuse' not in plain[name]
    assert ('fuse' in afi[name]) == fused
    assert plain[name]['Conv_0']['kernel'].shape == (3, 3, 64, 64)
    assert afi[name]['Conv_0']['kernel'].shape == (3, 3, 64, 32 if fused else 64)
    assert plain[name]['Conv_1']['kernel'].shape == afi[name]['Conv_1']['kernel'].shape


def test_configs_and_targets_exist():
  assert len(PYTHON) == 4
  commands = [shlex.split(line, comments=True) for line in SHELL.splitlines() if line.strip()]
  assert len(commands) > 6
  makefile = pathlib.Path('Makefile').read_text()
  for command in commands:
    if command[0] == 'make':
      assert f'\n{command[1]}:' in makefile
    for given, value in itertools.pairwise(command):
      if given == '--config':
        assert pathlib.Path(value.partition(':')[0]).exists(), value
  for link in re.findall(r'\]\(([\w/.]+)\)', README):
    assert pathlib.Path(link).exists(), link


def test_the_table_has_all_networks_of_the_paper():
  assert len(ROWS) == len({row[:2] for row in ROWS}) == 6 + 4 + 15 + 7  # Tables 1, 2, 4, 5


@pytest.mark.parametrize(('name', 'arg', 'accuracies', 'parameters', 'gflops'), ROWS)
def test_table_of_networks(name, arg, accuracies, parameters, gflops):
  """Its counts are those of the networks, and each config says the same of itself."""
  config = importlib.import_module(f'configs.{name}')
  for figure in (parameters, *(f'{accuracy}%' for accuracy in accuracies.split(' / '))):
    assert figure in ' '.join(config.__doc__.split())
  plan = resolve(config.get_config(arg))
  whole = cost.total(cost.count(create_model(**vars(plan.model)), plan.data.image_size))
  assert parameters == f'{whole.parameters:,}'
  assert gflops == f'{cost.PAPER_PICTURES * whole.paper_flops / 1e9:.2f}'
