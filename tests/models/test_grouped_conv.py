import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afi_flax.models import grouped_conv as lib
from afi_flax.models import layers
from afi_flax.models.resnet import Bottleneck, ResNet

# Size, groups, inputs and outputs of a group, strides, side.
DEPTHWISE = [(7, 5, 1, 1, 1, 3), (8, 5, 1, 1, 2, 3), (7, 5, 1, 1, 2, 3), (9, 3, 1, 1, 2, 5)]
ONE_OUTPUT = [(7, 4, 2, 1, 1, 3), (6, 4, 2, 1, 2, 3)]
BLOCKS = [(8, 2, 4, 4, 2, 3), (7, 12, 4, 4, 1, 3), (7, 3, 2, 2, 2, 3), (5, 2, 3, 2, 1, 1),
          (5, 2, 32, 2, 1, 3)]  # fmt: skip


def plain(x, w, strides, groups):
  pad = (w.shape[0] // 2, w.shape[0] // 2)
  return jax.lax.conv_general_dilated(
    x, w, (strides, strides), (pad, pad), (1, 1), (1, 1), ('NHWC', 'HWIO', 'NHWC'), groups
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
  ('size', 'groups', 'inputs', 'outputs', 'strides', 'side'), DEPTHWISE + ONE_OUTPUT + BLOCKS
)
def test_values_and_gradients_are_those_of_jax(size, groups, inputs, outputs, strides, side, dtype):
  x = jax.random.normal(jax.random.key(0), [2, size, size, groups * inputs], dtype)
  w = jax.random.normal(jax.random.key(1), [side, side, inputs, groups * outputs], dtype)

  def ours(x, w):
    return lib.grouped_conv(x, w, strides, side // 2, groups)

  want_y, pull_want = jax.vjp(
    lambda x, w: plain(x.astype('float32'), w.astype('float32'), strides, groups), x, w
  )
  y, pull = jax.vjp(ours, x, w)
  assert y.dtype == dtype
  gradient = jax.random.normal(jax.random.key(2), y.shape).astype(dtype)
  wanted = (want_y, *pull_want(gradient.astype('float32')))
  tolerance = 1e-4 if dtype == 'float32' else 0.03
  for got, want in zip((y, *pull(gradient)), wanted, strict=True):
    scale = float(jnp.abs(want).max())
    np.testing.assert_allclose(
      got.astype('float32') / scale, want.astype('float32') / scale, rtol=0, atol=tolerance
    )


@pytest.mark.parametrize(
  ('case', 'form'), [(DEPTHWISE[1], '_by_shifts'), (BLOCKS[1], '_in_blocks')]
)
def test_other_platforms_get_the_convolution_as_it_is(case, form):
  size, groups, inputs, outputs, strides, side = case
  x = jnp.zeros([2, size, size, groups * inputs])
  w = jnp.zeros([side, side, inputs, groups * outputs])
  traced = jax.jit(lambda x, w: lib.grouped_conv(x, w, strides, side // 2, groups)).trace(x, w)
  count = {
    platform: traced.lower(lowering_platforms=(platform,)).as_text().count('stablehlo.convolution')
    for platform in ('cpu', 'tpu', 'cuda')
  }
  assert count['tpu'] == count['cuda'] == 1
  assert count['cpu'] == (0 if form == '_by_shifts' else 3)  # of 16 of 48 channels each


def test_networks_use_it():
  """What they would use is too slow to train with on the CPU."""
  x = jnp.ones([1, 4, 4, 4])
  for groups, used in ((1, False), (2, True), (4, True)):
    conv = layers.conv(8, 3, groups=groups)
    jaxpr = jax.make_jaxpr(conv.apply)(conv.init(jax.random.key(0), x), x)
    assert ('custom_vjp_call' in str(jaxpr)) == used


@pytest.mark.parametrize('groups', [2, 8])
def test_remat_keeps_grouped_convolutions(groups):
  """With `fusion`, a gradient convolves as often as without; with `block`, more often."""

  def convolutions(remat):
    block = functools.partial(Bottleneck, groups=groups)
    model = ResNet((2,), (8,), block, 'cifar', 4, (None,), remat=remat)
    x = jnp.ones([1, 4, 4, 3])
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))

    def loss(variables):
      return model.apply(variables, x, train=False).sum()

    # What is kept is decided when the gradient is made, so the program has only what it needs.
    traced = jax.jit(jax.grad(loss)).trace(variables)
    return traced.lower(lowering_platforms=('tpu',)).as_text().count('stablehlo.convolution')

  assert convolutions('none') == convolutions('fusion') < convolutions('block')
