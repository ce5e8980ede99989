import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afi_flax import preprocess, random_draws, sharding

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, [8, 6, 10, 3]).astype('uint8')
TARGETS = np.eye(5, dtype='float32')[RNG.integers(0, 5, 8)]


def test_normalise():
  images = np.random.default_rng(0).integers(0, 256, [2, 3, 4, 3]).astype('uint8')
  mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
  want = (images / 255 - np.array(mean)) / np.array(std)
  got = preprocess.normalise(images, mean, std)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@jax.jit
def weights(steps):
  """Of many batches, with mixup alone, cutmix alone, and both."""

  def three(step):
    return [
      preprocess.mix_weights(32, 32, *alphas, 3, step) for alphas in ((0.2, 0), (0, 1), (2, 1))
    ]

  return jax.vmap(three)(steps)


@pytest.fixture(scope='module')
def many_weights():
  return [np.asarray(w) for w in weights(jnp.arange(2000))]


def test_mixup_blends_with_the_partner_from_the_end():
  step = jnp.int32(7)
  images, targets = preprocess.mix(IMAGES, TARGETS, 0.4, 0.0, 3, step)
  share = float(preprocess.mix_weights(6, 10, 0.4, 0.0, 3, step)[0, 0])
  assert 0 < share < 1
  for i in range(8):
    want = share * IMAGES[i].astype('float64') + (1 - share) * IMAGES[7 - i]
    np.testing.assert_allclose(images[i], want, rtol=1e-5, atol=1e-3)
    want = share * TARGETS[i] + (1 - share) * TARGETS[7 - i]
    np.testing.assert_allclose(targets[i], want, rtol=1e-5, atol=1e-6)


def test_cutmix_pastes_a_box_of_the_partner():
  for step in range(20):
    images, targets = preprocess.mix(IMAGES, TARGETS, 0.0, 1.0, 3, jnp.int32(step))
    key = jax.random.key(random_draws.bits(3, random_draws.CUTMIX, jnp.int32(step)))
    side = np.sqrt(1 - float(jax.random.beta(key, 1.0, 1.0)))
    want, at = IMAGES.astype('float32'), []
    for length, stream in ((6, random_draws.CUTMIX_Y), (10, random_draws.CUTMIX_X)):
      cut, centre = int(length * side), int(random_draws.integers(length, 3, stream, step))
      low, high = np.clip([centre - cut // 2, centre + (cut + 1) // 2], 0, length)
      at.append(slice(low, high))
    want[:, at[0], at[1]] = IMAGES[::-1, at[0], at[1]]
    np.testing.assert_array_equal(images, want)
    taken = (at[0].stop - at[0].start) * (at[1].stop - at[1].start) / 60
    want = (1 - taken) * TARGETS + taken * TARGETS[::-1]
    np.testing.assert_allclose(targets, want, rtol=1e-5, atol=1e-6)


def test_shares_are_distributed_as_beta(many_weights):
  mixup, cutmix, both = many_weights
  share = mixup[:, 0, 0]
  assert (mixup == share[:, None, None]).all()
  drawn = np.random.default_rng(0).beta(0.2, 0.2, 200_000)
  at = np.linspace(0.05, 0.95, 19)
  difference = (share[:, None] < at).mean(axis=0) - (drawn[:, None] < at).mean(axis=0)
  assert np.abs(difference).max() < 1.63 / np.sqrt(2000)  # Kolmogorov-Smirnov, one in a hundred
  assert set(np.unique(cutmix)) == {0, 1}
  is_cut = (both[:, :1, :1] != both).any(axis=(1, 2))  # rarely a cut box has no pixel
  assert 0.45 < is_cut.mean() < 0.52


def test_what_is_mixed_depends_on_seed_and_step_only():
  mesh = sharding.make_mesh()
  step = jnp.int32(5)
  f = jax.jit(lambda x, t: preprocess.mix(x, t, 0.2, 1.0, 3, step))
  alone = f(jnp.asarray(IMAGES), jnp.asarray(TARGETS))
  batch = sharding.put_batch({'x': IMAGES, 't': TARGETS}, mesh)
  for a, b in zip(alone, f(batch['x'], batch['t']), strict=True):
    np.testing.assert_array_equal(a, b)
  others = [
    preprocess.mix(IMAGES, TARGETS, 0.2, 1.0, s, jnp.int32(n))[0] for s, n in ((3, 6), (4, 5))
  ]
  assert all((np.asarray(alone[0]) != other).any() for other in others)


def erased_reference(height, width, seed, epoch, example):
  """timm's loop for one picture: top, left, height, width, or None."""
  if random_draws.uniform(seed, random_draws.ERASE, epoch, example) >= 0.7:
    return None
  for n in range(10):
    area = random_draws.uniform(seed, random_draws.ERASE_AREA, epoch, example, n)
    aspect = random_draws.uniform(seed, random_draws.ERASE_ASPECT, epoch, example, n)
    area = height * width * (0.02 + (1 / 3 - 0.02) * float(area))
    aspect = np.exp(np.log(0.3) + (np.log(1 / 0.3) - np.log(0.3)) * float(aspect))
    h, w = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
    if h < height and w < width:
      y = float(random_draws.uniform(seed, random_draws.ERASE_Y, epoch, example))
      x = float(random_draws.uniform(seed, random_draws.ERASE_X, epoch, example))
      return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
  return None


def test_erasing_equals_a_reference_one_by_one():
  b, height, width = 64, 12, 9
  images = np.full([b, height, width, 3], 100, 'float32')
  epoch, example = np.arange(b, dtype='int32') % 3, RNG.permutation(b).astype('int32')
  erase = jax.jit(preprocess.erase, static_argnums=(1, 2))
  got = np.asarray(erase(images, 0.7, 5, jnp.asarray(epoch), jnp.asarray(example)))
  boxes = [
    erased_reference(height, width, 5, int(e), int(i)) for e, i in zip(epoch, example, strict=True)
  ]
  noise = []
  for picture, box in zip(got, boxes, strict=True):
    want = np.zeros([height, width], bool)
    if box:
      want[box[0] : box[0] + box[2], box[1] : box[1] + box[3]] = True
      noise.append(picture[want])
    np.testing.assert_array_equal((picture != 100).all(axis=-1), want)
    np.testing.assert_array_equal((picture != 100).any(axis=-1), want)
  assert 0.5 < len(noise) / b < 0.9
  noise = np.concatenate(noise).ravel()
  assert abs(noise.mean()) < 5 / np.sqrt(noise.size)
  assert abs(noise.std() - 1) < 5 / np.sqrt(2 * noise.size)


def test_branches_are_dropped_more_often_the_deeper():
  example = jnp.arange(4000, dtype='int32')
  scales = np.asarray(preprocess.branch_scales(0.4, 5, 0, jnp.zeros_like(example), example))
  assert scales.shape == (4000, 5)
  rates = np.array([0, 0.1, 0.2, 0.3, 0.4])
  np.testing.assert_allclose((scales == 0).mean(axis=0), rates, atol=0.03)
  np.testing.assert_allclose(scales.max(axis=0), 1 / (1 - rates), rtol=1e-6)
  assert len(np.unique(scales)) == 6  # 0, or what keeps the mean
  again = preprocess.branch_scales(0.4, 5, 0, jnp.zeros([1], 'int32'), example[7:8])
  np.testing.assert_array_equal(again[0], scales[7])  # whatever the rest of the batch
  dropped = scales == 0
  assert abs(np.corrcoef(dropped[:, 3], dropped[:, 4])[0, 1]) < 5 / np.sqrt(4000)
  assert abs(np.corrcoef(dropped[:-1, 4], dropped[1:, 4])[0, 1]) < 5 / np.sqrt(4000)


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize('use_cutmix', [False, True])
def test_mix_as_timm(use_cutmix, monkeypatch):
  torch = pytest.importorskip('torch')
  timm = pytest.importorskip('timm.data.mixup')
  for step in range(10):
    alphas = (0.0, 1.0) if use_cutmix else (0.3, 0.0)
    stream = random_draws.CUTMIX if use_cutmix else random_draws.MIXUP
    key = jax.random.key(random_draws.bits(3, stream, jnp.int32(step)))
    alpha = max(alphas)
    share = float(jax.random.beta(key, alpha, alpha))
    centre = iter(
      int(random_draws.integers(n, 3, s, step))
      for n, s in ((6, random_draws.CUTMIX_Y), (10, random_draws.CUTMIX_X))
    )
    monkeypatch.setattr(timm.np.random, 'beta', lambda a, b, share=share: share)
    monkeypatch.setattr(timm.np.random, 'randint', lambda *_, centre=centre, **__: next(centre))
    theirs = timm.Mixup(*alphas, label_smoothing=0.1, num_classes=5)
    x = torch.tensor(IMAGES).permute(0, 3, 1, 2).float()
    x, t = theirs(x, torch.tensor(TARGETS.argmax(1)))
    smooth = 0.9 * TARGETS + 0.02
    images, targets = preprocess.mix(IMAGES, smooth, *alphas, 3, jnp.int32(step))
    np.testing.assert_allclose(images, x.permute(0, 2, 3, 1).numpy(), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(targets, t.numpy(), rtol=1e-4, atol=1e-5)
