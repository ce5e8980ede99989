"""A network's modules and the parts that they make up, by their names: stem, stage1, ..., head."""

import contextlib
import functools
import inspect
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
from flax import linen as nn

_IMAGE_SIZE = 64  # pixels; every network has all its modules on such pictures


def part(name: str) -> str:
  """The part that a module belongs to.

  >>> part('stage2_block1')
  'stage2'
  """
  return name.partition('_')[0]


@functools.lru_cache(maxsize=32)
def module_names(model: nn.Module) -> tuple[str, ...]:
  """Names of a network's outermost modules, in the order in which they are called.

  >>> from afi_flax.models import create_model
  >>> module_names(create_model('resnet20'))[:3]
  ('stem', 'stage1_block1', 'stage1_block2')
  """
  called: dict[str, None] = {}

  def note(call, args, kwargs, context):
    if len(context.module.path) == 1:
      called[context.module.path[0]] = None
    return call(*args, **kwargs)

  images = jax.ShapeDtypeStruct((1, _IMAGE_SIZE, _IMAGE_SIZE, 3), 'float32')
  with nn.intercept_methods(note):
    jax.eval_shape(functools.partial(model.init, jax.random.key(0), train=False), images)
  return tuple(called)


def distances(names: Sequence[str]) -> dict[str, int]:
  """How many blocks lie between each module and the head, whose distance is 0.

  The stem, every block and the head count one each; what follows a block without being one (a
  transition, the last convolution) goes with it: the groups of timm's layer-wise decay for these
  networks (`group_matcher` of its ResNets and MobileNets).

  >>> distances(['stem', 'stage1_block1', 'stage1_block2', 'last', 'head'])
  {'stem': 3, 'stage1_block1': 2, 'stage1_block2': 1, 'last': 1, 'head': 0}

  Args:
    names: as `module_names` returns them.
  """
  groups: list[str] = []
  places = {}
  for name in names:
    group = '_'.join(name.split('_')[:2])  # a DenseNet's layer is several modules
    if group.startswith(('stem', 'stage', 'head')) and group not in groups:
      groups.append(group)
    places[name] = len(groups)
  return {name: len(groups) - place for name, place in places.items()}


def without(names: Collection[str], tree: dict[str, Any]) -> dict[str, Any]:
  """A network's parameters or statistics, but for these modules'."""
  return {name: below for name, below in tree.items() if name not in names}


@contextlib.contextmanager
def evaluating(names: Collection[str]) -> Iterator[None]:
  """While entered, these modules of a network are called as in evaluation, though it trains.

  Their batch norms use their running statistics and leave them as they are, and no branch of theirs
  is dropped: of the modules' arguments, `train` is False and `keep` is None.
  """
  if not names:
    yield
    return

  def evaluate(call, args, kwargs, context):
    module = context.module
    outermost = len(module.path) == 1 and context.method_name == '__call__'
    if not outermost or module.path[0] not in names:
      return call(*args, **kwargs)
    given = inspect.signature(type(module).__call__).bind(module, *args, **kwargs)
    given.arguments |= {
      key: value for key, value in (('train', False), ('keep', None)) if key in given.arguments
    }
    return call(*given.args[1:], **given.kwargs)

  with nn.intercept_methods(evaluate):
    yield
