"""What happens to pictures on the device: they travel as uint8, a quarter of float32's bytes."""

import jax
import numpy as np


def normalise(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
  """u8 [B,H,W,3] -> f32 [B,H,W,3], (x / 255 - mean) / std with one mean and std a channel."""
  # Numpy, so that both are constants of the program, rounded once.
  scale = np.asarray(1 / (255 * np.asarray(std)), 'float32').reshape(1, 1, 1, -1)
  shift = np.asarray(np.asarray(mean) / np.asarray(std), 'float32').reshape(1, 1, 1, -1)
  return images.astype('float32') * scale - shift
