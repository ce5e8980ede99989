"""Convolutions of channel groups, with forms of their own for XLA's CPU compiler.

That compiler has no fast code for them: it computes the gradient of a depthwise kernel from the
dense one, hundreds of times too much, and takes a tenth of a core's speed forward. What stands here
for it is the same sum in another order: products of shifted maps where each group has one output,
and dense convolutions of a few groups at once, with zeros between groups, elsewhere. GPUs and TPUs
get the convolution as it is.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array
NAME = 'grouped convolution'  # of the result, for policies of `jax.checkpoint`
_BLOCK = 16  # channels of a dense convolution: fewer take as long, more compute more zeros


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def grouped_conv(x: Array, kernel: Array, strides: int, pad: int, groups: int) -> Array:
  """A square convolution of channel groups: x [B,H,W,g*i], kernel [k,k,i,g*o] -> [B,H',W',g*o].

  Padded by `pad` on all sides; undilated, of default precision, with reverse-mode derivatives only.
  """
  return _forward(x, kernel, strides, pad, groups)[0]


def _forward(x, kernel, strides, pad, groups):
  how = {'strides': strides, 'pad': pad, 'groups': groups}
  on_cpu = _by_shifts if kernel.shape[3] == groups else _in_blocks
  y = jax.lax.platform_dependent(
    x,
    kernel,
    cpu=functools.partial(on_cpu, **how),
    default=functools.partial(_plain, **how),
  )
  return checkpoint_name(y, NAME), (x, kernel)


def _backward(strides, pad, groups, saved, gradient):
  how = {'strides': strides, 'pad': pad, 'groups': groups}
  on_cpu = _gradients_by_shifts if saved[1].shape[3] == groups else _gradients_of(_in_blocks)
  return jax.lax.platform_dependent(
    *saved,
    gradient,
    cpu=functools.partial(on_cpu, **how),
    default=functools.partial(_gradients_of(_plain), **how),
  )


grouped_conv.defvjp(_forward, _backward)


def _gradients_of(convolve: Callable) -> Callable:
  """(x, kernel, gradient) -> the gradients of x and of the kernel."""

  def gradients(x, kernel, gradient, **how):
    _, pull = jax.vjp(functools.partial(convolve, **how), x, kernel)
    return pull(gradient)

  return gradients


def _plain(x: Array, kernel: Array, strides: int, pad: int, groups: int) -> Array:
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (strides, strides),
    ((pad, pad), (pad, pad)),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )


# ---- a few groups at once


def _in_blocks(x: Array, kernel: Array, strides: int, pad: int, groups: int) -> Array:
  """Dense convolutions of as many groups as _BLOCK channels hold, with zeros between groups."""
  side, inputs = kernel.shape[0], kernel.shape[2]
  outputs = kernel.shape[3] // groups
  fitting = range(1, min(groups, _BLOCK // inputs) + 1)
  together = max((n for n in fitting if groups % n == 0), default=1)
  blocks = groups // together
  kernel = kernel.reshape(side, side, inputs, blocks, together, outputs)
  dense = jnp.einsum('uvibgo,gh->buvhigo', kernel, jnp.eye(together, dtype=kernel.dtype))
  dense = dense.reshape(blocks, side, side, together * inputs, together * outputs)
  parts = [
    _plain(part, one, strides, pad, groups=1)
    for part, one in zip(jnp.split(x, blocks, axis=-1), dense, strict=True)
  ]
  return jnp.concatenate(parts, axis=-1)


# ---- one output a group


def _by_shifts(x: Array, kernel: Array, strides: int, pad: int, groups: int) -> Array:
  """The sum over the kernel's places and a group's inputs of a shifted map times its weights."""
  height, width = (_size(n, kernel.shape[0], strides, pad) for n in x.shape[1:3])
  inputs = kernel.shape[2]
  total = jnp.zeros([x.shape[0], height, width, groups], 'float32')
  for i in range(inputs):
    padded = _padded(x[..., i::inputs], pad)
    for (u, v), shifted in _shifts(padded, kernel.shape[0], strides, height, width):
      total += shifted * kernel[u, v, i][None, None, None].astype('float32')
  return total.astype(x.dtype)


def _gradients_by_shifts(
  x: Array, kernel: Array, gradient: Array, strides: int, pad: int, groups: int
) -> tuple[Array, Array]:
  side, inputs = kernel.shape[0], kernel.shape[2]
  # The gradient of x is a convolution, too: of the gradient, spread, by the flipped kernel.
  spread = [(0, 0, 0)] + [
    (side - 1 - pad, n + pad - strides * (m - 1) - 1, strides - 1)
    for n, m in zip(x.shape[1:3], gradient.shape[1:3], strict=True)
  ]
  spread = jax.lax.pad(gradient, jnp.zeros([], gradient.dtype), [*spread, (0, 0, 0)])
  flipped = kernel[::-1, ::-1]
  of_x = [_by_shifts(spread, flipped[:, :, i : i + 1], 1, 0, groups) for i in range(inputs)]
  of_kernel = [
    _of_kernel_by_shifts(x[..., i::inputs], gradient, side, strides, pad) for i in range(inputs)
  ]
  return (
    jnp.stack(of_x, axis=-1).reshape(x.shape),
    jnp.stack(of_kernel, axis=2).astype(kernel.dtype),
  )


def _of_kernel_by_shifts(x: Array, gradient: Array, side: int, strides: int, pad: int) -> Array:
  """x [B,H,W,C], gradient [B,H',W',C] -> f32 [side,side,C].

  Products are added up pixel by pixel over the pictures first: those sums stay in the cache.
  """
  height, width, channels = gradient.shape[1:]

  def add(sums, one):
    picture, slope = one
    places = _shifts(_padded(picture[None], pad), side, strides, height, width)
    return [
      total + shifted[0] * slope for total, (_, shifted) in zip(sums, places, strict=True)
    ], None

  zeros = [jnp.zeros([height, width, channels]) for _ in range(side * side)]
  sums, _ = jax.lax.scan(add, zeros, (x, gradient.astype('float32')))
  return jnp.stack([total.sum((0, 1)) for total in sums]).reshape(side, side, channels)


def _size(size: int, side: int, strides: int, pad: int) -> int:
  return (size + 2 * pad - side) // strides + 1


def _padded(x: Array, pad: int) -> Array:
  """f32, with zeros around; made once, not for every shift."""
  edges = ((0, 0), (pad, pad), (pad, pad), (0, 0))
  return jax.lax.optimization_barrier(jnp.pad(x.astype('float32'), edges))


def _shifts(padded: Array, side: int, strides: int, height: int, width: int):
  """((u, v), what the kernel's place u, v sees [B,height,width,C]), for each place."""
  for u, v in itertools.product(range(side), repeat=2):
    rows = slice(u, u + strides * (height - 1) + 1, strides)
    columns = slice(v, v + strides * (width - 1) + 1, strides)
    yield (u, v), padded[:, rows, columns]
