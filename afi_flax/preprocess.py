"""What happens to pictures on the device: they travel as uint8, a quarter of float32's bytes.

Draws are hashes of counters (`random_draws`): of (seed, stream, data step) where a whole batch
shares them, and of (seed, stream, epoch, example) where each picture has its own. So they are the
same for any number of devices and processes, and after a restart.
"""

import jax
import jax.numpy as jnp
import numpy as np

from afi_flax import random_draws

# Random erasing, as timm and Zhong et al. have it.
_ERASED_AREA = (0.02, 1 / 3)  # of the picture
_ERASED_ASPECT = (0.3, 1 / 0.3)  # height / width
_ERASING_TRIES = 10


def normalise(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
  """u8, or f32 in 0..255, [B,H,W,3] -> f32, (x / 255 - mean) / std with both of each channel."""
  # Numpy, so that both are constants of the program, rounded once.
  scale = np.asarray(1 / (255 * np.asarray(std)), 'float32').reshape(1, 1, 1, -1)
  shift = np.asarray(np.asarray(mean) / np.asarray(std), 'float32').reshape(1, 1, 1, -1)
  return images.astype('float32') * scale - shift


def mix(
  images: jax.Array,
  targets: jax.Array,
  mixup: float,
  cutmix: float,
  seed: int,
  data_step: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Mixes every picture and its targets with those of its partner, counted from the batch's end.

  As timm's Mixup in its mode 'batch': one share, one box and one choice for the whole batch; here
  that is the global batch. Mixup (Zhang et al.) keeps a share l of each pixel, l ~ Beta(mixup,
  mixup). Cutmix (Yun et al.) takes a box of the partner, of about (1 - l) of the area, l ~
  Beta(cutmix, cutmix); what is cut off at the border counts for the targets. Where both are on,
  each is taken with probability a half.

  Args:
    images: u8 [B,H,W,3].
    targets: f32 [B,K].
    mixup: alpha of mixup; 0: off.
    cutmix: alpha of cutmix; 0: off.
    seed: of the run.
    data_step: i32 [], the batch's number.

  Returns:
    images f32 [B,H,W,3] in 0..255, and targets f32 [B,K].
  """
  own = mix_weights(images.shape[1], images.shape[2], mixup, cutmix, seed, data_step)
  share = own.mean()
  own = own[None, :, :, None]
  mixed = images * own + images[::-1] * (1 - own)
  return mixed, targets * share + targets[::-1] * (1 - share)


def mix_weights(
  height: int, width: int, mixup: float, cutmix: float, seed: int, data_step: jax.Array
) -> jax.Array:
  """What `mix` leaves of each pixel of a picture: f32 [H,W] in 0..1."""
  blend = cut = jnp.ones([height, width])
  if mixup:
    blend *= _beta(mixup, seed, random_draws.MIXUP, data_step)
  if cutmix:
    side = jnp.sqrt(1 - _beta(cutmix, seed, random_draws.CUTMIX, data_step))
    rows = _cut(height, side, seed, random_draws.CUTMIX_Y, data_step)[:, None]
    columns = _cut(width, side, seed, random_draws.CUTMIX_X, data_step)[None, :]
    cut = 1 - (rows & columns).astype('float32')
  if not (mixup and cutmix):
    return cut if cutmix else blend
  switch = random_draws.integers(2, seed, random_draws.MIX_SWITCH, data_step) == 1
  return jnp.where(switch, cut, blend)


def _cut(length: int, side: jax.Array, seed: int, stream: int, data_step: jax.Array) -> jax.Array:
  """bool [length]: `side` of it, around a random pixel, as far as it is inside."""
  cut = (length * side).astype('int32')
  centre = random_draws.integers(length, seed, stream, data_step)
  at = jnp.arange(length)
  return (at >= centre - cut // 2) & (at < centre + (cut + 1) // 2)


def _beta(alpha: float, seed: int, stream: int, data_step: jax.Array) -> jax.Array:
  """f32 [] of the distribution Beta(alpha, alpha)."""
  key = jax.random.key(random_draws.bits(seed, stream, data_step), impl='threefry2x32')
  return jax.random.beta(key, alpha, alpha)


def erase(
  images: jax.Array, probability: float, seed: int, epoch: jax.Array, example: jax.Array
) -> jax.Array:
  """Random erasing (Zhong et al.) with timm's ranges: a rectangle becomes Gaussian noise.

  Args:
    images: f32 [B,H,W,3], normalised.
    probability: that a picture has one.
    seed: of the run.
    epoch: i32 [B].
    example: i32 [B].

  Returns:
    f32 [B,H,W,3].
  """
  height, width, channels = images.shape[1:]
  drawn = random_draws.uniform(seed, random_draws.ERASE, epoch, example)  # [B]
  top, left, h, w = erased_boxes(height, width, seed, epoch, example)
  y, x = jnp.arange(height)[None, :, None], jnp.arange(width)[None, None, :]
  top, left, h, w, chosen = (v[:, None, None] for v in (top, left, h, w, drawn < probability))
  inside = (y >= top) & (y < top + h) & (x >= left) & (x < left + w) & chosen  # [B,H,W]
  pixel = jnp.arange(height * width * channels).reshape(1, height, width, channels)
  epoch, example = (v[:, None, None, None] for v in (epoch, example))
  noise = random_draws.uniform(seed, random_draws.ERASED_PIXEL, epoch, example, pixel)
  normal = jax.scipy.special.ndtri(noise + np.float32(2.0**-25))  # never of 0
  return jnp.where(inside[..., None], normal, images)


def erased_boxes(
  height: int, width: int, seed: int, epoch: jax.Array, example: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """top, left, height, width i32 [B] of each picture's box; empty where none of ten tries fits."""
  counters = epoch[:, None], example[:, None], jnp.arange(_ERASING_TRIES)[None]
  area = random_draws.uniform(seed, random_draws.ERASE_AREA, *counters)  # [B,tries]
  area = height * width * (_ERASED_AREA[0] + (_ERASED_AREA[1] - _ERASED_AREA[0]) * area)
  low, high = np.log(_ERASED_ASPECT)
  aspect = random_draws.uniform(seed, random_draws.ERASE_ASPECT, *counters)
  aspect = jnp.exp(low + (high - low) * aspect)
  h, w = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
  fits = (h < height) & (w < width)
  first = fits.argmax(axis=1, keepdims=True)
  h, w = (jnp.take_along_axis(jnp.where(fits, v, 0), first, axis=1)[:, 0] for v in (h, w))
  top = random_draws.uniform(seed, random_draws.ERASE_Y, epoch, example) * (height - h + 1)
  left = random_draws.uniform(seed, random_draws.ERASE_X, epoch, example) * (width - w + 1)
  return tuple(v.astype('int32') for v in (top, left, h, w))


def branch_scales(
  rate: float, num_blocks: int, seed: int, epoch: jax.Array, example: jax.Array
) -> jax.Array:
  """Stochastic depth (Huang et al.): what each block's residual branch is multiplied by.

  Block k of n, from 0, is dropped with probability rate * k / (n - 1), for each picture on its own;
  where it is kept, it is divided by the probability of that, so that its mean stays.

  Args:
    rate: of the last block.
    num_blocks: n, over all stages.
    seed: of the run.
    epoch: i32 [B].
    example: i32 [B].

  Returns:
    f32 [B,n].
  """
  dropped = np.linspace(0, rate, num_blocks, dtype='float32')[None]
  block = jnp.arange(num_blocks)[None]
  drawn = random_draws.uniform(
    seed, random_draws.DROP_PATH, epoch[:, None], example[:, None], block
  )
  return (drawn >= dropped) / (1 - dropped)
