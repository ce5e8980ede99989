import numpy as np
import pytest

from afi_flax.analysis import style


@pytest.mark.parametrize(
  ('values', 'limits'),
  [
    ([50, 50], (45, 55)),  # at least so wide
    ([0, 0], (0, 10)),  # not below 0
    ([99, 100], (90, 100)),
    ([0, 100], (0, 100)),
    ([20, 70], (15, 75)),
  ],
)
def test_an_axis_of_per_cents(values, limits):
  panel = style.new(3, 2).subplots()
  style.per_cent(panel, np.array(values), 10)
  low, high = limits
  margin = 0.02 * (high - low)
  np.testing.assert_allclose(panel.get_xlim(), (low - margin, high + margin))


def test_the_run_has_the_same_colour_alone_and_beside_a_baseline():
  assert style.colours(['run']) == style.colours(['baseline', 'run'])[1:]
