"""The Python of the README and the guides runs; their commands name what exists."""

import importlib
import itertools
import pathlib
import re
import shlex
import types

import jax
import pytest

import afi_flax
from afi_flax.analysis import cost
from afi_flax.config import resolve
from afi_flax.models import create_model

README = pathlib.Path('README.md').read_text()
GUIDES = sorted(pathlib.Path('docs').glob('*.md'))


def blocks(text: str, language: str) -> list[str]:
  return re.findall(rf'```{language}\n(.*?)```', text, re.DOTALL)


# The README's blocks stand each for itself; those of a guide go on with one another.
PYTHON = {
  **{f'README {i}': code for i, code in enumerate(blocks(README, 'python'))},
  **{guide.stem: '\n'.join(blocks(guide.read_text(), 'python')) for guide in GUIDES},
}
# (config, variant, top-1 with or without top-5, parameters, GFLOPs) of the table of networks.
ROWS = re.findall(
  r'^\| [^|]+ \| `configs/(\w+)\.py:?(\S*)` \| ([\d. /]+) \| ([\d,]+) \| ([\d.]+) \|',
  README,
  re.MULTILINE,
)
SHELL = [
  shlex.split(line, comments=True)
  for text in (README, *(guide.read_text() for guide in GUIDES))
  for block in blocks(text, 'sh')
  for line in block.replace('\\\n', ' ').splitlines()
  if line.strip()
]


class FakeRun:
  """Stands for `runs/quickstart`, which a test must not train."""

  model = create_model('resnet20', 10)
  class_names = tuple('0123456789')
  plan = types.SimpleNamespace(model=types.SimpleNamespace(name='resnet20'))

  def __init__(self, workdir):
    assert workdir == 'runs/quickstart'
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), 'float32')
    init = jax.jit(lambda key: self.model.init(key, jax.numpy.zeros(images.shape), train=False))
    self.variables = init(jax.random.key(0))

  def preprocessing(self, images):
    return images / 255.0


@pytest.mark.parametrize('where', PYTHON)
def test_python(where, monkeypatch):
  monkeypatch.setattr(afi_flax, 'load_run', FakeRun, raising=False)
  names = {'__name__': '__main__'}
  exec(compile(PYTHON[where], where, 'exec'), names)
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


def test_what_commands_name_exists():
  assert len(SHELL) > 20
  makefile = pathlib.Path('Makefile').read_text()
  for command in SHELL:
    if command[0] == 'make':
      assert f'\n{command[1]}:' in makefile
    for given, value in itertools.pairwise(command):
      if given == '--config':
        assert pathlib.Path(value.partition(':')[0]).exists(), value
      if given == '-m':
        assert pathlib.Path(value.replace('.', '/') + '.py').exists(), value


@pytest.mark.parametrize('path', [pathlib.Path('README.md'), *GUIDES], ids=str)
def test_links(path):
  for link in re.findall(r'\]\(([\w/.]+)(?:#[\w-]+)?\)', path.read_text()):
    assert (path.parent / link).exists(), link


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
