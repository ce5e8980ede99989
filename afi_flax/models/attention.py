"""Channel and spatial attention behind one signature: [B,H,W,C] -> the same, rescaled.

Each is used on a block's output, or on the result of AFI. Pooling, scores and gates are float32,
whatever the dtype of the map; the product has the map's dtype.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from afi_flax.models.layers import (
  GlobalAveragePool,
  fan_in_uniform,
  fan_in_uniform_bias,
  he_normal,
)

Array = jax.Array


class SE(nn.Module):
  """Squeeze-and-Excitation (Hu et al. 2018): x * sigmoid(W2 relu(W1 GAP(x))).

  >>> import jax, jax.numpy as jnp
  >>> y, variables = SE().init_with_output(jax.random.key(0), jnp.ones([2, 4, 4, 32]))
  >>> y.shape, variables['params']['reduce']['kernel'].shape
  ((2, 4, 4, 32), (32, 2))

  Attributes:
    reduction: ratio of C to the hidden width, which is at least 1.
    use_bias: the authors' code and timm's have biases; the paper's parameter counts have none.
  """

  reduction: int = 16
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B,H,W,C] -> [B,H,W,C]."""
    pooled = GlobalAveragePool()(x)
    return _scale(x, mlp(pooled, self.reduction, self.use_bias)[:, None, None, :])


class GE(nn.Module):
  """Gather-Excite (Hu et al. 2018), theta-minus with global extent: x * sigmoid(GAP(x)).

  >>> import jax, jax.numpy as jnp
  >>> GE().apply({}, jnp.zeros([1, 2, 2, 3])).shape
  (1, 2, 2, 3)
  """

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B,H,W,C] -> [B,H,W,C], without parameters."""
    return _scale(x, GlobalAveragePool()(x)[:, None, None, :])


class CBAM(nn.Module):
  """Convolutional Block Attention Module (Woo et al. 2018): a channel gate, then a spatial one.

  Channels: sigmoid(MLP(average pool) + MLP(max pool)), one MLP for both, without biases. Space:
  sigmoid of a convolution over the mean and the maximum of the channels, without bias.

  >>> import jax, jax.numpy as jnp
  >>> y, variables = CBAM().init_with_output(jax.random.key(0), jnp.ones([1, 8, 8, 32]))
  >>> variables['params']['space']['kernel'].shape
  (7, 7, 2, 1)

  Attributes:
    reduction: ratio of C to the hidden width, which is at least 1.
    kernel: side of the spatial convolution.
  """

  reduction: int = 16
  kernel: int = 7

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B,H,W,C] -> [B,H,W,C]."""
    exact = x.astype('float32')
    pooled = jnp.stack([GlobalAveragePool()(x), exact.max(axis=(1, 2))], axis=1)  # [B,2,C]
    x = _scale(x, mlp(pooled, self.reduction, use_bias=False).sum(axis=1)[:, None, None, :])
    exact = x.astype('float32')
    planes = jnp.stack([exact.mean(axis=-1), exact.max(axis=-1)], axis=-1)  # [B,H,W,2]
    pad = self.kernel // 2
    space = nn.Conv(
      1,
      (self.kernel, self.kernel),
      padding=((pad, pad), (pad, pad)),
      use_bias=False,
      kernel_init=he_normal,
      name='space',
    )(planes)
    return _scale(x, space)


class ECA(nn.Module):
  """Efficient Channel Attention (Wang et al. 2020): a convolution over neighbouring channels.

  The kernel is the odd number next to (log2(C) + b) / gamma.

  >>> import jax, jax.numpy as jnp
  >>> y, variables = ECA().init_with_output(jax.random.key(0), jnp.ones([1, 8, 8, 256]))
  >>> variables['params']['channels']['kernel'].shape
  (5, 1, 1)

  Attributes:
    gamma: see above.
    b: see above.
  """

  gamma: float = 2
  b: float = 1

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B,H,W,C] -> [B,H,W,C]."""
    size = int(abs((math.log2(x.shape[-1]) + self.b) / self.gamma))
    size += 1 - size % 2
    pooled = GlobalAveragePool()(x)[..., None]  # [B,C,1]
    scores = nn.Conv(
      1,
      (size,),
      padding=((size // 2, size // 2),),
      use_bias=False,
      kernel_init=fan_in_uniform,
      name='channels',
    )(pooled)
    return _scale(x, scores[:, None, None, :, 0])


ATTENTIONS: dict[str, type[nn.Module]] = {'se': SE, 'ge': GE, 'cbam': CBAM, 'eca': ECA}


def mlp(x: Array, reduction: int, use_bias: bool) -> Array:
  """W2 relu(W1 x) over the last axis: [..., C] -> [..., C]. Called inside a module."""
  channels = x.shape[-1]
  hidden = max(1, channels // reduction)
  for name, features in (('reduce', hidden), ('expand', channels)):
    fan_in = x.shape[-1]
    x = nn.Dense(
      features,
      use_bias=use_bias,
      kernel_init=fan_in_uniform,
      bias_init=fan_in_uniform_bias(fan_in),
      name=name,
    )(x)
    x = nn.relu(x) if name == 'reduce' else x
  return x


def _scale(x: Array, scores: Array) -> Array:
  """x * sigmoid(scores), scores f32 and broadcast over x."""
  return x * nn.sigmoid(scores).astype(x.dtype)
