import jax.numpy as jnp
import numpy as np
import pytest

from afi_flax import random_draws

GOLDEN_ORDER = [0, 6, 7, 1, 2, 5, 8, 3, 4, 9]


def mix_reference(x: int) -> int:
  """Wellons' lowbias32 over Python integers."""
  x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
  x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
  return x ^ (x >> 16)


def bits_reference(*counters: int) -> int:
  h = 0
  for counter in counters:
    h = mix_reference(h ^ mix_reference((counter + 0x9E3779B9) & 0xFFFFFFFF))
  return h


def test_bits_equal_a_reference_over_python_integers():
  for counters in [(0,), (1, 2, 3), (3, 2, 1), (2**32 - 1, 7), (123456789, 5, 0, 1281166)]:
    assert int(random_draws.bits(*counters)) == bits_reference(*counters)


def test_arrays_and_negative_counters_equal_scalars():
  example = np.array([-1, 0, 7], np.int32)
  drawn = random_draws.bits(5, 2, example)
  assert drawn.dtype == np.uint32
  assert drawn.tolist() == [bits_reference(5, 2, i % 2**32) for i in example.tolist()]


@pytest.mark.parametrize(
  'draw',
  [
    random_draws.bits,
    random_draws.uniform,
    lambda *counters: random_draws.integers(9, *counters),
    lambda *counters: random_draws.integers(65536, *counters),
  ],
)
def test_numpy_and_jax_draw_the_same_bits(draw):
  epoch, example = np.divmod(np.arange(4096, dtype=np.int32), 1000)
  on_host = draw(11, random_draws.CROP_X, epoch, example)
  on_device = draw(11, random_draws.CROP_X, jnp.asarray(epoch), jnp.asarray(example))
  assert isinstance(on_host, np.ndarray)
  assert not isinstance(on_device, np.ndarray)
  assert on_host.dtype == on_device.dtype
  np.testing.assert_array_equal(on_host, np.asarray(on_device))


@pytest.mark.parametrize('varying', [0, 2, 3])  # seed, epoch or example
def test_draws_are_uniform_and_neighbours_independent(varying):
  n, bins = 64_000, 64
  counters = [1, random_draws.FLIP, 2, 3]
  counters[varying] = np.arange(n)
  drawn = random_draws.uniform(*counters)
  assert drawn.min() >= 0
  assert drawn.max() < 1
  counts = np.bincount((drawn * bins).astype(int), minlength=bins)
  chi2 = ((counts - n / bins) ** 2 / (n / bins)).sum()  # mean 63, deviation 11
  assert 63 - 5 * 11 < chi2 < 63 + 5 * 11
  assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 5 / np.sqrt(n)


def test_draws_of_different_kinds_are_independent():
  example = np.arange(64_000)
  y = random_draws.uniform(0, random_draws.CROP_Y, 0, example)
  x = random_draws.uniform(0, random_draws.CROP_X, 0, example)
  assert abs(np.corrcoef(x, y)[0, 1]) < 5 / np.sqrt(len(x))


def test_integers_cover_their_range_evenly():
  counts = np.bincount(random_draws.integers(9, 0, 1, np.arange(90_000)), minlength=9)
  assert len(counts) == 9
  assert abs(counts - 10_000).max() < 5 * 100
  with pytest.raises(ValueError, match='65537'):
    random_draws.integers(65537, 0)


def test_permutation_is_pinned_and_complete():
  assert random_draws.permutation(10, seed=0, epoch=0).tolist() == GOLDEN_ORDER
  order = random_draws.permutation(50_000, seed=3, epoch=7)
  np.testing.assert_array_equal(np.sort(order), np.arange(50_000))
  other = random_draws.permutation(50_000, seed=3, epoch=8)
  assert (order == other).sum() < 20  # as many as chance puts in place: 1, rarely 5


def test_choice_is_a_fair_sample_in_order():
  chosen = random_draws.choice(1000, 100, seed=3)
  assert len(set(chosen.tolist())) == 100
  assert (np.diff(chosen) > 0).all()
  assert random_draws.choice(1000, 100, seed=3).tolist() == chosen.tolist()
  assert random_draws.choice(5, 9, seed=3).tolist() == [0, 1, 2, 3, 4]
  taken = np.bincount(np.concatenate([random_draws.choice(50, 10, s) for s in range(500)]))
  assert len(taken) == 50
  assert abs(taken - 100).max() < 45  # standard deviation 9
  assert abs(chosen.mean() - 500) < 120  # 29 * 4
