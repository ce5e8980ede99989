"""Each attention against numpy, one example, one channel and one pixel at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afi_flax.models.attention import ATTENTIONS, CBAM, ECA, GE, SE


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def make(module, channels=32, shape=(2, 6, 5)):
  x = 2 * jax.random.normal(jax.random.key(1), (*shape, channels)) + 0.5
  variables = module.init(jax.random.key(2), x)
  # Larger weights than the initial ones, so that gates are far from a half.
  variables = jax.tree.map(lambda w: 4 * w, variables)
  return np.asarray(x, np.float64), module.apply(variables, x), variables.get('params', {})


def mlp(z, params):
  hidden = z @ np.float64(params['reduce']['kernel']) + params['reduce'].get('bias', 0)
  return np.maximum(hidden, 0) @ np.float64(params['expand']['kernel']) + params['expand'].get(
    'bias', 0
  )


@pytest.mark.parametrize('use_bias', [False, True])
def test_se(use_bias):
  x, got, params = make(SE(reduction=8, use_bias=use_bias))
  want = np.empty_like(x)
  for b in range(len(x)):
    want[b] = x[b] * sigmoid(mlp(x[b].mean(axis=(0, 1)), params))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  assert ('bias' in params['reduce']) == use_bias
  assert params['reduce']['kernel'].shape == (32, 4)


def test_ge():
  x, got, params = make(GE())
  np.testing.assert_allclose(
    got, x * sigmoid(x.mean(axis=(1, 2), keepdims=True)), rtol=1e-5, atol=1e-6
  )
  assert not params


def test_cbam():
  x, got, params = make(CBAM(reduction=8, kernel=3))
  kernel = np.float64(params['space']['kernel'])
  want = np.empty_like(x)
  for b in range(len(x)):
    gate = mlp(x[b].mean(axis=(0, 1)), params) + mlp(x[b].max(axis=(0, 1)), params)
    y = x[b] * sigmoid(gate)
    planes = np.pad(np.stack([y.mean(-1), y.max(-1)], axis=-1), ((1, 1), (1, 1), (0, 0)))
    for i in range(y.shape[0]):
      for j in range(y.shape[1]):
        want[b, i, j] = y[i, j] * sigmoid((planes[i : i + 3, j : j + 3] * kernel[..., 0]).sum())
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('channels', 'size'), [(8, 3), (32, 3), (64, 3), (128, 5), (256, 5)])
def test_eca(channels, size):
  x, got, params = make(ECA(), channels)
  kernel = np.float64(params['channels']['kernel'])[:, 0, 0]
  assert kernel.shape == (size,)
  z = np.pad(x.mean(axis=(1, 2)), ((0, 0), (size // 2, size // 2)))
  want = np.empty_like(x)
  for c in range(channels):
    gate = sigmoid(z[:, c : c + size] @ kernel)
    want[..., c] = x[..., c] * gate[:, None, None]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ATTENTIONS)
def test_bfloat16_maps_stay_bfloat16(name):
  x = jnp.ones([1, 4, 4, 16], 'bfloat16')
  y, variables = ATTENTIONS[name]().init_with_output(jax.random.key(0), x)
  assert y.dtype == jnp.bfloat16
  assert all(w.dtype == jnp.float32 for w in jax.tree.leaves(variables))
