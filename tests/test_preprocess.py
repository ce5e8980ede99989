import numpy as np

from afi_flax import preprocess


def test_normalise():
  images = np.random.default_rng(0).integers(0, 256, [2, 3, 4, 3]).astype('uint8')
  mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
  want = (images / 255 - np.array(mean)) / np.array(std)
  got = preprocess.normalise(images, mean, std)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
