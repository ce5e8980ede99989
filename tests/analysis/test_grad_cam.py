"""Heat maps against gradients that are taken some other way."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from afi_flax.analysis import grad_cam
from afi_flax.analysis.grad_cam import GradCam
from afi_flax.data import sources
from afi_flax.errors import UserError
from afi_flax.models import create_model
from afi_flax.models.densenet import DenseNet
from afi_flax.models.fusion import Fusion, run_stage
from afi_flax.models.layers import Head
from afi_flax.models.resnet import BasicBlock
from tests.analysis import small_runs
from tests.analysis.small_runs import network

IMAGES = sources.open_split('digits', '', 'test[:6]').images


@pytest.fixture(scope='module')
def run():
  return small_runs.make(network(None, Fusion('full', 4), blocks=(1, 2)))


@pytest.fixture(scope='module')
def forward(run):
  """Logits, and the maps after both stages."""
  model, x = run.model, run.preprocessing(IMAGES)

  @jax.jit
  def apply(variables):
    maps = model.clone(features_only=True).apply(variables, x, train=False)
    return model.apply(variables, x, train=False), maps

  logits, maps = apply(run.variables)
  return np.asarray(logits), maps


class Rest(nn.Module):
  """What follows on the first stage of the run's network, written out."""

  @nn.compact
  def __call__(self, x):
    def make_block(k, fusion):
      return BasicBlock(16, 2 if k == 0 else 1, fusion, name=f'stage2_block{k + 1}')

    x = run_stage(make_block, 2, x, 16, Fusion('full', 4), train=False)
    return Head(10, name='head')(x)


def rest_of(run, maps):
  variables = {
    group: {name: x for name, x in tree.items() if name.startswith(('stage2', 'head'))}
    for group, tree in run.variables.items()
  }
  return Rest().apply(variables, maps)


def scaled(heat):
  """relu, then each picture divided by its largest value."""
  heat = np.maximum(heat, 0)
  return heat / np.maximum(heat.max(axis=(1, 2), keepdims=True), 1e-30)


def cam(maps, g):
  return scaled((maps * g.mean(axis=(1, 2), keepdims=True)).sum(axis=-1))


def cam_plus_plus(maps, g):
  """As it stands in the paper: eqs. 19 and 10."""
  below = 2 * g**2 + maps.sum(axis=(1, 2), keepdims=True) * g**3
  a = np.divide(g**2, below, out=np.zeros_like(g), where=below != 0)
  return scaled((maps * (a * np.maximum(g, 0)).sum(axis=(1, 2), keepdims=True)).sum(axis=-1))


def test_last_stage_has_weights_in_closed_form(run, forward):
  """Where only the mean over pixels and a dense layer follow, w_c is the layer's, over h w."""
  logits, maps = forward
  found = GradCam(run)(IMAGES)
  maps = np.asarray(maps[1], np.float64)
  assert found.heat.shape == (6, 8, 8)
  assert found.heat.dtype == np.float32
  assert found.classes.tolist() == logits.argmax(axis=1).tolist()
  np.testing.assert_allclose(found.probabilities, nn.softmax(logits), rtol=1e-4, atol=1e-6)
  kernel = np.asarray(run.variables['params']['head']['dense']['kernel'], np.float64)
  weights = kernel.T[found.classes][:, None, None] / 64
  np.testing.assert_allclose(found.heat, scaled((maps * weights).sum(axis=-1)), atol=1e-5)
  assert found.heat.max(axis=(1, 2)).tolist() == [1] * 6


@pytest.mark.parametrize('plus_plus', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_any_stage_and_class(run, forward, plus_plus):
  classes = np.arange(6, dtype=np.int32)
  _, maps = forward

  def score(a):
    return rest_of(run, a)[np.arange(6), classes].sum()

  g = np.asarray(jax.jit(jax.grad(score))(maps[0]), np.float64)
  found = GradCam(run, stage=1, plus_plus=plus_plus)(IMAGES, classes)
  wanted = (cam_plus_plus if plus_plus else cam)(np.asarray(maps[0], np.float64), g)
  assert found.classes.tolist() == classes.tolist()
  np.testing.assert_allclose(found.heat, wanted, atol=1e-4)
  assert found.heat.shape == (6, 16, 16)
  assert found.heat.std() > 0.05


def test_nothing_positive_is_nothing():
  """Where every weight of the class is negative or 0, no pixel speaks for it."""
  maps = jnp.ones([2, 3, 3, 4])
  for plus_plus in (False, True):
    assert not grad_cam.heat_maps(maps, -maps, plus_plus).any()
    assert not grad_cam.heat_maps(maps, 0 * maps, plus_plus).any()
    assert not grad_cam.heat_maps(0 * maps, maps, plus_plus).any()
  heat = np.array([[[0, 0]], [[2, 1]]], np.float32)
  assert grad_cam._of_the_largest(heat).tolist() == [[[0, 0]], [[1, 0.5]]]


def test_heat_of_small_gradients_is_not_lost(run):
  """Those of a sure network: g^3 underflows float32 where g is 1e-15."""
  maps, g = np.random.default_rng(0).uniform(0, 1, [2, 1, 4, 4, 3])
  found = grad_cam.heat_maps(jnp.asarray(maps), jnp.asarray(1e-15 * g), True)
  np.testing.assert_allclose(scaled(found), cam_plus_plus(maps, 1e-15 * g), rtol=1e-4)


@pytest.mark.slow
def test_remat_changes_nothing(run):
  wanted = GradCam(run, stage=1)(IMAGES)
  again = dataclasses.replace(run, model=run.model.clone(remat='block'))
  np.testing.assert_allclose(GradCam(again, stage=1)(IMAGES).heat, wanted.heat, atol=1e-5)


@pytest.mark.slow
def test_several_devices_give_the_same(run):
  wanted = GradCam(run)(IMAGES)
  found = GradCam(small_runs.make(run.model, devices=8))(IMAGES)
  np.testing.assert_allclose(found.heat, wanted.heat, atol=1e-5)
  np.testing.assert_allclose(found.probabilities, wanted.probabilities, atol=1e-6)


def test_mistakes(run):
  assert grad_cam.stages(run) == 2
  for stage in (0, 3):
    with pytest.raises(UserError, match=rf"stage {stage}: 'afi_resnet20' has stages 1 to 2"):
      GradCam(run, stage=stage)
  look = GradCam(run)
  with pytest.raises(UserError, match='class 10: the network has classes 0 to 9'):
    look(IMAGES, np.array([0, 1, 10, 2, 3, 4]))
  with pytest.raises(ValueError, match=r'images must be u8 .* got float32'):
    look(IMAGES.astype(np.float32))
  with pytest.raises(ValueError, match=r'classes must be \[6\]'):
    look(IMAGES, np.zeros(5, np.int32))


def through(model, stages, variables, images):
  """Logits; and those where the maps after these stages are the network's own, and are zeros."""
  maps = model.clone(features_only=True).apply(variables, images, train=False)
  assert grad_cam.stages(SimpleNamespace(variables=variables)) == len(maps)

  def logits(stage, a):
    return grad_cam._logits(model, variables, images, stage, a)

  return (
    model.apply(variables, images, train=False),
    [logits(i, maps[i - 1]) for i in stages],
    [logits(i, 0 * maps[i - 1]) for i in stages],
  )


def check_through(model, stages):
  """All that the network sees goes through the map that is replaced, and nothing else is."""
  images = np.random.default_rng(1).normal(size=[2, 32, 32, 3]).astype(np.float32)
  look = jax.jit(functools.partial(through, model, stages))
  plain, own, zeros = look(small_runs.random_variables(model), images)
  assert np.abs(plain[0] - plain[1]).max() > 1e-5
  for found, nothing in zip(own, zeros, strict=True):
    np.testing.assert_allclose(found, plain, atol=1e-5 * np.abs(plain).max())
    np.testing.assert_array_equal(nothing[0], nothing[1])


def test_dense_blocks_are_stages_too():
  check_through(DenseNet((1, 2), num_classes=10, growth=4), (1, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'stages'),
  [('afi_mobilenetv2_cifar', (2, 7)), ('afi_shufflenetv2_x0_5_cifar', (1, 3))],
)
def test_every_family(name, stages):
  check_through(create_model(name, num_classes=10), stages)
