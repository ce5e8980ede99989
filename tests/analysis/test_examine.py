"""One pass over a split against NumPy, from the activations of the whole split at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afi_flax.analysis import examine as examine_lib
from afi_flax.analysis.examine import examine
from afi_flax.data import sources
from afi_flax.errors import UserError
from afi_flax.models.densenet import DenseNet
from afi_flax.models.fusion import Fusion
from tests.analysis import small_runs
from tests.analysis.small_runs import network

HALF, FULL = Fusion('half', 4), Fusion('full', 4)
SPLIT = 'test[:40]'


def forward(run, images):
  """Logits, and all that any module returned: of all pictures at once, in float64."""

  @jax.jit
  def apply(images):
    x = run.preprocessing(images)
    return run.model.apply(
      run.variables, x, train=False, capture_intermediates=True, mutable='intermediates'
    )

  logits, sown = jax.device_get(apply(images))
  return jax.tree.map(lambda x: x.astype(np.float64), (logits, sown['intermediates']))


def by_class(values, labels):
  """Means of [N,...] over the examples of each class that has some."""
  return np.stack([values[labels == k].mean(axis=0) for k in np.unique(labels)])


def selectivity_of(maps, labels):
  """Channel by channel, class by class."""
  means = by_class(maps.mean(axis=(1, 2)), labels)
  found = []
  for channel in means.T.tolist():
    best = channel.pop(int(np.argmax(channel)))
    rest = sum(channel) / len(channel)
    found.append((best - rest) / (best + rest) if best + rest else np.nan)
  return found


def maps_of(inside, block, channels=None):
  if channels is None:
    return inside[block]['fuse']['afi']['__call__'][0]
  return inside[block]['conv1']['__call__'][0][..., channels]


@pytest.fixture(scope='module')
def afi():
  """AFI in the first stage, the second one plain; what it gives; and its forward pass."""
  run = small_runs.make(network(HALF, None))
  found = examine(run, train_examples=25)
  train = sources.sample(sources.open_split('digits', '', 'train'), 25, seed=0)
  images = np.concatenate([sources.open_split('digits', '', SPLIT).images, train.images])
  logits, inside = forward(run, images)
  right = (logits[40:].argmax(axis=1) == train.labels).mean()
  return run, found, logits[:40], jax.tree.map(lambda x: x[:40], inside), right


def test_predictions(afi):
  _, found, logits, *_ = afi
  labels = sources.open_split('digits', '', SPLIT).labels
  p = np.exp(logits - logits.max(axis=1, keepdims=True))
  p /= p.sum(axis=1, keepdims=True)
  predicted = p.argmax(axis=1)
  order = np.argsort(-p, axis=1)
  assert (found.split, found.examples) == (SPLIT, 40)
  assert found.class_names == tuple('0123456789')
  assert found.top1 == (predicted == labels).mean()
  assert found.top5 == (order[:, :5] == labels[:, None]).any(axis=1).mean()
  np.testing.assert_allclose(found.nll, -np.log(p[np.arange(40), labels]).mean(), rtol=1e-5)
  confusion = [[((labels == i) & (predicted == j)).sum() for j in range(10)] for i in range(10)]
  assert found.confusion.tolist() == confusion
  wrong = [int(i) for i in np.argsort(-p.max(axis=1)) if predicted[i] != labels[i]]
  assert len(wrong) > 10
  assert [m.example for m in found.mistakes] == wrong[:32]
  for m in found.mistakes:
    assert (m.true, m.predicted) == (labels[m.example], predicted[m.example])
    assert m.probability == pytest.approx(p[m.example].max(), rel=1e-5)
  assert found.reliability.count.sum() == 40
  confidence = np.nansum(found.reliability.confidence * found.reliability.count)
  np.testing.assert_allclose(confidence, p.max(axis=1).sum(), rtol=1e-5)


def test_selectivity(afi):
  _, found, _, inside, _ = afi
  labels = sources.open_split('digits', '', SPLIT).labels
  assert list(found.selectivity) == ['stage1_block2', 'stage1_block3', 'stage2_block2']
  for block, channels in zip(found.selectivity, (None, None, slice(8, 16)), strict=True):
    wanted = selectivity_of(maps_of(inside, block, channels), labels)
    np.testing.assert_allclose(found.selectivity[block], wanted, rtol=1e-4, atol=1e-6)
  assert np.nanmax(found.selectivity['stage2_block2']) > 0.05


def test_reuse(afi):
  _, found, _, inside, _ = afi
  labels = sources.open_split('digits', '', SPLIT).labels
  assert list(found.reuse) == ['stage1_block2', 'stage1_block3']
  assert found.reuse['stage1_block2'].sources == ('stage1_block1',)
  assert found.reuse['stage1_block2'].mean.tolist() == [1]
  assert np.isnan(found.reuse['stage1_block2'].entropy)
  reuse = found.reuse['stage1_block3']
  assert reuse.sources == ('stage1_block1', 'stage1_block2')
  s = inside['stage1_block3']['fuse']['afi']['weights'][0]  # [40,2,4]
  np.testing.assert_allclose(reuse.mean, s.mean(axis=(0, 2)), rtol=1e-5)
  np.testing.assert_allclose(reuse.spread, by_class(s.mean(axis=2), labels).std(axis=0), rtol=1e-3)
  np.testing.assert_allclose(reuse.entropy, -(s * np.log2(s)).sum(axis=1).mean(), rtol=1e-5)
  assert 0.1 < reuse.entropy < 0.99
  assert reuse.spread[0] > 1e-4


def test_training_pictures_are_a_sample_of_that_split(afi):
  _, found, *_, right = afi
  assert found.train_top1 == right


@pytest.mark.parametrize(
  ('devices', 'batch_size'),
  [(8, 12), *(pytest.param(*at, marks=pytest.mark.slow) for at in ((1, 7), (2, 64)))],
)
def test_neither_batches_nor_devices_matter(afi, devices, batch_size):
  run, wanted, *_ = afi
  told = []
  again = small_runs.make(run.model, devices, batch_size)
  found = examine(again, train_examples=25, on_progress=lambda *at: told.append(at))
  assert told == sorted(set(told))
  assert told[-1] == (65, 65)
  assert found.confusion.tolist() == wanted.confusion.tolist()
  assert found.train_top1 == wanted.train_top1
  assert [m.example for m in found.mistakes] == [m.example for m in wanted.mistakes]
  for name in ('nll', 'top1', 'top5'):
    np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-6)
  for block, index in wanted.selectivity.items():
    np.testing.assert_allclose(found.selectivity[block], index, atol=1e-6)
  for block, reuse in wanted.reuse.items():
    np.testing.assert_allclose(found.reuse[block].mean, reuse.mean, rtol=1e-5)
    np.testing.assert_allclose(found.reuse[block].spread, reuse.spread, atol=1e-6)
    np.testing.assert_allclose(found.reuse[block].entropy, reuse.entropy, rtol=1e-5)


@pytest.mark.slow
def test_what_is_kept_on_the_devices_does_not_grow_with_the_split(afi):
  run, *_ = afi
  sizes, look = {}, examine_lib._Pass(run, run.plan.data)
  for split in ('test[:5]', 'test'):
    _, sums = look(sources.open_split('digits', '', split), lambda done: None)
    sizes[split] = [x.shape for x in jax.tree.leaves(sums)]
  assert sizes['test[:5]'] == sizes['test']
  assert all(shape[0] == 10 for shape in sizes['test'])


@pytest.mark.slow
def test_dead_channels_and_classes_without_examples():
  """Of AFI-B, whose R is dead where all its sources are: 'test[:4]' has four of ten classes."""
  run = small_runs.make(network(None, FULL, blocks=(2, 2)), split='test[:4]')

  def kill(bias):
    bias[5] = -1000
    return bias

  for block in ('stage1_block2', 'stage2_block1'):
    run = small_runs.changed(run, f'params/{block}/conv1/bn/bias', kill)
  found = examine(run, train_examples=0)
  source = sources.open_split('digits', '', 'test[:4]')
  assert found.train_top1 is None
  assert found.confusion.sum(axis=1).tolist() == np.bincount(source.labels, minlength=10).tolist()
  assert np.flatnonzero(np.isnan(found.selectivity['stage2_block2'])).tolist() == [5]
  assert np.flatnonzero(np.isnan(found.selectivity['stage1_block2'])).tolist() == [1]  # of 4 to 7
  _, inside = forward(run, source.images)
  for block, channels in (('stage1_block2', slice(4, 8)), ('stage2_block2', None)):
    wanted = selectivity_of(maps_of(inside, block, channels), source.labels)
    np.testing.assert_allclose(found.selectivity[block], wanted, rtol=1e-4, atol=1e-6)


def test_a_network_without_such_places():
  model = DenseNet((1, 1), num_classes=10, growth=4)
  run = small_runs.make(model, split='test[:5]')
  found = examine(run, train_examples=0)
  assert (found.selectivity, found.reuse, found.examples) == ({}, {}, 5)


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['block', 'fusion'])
def test_what_is_computed_again_is_seen_too(afi, remat):
  run, wanted, *_ = afi
  again = dataclasses.replace(run, model=run.model.clone(remat=remat))
  found = examine(again, train_examples=0)
  assert found.confusion.tolist() == wanted.confusion.tolist()
  for block, index in wanted.selectivity.items():
    np.testing.assert_allclose(found.selectivity[block], index, atol=1e-5)


def test_mistakes_of_the_user(afi):
  run, *_ = afi
  with pytest.raises(UserError, match='train_examples -1 must be 0'):
    examine(run, train_examples=-1)
  with pytest.raises(UserError, match='unknown split of digits'):
    examine(run, split='val')
  data = dataclasses.replace(run.plan.data, train_split='none')
  without = dataclasses.replace(run, plan=dataclasses.replace(run.plan, data=data))
  with pytest.raises(UserError, match=r"'none'.*; --train_examples=0 does without training pict"):
    examine(without)
  other = dataclasses.replace(run, class_names=tuple('abcdefghij'))
  with pytest.raises(UserError, match="class 0 was 'a' in training and is '0' here"):
    examine(other)
  diverged = small_runs.changed(run, 'params/head/dense/bias', lambda x: x * jnp.nan)
  with pytest.raises(UserError, match='gives nan as the probability of example 0: the run has di'):
    examine(diverged, train_examples=0)
