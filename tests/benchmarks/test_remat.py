import numpy as np
import pytest

from benchmarks import remat


@pytest.mark.slow
def test_runs_of_all_remats_take_the_same_steps():
  """On the smallest network: equal losses, and less memory the more is computed again."""
  runs = {name: remat.Training(remat.make_plan('afi_resnet20', name)) for name in remat.REMATS}
  losses = [[float(run()[0]) for _ in range(2)] for run in runs.values()]
  np.testing.assert_allclose(losses[1:], losses[:1] * 2, rtol=1e-3)
  assert losses[0][0] != losses[0][1], 'the state moves on'
  peaks = [run.peak for run in runs.values()]
  assert peaks == sorted(peaks, reverse=True)


@pytest.mark.slow
def test_draws(tmp_path):
  keys = [(network, name) for network in remat._NETWORKS for name in remat.REMATS]
  remat.draw(tmp_path / 'a.png', dict.fromkeys(keys, 2**20), dict.fromkeys(keys, 0.5))
  assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')
