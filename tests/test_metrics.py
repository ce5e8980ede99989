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


def test_zeros_are_the_sums_over_nothing():
  nothing = metrics.sums(jnp.ones([2, 3]), jnp.zeros(2, 'int32'), jnp.ones(2), jnp.zeros(2))
  assert {k: v.dtype for k, v in nothing.items()} == {
    k: v.dtype for k, v in metrics.zeros().items()
  }
  assert not any(v for v in nothing.values())
