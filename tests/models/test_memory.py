"""How many features a network keeps while it runs: Section 4.2 of the paper."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from afi_flax.models import create_model
from afi_flax.models.resnet import Bottleneck


def features_of_the_blocks(name):
  """What every block is handed of its stage's earlier features: the shapes of the maps."""
  handed = []

  def record(call, args, kwargs, context):
    if isinstance(context.module, Bottleneck) and context.method_name == '__call__':
      features = args[1]
      handed.append([x.shape for x in features.maps] if features else [])
    return call(*args, **kwargs)

  model = create_model(name)
  with nn.intercept_methods(record):
    jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros([1, 64, 64, 3]), train=False))
  return handed


def test_at_most_six_features_are_kept():
  """Block 6 of stage 3 holds the most: those of the five blocks before it, and its own."""
  handed = features_of_the_blocks('afi_resnet50')
  assert [len(maps) for maps in handed] == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1, 2]
  assert max(len(maps) + 1 for maps in handed) == 6
  assert set(handed[12]) == {(1, 4, 4, 128)}


def test_the_plain_network_keeps_none():
  assert features_of_the_blocks('resnet50') == [[]] * 16
