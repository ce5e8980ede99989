"""What processes tell each other, as far as one process can play them."""

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from afi_flax import sharding


@pytest.mark.parametrize('value', [0.1 + 2**-50, -1.0, float('inf'), 5e-324, 2**24 - 1, 2**53 - 1])
def test_what_the_first_process_says_is_exact(monkeypatch, value):
  """It goes over the devices, where JAX knows no float64."""
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(
    multihost_utils, 'broadcast_one_to_all', lambda x: np.asarray(jax.device_put(x))
  )
  told = sharding.first_process_says(value)
  assert type(told) is float
  assert told == value
