import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afi_flax.models import create_model, parts
from afi_flax.models.fusion import Fusion
from afi_flax.models.resnet import BasicBlock, ResNet


@pytest.mark.parametrize(
  ('name', 'blocks', 'known'),
  [
    ('afi_resnet20', 9, ['stem', 'stage1', 'stage2', 'stage3', 'head']),
    ('shufflenetv2_x0_5', 16, ['stem', 'stage1', 'stage2', 'stage3', 'last', 'head']),
  ],
)
def test_parts_and_distances(name, blocks, known):
  model = create_model(name, num_classes=2)
  names = parts.module_names(model)
  assert list(dict.fromkeys(map(parts.part, names))) == known
  away = parts.distances(names)
  assert set(away) == set(names)
  assert (away['stem'], away['stage1_block1'], away['head']) == (blocks + 1, blocks, 0)
  assert away.get('last', 1) == 1
  assert sorted(set(away.values())) == list(range(blocks + 2))


def test_a_layer_of_several_modules_is_one_block():
  names = [
    'stem', 'stage1_layer1_bn', 'stage1_layer1_conv1', 'stage1_layer2_bn', 'transition1_bn',
    'transition1_conv', 'stage2_layer1_bn', 'last_bn', 'head',
  ]  # fmt: skip
  assert list(parts.distances(names).values()) == [4, 3, 3, 2, 2, 2, 1, 1, 0]


@pytest.mark.parametrize('remat', ['none', 'fusion', 'block'])
def test_what_evaluates_while_the_rest_trains(remat):
  """Within one network, by name: all evaluate, none does, the first stage does."""
  model = ResNet((1, 2), (8, 8), BasicBlock, 'cifar', 3, (None, Fusion('half', 4)), remat=remat)
  images = np.random.default_rng(0).normal(size=[4, 8, 8, 3]).astype('float32')
  quickly = {'xla_backend_optimization_level': 0}
  init = functools.partial(model.init, train=False)
  variables = jax.jit(init, compiler_options=quickly)(jax.random.key(1), images)
  names = parts.module_names(model)
  assert names == ('stem', 'stage1_block1', 'stage2_block1', 'stage2_block2', 'head')

  @functools.partial(jax.jit, compiler_options=quickly)
  def forward():
    def apply(frozen, train, keep=None):
      with parts.evaluating(frozen):
        return model.apply(variables, images, train=train, keep=keep, mutable='batch_stats')

    dropped = jnp.zeros([4, 3])
    return apply(names, True, dropped), apply((), False), apply(names, 2), apply(names[:2], True)

  frozen, evaluation, in_parts, partly = forward()
  jax.tree.map(np.testing.assert_array_equal, frozen, evaluation)
  jax.tree.map(np.testing.assert_array_equal, in_parts, evaluation)
  jax.tree.map(np.testing.assert_array_equal, frozen[1]['batch_stats'], variables['batch_stats'])
  for name, statistics in partly[1]['batch_stats'].items():
    before = jax.tree.leaves(variables['batch_stats'][name])
    same = [(a == b).all() for a, b in zip(jax.tree.leaves(statistics), before, strict=True)]
    assert all(same) if name in names[:2] else not any(same), name
