"""Eight fake CPU devices for every test, and where the real data is."""

import os
import pathlib

import jax
import pytest

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update(
  'jax_compilation_cache_dir', os.path.expanduser('~/.cache/afi_flax/compiled-by-tests')
)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def root() -> pathlib.Path:
  """The repository."""
  return ROOT


@pytest.fixture
def real_data() -> pathlib.Path:
  """A folder with `tfds/cifar100` and `imagenet-samples/val`; where it is absent the test skips."""
  folder = pathlib.Path(os.environ.get('AFI_FLAX_DATA', ROOT.parent / 'shared' / 'data'))
  if not folder.is_dir():
    pytest.skip(f'needs the real pictures of {folder}; set AFI_FLAX_DATA')
  return folder
