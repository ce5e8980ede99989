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
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import jax
from flax import linen as nn

from afi_flax.models.attention import CBAM, ECA, GE, SE
from afi_flax.models.fusion import AFI, Features
from afi_flax.models.layers import BatchNorm, GlobalAveragePool

PAPER_PICTURES = 32  # that the paper's FLOPs are for


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a network, or a part of it, costs for one picture."""

  parameters: int = 0  # trainable
  macs: int = 0
  paper_flops: int = 0
  activations: int = 0  # numbers that come out of convolutions, as in the RegNet paper and in timm

  def __add__(self, other: 'Cost') -> 'Cost':
    return Cost(
      self.parameters + other.parameters,
      self.macs + other.macs,
      self.paper_flops + other.paper_flops,
      self.activations + other.activations,
    )

  def repeated(self, times: int) -> 'Cost':
    """Of the same layer, applied several times."""
    return Cost(
      self.parameters, times * self.macs, times * self.paper_flops, times * self.activations
    )


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
  """All layers of a network in the order in which they are called; parameters at the first call.

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
  called, layers = set(), []
  for layer in counter.layers:
    if layer.path in called:
      layer = dataclasses.replace(layer, cost=dataclasses.replace(layer.cost, parameters=0))
    layers.append(layer)
    called.add(layer.path)
  return layers


def total(layers: Iterable[Layer]) -> Cost:
  """The sum over the layers."""
  return sum((layer.cost for layer in layers), Cost())


def train_flops(model: nn.Module, image_size: int, frozen: Collection[str] = ()) -> int:
  """Floating-point operations of the network for one training picture, as utilisation counts them.

  Two for each multiply-accumulate, once forward and twice for the gradients, of its kernel and of
  its input; not what is computed again to save memory. Kernels of modules in `frozen` have no
  gradient, nor have inputs before the first module that trains.
  """
  layers = count(model, image_size)
  trained = [layer for layer in layers if layer.path[0] not in frozen]
  behind = layers[layers.index(trained[0]) :] if trained else []
  return 2 * sum(total(part).macs for part in (layers, behind, trained))


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
  """Notes every call of a module. What was called before, on equal shapes, is not traced again.

  AFI treats its maps alike: one of them is traced, and counts for each.
  """

  def __init__(self):
    self.layers: list[Layer] = []

  def __call__(self, call, args, kwargs, context):
    module = context.module
    if context.method_name != '__call__':
      return call(*args, **kwargs)
    one_map, num_maps = _first_map(module, args, kwargs)
    key = _key(module, *one_map)
    try:
      seen = _SEEN.get(key)
    except TypeError:  # The module holds others, whose names do not begin with its own.
      result = call(*args, **kwargs)
      self.layers += _own(module, args, result)
      return result
    if seen is None:
      _SEEN[key] = self._trace(call, module, *one_map)
    layers, tree, shapes = _SEEN[key]
    for layer in layers:
      cost = layer.cost.repeated(num_maps) if num_maps > 1 else layer.cost
      self.layers.append(Layer((*module.path, *layer.path), layer.label, layer.size, cost))
    return tree.unflatten([jax.lax.empty(*shape) for shape in shapes])

  def _trace(self, call, module, args, kwargs) -> 'tuple[list[Layer], Any, list]':
    """Layers with paths from the module on, the structure of its result and its arrays' shapes."""
    if isinstance(module, nn.Conv | nn.Dense):  # Values cost nothing, but much time to trace.
      object.__setattr__(module, 'kernel_init', nn.initializers.zeros)
      object.__setattr__(module, 'bias_init', nn.initializers.zeros)
    before, self.layers = self.layers, []
    result = call(*args, **kwargs)
    inside, self.layers = self.layers + _own(module, args, result), before
    depth = len(module.path)
    inside = [dataclasses.replace(layer, path=layer.path[depth:]) for layer in inside]
    leaves, tree = jax.tree.flatten(result)
    return inside, tree, [(x.shape, x.dtype) for x in leaves]


_SEEN = {}  # {key of a call: what `_Counter._trace` returned}


def _key(module: nn.Module, args: tuple, kwargs: dict) -> Any:
  """Equal for two calls of equal cost."""
  fields = tuple(
    getattr(module, field.name)
    for field in dataclasses.fields(module)
    if field.name not in ('name', 'parent', 'kernel_init', 'bias_init')
  )
  leaves, tree = jax.tree.flatten((args, kwargs))
  shapes = tuple((x.shape, x.dtype) if hasattr(x, 'shape') else x for x in leaves)
  return type(module), fields, tree, shapes


def _first_map(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple[tuple, dict], int]:
  """Arguments with one map only, where the module is AFI, and how many there are."""
  if not isinstance(module, AFI):
    return (args, kwargs), 1
  (features,) = (*args, *kwargs.values())
  if not isinstance(features, Features):
    return ((features[:1],), {}), len(features)
  batch, _, channels = features.pooled.shape
  pooled = jax.lax.empty((batch, 1, channels), features.pooled.dtype)
  return ((Features(features.maps[:1], pooled),), {}), len(features.maps)


def _own(module: nn.Module, args: tuple, result: Any) -> list[Layer]:
  """The layer that the module itself is, if it is one, its submodules not counted."""
  if isinstance(module, nn.Conv | nn.Dense):
    return [_multiplication(module, result)]
  if isinstance(module, nn.BatchNorm | BatchNorm):
    elements = math.prod(result.shape[1:])
    cost = Cost(_parameters(module), paper_flops=2 * elements)
    return [Layer(module.path, '', result.shape[1:3], cost)]
  if isinstance(module, GlobalAveragePool):
    _, height, width, channels = args[0].shape
    return [Layer(module.path, '', (), Cost(paper_flops=(height * width + 1) * channels))]
  if isinstance(module, AFI | SE | GE | CBAM | ECA):
    return [Layer(module.path, type(module).__name__, (), Cost())]
  return []


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
