import dataclasses

import jax
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


MATRIX, VECTOR = np.array([[1.0, -2.0], [0.5, 3.0]]), np.array([0.3, -0.7, 1.1])


def gradient(p):
  """Of a loss that pulls each number to a place of its own."""
  return 2 * p + np.linspace(-1, 2, p.size).reshape(p.shape)


def norm(x):
  return np.sqrt(np.square(x).sum())


class Reference:
  """One tensor in float64, by the definitions; a vector without decay and trust ratio."""

  def __init__(self, p, name, decay, nesterov=False):
    self.p, self.name, self.nesterov = p, name, nesterov
    self.decay = decay if p.ndim > 1 else 0
    self.m = self.v = 0

  def step(self, n, lr):
    g, p = gradient(self.p), self.p
    if self.name == 'lars':
      trust = 1e-3 * norm(p) / (norm(g) + self.decay * norm(p) + 1e-8) if p.ndim > 1 else 1
      g = trust * (g + self.decay * p)
    if self.name in ('sgd', 'lars'):
      g = g + self.decay * p if self.name == 'sgd' else g
      self.m = 0.9 * self.m + g
      self.p = p - lr * (g + 0.9 * self.m if self.nesterov else self.m)
      return
    self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g**2
    root = np.sqrt(self.v / (1 - 0.999**n))
    update = self.m / (1 - 0.9**n) / (root + (1e-6 if self.name == 'lamb' else 1e-8))
    update = update + self.decay * p
    trust = norm(p) / norm(update) if self.name == 'lamb' and p.ndim > 1 else 1
    self.p = p - lr * trust * update


@pytest.mark.parametrize(
  ('name', 'nesterov'), [('sgd', True), ('lars', False), ('lars', True), ('adamw', False),
                         ('lamb', False)],
)  # fmt: skip
def test_optimisers_by_their_definitions(name, nesterov):
  plan = dataclasses.replace(
    STEP, name=name, nesterov=nesterov, decay_vectors=False, weight_decay=0.1, peak_lr=0.05
  )
  optimizer = optim.make(plan)
  params = {'matrix': jnp.asarray(MATRIX), 'vector': jnp.asarray(VECTOR)}
  state = optimizer.init(params)
  references = {
    'matrix': Reference(MATRIX, name, 0.1, nesterov),
    'vector': Reference(VECTOR, name, 0.1, nesterov),
  }
  for n in range(1, 9):
    grads = {key: jnp.asarray(gradient(np.asarray(p, 'float64'))) for key, p in params.items()}
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    for key, reference in references.items():
      reference.step(n, 0.05)
      np.testing.assert_allclose(
        params[key], reference.p, rtol=2e-5, atol=5e-6, err_msg=f'{key}, step {n}'
      )
  moved = {'lars': 1e-4}.get(name, 1e-2)  # LARS takes a thousandth
  assert np.abs(params['matrix'] - MATRIX).max() > moved


@pytest.mark.parametrize('name', ['sgd', 'lars', 'adamw', 'lamb'])
def test_layers_have_rates_of_their_own(name):
  """Each is as if it were alone, with a learning rate of its own: PyTorch's parameter groups."""
  rates = {'stem': 0.01, 'stage1_block1': 0.1, 'head': 1.0}
  plan = dataclasses.replace(
    STEP, name=name, decay_vectors=False, weight_decay=0.1, peak_lr=0.05, rates=tuple(rates.items())
  )
  optimizer = optim.make(plan)
  params = {m: {'a': jnp.asarray(MATRIX), 'b': jnp.asarray(VECTOR)} for m in rates}
  state = optimizer.init(params)
  references = {
    m: {'a': Reference(MATRIX, name, 0.1), 'b': Reference(VECTOR, name, 0.1)} for m in rates
  }
  for n in range(1, 6):
    grads = jax.tree.map(lambda p: jnp.asarray(gradient(np.asarray(p, 'float64'))), params)
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    for module, tensors in references.items():
      for key, reference in tensors.items():
        reference.step(n, 0.05 * rates[module])
        np.testing.assert_allclose(
          params[module][key], reference.p, rtol=2e-5, atol=5e-6, err_msg=f'{module} {key} {n}'
        )


def test_what_is_frozen_has_no_state():
  plan = dataclasses.replace(STEP, name='adamw', frozen=('stem', 'stage1_block1'))
  params = {'stem': jnp.ones([2, 2]), 'stage1_block1': jnp.ones([3]), 'head': jnp.ones([4])}
  shapes = {x.shape for x in jax.tree.leaves(optim.make(plan).init(params))}
  assert shapes == {(), (4,)}


@pytest.mark.parametrize('name', ['sgd', 'lars', 'adamw', 'lamb'])
def test_the_state_is_that_of_runs_without_frozen_parts_or_rates(name):
  """As their checkpoints hold it."""
  trace, adam = optax.trace(0.9), optax.scale_by_adam()
  decay, rate = optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(lambda n: 0.1)
  steps = {
    'sgd': (decay, optax.sgd(lambda n: 0.1, 0.9)),
    'lars': (optax.identity(), trace, rate),
    'adamw': (adam, decay, rate),
    'lamb': (adam, decay, optax.identity(), rate),
  }
  made = optim.make(dataclasses.replace(STEP, name=name)).init({'a': jnp.ones(2)})
  want = optax.chain(optax.identity(), *steps[name]).init({'a': jnp.ones(2)})
  assert jax.tree.structure(made) == jax.tree.structure(want)


def test_decay_of_vectors_can_be_left_out():
  params = {'matrix': jnp.ones([2, 2]), 'vector': jnp.ones([3])}
  zeros = {'matrix': jnp.zeros([2, 2]), 'vector': jnp.zeros([3])}
  for decay_vectors in (True, False):
    optimizer = optim.make(dataclasses.replace(STEP, decay_vectors=decay_vectors))
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates['matrix'], -0.4 * 1e-2, rtol=1e-6)
    np.testing.assert_allclose(updates['vector'], -0.4 * 1e-2 * decay_vectors, rtol=1e-6)


def test_a_tensor_of_zeros_still_moves():
  """Its trust ratio would be 0 for ever."""
  for name in ('lars', 'lamb'):
    optimizer = optim.make(dataclasses.replace(STEP, name=name))
    params = jnp.zeros([2, 2])
    updates, _ = optimizer.update(jnp.ones([2, 2]), optimizer.init(params), params)
    assert (np.asarray(updates) < -0.1).all()


def test_moving_average():
  average = want = 1.0
  for step, value in enumerate([2.0, -1.0, 4.0, 4.0]):
    d = min(0.3, (1 + step) / (10 + step))
    want = d * want + (1 - d) * value
    average = optim.moving_average(
      {'p': jnp.float32(average)}, {'p': jnp.float32(value)}, 0.3, step
    )
    average = float(average['p'])
    assert average == pytest.approx(want, rel=1e-6)


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'nesterov'), [('lamb', False), ('lars', False), ('lars', True), ('adamw', False)]
)
def test_optimisers_as_timm(name, nesterov):
  torch = pytest.importorskip('torch')
  create = pytest.importorskip('timm.optim').create_optimizer_v2
  plan = dataclasses.replace(
    STEP, name=name, nesterov=nesterov, decay_vectors=False, weight_decay=0.02, peak_lr=0.05,
    clip_norm=1.0 if name == 'lamb' else 0.0,
  )  # fmt: skip
  theirs = torch.nn.Linear(2, 2)
  params = {
    'matrix': jnp.asarray(theirs.weight.detach().numpy()),
    'vector': jnp.asarray(theirs.bias.detach().numpy()),
  }
  options = {} if name in ('lamb', 'adamw') else {'momentum': 0.9, 'nesterov': nesterov}
  torch_name = 'adamw' if name == 'adamw' else name
  reference = create(theirs, torch_name, lr=0.05, weight_decay=0.02, **options)
  ours = optim.make(plan)
  state = ours.init(params)
  for _ in range(6):
    grads = {key: jnp.asarray(gradient(np.asarray(p))) for key, p in params.items()}
    theirs.weight.grad = torch.tensor(gradient(theirs.weight.detach().numpy())).float()
    theirs.bias.grad = torch.tensor(gradient(theirs.bias.detach().numpy())).float()
    reference.step()
    updates, state = ours.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  np.testing.assert_allclose(params['matrix'], theirs.weight.detach().numpy(), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(params['vector'], theirs.bias.detach().numpy(), rtol=1e-4, atol=1e-6)
