"""The command, in processes of its own."""

import os
import subprocess
import sys

import jax
import pytest
from safetensors.numpy import save_file

import afi_flax
from afi_flax.interop import names
from tests.interop import fake_weights

SMOKE = 'configs/imagenet_resnet50.py:smoke'


def run(command, *flags):
  cache = jax.config.jax_compilation_cache_dir
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_COMPILATION_CACHE_DIR': cache}
  command = [sys.executable, '-m', f'afi_flax.{command}', *map(str, flags)]
  return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope='module')
def resnet18(tmp_path_factory):
  """A file of torchvision's ResNet-18, of random weights."""
  path = tmp_path_factory.mktemp('weights') / 'resnet18.safetensors'
  network = fake_weights.model('resnet18', 1000)
  save_file(fake_weights.as_torch(fake_weights.arrays(network), names.RESNET), path)
  return path


@pytest.mark.slow
def test_a_report_alone(resnet18):
  done = run('import_weights', '--weights', resnet18, '--model=afi_resnet18', '--num_classes=10')
  assert done.returncode == 0, done.stderr
  title, *rows = done.stdout.splitlines()
  assert title == (
    f'{resnet18} (names of torchvision and timm, float32): resnet18, 1000 classes -> '
    'afi_resnet18, 10 classes'
  )
  assert [row.split()[0] for row in rows] == ['taken', 'first', 'initialised', 'left', 'ignored']
  assert 'bn1.num_batches_tracked and 19 more' in rows[-1]


@pytest.mark.slow
def test_imported_weights_are_evaluated(resnet18, tmp_path):
  folder = tmp_path / 'run'
  config = ('--config', SMOKE, '--config.model.name=resnet18')
  done = run('import_weights', '--weights', resnet18, '--workdir', folder, *config)
  assert done.returncode == 0, done.stderr
  assert f'evaluate it by python -m afi_flax.main --mode=eval --workdir {folder}' in done.stdout
  done = run('main', '--mode=eval', '--workdir', folder)
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith('step 0 ')
  assert done.stdout.endswith(' of 32\n')
  again = run('import_weights', '--weights', resnet18, '--workdir', folder, *config)
  assert (again.returncode, again.stdout) == (2, '')
  assert 'holds a run already' in again.stderr


@pytest.mark.slow
def test_a_network_alone_means_imagenet(resnet18, tmp_path):
  folder = tmp_path / 'run'
  flags = ('--weights', resnet18, '--model=resnet18', '--workdir', folder)
  done = run('import_weights', *flags)
  assert done.returncode == 0, done.stderr
  loaded = afi_flax.load_run(folder)
  assert loaded.class_names[0] == 'n01440764'
  assert (loaded.preprocessing.image_size, loaded.preprocessing.resize) == (224, 256)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('flags', 'says'),
  [
    (('--weights=none.pth',), 'none.pth cannot be read: No such file'),
    (('--weights=W', '--model=resnet18', '--config', SMOKE), 'give one of --model and --config'),
  ],
)
def test_a_mistake_ends_in_one_line(flags, says):
  done = run('import_weights', *flags)
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr.startswith('error: ')
  assert says in done.stderr
  assert len(done.stderr.splitlines()) == 1
