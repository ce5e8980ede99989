import importlib
import pathlib

import pytest

BENCHMARKS = sorted(
  path.stem for path in pathlib.Path('benchmarks').glob('*.py') if 'def main(' in path.read_text()
)


@pytest.mark.parametrize('name', BENCHMARKS)
def test_only_benchmarks_that_draw_have_the_flag(name):
  module = importlib.import_module(f'benchmarks.{name}')
  assert hasattr(module, 'draw') == hasattr(module, 'plots')
