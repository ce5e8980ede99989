"""Training steps of networks of which a part is frozen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from afi_flax import config, losses, optim, preprocess, sharding, state, steps
from afi_flax.analysis import cost
from afi_flax.models import create_model, parts
from afi_flax.models.fusion import Fusion
from afi_flax.models.layers import BatchNorm
from afi_flax.models.resnet import BasicBlock, ResNet
from configs import cifar100_afi_resnet32 as shipped
from tests.test_regularisation import batches

FUSION = Fusion('half', reduction=4)
MODEL = ResNet((1, 2), (8, 16), BasicBlock, 'cifar', 10, (None, FUSION))
EARLY = ('stem', 'stage1_block1')
QUICKLY = {'xla_backend_optimization_level': 0}  # to compile
BODY = (*EARLY, 'stage2_block1', 'stage2_block2')
EVERYTHING = config.Regularisation(
  label_smoothing=0.1, cutmix=1.0, erasing=0.5, drop_path=0.3, num_blocks=3, ema_decay=0.9
)


@pytest.fixture(scope='module')
def plan():
  made = shipped.get_config('smoke')
  made.schedule.boundaries = ()
  return config.resolve(made)


def run(plan, how, num_devices=1, num_steps=1, change=lambda now: now, **more):
  """States before and after, on the host, the numbers that the last step returned, its inputs."""
  optimizer = optim.make(dataclasses.replace(plan.optim, frozen=how.frozen, **more))
  mesh = sharding.make_mesh(jax.devices()[:num_devices])
  everywhere = sharding.replicated(mesh)
  step = jax.jit(
    steps.make_train_step(MODEL, optimizer, plan.data, how),
    donate_argnums=0,
    out_shardings=everywhere,
    compiler_options=QUICKLY,
  )
  now = state.Initial(MODEL, optimizer, 8, 0, everywhere, how.regularisation.ema_decay > 0).state()
  now = change(now)
  before = jax.device_get(now)
  for batch in batches(num_steps):
    now, numbers = step(now, sharding.put_batch(batch, mesh))
  return before, jax.device_get(now), numbers, batch


def close(got, want):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


def trained_before(now):
  """As of weights that were trained before: running statistics that are nobody's first ones."""
  moved = jax.tree.map(
    lambda x: np.asarray(x) + 0.1 * np.arange(x.size, dtype='float32'), now.batch_stats
  )
  return now.replace(batch_stats=jax.device_put(moved, now.step.sharding))


def test_what_is_frozen_stays_to_the_bit(plan):
  how = config.Step(regularisation=EVERYTHING, micro_batches=2, frozen=EARLY)
  before, after, _, _ = run(plan, how, num_steps=3, change=trained_before)
  for old, new in (
    (before.params, after.params),
    (before.batch_stats, after.batch_stats),
    (before.ema['params'], after.ema['params']),
    (before.ema['batch_stats'], after.ema['batch_stats']),
  ):
    for name in old:
      # All others move, block 2's scores too: they choose from one map, but are decayed.
      for a, b in zip(jax.tree.leaves(old[name]), jax.tree.leaves(new[name]), strict=True):
        assert (a == b).all() if name in EARLY else (a != b).any(), name
  names = {key.key for path, _ in jax.tree_util.tree_leaves_with_path(after.opt_state)
           for key in path if isinstance(key, jax.tree_util.DictKey)}  # fmt: skip
  assert 'head' in names
  assert not names & set(EARLY)


def batch_norm_of_early_parts_evaluates(call, args, kwargs, context):
  if isinstance(context.module, BatchNorm) and context.module.path[0] in EARLY:
    return call(args[0], False)
  return call(*args, **kwargs)


def test_one_step_is_that_of_the_gradient_with_the_rest_held(plan):
  """The gradient of all parameters, by another way to the same network, and SGD by hand."""
  factors = dict.fromkeys((*BODY, 'head'), 0.5) | {'head': 1.0}
  how = config.Step(frozen=EARLY)
  before, after, numbers, batch = run(
    plan, how, change=trained_before, rates=tuple(factors.items()), clip_norm=0.01
  )
  images = preprocess.normalise(jnp.asarray(batch['image']), plan.data.mean, plan.data.std)

  @functools.partial(jax.jit, compiler_options=QUICKLY)
  def gradients(params):
    def loss(params):
      variables = {'params': params, 'batch_stats': before.batch_stats}
      with nn.intercept_methods(batch_norm_of_early_parts_evaluates):
        logits, updated = MODEL.apply(variables, images, train=True, mutable='batch_stats')
      return losses.cross_entropy(logits, batch['label']).mean(), updated['batch_stats']

    return jax.value_and_grad(loss, has_aux=True)(params)

  (loss, batch_stats), grads = jax.device_get(gradients(before.params))
  trained = parts.without(EARLY, grads)
  norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(trained)))
  assert norm > 0.01  # so that it is clipped
  np.testing.assert_allclose(numbers, [loss, norm, 1], rtol=1e-4)
  close(after.batch_stats, batch_stats)
  rate, decay = plan.optim.peak_lr, plan.optim.weight_decay
  for name, below in trained.items():
    want = jax.tree.map(
      lambda p, g, name=name: p - rate * factors[name] * (g * 0.01 / norm + decay * p),
      before.params[name],
      below,
    )
    close(after.params[name], want)


def test_head_only_is_regression_on_what_evaluation_sees(plan):
  before, after, numbers, batch = run(plan, config.Step(frozen=BODY), change=trained_before)
  images = preprocess.normalise(jnp.asarray(batch['image']), plan.data.mean, plan.data.std)
  network = functools.partial(MODEL.clone(features_only=True).apply, train=False)
  *_, last = jax.jit(network, compiler_options=QUICKLY)(before.variables, images)
  features = np.asarray(last).mean(axis=(1, 2))
  kernel, bias = (before.params['head']['dense'][key] for key in ('kernel', 'bias'))
  logits = features @ kernel + bias
  odds = np.exp(logits - logits.max(axis=1, keepdims=True))
  odds /= odds.sum(axis=1, keepdims=True)
  of_label = odds[np.arange(16), batch['label']]
  np.testing.assert_allclose(numbers[0], -np.log(of_label).mean(), rtol=1e-5)
  error = (odds - np.eye(10)[batch['label']]) / 16
  rate, decay = plan.optim.peak_lr, plan.optim.weight_decay
  close(
    after.params['head']['dense'],
    {
      'kernel': kernel - rate * (features.T @ error + decay * kernel),
      'bias': bias - rate * (error.sum(axis=0) + decay * bias),
    },
  )


@pytest.mark.slow
def test_one_and_eight_devices_take_the_same_step(plan):
  how = config.Step(regularisation=EVERYTHING, frozen=EARLY)
  _, one, loss, _ = run(plan, how, 1, change=trained_before)
  _, eight, loss_on_eight, _ = run(plan, how, 8, change=trained_before)
  np.testing.assert_allclose(loss, loss_on_eight, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), one, eight)


@pytest.mark.parametrize('remat', ['none', 'block'])
def test_no_gradient_goes_into_what_is_frozen(plan, remat):
  model = create_model('resnet20', 10, remat=remat)
  names = parts.module_names(model)
  forward = 19 + 2  # convolutions, two of them shortcuts
  again = {'none': 0, 'block': 1}[remat]

  def convolutions(*frozen):
    how = config.Step(frozen=tuple(n for n in names if parts.part(n) in frozen))
    optimizer = optim.make(dataclasses.replace(plan.optim, frozen=how.frozen))
    now = jax.eval_shape(lambda: state.create(model, optimizer, 8, 0))
    (batch,) = batches(1)
    step = steps.make_train_step(model, optimizer, plan.data, how)
    return str(jax.make_jaxpr(step)(now, batch)).count('conv_general_dilated[')

  assert convolutions('stem', 'stage1', 'stage2', 'stage3') == forward
  # Of stage 3's first block, the input has no gradient; two convolutions take it.
  assert convolutions('stem', 'stage1', 'stage2') == forward + 7 * (2 + again) - 2


def test_operations_of_a_step_without_them():
  model = create_model('resnet20', 10)
  layers = {layer.path: layer.cost.macs for layer in cost.count(model, 32)}
  whole, head = sum(layers.values()), layers['head', 'dense']
  early = sum(macs for path, macs in layers.items() if parts.part(path[0]) in ('stem', 'stage1'))
  names = parts.module_names(model)
  frozen = [name for name in names if parts.part(name) in ('stem', 'stage1')]
  assert cost.train_flops(model, 32) == 6 * whole
  assert cost.train_flops(model, 32, frozen) == 6 * whole - 4 * early
  assert cost.train_flops(model, 32, names[:-1]) == 2 * whole + 4 * head
  middle = [name for name in names if parts.part(name) == 'stage2']
  inside = sum(macs for path, macs in layers.items() if path[0] in middle)
  assert cost.train_flops(model, 32, middle) == 6 * whole - 2 * inside


def test_the_table_says_how_many_train():
  params = {'stem': jnp.ones([3, 5]), 'stage1_block1': jnp.ones([4]), 'head': jnp.ones([6])}
  table = state.parameter_table(params, ('stem', 'stage1_block1'))
  assert [row.split() for row in table.splitlines() if 'trained' in row] == [
    ['|', 'trained', '|', '1', '|', '6', '|', '24.0%', '|']
  ]
  assert 'trained' not in state.parameter_table(params)
