import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from afi_flax.models import layers


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


def test_plain_forms_know_no_platform():
  """As other formats want them: nothing but the convolution that GPUs and TPUs get."""
  conv = layers.conv(8, 3, groups=4)
  x = jnp.ones([1, 4, 4, 8])
  variables = jax.eval_shape(conv.init, jax.random.key(0), x)

  def operations():
    return str(jax.make_jaxpr(conv.apply)(variables, x))

  assert 'platform_index' in operations()
  with layers.plain_forms():
    plain = operations()
  for word in ('platform_index', 'cond', 'custom_vjp', 'optimization_barrier'):
    assert word not in plain
  assert 'feature_group_count=4' in plain
  assert 'platform_index' in operations()
