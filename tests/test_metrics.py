import jax
import jax.numpy as jnp
import numpy as np

from afi_flax import losses, metrics


def test_sums_leave_masked_examples_out():
  logits = np.random.default_rng(0).normal(size=[40, 12]).astype('float32')
  labels = np.arange(40, dtype='int32') % 12
  mask = (np.arange(40) % 3 > 0).astype('float32')
  per_example = losses.cross_entropy(logits, labels)
  got = metrics.means([metrics.sums(logits, labels, per_example, mask)])
  kept = mask > 0
  order = np.argsort(-logits[kept], axis=1)
  assert got['examples'] == kept.sum()
  assert got['top1'] == (order[:, 0] == labels[kept]).mean()
  assert got['top5'] == (order[:, :5] == labels[kept][:, None]).any(axis=1).mean()
  p = np.exp(logits[kept]) / np.exp(logits[kept]).sum(axis=1, keepdims=True)
  want = -np.log(p[np.arange(kept.sum()), labels[kept]]).mean()
  np.testing.assert_allclose(got['loss'], want, rtol=1e-5)


def test_means_weigh_batches_by_their_examples():
  logits = jnp.array([[2.0, 0], [0, 2], [0, 2]])
  labels = jnp.array([0, 0, 0])
  one = metrics.sums(logits[:1], labels[:1], jnp.array([1.0]), jnp.ones(1))
  two = metrics.sums(logits[1:], labels[1:], jnp.array([4.0, 4.0]), jnp.ones(2))
  got = metrics.means([one, two])
  assert got == {'loss': 3.0, 'top1': 1 / 3, 'top5': 1.0, 'examples': 3}


def test_a_masked_loss_may_be_anything():
  logits = jnp.zeros([2, 3])
  got = metrics.sums(logits, jnp.array([0, 0]), jnp.array([1.0, jnp.nan]), jnp.array([1.0, 0]))
  assert float(got['loss']) == 1.0


def test_with_few_classes_top5_is_top_k():
  logits = jnp.array([[3.0, 2, 1]])
  assert metrics.means([metrics.sums(logits, jnp.array([2]), jnp.zeros(1), jnp.ones(1))]) == {
    'loss': 0.0,
    'top1': 0.0,
    'top5': 1.0,
    'examples': 1,
  }


def test_ties_and_nans_are_not_hits():
  labels = jnp.array([0, 1, 2])
  np.testing.assert_array_equal(metrics.label_rank(jnp.ones([3, 3]), labels), [0, 1, 2])
  assert (metrics.label_rank(jnp.full([3, 8], jnp.nan), labels) >= 5).all()


def test_with_several_labels_any_of_them_is_right():
  """As ReaL counts, against NumPy: none to four labels, of which the last column may be empty."""
  rng = np.random.default_rng(1)
  logits = rng.normal(size=[60, 12]).astype('float32')
  sets = [rng.choice(12, n, replace=False) for n in rng.integers(0, 5, 60)]
  labels = np.array([[*s, *[-1] * (5 - len(s))] for s in sets], 'int32')
  mask = (labels.max(axis=1) >= 0) & (np.arange(60) % 4 > 0)
  per_example = losses.any_label_cross_entropy(logits, labels)
  got = metrics.means([jax.jit(metrics.sums)(logits, labels, per_example, mask.astype('float32'))])
  p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  order = np.argsort(-logits, axis=1)
  kept = np.flatnonzero(mask)
  assert 10 < len(kept) < 45
  assert got['examples'] == len(kept)
  for key, k in (('top1', 1), ('top5', 5)):
    hits = [bool(set(order[i, :k]) & set(sets[i])) for i in kept]
    assert 0.1 < np.mean(hits) < 1
    assert got[key] == np.mean(hits)
  np.testing.assert_allclose(
    got['loss'], np.mean([-np.log(p[i, sets[i]].sum()) for i in kept]), rtol=1e-5
  )


def test_one_label_in_a_set_is_that_label():
  logits = np.random.default_rng(0).normal(size=[40, 12]).astype('float32')
  labels = np.arange(40, dtype='int32') % 12
  alone = np.stack([labels, np.full_like(labels, -1)], axis=1)
  mask = np.ones(40, 'float32')
  one = metrics.sums(logits, labels, losses.cross_entropy(logits, labels), mask)
  other = metrics.sums(logits, alone, losses.any_label_cross_entropy(logits, alone), mask)
  for key in ('top1', 'top5', 'examples'):
    assert one[key] == other[key]
  np.testing.assert_allclose(one['loss'], other['loss'], rtol=1e-6)
  nothing = metrics.sums(jnp.full([2, 3], jnp.nan), alone[:2], jnp.zeros(2), jnp.ones(2))
  assert (nothing['top1'], nothing['top5']) == (0, 0), 'where logits are NaN, nothing is right'


def test_zeros_are_the_sums_over_nothing():
  nothing = metrics.sums(jnp.ones([2, 3]), jnp.zeros(2, 'int32'), jnp.ones(2), jnp.zeros(2))
  assert {k: v.dtype for k, v in nothing.items()} == {
    k: v.dtype for k, v in metrics.zeros().items()
  }
  assert not any(v for v in nothing.values())
