"""Parameters, FLOPs and activations of a network, from abstract shapes: no array is ever made.

Two conventions for the floating-point operations of one picture:

- `macs`: multiply-accumulates of convolutions and dense layers, what most tables call FLOPs.
- `paper_flops`: those of the AFI paper, which are the `thop` tool's: `macs`, and 2 for every
  element that passes a batch norm, and H * W + 1 for every channel of a layer that is a global
  average pool (of the classifier and of attentions). Its tables give them for 32 pictures.

Neither counts what is not a layer: additions, and in AFI the pooling of the features and their
weighted sum, which are some N * H * W * c operations for a block's N sources of c channels each.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from afi_flax.models.attention import CBAM, ECA, GE, SE
from afi_flax.models.fusion import AFI, Features
from afi_flax.models.layers import GlobalAveragePool

PAPER_PICTURES = 32  # that the paper's FLOPs are for


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a network, or a part of it, costs for one picture."""

  parameters: int = 0  # trainable
  macs: int = 0
  paper_flops: int = 0
  activations: int = 0  # numbers that come out of convolutions, as in the RegNet paper and in timm

  def __add__(self, other: 'Cost') -> 'Cost':
    return Cost(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

  def repeated(self, times: int) -> 'Cost':
    """Of the same layer, applied several times."""
    return Cost(self.parameters, *(times * n for n in _values(self)[1:]))


@dataclasses.dataclass(frozen=True)
class Layer:
  """A module that costs something, or that a table names."""

  path: tuple[str, ...]
  label: str  # '3x3 16': side and output channels; 'AFI', 'SE': the module; '': not for a table
  size: tuple[int, ...]  # height and width of its result, 1 x 1 of a dense layer's; (): the input's
  cost: Cost


@dataclasses.dataclass(frozen=True)
class Stage:
  """A row of a network's table: all layers whose name begins with the same word."""

  name: str
  size: tuple[int, ...]  # height and width of its result
  layers: str  # equal blocks counted: '[3x3 16, 3x3 16] + 4 x [3x3 8, AFI, 3x3 16]'
  cost: Cost


def count(model: nn.Module, image_size: int) -> list[Layer]:
  """All layers of a network in the order in which they are called.

  >>> from afi_flax.models import create_model
  >>> layers = count(create_model('resnet32', num_classes=100), image_size=32)
  >>> total(layers).parameters, round(total(layers).paper_flops * 32 / 1e9, 2)
  (472756, 2.23)

  Args:
    model: a Linen network, (images [B,H,W,3], train) -> anything.
    image_size: H and W, pixels.
  """
  images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), 'float32')
  counter = _Counter()
  with nn.intercept_methods(counter):
    jax.eval_shape(functools.partial(model.init, jax.random.key(0), train=False), images)
  return counter.layers


def total(layers: Iterable[Layer]) -> Cost:
  """The sum over the layers."""
  return sum((layer.cost for layer in layers), Cost())


def stages(layers: Sequence[Layer]) -> list[Stage]:
  """The layers by stage: stem, stage1, stage2, ..., head."""
  groups = collections.defaultdict(list)
  for layer in layers:
    groups[layer.path[0].split('_')[0]].append(layer)
  return [
    Stage(name, [layer.size for layer in group if layer.size][-1], _describe(group), total(group))
    for name, group in groups.items()
  ]


class _Counter:
  """Notes every call of a module. What was called before, on equal shapes, is not traced again."""

  def __init__(self):
    self.layers: list[Layer] = []

  def __call__(self, call, args, kwargs, context):
    module, times = context.module, 1
    if context.method_name != '__call__':
      return call(*args, **kwargs)
    if isinstance(module, AFI):  # treats its maps alike: one of them is traced
      args, times = _first_map(*args)
    key = _key(module, args, kwargs)
    if key in _SEEN:
      shapes = _SEEN[key][1]
      result = jax.tree.map(lambda s: jnp.zeros(*s), shapes, is_leaf=_is_shape)
    else:
      before, self.layers = self.layers, []
      result = call(*args, **kwargs)
      if own := _own(module, args, result):
        self.layers.append(own)
      inside, self.layers = self.layers, before
      depth = len(module.path)
      inside = [dataclasses.replace(layer, path=layer.path[depth:]) for layer in inside]
      _SEEN[key] = inside, jax.tree.map(lambda x: (x.shape, x.dtype), result)
    for layer in _SEEN[key][0]:
      path = (*module.path, *layer.path)
      self.layers.append(dataclasses.replace(layer, path=path, cost=layer.cost.repeated(times)))
    return result


_SEEN: dict[Any, tuple[list[Layer], Any]] = {}


def _is_shape(x: Any) -> bool:
  return isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], jnp.dtype)


def _key(module: nn.Module, args: tuple, kwargs: dict) -> Any:
  """Equal for two calls of equal cost."""
  fields = tuple(
    getattr(module, field.name)
    for field in dataclasses.fields(module)
    if field.name not in ('name', 'parent')
  )
  leaves, tree = jax.tree.flatten((args, kwargs))
  shapes = tuple((x.shape, x.dtype) if isinstance(x, jax.Array) else x for x in leaves)
  return type(module), fields, tree, shapes


def _first_map(features: Features | Sequence[jax.Array]) -> tuple[tuple[Any], int]:
  """The arguments of AFI on the first of its maps only, and how many there are."""
  if not isinstance(features, Features):
    return (features[:1],), len(features)
  return (Features(features.maps[:1], features.pooled[:, :1]),), len(features.maps)


def _own(module: nn.Module, args: tuple, result: Any) -> Layer | None:
  """The layer that the module itself is, its submodules not counted."""
  if isinstance(module, nn.Conv | nn.Dense):
    return _multiplication(module, result)
  if isinstance(module, nn.BatchNorm):
    elements = math.prod(result.shape[1:])
    cost = Cost(_parameters(module), paper_flops=2 * elements)
    return Layer(module.path, '', result.shape[1:3], cost)
  if isinstance(module, GlobalAveragePool):
    _, height, width, channels = args[0].shape
    return Layer(module.path, '', (), Cost(paper_flops=(height * width + 1) * channels))
  if isinstance(module, AFI | SE | GE | CBAM | ECA):
    return Layer(module.path, type(module).__name__, (), Cost())
  return None


def _multiplication(module: nn.Conv | nn.Dense, result: jax.Array) -> Layer:
  kernel = module.variables['params']['kernel']
  elements = math.prod(result.shape[1:])
  macs = elements * kernel.size // kernel.shape[-1]
  cost = Cost(_parameters(module), macs, macs, 0)
  if kernel.ndim < 4:
    return Layer(module.path, f'dense {kernel.shape[-1]}', (1, 1), cost)
  groups = module.feature_group_count
  label = f'{kernel.shape[0]}x{kernel.shape[1]} {kernel.shape[-1]}'
  label += f'/{groups}' if groups > 1 else ''
  return Layer(
    module.path, label, result.shape[1:3], dataclasses.replace(cost, activations=elements)
  )


def _parameters(module: nn.Module) -> int:
  return sum(x.size for x in jax.tree.leaves(module.variables.get('params', {})))


def _describe(layers: Sequence[Layer]) -> str:
  """'[3x3 16, 3x3 16] + 4 x [3x3 8, AFI, 3x3 16]', shortcuts and insides of attentions left out."""
  blocks = collections.defaultdict(list)
  for layer in layers:
    inside = {'shortcut', 'left', 'afi', 'attention'} & {p.split('_')[0] for p in layer.path[1:-1]}
    if layer.label and not inside:
      blocks['_'.join(layer.path[0].split('_')[:2])].append(layer.label)
  runs = [(len(list(group)), block) for block, group in itertools.groupby(blocks.values())]
  if len(runs) == 1 and runs[0][0] == 1:
    return ', '.join(runs[0][1])
  return ' + '.join(
    (f'{number} x ' if number > 1 else '') + f'[{", ".join(block)}]' for number, block in runs
  )


def _values(cost: Cost) -> tuple[int, ...]:
  return dataclasses.astuple(cost)
