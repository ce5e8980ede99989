"""Attentive Feature Integration: the module, and how a stage carries its features.

Source: "AFINets: Attentive Feature Integration Networks for Image Classification", eqs. 1 and 2.

A block X -> conv -> X_k -> conv -> ... becomes an AFI block by reusing what the earlier blocks of
its stage computed at the same place: R_k, a convex combination of X_1 .. X_{k-1} learned for every
channel, goes beside X_k into the second convolution. The first convolution may then be half as
wide (`Fusion('half')`, the paper's first setting) or the second one sees twice as much
(`Fusion('full')`, its second setting, AFI-B).
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from afi_flax.errors import UserError
from afi_flax.models import grouped_conv
from afi_flax.models.attention import mlp
from afi_flax.models.layers import global_average, settled

Array = jax.Array
Attention = Callable[..., nn.Module]  # makes a module of `attention.py`, given its name
REMATS = ('none', 'fusion', 'block')


class Features(NamedTuple):
  """The feature maps that the blocks of a stage reuse, each pooled once, when it is made.

  `pooled` has a row for every map that the stage will have, and the newest map comes first, so that
  all blocks do the same to arrays of one shape: XLA compiles a kernel once, not for every block.
  """

  maps: tuple[Array, ...]  # X_N .. X_1, each [B,H,W,c]
  pooled: Array  # z f32 [B,M,c], M >= N; rows from N on are zeros

  @classmethod
  def room_for(cls, rows: int, x: Array) -> 'Features':
    """None yet, of a stage that will have `rows` maps like x."""
    return cls((), jnp.zeros([x.shape[0], rows, x.shape[-1]]))

  def add(self, x: Array) -> 'Features':
    """With X_{N+1}, which is pooled here."""
    if self.maps and x.shape != self.maps[0].shape:
      raise ValueError(f'AFI integrates maps of one shape, got {self.maps[0].shape} and {x.shape}')
    pooled = jnp.concatenate([global_average(x)[:, None], self.pooled[:, :-1]], axis=1)
    return Features((x, *self.maps), pooled)


@dataclasses.dataclass(frozen=True)
class Fusion:
  """How the blocks of a stage reuse earlier features.

  Attributes:
    width: 'half': the first convolution keeps half its plain width and R fills the other half
      (AFI). 'full': it keeps its whole width and the second one takes twice as many (AFI-B).
    reduction: r, the bottleneck of the scoring network W2 relu(W1 z).
    attention: makes what is applied to R before the concatenation: a class of `attention.py`.

  Raises:
    UserError: a value that has no meaning.
  """

  width: Literal['half', 'full'] = 'half'
  reduction: int = 4
  attention: Attention | None = None

  def __post_init__(self):
    if self.width not in ('half', 'full'):
      raise UserError(f"Fusion.width {self.width!r} must be 'half' (AFI) or 'full' (AFI-B)")
    if self.reduction < 1:
      raise UserError(f'Fusion.reduction {self.reduction} must be 1 or more')
    if self.attention is not None and not callable(self.attention):
      raise UserError(
        f'Fusion.attention {self.attention!r} must be a class of afi_flax.models.attention, as SE'
      )

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

  The weights s~ f32 [B,N,c], X_1's first, are sown as `intermediates/weights`: ask for them with
  `apply(..., mutable='intermediates')`.

  Attributes:
    reduction: r.
  """

  reduction: int = 4

  @nn.compact
  def __call__(self, features: Sequence[Array] | Features) -> Array:
    """N >= 1 maps [B,H,W,c], or Features, pooled already -> R [B,H,W,c], of the maps' dtype."""
    if not isinstance(features, Features):
      features = _all_at_once(features)
    scores = mlp(features.pooled, self.reduction, use_bias=False)
    number, rows = len(features.maps), scores.shape[1]
    empty = jnp.array([0.0] * number + [-jnp.inf] * (rows - number))
    weights = nn.softmax(scores + empty[None, :, None], axis=1)[:, :number]  # s~ [B,N,c], eq. 1
    self.sow('intermediates', 'weights', weights[:, ::-1])
    return weighted_sum(weights, features.maps)  # eq. 2


def _all_at_once(maps: Sequence[Array]) -> Features:
  if not maps:
    raise ValueError('AFI integrates at least one feature map, got none')
  features = Features.room_for(len(maps), maps[0])
  for x in maps:
    features = features.add(x)
  return features


def fusion_weights(intermediates: Mapping[str, Any]) -> dict[str, Array]:
  """s~ of every block, from the forward pass that computed it anyway.

  >>> import jax, jax.numpy as jnp
  >>> from afi_flax.models import create_model
  >>> model = create_model('afi_resnet20', num_classes=10)
  >>> images = jnp.zeros([2, 32, 32, 3])
  >>> def forward(key):
  ...   variables = model.init(key, images, train=False)
  ...   return model.apply(variables, images, train=False, mutable='intermediates')
  >>> logits, sown = jax.eval_shape(forward, jax.random.key(0))
  >>> {name: s.shape for name, s in fusion_weights(sown['intermediates']).items()}['stage3_block3']
  (2, 2, 32)

  Args:
    intermediates: what `apply(..., mutable='intermediates')` returns beside the logits.

  Returns:
    {block: s~ f32 [B,N,c]}, which sums to 1 over its N sources, X_1 first, in the network's order.
  """
  blocks = [name for name, block in intermediates.items() if 'fuse' in block]
  # jax.jit sorts names, stage1_block10 before stage1_block2.
  blocks.sort(key=lambda name: [int(number) for number in re.findall(r'\d+', name)])
  return {name: intermediates[name]['fuse']['afi']['weights'][0] for name in blocks}


def weighted_sum(weights: Array, maps: Sequence[Array]) -> Array:
  """sum_i weights[:, i] * maps[i]: [B,N,c] f32 and N of [B,H,W,c] -> [B,H,W,c], summed in f32."""
  total = sum(weights[:, i, None, None, :] * x for i, x in enumerate(maps))
  return total.astype(maps[0].dtype)


def fit(x: Array, size: tuple[int, int], channels: int) -> Array:
  """X_1 as block 2 onwards can use it: [B,H,W,C] -> [B,*size,channels], without parameters.

  The first `channels` channels (zeros where there are fewer); average-pooled 2x2 with stride 2
  where the first block strides after its first convolution, padding left out of the mean.
  """
  x = x[..., :channels]
  if x.shape[1:3] != size:
    x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2), padding='SAME', count_include_pad=False)
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
  def __call__(self, x: Array, features: Features) -> Array:
    """X_k [B,H,W,c] and the stage's earlier features -> [B,H,W,2c]."""
    reused = AFI(self.fusion.reduction, name='afi')(features)
    if self.fusion.attention:
      reused = self.fusion.attention(name='attention')(reused)
    if self.fusion.width == 'half' or self.groups == 1:
      fused = jnp.concatenate([x, reused], axis=-1)
    else:
      grouped = (*x.shape[:-1], self.groups, x.shape[-1] // self.groups)
      fused = jnp.concatenate([x.reshape(grouped), reused.reshape(grouped)], axis=-1)
    return fused.reshape(*x.shape[:-1], 2 * x.shape[-1])


def run_stage(
  make_block: Callable[[int, Fusion | None], Callable[..., tuple[Array, Array]]],
  num_blocks: int,
  x: Array,
  width: int,
  fusion: Fusion | None,
  train: bool,
  remat: str = 'none',
  keep: Array | None = None,
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
    remat: what is computed again for the gradient and not kept until then. 'fusion': what is
      elementwise, that is, normalisation, ReLU, R and the concatenation; convolutions and sums are
      kept. 'block': all inside a block but its output and X_k.
    keep: f32 [B,n or more], for stochastic depth: block k, from 0, is given column k as one more
      argument, `block(x, features, train, keep)`; None: it is given none.

  Returns:
    The last block's output.
  """
  features = None
  for k in range(num_blocks):
    block = make_block(k, fusion if k > 0 else None)
    more = () if keep is None else (keep[:, k],)
    x, made = _rematted(remat, train)(block, x, features, *more)
    x = settled(x)
    if fusion is not None and k + 1 < num_blocks:
      made = fit(made, x.shape[1:3], fusion.own_channels(width))
      features = (features or Features.room_for(num_blocks - 1, made)).add(made)
  return x


def scale_branch(x: Array, keep: Array | None) -> Array:
  """x [B,H,W,C] times keep f32 [B], each picture by its own; None: x."""
  return x if keep is None else x * keep[:, None, None, None].astype(x.dtype)


def _rematted(remat: str, train: bool) -> Callable:
  """(block, x, features, ...) -> what the block returns, keeping as much for the gradient as asked.

  What stands behind `features` is passed on.
  """

  def call(block, x, features, *more):
    return block(x, features, train, *more)

  if remat == 'none':
    return call
  return nn.remat(call, policy=_is_reduction if remat == 'fusion' else None)


def _is_reduction(primitive, *_, **options) -> bool:
  """Whether every number of the result is made of many: costly to make again."""
  if primitive.name == 'name':
    return options['name'] == grouped_conv.NAME
  return primitive.name in ('conv_general_dilated', 'dot_general', 'reduce_sum', 'reduce_max')
