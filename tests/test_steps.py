import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from afi_flax import config, metrics, optim, sharding, state, steps
from afi_flax.data import pipeline, sources
from afi_flax.models import create_model
from afi_flax.models.fusion import Fusion
from afi_flax.models.layers import ConvBN
from afi_flax.models.resnet import BasicBlock, ResNet
from configs import cifar100_afi_resnet32 as shipped

FUSION = Fusion('half', reduction=4)
# Two stages with block 1, a stride, and up to two reused features: as small as compiles fast.
MODEL = ResNet((3, 2), (8, 16), BasicBlock, 'cifar', 10, (FUSION, FUSION))


@pytest.fixture(scope='module')
def plan():
  cfg = shipped.get_config('smoke')
  cfg.schedule.boundaries = ()  # no drop within the few steps taken here
  return config.resolve(cfg, device_count=8)


@pytest.fixture(scope='module')
def batches(plan):
  source = sources.open_split('fake_cifar', '', 'train')
  stream = pipeline.train_batches(
    source, seed=0, data_step=0, batch_size=16, augment='pad_crop_flip', image_size=32
  )
  return [next(stream) for _ in range(3)]


def run(plan, batches, num_devices, seed=0):
  """States and losses of one step a batch, and the jitted step."""
  mesh = sharding.make_mesh(jax.devices()[:num_devices])
  optimizer = optim.make(plan.optim)
  replicated = sharding.replicated(mesh)
  train_step = jax.jit(
    steps.make_train_step(MODEL, optimizer, plan.data, plan.step),
    donate_argnums=0,
    out_shardings=replicated,
  )
  now = state.Initial(MODEL, optimizer, 32, seed, replicated).state()
  losses = []
  for batch in batches:
    now, (loss, _, _) = train_step(now, sharding.put_batch(batch, mesh))
    losses.append(float(loss))
  return now, losses, train_step


@pytest.fixture(scope='module')
def on_one(plan, batches):
  return run(plan, batches, 1)


@pytest.fixture(scope='module')
def on_eight(plan, batches):
  return run(plan, batches, 8)


def test_one_and_eight_devices_take_the_same_step(plan, batches, on_one, on_eight):
  one, eight = run(plan, batches[:1], 1), run(plan, batches[:1], 8)
  np.testing.assert_allclose(one[1], eight[1], rtol=1e-6)
  for path, a in jax.tree_util.tree_leaves_with_path(jax.device_get(one[0])):
    b = dict(jax.tree_util.tree_leaves_with_path(jax.device_get(eight[0])))[path]
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=str(path))
  np.testing.assert_allclose(on_one[1], on_eight[1], rtol=1e-4)


def test_same_seed_same_bits_and_other_seed_other_loss(plan, batches, on_one):
  again, losses, _ = run(plan, batches, 1)
  assert losses == on_one[1]
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(on_one[0]), strict=True):
    np.testing.assert_array_equal(a, b)
  assert run(plan, batches[:1], 1, seed=1)[1] != losses[:1]


def test_compiles_once(on_one, on_eight):
  assert on_one[2]._cache_size() == 1
  assert on_eight[2]._cache_size() == 1


def test_state_after_three_steps(plan, batches, on_one):
  now, losses, _ = on_one
  assert int(now.step) == int(now.data_step) == 3
  means = metrics.means([now.metric_sums])
  assert means['examples'] == 48
  np.testing.assert_allclose(means['loss'], np.mean(losses), rtol=1e-5)
  assert {x.dtype for x in jax.tree.leaves(now.params)} == {jnp.dtype('float32')}


def test_learns_one_batch_by_heart(plan, batches):
  _, losses, _ = run(plan, batches[:1] * 60, 1)
  assert losses[-1] < 0.5 * losses[0]


def test_global_batch_norm(plan, batches, on_eight):
  """Running means after one step are those of the whole batch, not of a device's share."""
  now, _, _ = run(plan, batches[:1], 8)
  one = sharding.replicated(sharding.make_mesh(jax.devices()[:1]))
  first = state.Initial(MODEL, optim.make(plan.optim), 32, 0, one).state()
  images = (batches[0]['image'] / 255 - np.array(plan.data.mean)) / np.array(plan.data.std)
  kernel = jax.device_get(first.params['stem']['conv']['kernel'])
  out = jax.lax.conv_general_dilated(
    images.astype('float32'), kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  want_mean, want_var = out.mean(axis=(0, 1, 2)), out.var(axis=(0, 1, 2))  # var: divided by n
  got = now.batch_stats['stem']['bn']
  np.testing.assert_allclose(got['mean'], 0.1 * want_mean, rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(got['var'], 0.9 + 0.1 * want_var, rtol=1e-3)


def test_batch_norm_of_each_device_is_that_of_shard_map():
  mesh = sharding.make_mesh()
  images = jax.random.normal(jax.random.key(0), [16, 4, 4, 3])
  layer = ConvBN(4)
  variables = layer.init(jax.random.key(0), images, train=False)
  by_device, everywhere = jax.sharding.PartitionSpec('data'), jax.sharding.PartitionSpec()

  wanted = jax.random.normal(jax.random.key(1), (*images.shape[:3], 4))

  def loss(params, images, wanted, train):
    given = variables | {'params': params}
    out, updated = layer.apply(given, images, train=train, mutable='batch_stats')
    return ((out - wanted) ** 2).mean(), (updated['batch_stats'], out)

  gradient = jax.value_and_grad(loss, has_aux=True)

  def of_one_device(params, images, wanted):
    params = jax.lax.pcast(params, 'data', to='varying')  # else its gradient is summed already
    (value, (stats, out)), grads = gradient(params, images, wanted, True)
    return jax.lax.pmean((value, stats, grads), 'data'), out

  own = jax.shard_map(
    of_one_device,
    mesh=mesh,
    in_specs=(everywhere, by_device, by_device),
    out_specs=(everywhere, by_device),
  )

  @jax.jit
  def ours(params, images, wanted):
    (value, (stats, out)), grads = gradient(params, images, wanted, 8)
    return (value, stats, grads), out

  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  split = jax.device_put((images, wanted), sharding.split(mesh))
  want = jax.jit(own)(variables['params'], *split)
  assert {x.sharding.num_devices for x in jax.tree.leaves(want)} == {8}
  jax.tree.map(close, ours(variables['params'], *split), want)
  jax.tree.map(close, ours(variables['params'], images, wanted), want)  # one device


def test_batch_norm_of_groups_of_devices():
  """Two groups of four: each half of the batch is normalised by itself, wherever it is."""
  layer, images = ConvBN(4), jax.random.normal(jax.random.key(0), [16, 4, 4, 3])
  variables = layer.init(jax.random.key(0), images, train=False)

  @functools.partial(jax.jit, static_argnums=1)
  def forward(images, parts):
    return layer.apply(variables, images, train=parts, mutable='batch_stats')[0]

  want = np.concatenate([forward(half, 1) for half in np.split(np.asarray(images), 2)])
  split = jax.device_put(images, sharding.split(sharding.make_mesh()))
  assert len(split.sharding.device_set) == 8
  np.testing.assert_allclose(forward(split, 2), want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'parts', 'all_reduces'),
  [('resnet20', 8, 1), ('resnet20', 1, 39), ('afi_resnet20', 8, 1), ('afi_resnet20', 1, 39)],
)
def test_number_of_sums_over_devices(plan, name, parts, all_reduces):
  """Global statistics: one for each of 19 convolutions, forward and backward, and the gradients."""
  mesh, model = sharding.make_mesh(), create_model(name, 10)
  optimizer, replicated = optim.make(plan.optim), sharding.replicated(mesh)
  step = steps.make_train_step(model, optimizer, plan.data, config.Step(batch_norm_parts=parts))
  now = state.abstract(model, optimizer, 32, replicated)
  batch = {
    'image': jax.ShapeDtypeStruct((16, 32, 32, 3), 'uint8', sharding=sharding.split(mesh)),
    'label': jax.ShapeDtypeStruct((16,), 'int32', sharding=sharding.split(mesh)),
  }
  program = jax.jit(step, donate_argnums=0, out_shardings=replicated).lower(now, batch).compile()
  assert program.as_text().count(' all-reduce(') == all_reduces


def first_step(plan, batch, num_devices, micro_batches, stats=None):
  """The state after one step; `stats` None: from the initial running statistics."""
  mesh = sharding.make_mesh(jax.devices()[:num_devices])
  optimizer, replicated = optim.make(plan.optim), sharding.replicated(mesh)
  step = steps.make_train_step(
    MODEL, optimizer, plan.data, config.Step(micro_batches=micro_batches)
  )
  now = state.Initial(MODEL, optimizer, 32, 0, replicated).state()
  now = now if stats is None else now.replace(batch_stats=stats)
  return jax.jit(step, out_shardings=replicated)(now, sharding.put_batch(batch, mesh))


class WithoutBatchNorm(nn.Module):
  """As small as can be, with the statistics that a state wants, though it uses none."""

  @nn.compact
  def __call__(self, images, train):
    self.variable('batch_stats', 'unused', jnp.zeros, [1])
    pooled = images.reshape(len(images), 8, 4, 8, 4, 3).mean(axis=(2, 4))
    hidden = nn.relu(nn.Dense(16)(pooled.reshape(len(images), -1)))
    return nn.Dense(10)(hidden)


def test_micro_batches_without_batch_norm_equal_the_whole_batch(plan, batches):
  model, optimizer, batch = WithoutBatchNorm(), optim.make(plan.optim), batches[0]
  mesh = sharding.make_mesh(jax.devices()[:1])
  now = state.Initial(model, optimizer, 32, 0, sharding.replicated(mesh)).state()
  (whole, loss), (cut, loss_cut) = (
    jax.jit(
      steps.make_train_step(model, optimizer, plan.data, config.Step(micro_batches=micro_batches))
    )(now, batch)
    for micro_batches in (1, 4)
  )
  np.testing.assert_allclose(loss_cut, loss, rtol=1e-6)
  for got, want in ((cut.params, whole.params), (cut.metric_sums, whole.metric_sums)):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, want)


@pytest.mark.slow
@pytest.mark.parametrize('num_devices', [1, 4])
def test_micro_batches_are_a_mean_of_gradients(plan, batches, num_devices):
  """Each part is normalised by itself: the reference takes one plain step on each."""
  batch = batches[0]
  got, loss = first_step(plan, batch, num_devices, micro_batches=2)
  parts = [{name: x[i::2] for name, x in batch.items()} for i in range(2)]
  a, loss_a = first_step(plan, parts[0], 1, micro_batches=1)
  b, loss_b = first_step(plan, parts[1], 1, 1, stats=jax.device_get(a.batch_stats))
  np.testing.assert_allclose(loss[0], (loss_a[0] + loss_b[0]) / 2, rtol=1e-5)

  def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6)

  # SGD's first step is linear in the gradient, so the mean of two steps is the step of the mean.
  jax.tree.map(
    lambda x, y, z: close(x, (y + z) / 2), *map(jax.device_get, (got.params, a.params, b.params))
  )
  jax.tree.map(close, jax.device_get(got.batch_stats), jax.device_get(b.batch_stats))
  assert int(got.metric_sums['examples']) == len(batch['label'])


class Sick(nn.Module):
  """A network one of whose numbers is not finite, from its first step on."""

  where: str

  @nn.compact
  def __call__(self, images, train):
    zero = self.param('zero', nn.initializers.zeros, [10])
    stats = self.variable('batch_stats', 'mean', jnp.zeros, [1])
    logits = nn.Dense(10)(images.mean(axis=(1, 2))) + zero[None]
    if self.where == 'the loss':
      logits = jnp.log(logits - logits)
    if self.where == 'the gradient':
      logits = logits + jnp.sqrt(zero * zero)[None]  # whose derivative at 0 is not
    if self.where == 'the statistics' and train:
      stats.value = stats.value + jnp.inf
    return logits


@pytest.mark.parametrize('where', ['the loss', 'the gradient', 'the statistics', 'nothing'])
def test_a_batch_that_is_not_finite_leaves_no_trace(plan, batches, where):
  model, optimizer = Sick(where), optim.make(plan.optim)
  before = state.create(model, optimizer, 32, seed=0)
  step = jax.jit(steps.make_train_step(model, optimizer, plan.data, config.Step()))
  after, (loss, norm, finite) = step(before, batches[0])
  assert np.isfinite(loss) == (where != 'the loss')
  assert np.isfinite(norm) == (where not in ('the loss', 'the gradient'))
  assert finite == (where == 'nothing')
  assert int(after.data_step) == 1
  if where == 'nothing':
    images = steps.preprocess.normalise(batches[0]['image'], plan.data.mean, plan.data.std)

    def mean_loss(params):
      logits = model.apply({'params': params, 'batch_stats': before.batch_stats}, images, False)
      return steps.losses.cross_entropy(logits, batches[0]['label']).mean()

    gradient = jax.tree.leaves(jax.grad(mean_loss)(before.params))
    squares = [np.square(np.asarray(g, 'float64')).sum() for g in gradient]
    np.testing.assert_allclose(norm, np.sqrt(np.sum(squares)), rtol=1e-5)
    assert int(after.step) == 1
  else:
    jax.tree.map(np.testing.assert_array_equal, after, before.replace(data_step=jnp.int32(1)))
    assert state.all_finite(after)


def test_all_finite(plan):
  now = state.create(Sick('nothing'), optim.make(plan.optim), 32, seed=0)
  assert state.all_finite(now)
  for value in (jnp.nan, jnp.inf):
    assert not state.all_finite(now.replace(batch_stats={'mean': jnp.array([value])}))


def test_what_the_compiler_is_told():
  gpu, cpu = (types.SimpleNamespace(platform=platform) for platform in ('gpu', 'cpu'))
  assert steps.compiler_options(False, gpu) == {}
  assert steps.compiler_options(True, cpu) == steps.compiler_options(False, cpu)
  for options in steps.compiler_options(True, gpu), steps.compiler_options(False, cpu):
    assert options
    # XLA refuses options that it does not know, whatever they are for.
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
