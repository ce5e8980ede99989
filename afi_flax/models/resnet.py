"""ResNets for 32-pixel pictures and for ImageNet, plain and with Attentive Feature Integration.

Sources: He et al., "Deep Residual Learning for Image Recognition" (the CIFAR form of section 4.2,
with 1x1 convolution + BN shortcuts), and torchvision's v1.5 bottleneck, which strides in its 3x3.
"""

from collections.abc import Sequence

import jax
from flax import linen as nn

from afi_flax.models.fusion import Feature, Fuse, Fusion, run_stage
from afi_flax.models.layers import ConvBN, Dtype, Head

Array = jax.Array


class BasicBlock(nn.Module):
  """3x3, 3x3 and the shortcut. X_k is the first 3x3's output.

  Attributes:
    width: channels of both convolutions in the plain network, and of the output.
    strides: of the first convolution.
    fusion: None: the plain block.
    dtype: of the computation.
  """

  width: int
  strides: int = 1
  fusion: Fusion | None = None
  dtype: Dtype = 'float32'

  @nn.compact
  def __call__(self, x: Array, features: Sequence[Feature], train: bool) -> tuple[Array, Array]:
    """[B,H,W,C] -> output [B,H',W',width] and X_k [B,H',W',c]."""
    own = self.fusion.own_channels(self.width) if self.fusion else self.width
    made = ConvBN(own, 3, self.strides, dtype=self.dtype, name='conv1')(x, train)
    y = Fuse(self.fusion, name='fuse')(made, features) if self.fusion else made
    y = ConvBN(self.width, 3, relu=False, dtype=self.dtype, name='conv2')(y, train)
    return nn.relu(y + _shortcut(x, self.width, self.strides, self.dtype, train)), made


class Bottleneck(nn.Module):
  """1x1, 3x3, 1x1 and the shortcut. X_k is the first 1x1's output, at the input's resolution.

  Attributes:
    width: channels of the 3x3 in the plain network; the output has four times as many.
    strides: of the 3x3.
    fusion: None: the plain block.
    dtype: of the computation.
  """

  width: int
  strides: int = 1
  fusion: Fusion | None = None
  dtype: Dtype = 'float32'

  @nn.compact
  def __call__(self, x: Array, features: Sequence[Feature], train: bool) -> tuple[Array, Array]:
    """[B,H,W,C] -> output [B,H',W',4 * width] and X_k [B,H,W,c]."""
    own = self.fusion.own_channels(self.width) if self.fusion else self.width
    made = ConvBN(own, 1, dtype=self.dtype, name='conv1')(x, train)
    y = Fuse(self.fusion, name='fuse')(made, features) if self.fusion else made
    y = ConvBN(self.width, 3, self.strides, dtype=self.dtype, name='conv2')(y, train)
    y = ConvBN(4 * self.width, 1, relu=False, dtype=self.dtype, name='conv3')(y, train)
    return nn.relu(y + _shortcut(x, 4 * self.width, self.strides, self.dtype, train)), made


def _shortcut(x: Array, channels: int, strides: int, dtype: Dtype, train: bool) -> Array:
  """The identity, or 1x1 convolution + BN where the shape changes. Called inside a block."""
  if strides == 1 and x.shape[-1] == channels:
    return x
  return ConvBN(channels, 1, strides, relu=False, dtype=dtype, name='shortcut')(x, train)


class ResNet(nn.Module):
  """A residual network; block 1 of every stage but the first halves the resolution.

  Attributes:
    blocks: blocks in each stage.
    widths: width of each stage's blocks.
    block: BasicBlock or Bottleneck.
    stem: 'cifar': 3x3 convolution; 'imagenet': 7x7 with stride 2 and 3x3 max-pool with stride 2.
    num_classes: K.
    fusions: one for each stage; None leaves a stage plain.
    dtype: of the computation; parameters, statistics, pooling and logits stay float32.
  """

  blocks: Sequence[int]
  widths: Sequence[int]
  block: type[BasicBlock] | type[Bottleneck]
  stem: str
  num_classes: int
  fusions: Sequence[Fusion | None]
  dtype: Dtype = 'float32'

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """[B,H,W,3], normalised -> logits f32 [B,K]."""
    x = x.astype(self.dtype)
    if self.stem == 'cifar':
      x = ConvBN(self.widths[0], 3, dtype=self.dtype, name='stem')(x, train)
    else:
      x = ConvBN(self.widths[0], 7, 2, dtype=self.dtype, name='stem')(x, train)
      x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    for i, (num_blocks, width, fusion) in enumerate(
      zip(self.blocks, self.widths, self.fusions, strict=True), start=1
    ):

      def make_block(k, block_fusion, i=i, width=width):
        strides = 2 if i > 1 and k == 0 else 1
        return self.block(width, strides, block_fusion, self.dtype, name=f'stage{i}_block{k + 1}')

      x = run_stage(make_block, num_blocks, x, width, fusion, train)
    return Head(self.num_classes, name='head')(x)
