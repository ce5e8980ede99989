"""The layers that every backbone is made of, with the constants that all of them share.

Convolutions: He normal over the fan out, explicit padding of k // 2 on both sides, no bias.
Batch norm: epsilon 1e-5; running <- 0.9 running + 0.1 batch, where the batch variance is the biased
one (divided by n, as in Flax; PyTorch keeps the unbiased one in its running variance).
Dense: uniform within 1 / sqrt(fan in).
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from afi_flax.models.grouped_conv import grouped_conv

Array = jax.Array
Dtype = Any

EPSILON = 1e-5
MOMENTUM = 0.9
_plain = contextvars.ContextVar('plain', default=False)

# What is jitted in this file is traced, differentiated and lowered once for all layers of a shape,
# not for each, which would take 1.5 times as long for a whole step. XLA sees no difference.
relu = jax.jit(nn.relu)
_ACTIVATIONS = {'relu': relu, 'relu6': jax.jit(nn.relu6)}

he_normal = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
# Variance b^2 / 3 of a uniform distribution within b = 1 / sqrt(fan in).
fan_in_uniform = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def fan_in_uniform_bias(fan_in: int) -> nn.initializers.Initializer:
  """A bias uniform within 1 / sqrt(fan_in), which its own shape cannot tell."""

  def init(key, shape, dtype=float):
    return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

  return init


class ConvBN(nn.Module):
  """Convolution without bias, batch norm, and ReLU where asked.

  Statistics are those of the whole batch, over all devices: under `jax.jit` with the batch split
  over a mesh, the mean of an array is the mean of the global array.

  Attributes:
    features: output channels.
    kernel: side of the square kernel.
    strides: step in both directions.
    groups: channel groups of the convolution.
    activation: what follows: 'relu', 'relu6' or '' (nothing).
    dtype: of the computation; parameters and statistics stay float32.
  """

  features: int
  kernel: int = 3
  strides: int = 1
  groups: int = 1
  activation: str = 'relu'
  dtype: Dtype = 'float32'

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """[B,H,W,C] -> [B, ceil(H / strides), ceil(W / strides), features], of `dtype`."""
    x = conv(self.features, self.kernel, self.strides, self.groups, self.dtype, name='conv')(x)
    x = BatchNorm(self.dtype, name='bn')(x, train)
    return _ACTIVATIONS[self.activation](x) if self.activation else x


class BNReLU(nn.Module):
  """Batch norm and ReLU, as they come before a convolution in a pre-activation network.

  Attributes:
    dtype: of the computation.
  """

  dtype: Dtype = 'float32'

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """[B,H,W,C] -> the same shape."""
    return relu(BatchNorm(self.dtype, name='bn')(x, train))


def conv(
  features: int,
  kernel: int,
  strides: int = 1,
  groups: int = 1,
  dtype: Dtype = 'float32',
  name: str | None = None,
) -> nn.Conv:
  """A square convolution without bias, padded by kernel // 2 on all sides."""
  pad = kernel // 2
  return nn.Conv(
    features,
    (kernel, kernel),
    strides=strides,
    padding=((pad, pad), (pad, pad)),
    feature_group_count=groups,
    use_bias=False,
    dtype=dtype,
    kernel_init=he_normal,
    conv_general_dilated=_conv_general_dilated,
    name=name,
  )


def _conv_general_dilated(
  x: Array, kernel: Array, window_strides: Sequence[int], padding, *, feature_group_count, **options
) -> Array:
  """`jax.lax.conv_general_dilated` as `nn.Conv` calls it; of groups, `grouped_conv`."""
  x = settled(x)
  if feature_group_count == 1 or _plain.get():
    options |= {'feature_group_count': feature_group_count}
    y = jax.lax.conv_general_dilated(x, kernel, window_strides, padding, **options)
  else:
    y = grouped_conv(x, kernel, window_strides[0], kernel.shape[0] // 2, feature_group_count)
  return settled(y)


def settled(x: Array) -> Array:
  """x, which XLA's CPU compiler then makes once, wherever it is read; elsewhere just x.

  It would make what is elementwise again for each of its readers: the whole chain of additions up
  to a block for each reader of the block's output, and, once for every gradient of a kernel,
  in an order of memory that takes ten times as long. Others fuse such work into convolutions.
  It needs the options of `steps.compiler_options`.
  """
  return x if _plain.get() else _settled(x)


@jax.jit
def _settled(x: Array) -> Array:
  return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


@contextlib.contextmanager
def plain_forms() -> Iterator[None]:
  """While entered, networks are traced in the form for GPUs and TPUs, whatever they will run on.

  For converters to other formats, which know nothing that depends on a platform.
  """
  token = _plain.set(True)
  try:
    yield
  finally:
    _plain.reset(token)


class BatchNorm(nn.Module):
  """Batch norm over all but the last axis, with the constants of this file; float32 inside.

  `train` is False: running statistics; True or 1: those of the whole batch, over all devices; G:
  the batch is cut into G equal parts, in its order, each normalised by its own statistics, and the
  running ones follow their mean. With as many parts as devices, or fewer, each part lies on its
  own devices, and nothing passes between parts but that mean.

  Written as x * a + b with a = scale / sqrt(var + epsilon): its gradient then needs x alone, which
  is there as the convolution's result, where (x - mean) * a + bias keeps x - mean besides: a third
  of all that a network keeps for its gradient. Parameters and statistics are named as Flax's are.

  Attributes:
    dtype: of the result.
  """

  dtype: Dtype = 'float32'

  @nn.compact
  def __call__(self, x: Array, train: bool | int) -> Array:
    """[B,...,C] -> the same shape, of `dtype`."""
    channels = x.shape[-1:]
    running_mean = self.variable('batch_stats', 'mean', jnp.zeros, channels)
    running_var = self.variable('batch_stats', 'var', jnp.ones, channels)
    scale = self.param('scale', nn.initializers.ones, channels)
    bias = self.param('bias', nn.initializers.zeros, channels)
    if not train:
      return _affine(x, scale, bias, running_mean.value, running_var.value, self.dtype)
    running = running_mean.value, running_var.value
    y, (mean, var) = _normalise(x, scale, bias, running, int(train), self.dtype)
    if not self.is_initializing():
      running_mean.value, running_var.value = mean, var
    return y


@functools.partial(jax.jit, static_argnums=(4, 5))
def _normalise(
  x: Array, scale: Array, bias: Array, running: tuple[Array, Array], parts: int, dtype: Dtype
) -> tuple[Array, tuple[Array, Array]]:
  """x normalised by its own statistics, [B,...,C] of dtype, and the next running ones, f32 [C]."""
  shape, x = x.shape, x.astype('float32')
  axes = tuple(range(x.ndim - 1))
  if parts > 1:  # [G,B/G,...,C]; one part keeps its shape, which XLA fuses better
    x = x.reshape(parts, shape[0] // parts, *shape[1:])
    axes = tuple(range(1, x.ndim - 1))
    scale, bias = scale[None], bias[None]
  mean = x.mean(axes)  # [C], or [G,C]
  var = jnp.maximum((x * x).mean(axes) - mean * mean, 0)
  y = _scaled(x, scale, bias, mean, var).reshape(shape).astype(dtype)
  new = (v.reshape(-1, shape[-1]).mean(0) for v in (mean, var))
  running = tuple(MOMENTUM * old + (1 - MOMENTUM) * v for old, v in zip(running, new, strict=True))
  return y, running


@functools.partial(jax.jit, static_argnums=5)
def _affine(x: Array, scale: Array, bias: Array, mean: Array, var: Array, dtype: Dtype) -> Array:
  """x normalised by the statistics given: [B,...,C] of dtype."""
  return _scaled(x.astype('float32'), scale, bias, mean, var).astype(dtype)


def _scaled(x: Array, scale: Array, bias: Array, mean: Array, var: Array) -> Array:
  """x * a + b, f32, by statistics [C] of x [B,...,C], or [G,C] of the parts of x [G,B/G,...,C]."""
  axes = tuple(range(mean.ndim - 1, x.ndim - 1))
  factor = scale * jax.lax.rsqrt(var + EPSILON)
  factor, offset = (jnp.expand_dims(v, axes) for v in (factor, bias - mean * factor))
  return x * factor + offset


def stem_pool(x: Array) -> Array:
  """Maxima of 3x3 pixels, stride 2, padded by 1: x [B,H,W,C], at least 0, as it is after ReLU."""
  if _plain.get():  # jax2onnx takes no notice of explicit padding
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return nn.max_pool(x, window_shape=(3, 3), strides=(2, 2))
  return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


@jax.jit
def global_average(x: Array) -> Array:
  """The mean over all pixels: [B,H,W,C] -> f32 [B,C]."""
  return x.astype('float32').mean(axis=(1, 2))


class GlobalAveragePool(nn.Module):
  """`global_average` as a layer, which a count of operations sees."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B,H,W,C] -> f32 [B,C]."""
    return global_average(x)


class Head(nn.Module):
  """Global average pool and the classifier, in float32.

  Attributes:
    num_classes: K.
  """

  num_classes: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B,H,W,C] -> logits f32 [B,K]."""
    x = GlobalAveragePool()(x)
    return nn.Dense(
      self.num_classes,
      kernel_init=fan_in_uniform,
      bias_init=fan_in_uniform_bias(x.shape[-1]),
      name='dense',
    )(x)
