"""What every format gives, reloaded, against Flax; the SavedModel: test_savedmodel."""

import contextlib
import dataclasses
import functools

import numpy as np
import pytest

from afi_flax.interop import exports
from afi_flax.models.layers import plain_forms
from tests.interop import trained


@functools.cache
def expected(name):
  """The network, three pictures and their logits."""
  network = trained.network(name)
  images = trained.pictures(network, 3)
  want = trained.logits(network, images)
  assert 1 < want.std() < 10, 'it says something, as loudly as a trained one'
  return network, images, want


def reload(form, network, folder):
  chosen = exports.FORMATS[form]
  if chosen.needs:
    pytest.importorskip(chosen.needs, reason=f"needs pip install -e '.[{chosen.extra}]'")
  chosen.module.write(network, folder)
  return chosen.module.load(folder)


@pytest.mark.slow
@pytest.mark.parametrize('name', trained.FAMILIES)
@pytest.mark.parametrize('form', ['stablehlo', 'onnx', 'safetensors'])
def test_every_family(form, name, tmp_path):
  network, images, want = expected(name)
  if form == 'safetensors':
    network = dataclasses.replace(network, preprocessing=False)
    images = np.asarray(network.run.preprocessing(images))
  exported = reload(form, network, tmp_path)
  # Of the network itself that is enough, and compiles in a tenth of the time.
  with plain_forms() if form == 'safetensors' else contextlib.nullcontext():
    found = exported(images)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, want, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('form', ['stablehlo', 'onnx'])
def test_any_number_of_pictures_normalised_before(form, tmp_path):
  network, images, want = expected('afi_resnet20')
  network = dataclasses.replace(network, preprocessing=False)
  exported = reload(form, network, tmp_path)
  images = np.asarray(network.run.preprocessing(images))
  for chosen in ([0], [2, 1, 0, 0, 1]):
    np.testing.assert_allclose(exported(images[chosen]), want[chosen], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_what_computes_in_bfloat16(tmp_path):
  """ONNX: in float32. StableHLO: as the run does."""
  network = trained.network('afi_resnet20', **{'model.dtype': 'bfloat16'})
  images = trained.pictures(network, 2)
  exact = dataclasses.replace(network, dtype=exports.FORMATS['onnx'].dtype)
  want = trained.logits(exact, images)
  np.testing.assert_allclose(reload('onnx', exact, tmp_path)(images), want, rtol=0, atol=1e-4)
  found = reload('stablehlo', network, tmp_path)(images)
  assert 1e-3 < np.abs(found - want).max() < 0.5
