"""Eight fake CPU devices for every test, and where the real data is."""

import importlib.util
import os
import pathlib

import jax
import pytest

from tests import faults, parity
from tests.faults import pytest_addoption, pytest_collection_modifyitems  # noqa: F401

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault(  # or it leaves a folder in the repository
  'HYPOTHESIS_STORAGE_DIRECTORY', os.path.expanduser('~/.cache/afi_flax/hypothesis')
)
# 'cuda,cpu' for the tests of a GPU; every other test is one of the CPU.
jax.config.update('jax_platforms', os.environ.get('AFI_FLAX_TEST_PLATFORMS', 'cpu'))
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update(
  'jax_compilation_cache_dir', os.path.expanduser('~/.cache/afi_flax/compiled-by-tests')
)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)

ROOT = pathlib.Path(__file__).parent.parent


def pytest_terminal_summary(terminalreporter, config):
  """What tests have measured; here, since a folder's own is not asked where xdist runs them."""
  faults.summarise(terminalreporter, config)
  parity.summarise(terminalreporter)


@pytest.fixture
def root() -> pathlib.Path:
  """The repository."""
  return ROOT


@pytest.fixture
def at_full_size(request) -> bool:
  """Whether a test of faults is to be as long as `make faults` wants it."""
  return request.config.getoption('--faults')


@pytest.fixture
def real_data() -> pathlib.Path:
  """A folder with `tfds/cifar100` and `imagenet-samples/val`; where it is absent the test skips."""
  folder = os.environ.get('AFI_FLAX_DATA', '')
  if not os.path.isdir(folder):
    pytest.skip('needs real pictures: set AFI_FLAX_DATA to their folder')
  return pathlib.Path(folder)


@pytest.fixture(scope='session')
def object_store():
  """A stand-in for Cloud Storage with a bucket 'bucket', in which every gs:// is from now on.

  One for the session: TensorStore asks for the address only once.
  """
  if not importlib.util.find_spec('gcsfs'):
    pytest.skip("needs pip install -e '.[gcs]'")
  from tests.object_store import ObjectStore

  store = ObjectStore('bucket')
  with store.serving() as environment, pytest.MonkeyPatch.context() as patch:
    for name, value in environment.items():
      patch.setenv(name, value)
    yield store
