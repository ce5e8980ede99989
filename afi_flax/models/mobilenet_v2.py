"""MobileNetV2, plain and with AFI, for 32-pixel pictures and for ImageNet.

Sources: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (and torchvision,
whose width rounding it shares); the 32-pixel form is that of the variant that the AFI paper names:
ReLU for ReLU6, and every block of stride 1 adds its input, through 1x1 + BN where widths differ.
"""

from collections.abc import Sequence

import jax
from flax import linen as nn

from afi_flax.models.fusion import Attention, Features, Fuse, Fusion, run_stage, scale_branch
from afi_flax.models.layers import ConvBN, Dtype, Head

Array = jax.Array

# Expansion t, output channels c, blocks n, stride s of block 1 (Table 2 of the MobileNetV2 paper).
IMAGENET_STAGES = (
  (1, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)
CIFAR_STAGES = tuple((t, c, n, 1 if c == 24 else s) for t, c, n, s in IMAGENET_STAGES)


class InvertedResidual(nn.Module):
  """1x1 expand, 3x3 depthwise, 1x1 project. X_k is the expand's output.

  Attributes:
    expansion: t.
    features: output channels.
    strides: of the depthwise convolution.
    cifar: the 32-pixel form.
    fusion: None: the plain block.
    attention: makes one, on the projection, before the addition; None: none.
    dtype: of the computation.
  """

  expansion: int
  features: int
  strides: int
  cifar: bool
  fusion: Fusion | None = None
  attention: Attention | None = None
  dtype: Dtype = 'float32'

  @nn.compact
  def __call__(
    self, x: Array, features: Features | None, train: bool, keep: Array | None = None
  ) -> tuple[Array, Array]:
    """[B,H,W,C] -> output [B,H',W',features] and X_k [B,H,W,c]."""
    width = self.expansion * x.shape[-1]
    own = self.fusion.own_channels(width) if self.fusion else width
    activation = 'relu' if self.cifar else 'relu6'
    made = x
    if self.cifar or self.expansion > 1:
      made = ConvBN(own, 1, activation=activation, dtype=self.dtype, name='expand')(x, train)
    y = Fuse(self.fusion, width, name='fuse')(made, features) if self.fusion else made
    y = ConvBN(width, 3, self.strides, width, activation, self.dtype, name='depthwise')(y, train)
    y = ConvBN(self.features, 1, activation='', dtype=self.dtype, name='project')(y, train)
    if self.attention:
      y = self.attention(name='attention')(y)
    if x.shape == y.shape:
      y = scale_branch(y, keep) + x
    elif self.cifar and self.strides == 1:
      y = scale_branch(y, keep)
      y = y + ConvBN(self.features, 1, activation='', dtype=self.dtype, name='shortcut')(x, train)
    return y, made


class MobileNetV2(nn.Module):
  """Stem, seven stages of inverted residuals, 1x1 to at least 1,280 channels, classifier.

  Attributes:
    cifar: the 32-pixel form: strides 1 in stem and second stage.
    num_classes: K.
    fusions: one for each stage; None leaves a stage plain. Stages of one block are always plain.
    attention: makes one, on every block's projection; None: none.
    dtype: of the computation; parameters, statistics, pooling and logits stay float32.
    remat: what is computed again for the gradient, see `fusion.run_stage`.
    features_only: return the stages' maps, without classifier.
    multiplier: of all widths, which are rounded to multiples of 8.
  """

  cifar: bool
  num_classes: int
  fusions: Sequence[Fusion | None]
  attention: Attention | None = None
  dtype: Dtype = 'float32'
  remat: str = 'none'
  features_only: bool = False
  multiplier: float = 1.0

  @nn.compact
  def __call__(self, x: Array, train: bool, keep: Array | None = None) -> Array | list[Array]:
    """[B,H,W,3], normalised -> logits f32 [B,K], or the last map of every stage.

    `keep` f32 [B,N]: what the branch of each of all N blocks that add is multiplied by; None: 1.
    """
    activation = 'relu' if self.cifar else 'relu6'
    stem = round_width(32 * self.multiplier)
    x = ConvBN(stem, 3, 1 if self.cifar else 2, 1, activation, self.dtype, name='stem')(
      x.astype(self.dtype), train
    )
    maps, stages = [], CIFAR_STAGES if self.cifar else IMAGENET_STAGES
    for i, ((t, c, n, s), fusion) in enumerate(zip(stages, self.fusions, strict=True), start=1):
      channels = round_width(c * self.multiplier)

      def make_block(k, block_fusion, i=i, t=t, channels=channels, s=s):
        return InvertedResidual(
          t,
          channels,
          s if k == 0 else 1,
          self.cifar,
          block_fusion,
          self.attention,
          self.dtype,
          name=f'stage{i}_block{k + 1}',
        )

      x = run_stage(make_block, n, x, t * channels, fusion, train, self.remat, keep)
      keep = None if keep is None else keep[:, n:]
      maps.append(x)
    if self.features_only:
      return maps
    last = round_width(1280 * max(1.0, self.multiplier))
    x = ConvBN(last, 1, activation=activation, dtype=self.dtype, name='last')(x, train)
    return Head(self.num_classes, name='head')(x)


def round_width(width: float) -> int:
  """The multiple of 8 nearest to the width, but never less than nine tenths of it."""
  rounded = max(8, int(width + 4) // 8 * 8)
  return rounded + 8 if rounded < 0.9 * width else rounded
