import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afi_flax.models import layers
from afi_flax.models.resnet import Bottleneck, ResNet


@pytest.mark.parametrize(
  ('size', 'groups', 'inputs', 'outputs', 'strides', 'kernel'),
  [(7, 4, 2, 1, 1, 3), (8, 2, 4, 4, 2, 3), (7, 3, 2, 2, 2, 3), (5, 2, 3, 2, 1, 1)],
)
def test_grouped_convolution_has_the_gradients_of_jax(
  size, groups, inputs, outputs, strides, kernel
):
  x = jax.random.normal(jax.random.key(0), [2, size, size, groups * inputs])
  w = jax.random.normal(jax.random.key(1), [kernel, kernel, inputs, groups * outputs])

  def ours(x, w):
    return layers.grouped_conv(x, w, strides, kernel // 2, groups)

  def plain(x, w):
    pad = (kernel // 2, kernel // 2)
    return jax.lax.conv_general_dilated(
      x, w, (strides, strides), (pad, pad), (1, 1), (1, 1), ('NHWC', 'HWIO', 'NHWC'), groups
    )

  gradient = jax.random.normal(jax.random.key(2), plain(x, w).shape)
  results = []
  for convolution in (ours, plain):
    y, pull = jax.vjp(convolution, x, w)
    results.append((y, *pull(gradient)))
  for got, want in zip(*results, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_networks_use_it():
  """What they would use is too slow to train with on the CPU."""
  conv = layers.conv(8, 3, groups=2)
  x = jnp.ones([1, 4, 4, 4])
  variables = conv.init(jax.random.key(0), x)
  assert 'custom_vjp_call' in str(jax.make_jaxpr(conv.apply)(variables, x))
  for plain in (layers.conv(8, 3), layers.conv(4, 3, groups=4)):
    jaxpr = jax.make_jaxpr(plain.apply)(plain.init(jax.random.key(0), x), x)
    assert 'custom_vjp_call' not in str(jaxpr)


def test_remat_keeps_grouped_convolutions():
  """With `fusion`, a gradient convolves as often as without; with `block`, more often."""

  def convolutions(remat):
    block = functools.partial(Bottleneck, groups=2)
    model = ResNet((2,), (8,), block, 'cifar', 4, (None,), remat=remat)
    x = jnp.ones([1, 4, 4, 3])
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))

    def loss(variables):
      return model.apply(variables, x, train=False).sum()

    # What is kept is decided when the gradient is made, so the program has only what it needs.
    return jax.jit(jax.grad(loss)).lower(variables).as_text().count('stablehlo.convolution')

  assert convolutions('none') == convolutions('fusion') < convolutions('block')
