"""SavedModels of every family, loaded by TensorFlow where JAX cannot be imported.

Run by `make tensorflow-test`: TensorFlow is no part of the environment of the other tests.
"""

import importlib.util
import re
import subprocess
import sys

import numpy as np
import pytest

from afi_flax.interop import exports, savedmodel
from tests.interop import trained

pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings('ignore'),  # TensorFlow's own
  pytest.mark.skipif(
    not importlib.util.find_spec('tensorflow'), reason="needs pip install -e '.[tensorflow]'"
  ),
]
WITHOUT_JAX = "import sys; sys.modules |= {'jax': None, 'flax': None, 'afi_flax': None}\n"
COMPARE = f"""{WITHOUT_JAX}
import numpy as np
import tensorflow as tf

for folder in sys.argv[1:]:
  network = tf.saved_model.load(folder + '/{savedmodel.NAME}').signatures['serving_default']
  arrays = np.load(folder + '/arrays.npz')
  for number in arrays['numbers']:
    logits = network(images=tf.constant(arrays[f'images{{number}}']))['logits'].numpy()
    print(logits.dtype, logits.shape, np.abs(logits - arrays[f'logits{{number}}']).max())
"""


def run(code, *arguments, **options):
  command = [sys.executable, '-c', code, *map(str, arguments)]
  done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


def numbers(name):
  """Of pictures at a time: for each, XLA compiles the network again."""
  return [1, 5] if name == 'afi_resnet20' else [3]


def test_every_family_without_jax(tmp_path):
  for name in trained.FAMILIES:
    folder = tmp_path / name
    folder.mkdir()
    network = trained.network(name, preprocessing=name != 'afi_resnet20')
    savedmodel.write(network, folder)
    arrays = {'numbers': numbers(name)}
    for number in arrays['numbers']:
      arrays[f'images{number}'] = images = trained.pictures(network, number)
      arrays[f'logits{number}'] = trained.logits(network, images)
    np.savez(folder / 'arrays.npz', **arrays)
  lines = run(COMPARE, *(tmp_path / name for name in trained.FAMILIES)).splitlines()
  want = [number for name in trained.FAMILIES for number in numbers(name)]
  for line, number in zip(lines, want, strict=True):
    kind, shape, difference = re.fullmatch(r'(\w+) (\(.*\)) (\S+)', line).groups()
    assert (kind, shape) == ('float32', f'({number}, 10)')
    assert float(difference) <= 1e-4, lines


def test_the_card_loads_it(tmp_path):
  trained.save(tmp_path, trained.config_of('afi_resnet20', 16))
  export = exports.export_run(tmp_path, 'savedmodel')
  code = trained.python_of_card(export.folder)
  assert len(run(WITHOUT_JAX + code, cwd=export.folder).splitlines()) == 5
