"""Data sets, pictures and batches: numpy only, so that nothing here imports jax or TensorFlow."""
