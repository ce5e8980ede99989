import jax.numpy as jnp
import numpy as np
import pytest

from afi_flax import losses

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(6, 5)).astype('float32') * 3
LABELS = RNG.integers(0, 5, 6).astype('int32')
MIXED = RNG.dirichlet(np.ones(5), 6).astype('float32')


def log_softmax(logits):
  return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_cross_entropy_of_labels_and_of_targets():
  want = -log_softmax(LOGITS)[np.arange(6), LABELS]
  np.testing.assert_allclose(losses.cross_entropy(LOGITS, LABELS), want, rtol=1e-5)
  one_hot = losses.soft_targets(LABELS, 5)
  np.testing.assert_allclose(losses.cross_entropy(LOGITS, one_hot), want, rtol=1e-5)
  want = -(MIXED * log_softmax(LOGITS)).sum(axis=1)
  np.testing.assert_allclose(losses.cross_entropy(LOGITS, jnp.asarray(MIXED)), want, rtol=1e-5)


def test_smoothing_as_szegedy_defines_it():
  """(1 - s) of the label's loss and s of the mean over the classes."""
  targets = losses.soft_targets(LABELS, 5, smoothing=0.1)
  logs = -log_softmax(LOGITS)
  want = 0.9 * logs[np.arange(6), LABELS] + 0.1 * logs.mean(axis=1)
  np.testing.assert_allclose(losses.cross_entropy(LOGITS, targets), want, rtol=1e-5)
  np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize('threshold', [0.0, 0.2])
def test_binary_cross_entropy(threshold):
  targets = (threshold < MIXED) * 1.0 if threshold else MIXED
  p = 1 / (1 + np.exp(-LOGITS.astype('float64')))
  want = -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).mean(axis=1)
  got = losses.binary_cross_entropy(LOGITS, jnp.asarray(MIXED), threshold)
  np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize('threshold', [0.0, 0.2])
@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_binary_cross_entropy_as_timm(threshold, smoothing):
  torch = pytest.importorskip('torch')
  timm = pytest.importorskip('timm.loss')
  reference = timm.BinaryCrossEntropy(smoothing, threshold or None)
  want = reference(torch.tensor(LOGITS), torch.tensor(LABELS))
  targets = losses.soft_targets(LABELS, 5, smoothing)
  got = losses.binary_cross_entropy(LOGITS, targets, threshold).mean()
  np.testing.assert_allclose(got, want, rtol=1e-5)
  want = reference(torch.tensor(LOGITS), torch.tensor(MIXED))
  got = losses.binary_cross_entropy(LOGITS, jnp.asarray(MIXED), threshold).mean()
  np.testing.assert_allclose(got, want, rtol=1e-5)
