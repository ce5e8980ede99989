"""DenseNet-121 (Huang et al., "Densely Connected Convolutional Networks"), to compare memory with.

Every layer takes the concatenation of all earlier ones in its block: what AFI replaces by a sum.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from afi_flax.models.layers import BNReLU, ConvBN, Dtype, Head, conv, stem_pool

Array = jax.Array


class DenseNet(nn.Module):
  """Stem, dense blocks with transitions that halve channels and resolution, classifier.

  Attributes:
    blocks: layers in each dense block.
    num_classes: K.
    dtype: of the computation; parameters, statistics, pooling and logits stay float32.
    growth: channels that a layer adds.
    features_only: return the last map of every dense block, without classifier.
  """

  blocks: Sequence[int]
  num_classes: int
  dtype: Dtype = 'float32'
  growth: int = 32
  features_only: bool = False

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array | list[Array]:
    """[B,H,W,3], normalised -> logits f32 [B,K], or the last map of every dense block."""
    maps = []
    x = ConvBN(2 * self.growth, 7, 2, dtype=self.dtype, name='stem')(x.astype(self.dtype), train)
    x = stem_pool(x)
    for i, num_layers in enumerate(self.blocks, start=1):
      if i > 1:
        x = BNReLU(self.dtype, name=f'transition{i - 1}_bn')(x, train)
        x = conv(x.shape[-1] // 2, 1, dtype=self.dtype, name=f'transition{i - 1}_conv')(x)
        x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
      for k in range(1, num_layers + 1):
        name = f'stage{i}_layer{k}'
        y = BNReLU(self.dtype, name=f'{name}_bn')(x, train)
        y = ConvBN(4 * self.growth, 1, dtype=self.dtype, name=f'{name}_conv1')(y, train)
        y = conv(self.growth, 3, dtype=self.dtype, name=f'{name}_conv2')(y)
        x = jnp.concatenate([x, y], axis=-1)
      maps.append(x)
    if self.features_only:
      return maps
    x = BNReLU(self.dtype, name='last_bn')(x, train)
    return Head(self.num_classes, name='head')(x)
