"""The state of a run: all that a checkpoint holds, and all that a step changes."""

import collections
import dataclasses
from collections.abc import Collection
from concurrent import futures
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from clu import parameter_overview
from flax import linen as nn

from afi_flax import background, keys, metrics
from afi_flax.models import parts as parts_lib

PyTree = Any


@flax.struct.dataclass
class TrainState:
  """A training run between two steps."""

  step: jax.Array  # i32, updates made
  data_step: jax.Array  # i32, batches consumed
  params: PyTree  # f32
  batch_stats: PyTree  # f32, the running means and variances of batch norm
  opt_state: PyTree  # of the optimiser: momentum, count
  metric_sums: metrics.Sums  # since the last line of the log
  ema: PyTree = None  # moving average of params and batch_stats; None: off

  @property
  def variables(self) -> dict[str, PyTree]:
    """What `model.apply` takes."""
    return {'params': self.params, 'batch_stats': self.batch_stats}

  @property
  def eval_variables(self) -> dict[str, PyTree]:
    """What is evaluated: their moving average, where there is one."""
    return self.ema or self.variables


def create(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  image_size: int,
  seed: int,
  ema: bool = False,
) -> TrainState:
  """The state before the first step; a pure function of the seed, to be jitted or traced."""
  images = jnp.zeros([1, image_size, image_size, 3])
  variables = model.init(keys.key(seed), images, train=False)
  return TrainState(
    step=jnp.zeros([], 'int32'),
    data_step=jnp.zeros([], 'int32'),
    params=variables['params'],
    batch_stats=variables['batch_stats'],
    opt_state=optimizer.init(variables['params']),
    metric_sums=metrics.zeros(),
    ema={name: variables[name] for name in ('params', 'batch_stats')} if ema else None,
  )


def abstract(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  image_size: int,
  sharding: jax.sharding.Sharding,
  ema: bool = False,
) -> TrainState:
  """Shapes, dtypes and shardings of the state: no array is made."""
  shapes = jax.eval_shape(lambda: create(model, optimizer, image_size, seed=0, ema=ema))
  return _abstract(shapes, sharding)


def _abstract(shapes: TrainState, sharding: jax.sharding.Sharding) -> TrainState:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


class Initial:
  """The state before the first step: its shapes at once, its numbers when they are asked for.

  Attributes:
    abstract: as the function of that name returns it.
  """

  def __init__(
    self,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_size: int,
    seed: int,
    sharding: jax.sharding.Sharding,
    ema: bool = False,
  ):
    """Traces what makes it."""
    init = jax.jit(
      lambda seed: create(model, optimizer, image_size, seed, ema), out_shardings=sharding
    )
    self._seed = jnp.uint32(seed)  # an argument, so that one compiled program serves all seeds
    self._traced = init.trace(self._seed)
    self.abstract = _abstract(self._traced.out_info, sharding)
    self._making: futures.Future[TrainState] | None = None

  def make(self) -> None:
    """Begins to make the numbers in the background, where they live."""
    lowered = self._traced.lower()
    self._making = background.begin(lambda: jax.block_until_ready(lowered.compile()(self._seed)))

  def ready(self, seconds: float) -> bool:
    """Whether they are there, after so long at most."""
    return bool(futures.wait([self._making], seconds).done)

  def state(self) -> TrainState:
    """The numbers, once; the caller may donate them."""
    if self._making is None:
      self.make()
    made, self._making = self._making, None
    return made.result()


@jax.jit
def all_finite(state: TrainState) -> jax.Array:
  """bool []: whether no number of a state is NaN or infinite."""
  floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
  return jnp.array([jnp.isfinite(x).all() for x in floats]).all()


@dataclasses.dataclass(frozen=True)
class _Row:
  part: str
  arrays: int
  parameters: str
  share: str


def parameter_table(params: PyTree, frozen: Collection[str] = ()) -> str:
  """Parameters of the stem, of each stage and of the head, as a table with their sum.

  And how many of them train, where modules are frozen.
  """
  total = parameter_overview.count_parameters(params)
  parts = collections.defaultdict(dict)
  for name, part in sorted(params.items(), key=lambda item: (item[0] != 'stem', item[0] == 'head')):
    parts[parts_lib.part(name)][name] = part
  sums = {'total': params}
  if frozen:
    sums['trained'] = parts_lib.without(frozen, params)
  rows = []
  for name, blocks in (parts | sums).items():
    size = parameter_overview.count_parameters(blocks)
    rows.append(_Row(name, len(jax.tree.leaves(blocks)), f'{size:,}', f'{size / total:.1%}'))
  return parameter_overview.make_table(rows)
