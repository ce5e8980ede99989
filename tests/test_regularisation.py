"""The step with all that augments and regularises, over devices; and EMA through a run's folder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afi_flax import config, optim, preprocess, sharding, state, steps
from afi_flax.models import create_model, list_models, residual_blocks
from afi_flax.models.resnet import BasicBlock, ResNet
from configs import cifar100_afi_resnet32 as shipped

MODEL = ResNet((1, 1), (8, 8), BasicBlock, 'cifar', 10, (None, None))
EVERYTHING = config.Regularisation(
  loss='bce', label_smoothing=0.1, target_threshold=0.2, mixup=0.1, cutmix=1.0, erasing=0.5,
  drop_path=0.3, num_blocks=2, ema_decay=0.99,
)  # fmt: skip


def batches(n, b=16):
  rng = np.random.default_rng(0)
  for k in range(n):
    yield {
      'image': rng.integers(0, 256, [b, 8, 8, 3]).astype('uint8'),
      'label': rng.integers(0, 10, b).astype('int32'),
      'example': (k * b + np.arange(b)).astype('int32'),
      'epoch': np.zeros(b, 'int32'),
    }


def run(num_devices, num_steps=2, regularisation=EVERYTHING, seed=0):
  """States after each step, on the host, and losses."""
  plan = config.resolve(shipped.get_config('smoke'))
  mesh = sharding.make_mesh(jax.devices()[:num_devices])
  optimizer = optim.make(dataclasses.replace(plan.optim, name='lamb', peak_lr=0.01))
  replicated = sharding.replicated(mesh)
  step = jax.jit(
    steps.make_train_step(
      MODEL, optimizer, plan.data, config.Step(seed, regularisation=regularisation)
    ),
    donate_argnums=0,
    out_shardings=replicated,
  )  # fmt: skip
  now = state.Initial(MODEL, optimizer, 8, 0, replicated, regularisation.ema_decay > 0).state()
  states, losses = [jax.device_get(now)], []
  for batch in batches(num_steps):
    now, (loss, _, _) = step(now, sharding.put_batch(batch, mesh))
    states.append(jax.device_get(now))
    losses.append(float(loss))
  return states, losses


@pytest.fixture(scope='module')
def on_one():
  return run(1)


@pytest.mark.slow
def test_one_and_eight_devices_take_the_same_step(on_one):
  states, losses = run(8)
  np.testing.assert_allclose(losses, on_one[1], rtol=1e-5)
  for a, b in zip(jax.tree.leaves(states[1]), jax.tree.leaves(on_one[0][1]), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_moving_average_of_weights_and_statistics(on_one):
  before, *after = on_one[0]
  want = before.variables
  for step, now in enumerate(after):
    d = min(0.99, (1 + step) / (10 + step))
    want = jax.tree.map(lambda a, v, d=d: d * a + (1 - d) * v, want, now.variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), now.ema, want)
    assert now.eval_variables is now.ema
  assert jax.tree.structure(now.ema) == jax.tree.structure(now.variables)


def test_pictures_are_mixed_before_they_are_erased(monkeypatch):
  """A rectangle is noise of its own picture alone, at its full strength."""
  monkeypatch.setattr(preprocess, 'mix_weights', lambda *_: jnp.full([8, 8], 0.5))
  data = config.resolve(shipped.get_config('smoke')).data
  [batch] = batches(1)
  batch['image'] = np.full_like(batch['image'], 100)
  how = config.Step(regularisation=config.Regularisation(mixup=1.0, erasing=0.5))

  @jax.jit
  def made_and_wanted(batch):
    plain = preprocess.normalise(batch['image'], data.mean, data.std)
    want = preprocess.erase(plain, 0.5, 0, batch['epoch'], batch['example'])
    return steps._inputs(batch, jnp.int32(0), MODEL, data, how)[0], want

  made, want = made_and_wanted(batch)
  assert len(np.unique(want)) > 3  # one grey, and noise
  np.testing.assert_allclose(made, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('key', ['label_smoothing', 'mixup', 'cutmix', 'erasing', 'drop_path'])
def test_each_changes_the_loss_and_other_seeds_draw_otherwise(key):
  plain = config.Regularisation()
  one = dataclasses.replace(plain, **{key: getattr(EVERYTHING, key)}, num_blocks=2)
  losses = {run(1, 1, plain)[1][0], run(1, 1, one)[1][0], run(1, 1, one, seed=1)[1][0]}
  assert len(losses) == (2 if key == 'label_smoothing' else 3)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['afi_resnet20', 'se_resnet20', 'afi_mobilenetv2_cifar'])
def test_a_branch_that_is_kept_whole_changes_nothing(name):
  model = create_model(name, 10)
  images = jax.random.normal(jax.random.key(1), [2, 16, 16, 3])
  variables = jax.jit(lambda: model.init(jax.random.key(0), images, train=False))()
  keep = jnp.ones([2, residual_blocks(name)])
  apply = jax.jit(lambda **more: model.apply(variables, images, train=False, **more))
  plain, whole, half = apply(), apply(keep=keep), apply(keep=keep.at[0, 1:].set(0))
  np.testing.assert_allclose(plain, whole, rtol=1e-4, atol=1e-6)
  assert np.abs(half[0] - plain[0]).max() > 1e-3 * np.abs(plain).max()
  np.testing.assert_allclose(half[1], plain[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('name', ['afi_resnet20', 'afi_mobilenetv2_cifar'])
def test_stochastic_depth_has_no_parameters(name):
  model, images = create_model(name, 10), jnp.zeros([2, 16, 16, 3])
  keep = jnp.ones([2, residual_blocks(name)])

  def shapes(**more):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False, **more))

  assert shapes() == shapes(keep=keep)


def test_a_dropped_block_passes_its_input_on():
  block = BasicBlock(8)
  x = jax.random.normal(jax.random.key(0), [2, 4, 4, 8])
  variables = block.init(jax.random.key(1), x, None, train=False)
  y, made = block.apply(variables, x, None, train=False, keep=jnp.array([0.0, 2.0]))
  plain, made_plain = block.apply(variables, x, None, train=False)
  np.testing.assert_array_equal(y[0], np.maximum(x[0], 0))
  np.testing.assert_array_equal(made, made_plain)  # what later blocks reuse is there all the same
  assert (np.asarray(y[1]) != np.asarray(plain[1])).any()


def test_networks_without_residual_branches():
  for name in list_models('*'):
    assert (residual_blocks(name) == 0) == ('shufflenet' in name or 'densenet' in name), name
  assert residual_blocks('afi_resnet50_b') == 16
