"""Attentive Feature Integration: the module, and how a stage carries its features.

Source: "AFINets: Attentive Feature Integration Networks for Image Classification", eqs. 1 and 2.

A block X -> conv -> X_k -> conv -> ... becomes an AFI block by reusing what the earlier blocks of
its stage computed at the same place: R_k, a convex combination of X_1 .. X_{k-1} learned for every
channel, goes beside X_k into the second convolution. The first convolution may then be half as
wide (`Fusion('half')`, the paper's first setting) or the second one sees twice as much
(`Fusion('full')`, its second setting, AFI-B).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from afi_flax.models.attention import ATTENTIONS, mlp

Array = jax.Array


class Feature(NamedTuple):
  """A feature map that later blocks of the stage reuse, and its pooled form, computed once."""

  map: Array  # X_i [B,H,W,c]
  pooled: Array  # z_i f32 [B,c]


@dataclasses.dataclass(frozen=True)
class Fusion:
  """How the blocks of a stage reuse earlier features.

  Attributes:
    width: 'half': the first convolution keeps half its plain width and R fills the other half
      (AFI). 'full': it keeps its whole width and the second one takes twice as many (AFI-B).
    reduction: r, the bottleneck of the scoring network W2 relu(W1 z).
    attention: what is applied to R before the concatenation, one of `attention.ATTENTIONS`, or ''.
  """

  width: Literal['half', 'full'] = 'half'
  reduction: int = 4
  attention: str = ''

  def own_channels(self, width: int) -> int:
    """Channels c of X_k and R_k, where the plain network's first convolution has `width`."""
    return width // 2 if self.width == 'half' else width


class AFI(nn.Module):
  """Attentive Feature Integration (eqs. 1 and 2): N maps in, one convex combination out.

  ```
  z_i = global average pool of X_i
  s_i = W2 relu(W1 z_i)            W1: c -> max(1, c // r), W2: back to c, shared by all i, no bias
  s~  = softmax over i, for every channel on its own
  R   = sum_i s~_i * X_i
  ```
  Pooling, scores, softmax and the sum are float32, whatever the dtype of the maps.

  In a network of your own:

  >>> import jax, jax.numpy as jnp
  >>> from flax import linen as nn
  >>> from afi_flax.models.fusion import AFI
  >>> class Net(nn.Module):
  ...   @nn.compact
  ...   def __call__(self, x):
  ...     features = []
  ...     for _ in range(3):
  ...       y = nn.relu(nn.Conv(16, (3, 3))(x))
  ...       reused = AFI(reduction=4)(features) if features else y
  ...       features.append(y)
  ...       x = x + nn.Conv(32, (3, 3))(jnp.concatenate([y, reused], axis=-1))
  ...     return x
  >>> x = jnp.ones([2, 8, 8, 32])
  >>> y, variables = Net().init_with_output(jax.random.key(0), x)
  >>> y.shape
  (2, 8, 8, 32)
  >>> sorted(variables['params'])
  ['AFI_0', 'AFI_1', 'Conv_0', 'Conv_1', 'Conv_2', 'Conv_3', 'Conv_4', 'Conv_5']

  The weights s~ f32 [B,N,c] are sown as `intermediates/weights`: ask for them with
  `apply(..., mutable='intermediates')`.

  Attributes:
    reduction: r.
  """

  reduction: int = 4

  @nn.compact
  def __call__(self, features: Sequence[Array | Feature]) -> Array:
    """N >= 1 maps [B,H,W,c] (or Features, pooled already) -> R [B,H,W,c], of the maps' dtype."""
    if not features:
      raise ValueError('AFI integrates at least one feature map, got none')
    features = [f if isinstance(f, Feature) else pool(f) for f in features]
    shapes = {f.map.shape for f in features}
    if len(shapes) > 1:
      raise ValueError(f'AFI integrates maps of one shape, got {sorted(shapes)}')
    pooled = jnp.stack([f.pooled for f in features], axis=1)  # z [B,N,c]
    scores = mlp(pooled, self.reduction, use_bias=False)
    weights = nn.softmax(scores, axis=1)  # s~ [B,N,c], eq. 1
    self.sow('intermediates', 'weights', weights)
    return weighted_sum(weights, [f.map for f in features])  # eq. 2


def weighted_sum(weights: Array, maps: Sequence[Array]) -> Array:
  """sum_i weights[:, i] * maps[i]: [B,N,c] f32 and N of [B,H,W,c] -> [B,H,W,c], summed in f32."""
  total = sum(weights[:, i, None, None, :] * x for i, x in enumerate(maps))
  return total.astype(maps[0].dtype)


def pool(x: Array) -> Feature:
  """The map with its global average pool, f32."""
  return Feature(x, x.astype('float32').mean(axis=(1, 2)))


def fit(x: Array, size: tuple[int, int], channels: int) -> Array:
  """X_1 as block 2 onwards can use it: [B,H,W,C] -> [B,*size,channels], without parameters.

  The first `channels` channels (zeros where there are fewer); average-pooled 2x2 with stride 2
  where the first block strides after its first convolution, padding left out of the mean.
  """
  x = x[..., :channels]
  if x.shape[1:3] != size:
    x = nn.avg_pool(x, (2, 2), strides=(2, 2), padding='SAME', count_include_pad=False)
  if x.shape[-1] < channels:
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, channels - x.shape[-1])))
  return x


class Fuse(nn.Module):
  """What stands between the two convolutions of a fused block: X_k -> [X_k, R_k].

  Where the second convolution has groups and takes all of X and of R (AFI-B), they are interleaved,
  so that each of its groups has its own part of both.

  Attributes:
    fusion: the setting.
    groups: of the second convolution.
  """

  fusion: Fusion
  groups: int = 1

  @nn.compact
  def __call__(self, x: Array, features: Sequence[Feature]) -> Array:
    """X_k [B,H,W,c] and the stage's earlier features -> [B,H,W,2c]."""
    reused = AFI(self.fusion.reduction, name='afi')(features)
    if self.fusion.attention:
      reused = ATTENTIONS[self.fusion.attention](name=self.fusion.attention)(reused)
    if self.fusion.width == 'half' or self.groups == 1:
      return jnp.concatenate([x, reused], axis=-1)
    grouped = (*x.shape[:-1], self.groups, x.shape[-1] // self.groups)
    both = jnp.concatenate([x.reshape(grouped), reused.reshape(grouped)], axis=-1)
    return both.reshape(*x.shape[:-1], 2 * x.shape[-1])


def run_stage(
  make_block: Callable[[int, Fusion | None], Callable[..., tuple[Array, Array]]],
  num_blocks: int,
  x: Array,
  width: int,
  fusion: Fusion | None,
  train: bool,
) -> Array:
  """Runs the blocks of one stage and carries their features from each to the next.

  Args:
    make_block: (index from 0, fusion) -> a module with `block(x, features, train) -> (y, X_k)`. A
      block given a fusion makes X_k `fusion.own_channels(width)` wide and passes it with the
      earlier features through `Fuse`; one given None is the plain network's.
    num_blocks: n.
    x: [B,H,W,C], the stage's input.
    width: w, the plain width of the first convolution in blocks 2 to n.
    fusion: None for a plain stage. Block 1 is plain in any case: it has nothing to reuse.
    train: whether batch norm uses the batch's statistics.

  Returns:
    The last block's output.
  """
  features: list[Feature] = []
  for k in range(num_blocks):
    x, made = make_block(k, fusion if k > 0 else None)(x, features, train)
    if fusion is not None and k + 1 < num_blocks:
      features.append(pool(fit(made, x.shape[1:3], fusion.own_channels(width))))
  return x
