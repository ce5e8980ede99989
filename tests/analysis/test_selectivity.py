import numpy as np

from afi_flax.analysis import reuse, selectivity


def test_index_is_that_of_morcos_et_al():
  """Of each channel on its own, in plain Python; classes of unequal size count once each."""
  rng = np.random.default_rng(0)
  counts = np.array([5, 0, 1, 20])
  sums = rng.uniform(0, 1, [4, 6]) * counts[:, None]
  found = selectivity.index(sums, counts)
  for c in range(6):
    means = sorted(sums[k, c] / counts[k] for k in (0, 2, 3))
    rest = (means[0] + means[1]) / 2
    np.testing.assert_allclose(found[c], (means[2] - rest) / (means[2] + rest))


def test_dead_channels_have_none():
  sums = np.array([[0.0, 0, 3], [0, 2, 3]])
  found = selectivity.index(sums, np.array([1, 1]))
  assert np.isnan(found[0])
  assert found[1:].tolist() == [1, 0]
  assert np.isnan(selectivity.index(np.zeros([3, 4]), np.array([2, 2, 2]))).all()


def test_one_class_alone_has_no_rest():
  sums = np.array([[0.0, 0], [4, 6]])
  assert np.isnan(selectivity.index(sums, np.array([0, 2]))).all()
  assert np.isnan(selectivity.index(sums * 0, np.array([0, 0]))).all()


def test_order_is_the_networks():
  names = ['stage2_block1', 'stage1_block10', 'stage1_block2']
  assert selectivity.in_order(names) == ['stage1_block2', 'stage1_block10', 'stage2_block1']


def test_entropy_of_equal_weights_and_of_one_source():
  weights = np.full([2, 4, 3], 0.25, np.float32)
  weights[1] = np.array([0, 0, 1, 0])[:, None]
  rows = np.asarray(reuse.of_pictures(weights), np.float64)
  np.testing.assert_allclose(rows[0], [0.25, 0.25, 0.25, 0.25, np.log(4)], rtol=1e-6)
  assert rows[1].tolist() == [0, 0, 1, 0, 0]
  found = reuse.summarise('stage3_block5', rows, np.array([1, 1]))
  assert found.sources == ('stage3_block1', 'stage3_block2', 'stage3_block3', 'stage3_block4')
  np.testing.assert_allclose(found.mean, [0.125, 0.125, 0.625, 0.125])
  np.testing.assert_allclose(found.spread, [0.125, 0.125, 0.375, 0.125])
  np.testing.assert_allclose(found.entropy, 0.5)
