"""ShuffleNetV2, plain and with AFI, for 32-pixel pictures and for ImageNet.

Source: Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design".
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from afi_flax.models.fusion import Attention, Features, Fuse, Fusion, run_stage
from afi_flax.models.layers import ConvBN, Dtype, Head, stem_pool

Array = jax.Array

BLOCKS = (4, 8, 4)  # one down unit and 3, 7, 3 basic units


class Unit(nn.Module):
  """A down unit or a basic unit. X_k is the output of the right branch's first 1x1.

  The down unit takes its whole input through both branches, with stride 2; the basic unit passes
  half of its channels on as they are.

  Attributes:
    width: channels of each branch: half of the output's.
    down: a down unit.
    fusion: None: the plain unit.
    attention: makes one, on the right branch's result; None: none.
    dtype: of the computation.
  """

  width: int
  down: bool
  fusion: Fusion | None = None
  attention: Attention | None = None
  dtype: Dtype = 'float32'

  @nn.compact
  def __call__(self, x: Array, features: Features | None, train: bool) -> tuple[Array, Array]:
    """[B,H,W,C] -> output [B,H',W',2 * width] and X_k [B,H,W,c]."""
    width, strides = self.width, 2 if self.down else 1
    own = self.fusion.own_channels(width) if self.fusion else width
    if self.down:
      left, right = x, x
      c = x.shape[-1]
      left = ConvBN(c, 3, 2, c, '', self.dtype, name='left_depthwise')(left, train)
      left = ConvBN(width, 1, dtype=self.dtype, name='left_conv')(left, train)
    else:
      left, right = jnp.split(x, 2, axis=-1)
    made = ConvBN(own, 1, dtype=self.dtype, name='conv1')(right, train)
    y = Fuse(self.fusion, width, name='fuse')(made, features) if self.fusion else made
    y = ConvBN(width, 3, strides, width, '', self.dtype, name='depthwise')(y, train)
    y = ConvBN(width, 1, dtype=self.dtype, name='conv2')(y, train)
    if self.attention:
      y = self.attention(name='attention')(y)
    return shuffle(jnp.concatenate([left, y], axis=-1)), made


def shuffle(x: Array) -> Array:
  """Interleaves the two halves of the channels.

  >>> shuffle(jnp.arange(6).reshape(1, 1, 1, 6)).ravel()
  Array([0, 3, 1, 4, 2, 5], dtype=int32)
  """
  halves = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
  return halves.swapaxes(-1, -2).reshape(x.shape)


class ShuffleNetV2(nn.Module):
  """Stem, three stages, a 1x1 convolution and the classifier.

  Attributes:
    widths: output channels of the stages and of the last convolution.
    cifar: the 32-pixel form: the stem has stride 1 and no max-pool follows.
    num_classes: K.
    fusions: one for each stage; None leaves a stage plain.
    attention: makes one, on every right branch; None: none.
    dtype: of the computation; parameters, statistics, pooling and logits stay float32.
    remat: what is computed again for the gradient, see `fusion.run_stage`.
    features_only: return the stages' maps, without classifier.
  """

  widths: tuple[int, int, int, int]
  cifar: bool
  num_classes: int
  fusions: Sequence[Fusion | None]
  attention: Attention | None = None
  dtype: Dtype = 'float32'
  remat: str = 'none'
  features_only: bool = False

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array | list[Array]:
    """[B,H,W,3], normalised -> logits f32 [B,K], or the last map of every stage."""
    maps, x = [], x.astype(self.dtype)
    x = ConvBN(24, 3, 1 if self.cifar else 2, dtype=self.dtype, name='stem')(x, train)
    if not self.cifar:
      x = stem_pool(x)
    *stages, last = self.widths
    for i, (n, channels, fusion) in enumerate(
      zip(BLOCKS, stages, self.fusions, strict=True), start=1
    ):

      def make_block(k, block_fusion, i=i, width=channels // 2):
        name = f'stage{i}_block{k + 1}'
        return Unit(width, k == 0, block_fusion, self.attention, self.dtype, name=name)

      x = run_stage(make_block, n, x, channels // 2, fusion, train, self.remat)
      maps.append(x)
    if self.features_only:
      return maps
    x = ConvBN(last, 1, dtype=self.dtype, name='last')(x, train)
    return Head(self.num_classes, name='head')(x)
