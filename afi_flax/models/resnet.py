"""ResNets and ResNeXts for 32-pixel pictures and for ImageNet, plain and with AFI.

Sources: He et al., "Deep Residual Learning for Image Recognition" (the CIFAR form of section 4.2,
with 1x1 convolution + BN shortcuts), torchvision's v1.5 bottleneck, which strides in its 3x3, and
Xie et al., "Aggregated Residual Transformations for Deep Neural Networks".
"""

from collections.abc import Sequence

import jax
from flax import linen as nn

from afi_flax.models.fusion import Attention, Features, Fuse, Fusion, run_stage, scale_branch
from afi_flax.models.layers import ConvBN, Dtype, Head, relu, stem_pool

Array = jax.Array


class BasicBlock(nn.Module):
  """3x3, 3x3 and the shortcut. X_k is the first 3x3's output.

  Attributes:
    width: channels of both convolutions in the plain network, and of the output.
    strides: of the first convolution.
    fusion: None: the plain block.
    attention: makes one, on the residual branch, before the addition; None: none.
    dtype: of the computation.
  """

  width: int
  strides: int = 1
  fusion: Fusion | None = None
  attention: Attention | None = None
  dtype: Dtype = 'float32'

  @nn.compact
  def __call__(
    self, x: Array, features: Features | None, train: bool, keep: Array | None = None
  ) -> tuple[Array, Array]:
    """[B,H,W,C] -> output [B,H',W',width] and X_k [B,H',W',c]."""
    own = self.fusion.own_channels(self.width) if self.fusion else self.width
    made = ConvBN(own, 3, self.strides, dtype=self.dtype, name='conv1')(x, train)
    y = Fuse(self.fusion, name='fuse')(made, features) if self.fusion else made
    y = ConvBN(self.width, 3, activation='', dtype=self.dtype, name='conv2')(y, train)
    return _add_shortcut(self, x, y, train, keep), made


class Bottleneck(nn.Module):
  """1x1, 3x3, 1x1 and the shortcut. X_k is the first 1x1's output, at the input's resolution.

  Attributes:
    width: channels of the 3x3 in the plain network.
    strides: of the 3x3.
    fusion: None: the plain block.
    attention: makes one, on the residual branch, before the addition; None: none.
    dtype: of the computation.
    groups: of the 3x3.
    expansion: output channels over width.
  """

  width: int
  strides: int = 1
  fusion: Fusion | None = None
  attention: Attention | None = None
  dtype: Dtype = 'float32'
  groups: int = 1
  expansion: int = 4

  @nn.compact
  def __call__(
    self, x: Array, features: Features | None, train: bool, keep: Array | None = None
  ) -> tuple[Array, Array]:
    """[B,H,W,C] -> output [B,H',W',expansion * width] and X_k [B,H,W,c]."""
    own = self.fusion.own_channels(self.width) if self.fusion else self.width
    made = ConvBN(own, 1, dtype=self.dtype, name='conv1')(x, train)
    y = Fuse(self.fusion, self.groups, name='fuse')(made, features) if self.fusion else made
    y = ConvBN(self.width, 3, self.strides, self.groups, dtype=self.dtype, name='conv2')(y, train)
    out = self.expansion * self.width
    y = ConvBN(out, 1, activation='', dtype=self.dtype, name='conv3')(y, train)
    return _add_shortcut(self, x, y, train, keep), made


def _add_shortcut(
  block: BasicBlock | Bottleneck, x: Array, y: Array, train: bool, keep: Array | None
) -> Array:
  """relu(keep * attention(y) + x), x through 1x1 convolution + BN where the shape changes."""
  if block.attention:
    y = block.attention(name='attention')(y)
  y = scale_branch(y, keep)
  if x.shape != y.shape:
    x = ConvBN(y.shape[-1], 1, block.strides, activation='', dtype=block.dtype, name='shortcut')(
      x, train
    )
  return relu(x + y)


class ResNet(nn.Module):
  """A residual network; block 1 of every stage but the first halves the resolution.

  Attributes:
    blocks: blocks in each stage.
    widths: width of each stage's blocks.
    block: makes a block: BasicBlock, Bottleneck, or a partial of them.
    stem: 'cifar': a convolution of side `stem_kernel`; 'imagenet': 7x7 with stride 2 and 3x3
      max-pool with stride 2.
    num_classes: K.
    fusions: one for each stage; None leaves a stage plain.
    attention: makes one, on every block's residual branch; None: none.
    dtype: of the computation; parameters, statistics, pooling and logits stay float32.
    remat: what is computed again for the gradient, see `fusion.run_stage`.
    features_only: return the stages' maps, without classifier.
    stem_width: channels of the stem.
    stem_kernel: of the 'cifar' stem.
  """

  blocks: Sequence[int]
  widths: Sequence[int]
  block: type[BasicBlock] | type[Bottleneck]
  stem: str
  num_classes: int
  fusions: Sequence[Fusion | None]
  attention: Attention | None = None
  dtype: Dtype = 'float32'
  remat: str = 'none'
  features_only: bool = False
  stem_width: int = 64
  stem_kernel: int = 3

  @nn.compact
  def __call__(self, x: Array, train: bool, keep: Array | None = None) -> Array | list[Array]:
    """[B,H,W,3], normalised -> logits f32 [B,K], or the last map of every stage.

    `keep` f32 [B,N]: what the branch of each of all N blocks is multiplied by; None: 1.
    """
    maps, x = [], x.astype(self.dtype)
    if self.stem == 'cifar':
      x = ConvBN(self.stem_width, self.stem_kernel, dtype=self.dtype, name='stem')(x, train)
    else:
      x = ConvBN(self.stem_width, 7, 2, dtype=self.dtype, name='stem')(x, train)
      x = stem_pool(x)
    for i, (num_blocks, width, fusion) in enumerate(
      zip(self.blocks, self.widths, self.fusions, strict=True), start=1
    ):

      def make_block(k, block_fusion, i=i, width=width):
        strides = 2 if i > 1 and k == 0 else 1
        name = f'stage{i}_block{k + 1}'
        return self.block(width, strides, block_fusion, self.attention, self.dtype, name=name)

      x = run_stage(make_block, num_blocks, x, width, fusion, train, self.remat, keep)
      keep = None if keep is None else keep[:, num_blocks:]
      maps.append(x)
    if self.features_only:
      return maps
    return Head(self.num_classes, name='head')(x)
