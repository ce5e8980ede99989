import pickle

import numpy as np
import pytest

from afi_flax.analysis.quality import Mistake, Tally, difference_interval, interval

K = 12


def predictions(n):
  rng = np.random.default_rng(0)
  probability = rng.uniform(1 / K, 1, n).astype(np.float32)
  probability[:4] = 1, 0.2, 0.6, 0.8  # on the edges of bins, or next to them
  return {
    'example': np.arange(n, dtype=np.int32),
    'label': rng.integers(0, K, n).astype(np.int32),
    'predicted': rng.integers(0, K, n).astype(np.int32),
    'probability': probability,
    'rank': rng.integers(0, K, n).astype(np.int32),
    'loss': rng.uniform(0, 5, n).astype(np.float32),
  }


def tally_of(rows, batch_size):
  tally = Tally(K)
  for start in range(0, len(rows['label']), batch_size):
    tally.add(**{name: x[start : start + batch_size] for name, x in rows.items()})
  return tally


def test_reliability_is_that_of_guo_et_al():
  """Bin m of M has the predictions in ((m - 1) / M, m / M]."""
  rows = predictions(500)
  p, right = rows['probability'].astype(float), rows['predicted'] == rows['label']
  found, ece = tally_of(rows, 500).reliability(), 0
  for m in range(15):
    inside = (p > found.edges[m]) & (p <= found.edges[m + 1])
    assert found.count[m] == inside.sum()
    if inside.any():
      np.testing.assert_allclose(found.confidence[m], p[inside].mean())
      np.testing.assert_allclose(found.accuracy[m], right[inside].mean())
      ece += inside.mean() * abs(right[inside].mean() - p[inside].mean())
    else:
      assert np.isnan([found.confidence[m], found.accuracy[m]]).all()
  assert found.edges[-1] == 1
  assert found.count[-1] > 0
  assert found.count[0] == 0  # below 1 / K
  assert found.ece == pytest.approx(ece)


def test_a_perfectly_calibrated_network_has_no_error():
  rows = predictions(8)
  rows['probability'][:], rows['label'][:], rows['predicted'][:] = 0.75, 1, 1
  rows['predicted'][:2] = 0
  assert tally_of(rows, 3).reliability().ece == 0


def test_only_the_most_confident_mistakes_are_kept():
  rows = predictions(300)
  rows['probability'][100:140] = 0.97
  wrong = [i for i in range(300) if rows['label'][i] != rows['predicted'][i]]
  wrong.sort(key=lambda i: (-rows['probability'][i], i))
  found = tally_of(rows, 7).mistakes
  assert [m.example for m in found] == wrong[:32]
  first = wrong[0]
  true, predicted = int(rows['label'][first]), int(rows['predicted'][first])
  assert found[0] == Mistake(first, true, predicted, float(rows['probability'][first]))


@pytest.mark.parametrize('batch_size', [1, 64, 300])
def test_counts_of_batches_add_up(batch_size):
  rows = predictions(300)
  tally = tally_of(rows, batch_size)
  assert tally.examples == 300
  assert tally.top1 == (rows['label'] == rows['predicted']).mean()
  assert tally.top5 == (rows['rank'] < 5).mean()
  assert tally.nll == pytest.approx(rows['loss'].astype(float).mean())
  for i, j in ((0, 0), (3, 11), (11, 3)):
    assert tally.confusion[i, j] == ((rows['label'] == i) & (rows['predicted'] == j)).sum()


def test_few_classes_have_few_ranks():
  tally = Tally(2)
  zeros = np.zeros(3, np.int32)
  ranks = np.array([0, 1, 1], np.int32)
  tally.add(zeros, zeros, ranks, np.full(3, 0.6, np.float32), ranks, np.zeros(3, np.float32))
  assert tally.top5 == 1


@pytest.mark.parametrize(
  ('share', 'n', 'low', 'high'),
  # Of Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I.
  [(81 / 263, 263, 0.2553, 0.3662), (15 / 148, 148, 0.0624, 0.1605), (0 / 20, 20, 0.0, 0.1611),
   (1 / 29, 29, 0.0061, 0.1718)],
)  # fmt: skip
def test_the_interval_of_a_share(share, n, low, high):
  np.testing.assert_allclose(interval(share, n), (low, high), atol=5e-5)
  np.testing.assert_allclose(interval(1 - share, n), (1 - high, 1 - low), atol=5e-5)


@pytest.mark.parametrize(
  ('a', 'n', 'b', 'm', 'low', 'high'),
  # Of Newcombe, "Interval estimation for the difference between independent proportions" (1998).
  [(56 / 70, 70, 48 / 80, 80, 0.0524, 0.3339), (9 / 10, 10, 3 / 10, 10, 0.1705, 0.8090),
   (10 / 10, 10, 0 / 20, 20, 0.6791, 1.0)],
)  # fmt: skip
def test_the_interval_of_a_difference(a, n, b, m, low, high):
  np.testing.assert_allclose(difference_interval(a, n, b, m), (low, high), atol=5e-5)


def test_it_does_not_grow_with_what_it_counts():
  def size(tally):
    return sum(len(pickle.dumps(value)) for value in vars(tally).values())

  rows = predictions(20_000)
  one, all_ = tally_of({name: x[:500] for name, x in rows.items()}, 500), tally_of(rows, 500)
  assert size(all_) < 1.1 * size(one)
