"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pathlib

import pytest

WITH_EXAMPLES = [
  '.'.join(path.with_suffix('').parts).removesuffix('.__init__')
  for path in sorted(pathlib.Path('afi_flax').rglob('*.py'))
  if '>>> ' in path.read_text()
]


@pytest.mark.parametrize('module', WITH_EXAMPLES)
def test_examples(module):
  result = doctest.testmod(importlib.import_module(module))
  assert result.attempted > 0
  assert result.failed == 0


def test_the_public_functions_have_examples():
  for module in ('models.fusion', 'models', 'losses', 'metrics'):
    assert f'afi_flax.{module}' in WITH_EXAMPLES
