import math
import re

import numpy as np
import pytest
from PIL import Image

from afi_flax import random_draws
from afi_flax.data import distort, pipeline, sources
from afi_flax.errors import UserError

A3 = 'rand-m6-mstd0.5-inc1'
MEAN = (0.485, 0.456, 0.406)
GREY = (124, 116, 104)
NEAREST = Image.Resampling.NEAREST


@pytest.fixture(scope='module')
def pixels():
  coarse = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
  return np.asarray(Image.fromarray(coarse).resize((36, 30), Image.Resampling.BICUBIC))


def applied(pixels, name, amount, resampling=NEAREST):
  image = distort.apply(name, Image.fromarray(pixels), amount, resampling, GREY)
  return np.asarray(image)


def test_parse():
  assert distort.parse_rand_augment(A3, MEAN) == distort.RandAugment(
    magnitude=6, layers=2, probability=0.5, deviation=0.5, increasing=True, fill=GREY
  )
  assert distort.parse_rand_augment('rand', (0.5,) * 3) == distort.RandAugment()
  got = distort.parse_rand_augment('rand-n3-p0.8-m9-mmax12-mstd101', MEAN)
  assert (got.layers, got.probability, got.max_magnitude, got.deviation) == (3, 0.8, 12, math.inf)


@pytest.mark.parametrize(
  'text',
  ['augmix-m3', 'rand-x3', 'rand-m', 'rand-m6.5', 'rand-m6-m7', 'rand-tweights', 'rand-p1.1'],
)
def test_refuses(text):
  with pytest.raises(UserError, match=re.escape(f'data.auto_augment {text!r}')) as error:
    distort.parse_rand_augment(text, MEAN)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('key', 'value'),
  [('color_jitter', (0.4, 0.4, 0.4)), ('color_jitter', (0, 0, 0, 0.6)), ('lighting', -0.1)],
)
def test_refuses_strengths(key, value):
  with pytest.raises(UserError, match=f'data.{key}'):
    distort.make(**{'auto_augment': '', 'color_jitter': (0,) * 4, 'lighting': 0, 'mean': MEAN}
                 | {key: value})  # fmt: skip


def test_operations_on_single_pixels(pixels):
  x = pixels.astype(int)
  np.testing.assert_array_equal(applied(pixels, 'Invert', None), 255 - x)
  np.testing.assert_array_equal(applied(pixels, 'Posterize', 3), x & 0b11100000)
  np.testing.assert_array_equal(applied(pixels, 'Posterize', 0), 0 * x)
  np.testing.assert_array_equal(applied(pixels, 'Posterize', -8), 0 * x)
  np.testing.assert_array_equal(applied(pixels, 'Posterize', 12), x)
  np.testing.assert_array_equal(applied(pixels, 'Solarize', 100), np.where(x < 100, x, 255 - x))
  want = np.where(x < 128, np.minimum(x + 66, 255), x)
  np.testing.assert_array_equal(applied(pixels, 'SolarizeAdd', 66), want)
  np.testing.assert_allclose(applied(pixels, 'Brightness', 0.6), 0.6 * x, atol=1)
  luma = (x @ [0.299, 0.587, 0.114])[..., None]
  np.testing.assert_allclose(applied(pixels, 'Color', 0.3), 0.3 * x + 0.7 * luma, atol=1.5)
  want = (1.5 * x - 0.5 * luma.mean()).clip(0, 255)
  np.testing.assert_allclose(applied(pixels, 'Contrast', 1.5), want, atol=1.5)


def test_operations_on_histograms(pixels):
  narrow = (pixels // 2 + 30).astype(np.uint8)
  got = applied(narrow, 'AutoContrast', None)
  low, high = narrow.min((0, 1)).astype(float), narrow.max((0, 1))
  np.testing.assert_allclose(got, (narrow - low) * 255 / (high - low), atol=1.001)
  got = applied(narrow, 'Equalize', None)
  for c in range(3):
    ranks = np.searchsorted(np.sort(narrow[..., c].ravel()), narrow[..., c]) / (30 * 36)
    assert np.abs(got[..., c] / 255 - ranks).max() < 0.06
  blurred = applied(pixels, 'Sharpness', 0.1).astype(int)
  assert np.abs(np.diff(blurred, axis=0)).sum() < np.abs(np.diff(pixels.astype(int), axis=0)).sum()


def test_operations_that_move_pixels(pixels):
  """From where each pixel comes, rounded down to a whole one; what is outside becomes grey."""
  height, width = pixels.shape[:2]
  y, x = np.mgrid[:height, :width]
  sources_of = {
    'TranslateX': (y, x + 0.5 + 0.25 * width),
    'TranslateY': (y + 0.5 + 0.25 * height, x),
    'ShearX': (y, x + 0.5 + 0.25 * (y + 0.5)),
    'ShearY': (y + 0.5 + 0.25 * (x + 0.5), x),
  }
  for name, (from_y, from_x) in sources_of.items():
    got = applied(pixels, name, 0.25)
    from_y, from_x = np.floor(from_y + 1e-9).astype(int), np.floor(from_x + 1e-9).astype(int)
    inside = (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
    want = np.where(
      inside[..., None], pixels[from_y.clip(0, height - 1), from_x.clip(0, width - 1)], GREY
    )
    assert (got == want).all(axis=-1).mean() > 0.98, name
  square = pixels[:, :30]
  np.testing.assert_array_equal(applied(square, 'Rotate', 90.0), np.rot90(square))


def test_levels():
  """Both lists at magnitude 0, 5 and 10, for both signs."""
  up, down = distort._INCREASING, distort._NOT_INCREASING
  assert [up['Rotate'](level, -1) for level in (0, 0.5, 1)] == [0, -15, -30]
  assert [up['Posterize'](level, 1) for level in (0, 0.5, 1)] == [4, 2, 0]
  assert [down['Posterize'](level, 1) for level in (0, 0.5, 1)] == [0, 2, 4]
  assert [up['Solarize'](level, 1) for level in (0, 0.5, 1)] == [256, 128, 0]
  assert [down['Solarize'](level, 1) for level in (0, 0.5, 1)] == [0, 128, 256]
  assert [up['SolarizeAdd'](level, 1) for level in (0, 0.5, 1)] == [0, 55, 110]
  np.testing.assert_allclose([up['Color'](level, -1) for level in (0, 0.5, 1)], [1, 0.55, 0.1])
  np.testing.assert_allclose([up['Color'](level, 1) for level in (0, 0.5, 1)], [1, 1.45, 1.9])
  np.testing.assert_allclose([down['Color'](level, 1) for level in (0, 0.5, 1)], [0.1, 1, 1.9])
  np.testing.assert_allclose(up['TranslateX'](0.5, -1), -0.225)
  np.testing.assert_allclose(up['ShearY'](0.5, 1), 0.15)


def test_all_operations_are_drawn_evenly_half_of_the_time(monkeypatch, pixels):
  seen = []
  monkeypatch.setattr(
    distort, 'apply', lambda name, image, *rest: seen.append((name, *rest)) or image
  )
  augment = distort.parse_rand_augment(A3, MEAN)
  image = Image.fromarray(pixels)
  for example in range(3000):
    augment(image, 0, 1, example)
  names, counts = np.unique([s[0] for s in seen], return_counts=True)
  assert len(names) == 15
  assert abs(len(seen) / 6000 - 0.5) < 0.03
  assert np.abs(counts / len(seen) - 1 / 15).max() < 0.02
  turns = np.array([s[1] for s in seen if s[0] == 'Rotate'])
  assert abs((turns > 0).mean() - 0.5) < 0.13
  np.testing.assert_allclose(np.abs(turns).mean(), 18, atol=0.5)
  np.testing.assert_allclose(np.abs(turns).std(), 1.5, atol=0.3)
  bilinear = np.mean([s[2] == Image.Resampling.BILINEAR for s in seen])
  assert abs(bilinear - 0.5) < 0.05
  assert all(s[3] == GREY for s in seen)


def test_colour_jitter_is_each_change_in_the_order_drawn(pixels):
  from PIL import ImageEnhance

  jitter = distort.ColorJitter(0.4, 0.3, 0.2, 0.0)
  enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
  orders = set()
  for example in range(20):
    got = jitter(Image.fromarray(pixels), 3, 1, example)
    drawn = random_draws.uniform(3, random_draws.COLOR_JITTER, 1, example, np.arange(8))
    order = [i for i in np.argsort(drawn[4:]) if i < 3]
    want = Image.fromarray(pixels)
    for i in order:
      strength = (0.4, 0.3, 0.2)[i]
      want = enhance[i](want).enhance(1 + strength * (2 * float(drawn[i]) - 1))
    assert np.abs(np.asarray(got).astype(int) - np.asarray(want)).max() <= 1
    orders.add(tuple(order))
  assert len(orders) > 3


def test_hue_turns_a_whole_circle():
  red = Image.new('RGB', (2, 2), (255, 0, 0))
  for turn, want in ((1 / 3, (0, 255, 0)), (-1 / 3, (0, 0, 255)), (0.5, (0, 255, 255))):
    got = distort.turn_hue(red, turn).getpixel((0, 0))
    assert np.abs(np.subtract(got, want)).max() <= 9, turn


def test_lighting_moves_along_the_components(pixels):
  grey = np.full((4, 4, 3), 128, np.uint8)
  moved = np.array([
    np.asarray(distort.Lighting(0.1)(Image.fromarray(grey), 0, 0, i))[0, 0] - 128.0
    for i in range(2000)
  ])  # fmt: skip
  vectors, values = distort._EIGENVECTORS, distort._EIGENVALUES
  np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=2e-3)
  want = 255**2 * 0.01 * vectors @ np.diag(values**2) @ vectors.T
  np.testing.assert_allclose(np.cov(moved.T), want, rtol=0.1, atol=0.5)
  np.testing.assert_allclose(moved.mean(axis=0), 0, atol=0.3)


def test_batches_are_distorted_the_same_wherever_the_run_starts():
  source = sources.open_split('fake_cifar', '', 'train[:40]')
  distortion = distort.make(A3, (0.4, 0.4, 0.4, 0.1), 0.1, MEAN)
  options = {'seed': 5, 'batch_size': 16, 'augment': 'pad_crop_flip', 'image_size': 32}
  plain = pipeline.train_batches(source, data_step=2, **options)
  whole = pipeline.train_batches(source, data_step=0, distortion=distortion, **options)
  later = pipeline.train_batches(source, data_step=2, distortion=distortion, **options)
  third = [next(whole) for _ in range(3)][2]
  for key, value in next(later).items():
    np.testing.assert_array_equal(value, third[key])
  images = next(plain)['image']
  assert images.dtype == third['image'].dtype
  for i in range(16):
    want = distortion(images[i], 5, int(third['epoch'][i]), int(third['example'][i]))
    np.testing.assert_array_equal(third['image'][i], want)
  assert (images != third['image']).any((1, 2, 3)).mean() > 0.9


def test_encoded_pictures_are_distorted_too():
  source = sources.open_split('fake_imagenet', '', 'train[:4]')
  distortion = distort.make(A3, (0.4, 0.4, 0.4, 0.0), 0.0, MEAN)
  options = {'seed': 5, 'data_step': 0, 'batch_size': 4, 'augment': 'random_resized_crop_flip'}
  options['image_size'] = 24
  plain = pipeline.train_batches(source, **options)
  distorted = pipeline.train_batches(source, distortion=distortion, **options)
  a, b = next(plain), next(distorted)
  plain.close()
  distorted.close()
  for i in range(4):
    want = distortion(a['image'][i], 5, int(a['epoch'][i]), int(a['example'][i]))
    np.testing.assert_array_equal(b['image'][i], want)


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize('text', [A3, 'rand-m9-n3-mstd0.5', 'rand-m7-p0.9', 'rand-m5-mstd101-inc1'])
def test_rand_augment_as_timm(text, pixels, monkeypatch):
  """timm's own code, fed with our draws, gives the same pixels."""
  timm = pytest.importorskip('timm.data.auto_augment')
  theirs = timm.rand_augment_transform(text, {'img_mean': GREY})
  ours = distort.parse_rand_augment(text, MEAN)
  changed = 0
  for example in range(200):
    image = Image.fromarray(pixels)
    for layer in range(ours.layers):
      counters = 3, random_draws.RAND_AUGMENT, 1, example, layer
      which, left_out, size, sign, sampling = (
        float(random_draws.uniform(*counters, i)) for i in range(5)
      )
      op = theirs.ops[int(which * 15)]

      class Draws:
        """Python's `random`, in the order in which timm asks for it."""

        asked = iter((left_out, 1.0 if sign < 0.5 else 0.0))
        random = staticmethod(lambda asked=asked: next(asked))
        choice = staticmethod(lambda options, s=sampling: options[0 if s < 0.5 else 1])
        uniform = staticmethod(lambda low, high, s=size: low + (high - low) * s)
        gauss = staticmethod(lambda mean, deviation, s=size: mean + deviation * distort._normal(s))

      monkeypatch.setattr(timm, 'random', Draws)
      image = op(image)
    got = np.asarray(ours(Image.fromarray(pixels), 3, 1, example))
    np.testing.assert_array_equal(got, np.asarray(image), err_msg=f'example {example}')
    changed += (got != pixels).any()
  assert changed > 100


@pytest.mark.parity
@pytest.mark.slow
def test_colour_jitter_as_torchvision(pixels):
  functional = pytest.importorskip('torchvision.transforms.functional')
  jitter = distort.ColorJitter(0.4, 0.3, 0.2, 0.1)
  change = (
    functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation,
    functional.adjust_hue,
  )  # fmt: skip
  for example in range(50):
    drawn = random_draws.uniform(3, random_draws.COLOR_JITTER, 1, example, np.arange(8))
    want = Image.fromarray(pixels)
    for i in np.argsort(drawn[4:]):
      strength = (0.4, 0.3, 0.2, 0.1)[i]
      by = strength * (2 * float(drawn[i]) - 1)
      want = change[i](want, by if i == 3 else 1 + by)
    got = jitter(Image.fromarray(pixels), 3, 1, example)
    np.testing.assert_allclose(np.asarray(got).astype(int), np.asarray(want).astype(int), atol=1)
