import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

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


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_batch_norm_is_that_of_flax(train, dtype):
  keys = jax.random.split(jax.random.key(0), 5)
  x = (3 + 2 * jax.random.normal(keys[0], [4, 5, 5, 6])).astype(dtype)
  variables = {
    'params': {'scale': jax.random.normal(keys[1], [6]), 'bias': jax.random.normal(keys[2], [6])},
    'batch_stats': {
      'mean': jax.random.normal(keys[3], [6]),
      'var': jax.random.uniform(keys[4], [6]),
    },
  }
  target = jax.random.normal(jax.random.key(9), x.shape)
  flax = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype)
  results = []
  for apply in (functools.partial(layers.BatchNorm(dtype).apply, train=train), flax.apply):

    def loss(params, x, apply=apply):
      y, updated = apply(variables | {'params': params}, x, mutable='batch_stats')
      return (y * target).sum(), (y, updated)

    gradient, (y, updated) = jax.grad(loss, (0, 1), has_aux=True)(variables['params'], x)
    assert y.dtype == dtype
    results.append(
      (y.astype('float32'), jax.tree.map(lambda g: g.astype('float32'), gradient), updated)
    )
  tolerance = 2e-5 if dtype == 'float32' else 0.02
  jax.tree.map(
    lambda got, want: np.testing.assert_allclose(got, want, rtol=tolerance, atol=5 * tolerance),
    *results,
  )
  fresh = layers.BatchNorm().init(jax.random.key(0), x, train=train)
  jax.tree.map(np.testing.assert_array_equal, fresh, flax.init(jax.random.key(0), x))


def test_batch_norm_keeps_nothing_of_its_inputs_size_but_the_input():
  x = jax.random.normal(jax.random.key(0), [2, 4, 4, 8])
  module = layers.BatchNorm()
  variables = module.init(jax.random.key(0), x, train=False)

  def forward(params, x):
    return module.apply(variables | {'params': params}, x, train=True, mutable='batch_stats')[0]

  _, pull = jax.vjp(forward, variables['params'], x)
  kept = [leaf.reshape(x.shape) for leaf in jax.tree.leaves(pull) if leaf.size == x.size]
  assert kept
  for leaf in kept:
    np.testing.assert_array_equal(leaf, x)


def test_batch_norm_of_parts_normalises_each_by_itself():
  x = jax.random.normal(jax.random.key(0), [8, 3, 3, 5]) * jnp.arange(1.0, 9)[:, None, None, None]
  module = layers.BatchNorm()
  variables = module.init(jax.random.key(0), x, train=False)
  got, updated = module.apply(variables, x, train=4, mutable='batch_stats')
  parts = [
    module.apply(variables, x[i : i + 2], train=True, mutable='batch_stats') for i in range(0, 8, 2)
  ]
  np.testing.assert_allclose(got, jnp.concatenate([y for y, _ in parts]), rtol=1e-5, atol=1e-6)
  mean = jax.tree.map(lambda *leaves: jnp.mean(jnp.stack(leaves), axis=0), *[s for _, s in parts])
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), updated, mean)
