import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from afi_flax import config, optim

STEP = config.Optim(
  peak_lr=0.4,
  schedule='step',
  total_steps=100,
  warmup_steps=0,
  boundaries=(50, 75),
  factor=0.1,
  momentum=0.9,
  nesterov=False,
  weight_decay=1e-2,
  clip_norm=0.0,
)


def rates(plan):
  schedule = optim.schedule(plan)
  return [float(schedule(n)) for n in range(plan.total_steps)]


def test_step_schedule_drops_at_its_boundaries():
  np.testing.assert_allclose(rates(STEP), [0.4] * 50 + [0.04] * 25 + [0.004] * 25, rtol=1e-6)


def test_warmup_does_not_move_the_boundaries():
  got = rates(dataclasses.replace(STEP, warmup_steps=10))
  np.testing.assert_allclose(got[:10], 0.04 * np.arange(10), rtol=1e-6)
  np.testing.assert_allclose(got[10:], rates(STEP)[10:], rtol=1e-6)


def test_cosine_ends_at_zero():
  plan = dataclasses.replace(STEP, schedule='cosine', warmup_steps=20)
  got = rates(plan)
  want = 0.2 * (1 + np.cos(np.pi * np.arange(80) / 80))
  np.testing.assert_allclose(got[20:], want, rtol=1e-5, atol=1e-8)
  assert float(optim.schedule(plan)(100)) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize('nesterov', [False, True])
def test_sgd_as_pytorch_defines_it(nesterov):
  """Ten steps on the gradient g(p) = 2p + 1, by the three lines that define torch.optim.SGD."""
  plan = dataclasses.replace(STEP, nesterov=nesterov, boundaries=(5,))
  optimizer = optim.make(plan)
  params = jnp.array([1.0, -2.0, 0.5])
  state = optimizer.init(params)
  p, m = np.array([1.0, -2.0, 0.5]), 0
  for n in range(10):
    updates, state = optimizer.update(2 * params + 1, state, params)
    params = optax.apply_updates(params, updates)
    g = 2 * p + 1 + 1e-2 * p
    m = 0.9 * m + g
    p = p - (0.4 if n < 5 else 0.04) * (g + 0.9 * m if nesterov else m)
    np.testing.assert_allclose(params, p, rtol=1e-5, atol=1e-6)


def test_clipping_comes_before_the_decay():
  plan = dataclasses.replace(STEP, clip_norm=1.0)
  params = jnp.array([3.0, 4.0])
  optimizer = optim.make(plan)
  updates, _ = optimizer.update(jnp.array([30.0, 40.0]), optimizer.init(params), params)
  want = -0.4 * (np.array([0.6, 0.8]) + 1e-2 * np.array([3.0, 4.0]))
  np.testing.assert_allclose(updates, want, rtol=1e-5)
