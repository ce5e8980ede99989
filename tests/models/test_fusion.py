from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from afi_flax.errors import UserError
from afi_flax.models import fusion
from afi_flax.models.attention import GE
from afi_flax.models.fusion import AFI, Fusion


def reference(maps, w1, w2):
  """Equations 1 and 2 as they are written, in float64 numpy, one example and channel at a time."""
  maps = [np.asarray(x, np.float64) for x in maps]
  batch, height, width, channels = maps[0].shape
  weights = np.zeros([batch, len(maps), channels])
  result = np.zeros([batch, height, width, channels])
  for b in range(batch):
    scores = []
    for x in maps:
      z = x[b].sum(axis=(0, 1)) / (height * width)
      scores.append(np.maximum(z @ w1, 0) @ w2)
    for c in range(channels):
      e = np.array([np.exp(s[c]) for s in scores])
      weights[b, :, c] = e / e.sum()
      for i, x in enumerate(maps):
        result[b, :, :, c] += weights[b, i, c] * x[b, :, :, c]
  return result, weights


def make(num_maps, channels, reduction, dtype='float32', shape=(2, 5, 4)):
  keys = jax.random.split(jax.random.key(1), num_maps)
  maps = [2 * jax.random.normal(k, (*shape, channels)).astype(dtype) + 1 for k in keys]
  module = AFI(reduction)
  variables = module.init(jax.random.key(5), maps)
  # Larger scores than the initial ones, so that the weights are far from uniform.
  variables = jax.tree.map(lambda w: 3 * w, variables)
  return module, variables, maps


@pytest.mark.parametrize(('num_maps', 'channels', 'reduction'), [(1, 8, 4), (4, 8, 4), (5, 6, 16)])
def test_matches_the_equations(num_maps, channels, reduction):
  module, variables, maps = make(num_maps, channels, reduction)
  params = jax.tree.map(lambda w: np.asarray(w, np.float64), variables['params'])
  want, want_weights = reference(maps, params['reduce']['kernel'], params['expand']['kernel'])
  got, sown = module.apply(variables, maps, mutable='intermediates')
  weights = sown['intermediates']['weights'][0]
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(weights, want_weights, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
  assert params['reduce']['kernel'].shape == (channels, max(1, channels // reduction))
  if num_maps > 1:
    assert float(jnp.std(weights)) > 0.05, 'weights near uniform would hide a wrong axis'


def test_stays_within_its_sources():
  module, variables, maps = make(4, 8, 4)
  result = module.apply(variables, maps)
  assert (result <= jnp.max(jnp.stack(maps), axis=0) + 1e-5).all()
  assert (result >= jnp.min(jnp.stack(maps), axis=0) - 1e-5).all()


def test_bfloat16_maps_are_weighted_in_float32():
  module, variables, maps = make(6, 8, 4, 'bfloat16')
  result, sown = module.apply(variables, maps, mutable='intermediates')
  assert result.dtype == jnp.bfloat16
  assert sown['intermediates']['weights'][0].dtype == jnp.float32
  exact = module.apply(variables, [x.astype('float32') for x in maps])
  # The weights and the sum are exact; only the result is rounded, once.
  np.testing.assert_array_equal(result, exact.astype('bfloat16'))


def test_pooled_features_are_not_pooled_again():
  module, variables, maps = make(3, 8, 4)
  newest_first = tuple(maps[::-1])
  pooled = jnp.stack([x.mean(axis=(1, 2)) for x in newest_first], axis=1)
  features = fusion.Features(newest_first, pooled)
  np.testing.assert_allclose(
    module.apply(variables, features), module.apply(variables, maps), rtol=1e-5
  )
  moved = features._replace(pooled=pooled + jnp.arange(3.0)[None, :, None])
  assert not np.allclose(module.apply(variables, moved), module.apply(variables, maps))


def test_rows_that_are_not_filled_count_for_nothing():
  module, variables, maps = make(3, 8, 4)
  newest_first = tuple(maps[::-1])
  pooled = jnp.stack([x.mean(axis=(1, 2)) for x in newest_first], axis=1)
  more = jnp.concatenate([pooled, jnp.full([2, 4, 8], 100.0)], axis=1)
  want, sown = module.apply(variables, maps, mutable='intermediates')
  got, also_sown = module.apply(
    variables, fusion.Features(newest_first, more), mutable='intermediates'
  )
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for weights, wanted in zip(jax.tree.leaves(also_sown), jax.tree.leaves(sown), strict=True):
    np.testing.assert_allclose(weights, wanted, rtol=1e-5)


def test_refuses_nothing_and_maps_of_several_shapes():
  with pytest.raises(ValueError, match='at least one'):
    AFI().init(jax.random.key(0), [])
  with pytest.raises(ValueError, match='one shape'):
    AFI().init(jax.random.key(0), [jnp.ones([1, 4, 4, 8]), jnp.ones([1, 4, 4, 4])])


def test_fit():
  x = jnp.arange(2 * 5 * 5 * 4, dtype='float32').reshape(2, 5, 5, 4)
  np.testing.assert_array_equal(fusion.fit(x, (5, 5), 2), x[..., :2])
  pooled = fusion.fit(x, (3, 3), 4)
  np.testing.assert_allclose(pooled[:, 0, 0], x[:, :2, :2].mean(axis=(1, 2)))
  # The last row and column have no neighbour, and the padding is no part of the mean.
  np.testing.assert_allclose(pooled[:, 2, 2], x[:, 4, 4])
  np.testing.assert_allclose(pooled[:, 2, 0], x[:, 4, :2].mean(axis=1))
  padded = fusion.fit(x, (5, 5), 6)
  np.testing.assert_array_equal(padded[..., :4], x)
  assert not padded[..., 4:].any()


@pytest.mark.parametrize(('width', 'groups'), [('half', 1), ('half', 2), ('full', 1), ('full', 2)])
def test_fuse_gives_every_group_its_part_of_both(width, groups):
  """One earlier feature: R is that feature, so the order of the channels can be read off."""
  x = jnp.broadcast_to(jnp.arange(4.0), [1, 3, 3, 4])  # X_k: 0 1 2 3
  earlier = [x + 10]  # R: 10 11 12 13
  fuse = fusion.Fuse(Fusion(width), groups)
  y, _ = fuse.init_with_output(jax.random.key(0), x, earlier)
  interleaved = width == 'full' and groups == 2
  want = [0, 1, 10, 11, 2, 3, 12, 13] if interleaved else [0, 1, 2, 3, 10, 11, 12, 13]
  np.testing.assert_allclose(y[0, 1, 1], want)


def test_fuse_applies_its_attention_to_the_result_only():
  x = jnp.ones([1, 3, 3, 4])
  y, _ = fusion.Fuse(Fusion('half', attention=GE)).init_with_output(jax.random.key(0), x, [2 * x])
  np.testing.assert_allclose(y[0, 0, 0], [1] * 4 + [2 / (1 + np.exp(-2))] * 4, rtol=1e-6)


class Probe(nn.Module):
  """A stage whose blocks tell what they are given; block 1 strides after its X_1.

  Attributes:
    tell: called with (setting, shapes of the features), block after block.
    num_blocks: n.
    setting: of the stage.
  """

  tell: Callable
  num_blocks: int
  setting: Fusion | None

  @nn.compact
  def __call__(self, x):
    def make_block(k, setting):
      def block(x, features, train):
        self.tell((setting, [m.shape for m in features.maps] if features else []))
        made = jnp.ones([*x.shape[:3], setting.own_channels(8) if setting else 8])
        return (x[:, ::2, ::2] if k == 0 else x), made

      return block

    return fusion.run_stage(make_block, self.num_blocks, x, 8, self.setting, train=False)


@pytest.mark.parametrize(('setting', 'channels'), [('half', 4), ('full', 8)])
def test_stage_hands_every_block_all_earlier_features(setting, channels):
  seen = []
  setting = Fusion(setting)
  y = Probe(seen.append, 4, setting).apply({}, jnp.zeros([1, 8, 8, 16]))
  assert y.shape == (1, 4, 4, 16)
  assert seen[0] == (None, [])
  for k in (1, 2, 3):
    assert seen[k] == (setting, [(1, 4, 4, channels)] * k)


def test_plain_stage_carries_nothing():
  seen = []
  Probe(seen.append, 3, None).apply({}, jnp.zeros([1, 8, 8, 16]))
  assert seen == [(None, [])] * 3


def test_works_in_an_nnx_network():
  module, variables, maps = make(3, 8, 4)
  bridged = nnx.bridge.lazy_init(nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)), maps)
  bridged.reduce['kernel'][...] = variables['params']['reduce']['kernel']
  bridged.expand['kernel'][...] = variables['params']['expand']['kernel']
  np.testing.assert_allclose(bridged(maps), module.apply(variables, maps), rtol=1e-6)


@pytest.mark.parametrize(
  ('arguments', 'says'),
  [
    ({'width': 'Half'}, "Fusion.width 'Half' must be 'half'"),
    ({'reduction': 0}, 'Fusion.reduction 0 must be 1 or more'),
    ({'attention': 'se'}, "Fusion.attention 'se' must be a class"),
  ],
)
def test_a_fusion_without_meaning_is_refused(arguments, says):
  with pytest.raises(UserError, match=says):
    Fusion(**arguments)
