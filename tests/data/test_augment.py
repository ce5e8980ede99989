import jax.numpy as jnp
import numpy as np
import pytest

from afi_flax import random_draws
from afi_flax.data import augment


def batch(b=64, side=32):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (b, side, side, 3), dtype=np.uint8)
  epoch = rng.integers(0, 3, b).astype(np.int32)
  return images, epoch, rng.permutation(1000)[:b].astype(np.int32)


def reference(name, image, seed, epoch, example):
  """One picture at a time, by slicing."""
  side = len(image)
  if name.startswith('pad_crop'):
    pad = side // 8
    y = int(random_draws.integers(2 * pad + 1, seed, random_draws.CROP_Y, epoch, example))
    x = int(random_draws.integers(2 * pad + 1, seed, random_draws.CROP_X, epoch, example))
    canvas = np.zeros((side + 2 * pad, side + 2 * pad, 3), np.uint8)
    canvas[pad : pad + side, pad : pad + side] = image
    image = canvas[y : y + side, x : x + side]
  if name.endswith('flip') and random_draws.integers(2, seed, random_draws.FLIP, epoch, example):
    image = image[:, ::-1]
  return image


@pytest.mark.parametrize('name', augment.IN_MEMORY)
@pytest.mark.parametrize('side', [16, 32])
def test_batches_equal_a_reference_one_by_one(name, side):
  images, epoch, example = batch(side=side)
  got = augment.arrays(name, images, 9, epoch, example)
  want = [reference(name, *row) for row in zip(images, [9] * 64, epoch, example, strict=True)]
  assert got.dtype == np.uint8
  np.testing.assert_array_equal(got, np.stack(want))


@pytest.mark.parametrize('name', augment.IN_MEMORY)
def test_the_same_code_on_the_device_gives_the_same_pixels(name):
  images, epoch, example = batch()
  on_host = augment.arrays(name, images, 9, epoch, example)
  on_device = augment.arrays(name, jnp.asarray(images), 9, jnp.asarray(epoch), jnp.asarray(example))
  assert not isinstance(on_device, np.ndarray)
  np.testing.assert_array_equal(on_host, np.asarray(on_device))


def test_every_shift_and_both_flips_are_drawn():
  images, _, _ = batch(1)
  images = np.broadcast_to(images, (2000, 32, 32, 3))
  got = augment.pad_crop(images, 0, np.zeros(2000, np.int32), np.arange(2000, dtype=np.int32))
  assert len(np.unique(got.reshape(2000, -1), axis=0)) == 81
  flipped = augment.flip(images, 0, np.zeros(2000, np.int32), np.arange(2000, dtype=np.int32))
  assert 0.45 < (flipped != images).any((1, 2, 3)).mean() < 0.55


def test_draws_change_with_seed_epoch_and_example():
  boxes = {
    augment.random_resized_box(300, 400, seed, epoch, example)
    for seed in (0, 1)
    for epoch in (0, 1)
    for example in (0, 1)
  }
  assert len(boxes) == 8


def test_random_resized_box_is_distributed_as_torchvision_defines_it():
  n, height, width = 4000, 300, 400
  boxes = np.array([augment.random_resized_box(height, width, 0, 0, i) for i in range(n)])
  y, x, h, w = boxes.T
  assert (y >= 0).all()
  assert (y + h <= height).all()
  assert (x >= 0).all()
  assert (x + w <= width).all()
  area, aspect = h * w / (height * width), w / h
  assert area.min() > 0.07
  assert aspect.min() > 0.72
  assert aspect.max() < 1.38
  # Tries that do not fit are drawn again, which favours small areas: so compare with that process.
  rng = np.random.default_rng(0)
  a, r = rng.uniform(0.08, 1, 400_000), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), 400_000))
  fits = (np.sqrt(a * height * width * r) <= width) & (np.sqrt(a * height * width / r) <= height)
  np.testing.assert_allclose(area.mean(), a[fits].mean(), atol=0.015)
  np.testing.assert_allclose(np.median(aspect), np.median(r[fits]), atol=0.02)
  assert abs(np.log(aspect).std() - np.log(r[fits]).std()) < 0.01
  place = (y / np.maximum(height - h, 1))[h < 200]  # 0 at the top, 1 at the bottom
  assert abs(place.mean() - 0.5) < 0.02


@pytest.mark.parametrize(
  ('height', 'width', 'box'),
  [(10, 1000, (0, 493, 10, 13)), (1000, 9, (494, 0, 12, 9)), (1, 1, (0, 0, 1, 1))],
)
def test_where_no_draw_fits_the_centre_is_taken(height, width, box):
  assert augment.random_resized_box(height, width, 0, 0, 0) == box
