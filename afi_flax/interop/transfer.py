"""The weights of one network as the start of another, and the report of what became of each.

They start a network of the same backbone that has all of their modules: itself, with another
classifier; the plain network with AFI, or with an attention. An array that both have in one shape
is taken. Two are reshaped, where a block reuses features and theirs does not:

AFI halves the first convolution to c = w/2 channels X_k, so that the second one takes X_k and R_k
where the plain one took w channels. The first half of its outputs is taken, with their batch norm.
Then X_k is, number for number, the first half of what the plain block computes, which is also the
half that AFI takes of block 1, and the second convolution meets its first c inputs as it knows
them. A convolution initialised anew would leave it none: of a ResNet-32 with 25% top-1 on
CIFAR-100, AFI-ResNet-32 then begins at 1% instead of 15% (on the statistics of a batch), and has a
loss of 3.77 instead of 3.20 after 40 steps. What the second convolution does to the other c inputs
was learned for channels that there are no more, and R_k has others in their place; it is taken as
it is.

AFI-B leaves the first convolution whole and gives the second one R_k besides: 2w inputs, X_k first
(in each group, where it has groups). Its kernel is taken for X_k and is zero for R_k. Then the
network computes exactly what the plain one does, and learns from there: the gradient of a zero
kernel is not zero.

All else is initialised anew: the scoring network of AFI, attentions, and the classifier where the
number of classes differs.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable

import numpy as np

from afi_flax import models
from afi_flax.config import Model
from afi_flax.errors import UserError, shown
from afi_flax.interop import weights
from afi_flax.interop.weights import HEAD, Shape, Source

_IN_BLOCK = re.compile(r'\w+/stage(\d+)_block(\d+)/(.+)/\w+')
_ADDED = re.compile(r'\w+/\w+/(fuse|attention)/')  # what a plain network lacks
_SE_BIAS = re.compile(r'params/\w+/attention/(reduce|expand)/bias')
_OTHER_WEIGHTS = (
  'give weights of the same network, or of the plain one for one with AFI or attention'
)


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of every array; those of each kind by path.

  Attributes:
    where: the source, in words.
    source: its network.
    target: the network that it starts.
    taken: shapes of those taken as they are.
    cut: shapes of those of which the first half is taken.
    widened: shapes of those that have zeros for R_k.
    initialised: shapes of those that the source does not have, or for another number of classes.
    left: shapes of the source's that are not taken: of its classifier.
    ignored: names of what is no weight.
    note: '' or what to know of the classifier.
  """

  where: str
  source: Model
  target: Model
  taken: dict[str, Shape]
  cut: dict[str, Shape]
  widened: dict[str, Shape]
  initialised: dict[str, Shape]
  left: dict[str, Shape]
  ignored: tuple[str, ...]
  note: str

  def __str__(self) -> str:
    """Some lines that name every module."""
    numbers = sum(int(np.prod(shape)) for shape in self.taken.values())
    rows = {
      'taken': f'{len(self.taken)} arrays, {numbers:,} numbers',
      'first half': _modules(self.cut),
      'and zeros': _modules(self.widened),
      'initialised': _modules(self.initialised),
      'left': _modules(self.left),
      'ignored': _first(self.ignored),
      'note': self.note,
    }
    title = f'{self.where}: {_network(self.source)} -> {_network(self.target)}'
    return '\n'.join((title, *(f'  {what:<12}{text}' for what, text in rows.items() if text)))


def transfer(
  source: Source, target: Model, class_names: tuple[str, ...] | None = None
) -> tuple[dict[str, np.ndarray], Report]:
  """What of a source a network takes.

  Args:
    source: weights.
    target: the network.
    class_names: of its data, in the order of the logits; None: unknown.

  Returns:
    f32 arrays by path, in the network's shapes: all but those that it initialises; and the report.

  Raises:
    UserError: the source is of another backbone, or one of the two lacks a module of the other.
  """
  if models.form(source.model.name).backbone != models.form(target.name).backbone:
    raise _refused(source, target, 'they have other layers')
  wanted = weights.shapes(target)
  reusing = _reusing(wanted) - _reusing(source.arrays)
  chosen, shapes = {}, collections.defaultdict(dict)
  for path, shape in wanted.items():
    value = source.arrays.get(path)
    how, made = _fitted(value, shape, path.split('/')[1] in reusing)
    if made is not None:
      chosen[path] = made
    elif path.startswith(HEAD) or (value is None and _ADDED.match(path)):
      how = 'initialised'
    else:
      there = {} if value is None else {path: value.shape}
      raise _refused(source, target, weights.differences(there, {path: [shape]}))
    shapes[how][path] = shape
  left = {path: x.shape for path, x in source.arrays.items() if path not in chosen}
  if more := [path for path in left if not path.startswith(HEAD)]:
    biased = all(map(_SE_BIAS.fullmatch, more))
    cure = 'its SE has biases: add --config.model.se_bias=True' if biased else _OTHER_WEIGHTS
    raise _refused(source, target, f'there is no place for {more[0]}', cure)
  report = Report(
    where=source.where,
    source=source.model,
    target=target,
    **{how: shapes[how] for how in ('taken', 'cut', 'widened', 'initialised')},
    left=left,
    ignored=source.ignored,
    note=_note(source, class_names, f'{HEAD}dense/kernel' in chosen),
  )
  return chosen, report


def _reusing(paths: Iterable[str]) -> set[str]:
  """The blocks that reuse features."""
  return {path.split('/')[1] for path in paths if '/fuse/' in path}


def _fitted(
  value: np.ndarray | None, shape: Shape, reuses: bool
) -> tuple[str, np.ndarray] | tuple[None, None]:
  """How an array is taken, and as what; None where it is not.

  Args:
    value: of the source.
    shape: of the network's.
    reuses: whether it is in a block that reuses features, and did not where it comes from.
  """
  if value is None:
    return None, None
  if value.shape == shape:
    return 'taken', value
  if reuses and value.shape == (*shape[:-1], 2 * shape[-1]):
    return 'cut', value[..., : shape[-1]]
  if reuses and len(shape) == 4 and shape == (*value.shape[:2], 2 * value.shape[2], shape[3]):
    return 'widened', np.concatenate([value, np.zeros_like(value)], axis=2)
  return None, None


def _refused(source: Source, target: Model, why: str, cure: str = _OTHER_WEIGHTS) -> UserError:
  return UserError(
    f'{source.where} holds {_network(source.model)}, which cannot start {_network(target)}: {why}; '
    f'{cure}'
  )


def _network(model: Model) -> str:
  stages = f' (AFI in stages {", ".join(map(str, model.stages))})' if model.stages else ''
  biases = ' with biases in SE' if model.se_bias else ''
  classes = f'{model.num_classes} classes' if model.num_classes else 'no classifier'
  return f'{model.name}{stages}{biases}, {classes}'


def _note(source: Source, class_names: tuple[str, ...] | None, taken: bool) -> str:
  if not taken or None in (source.class_names, class_names) or source.class_names == class_names:
    return ''
  return 'the classifier is of other classes, though of as many; it is taken'


def _modules(paths: Iterable[str]) -> str:
  """Their modules, by the blocks that they are in: 'conv1/conv, conv1/bn in stage 1 block 2-3'."""
  parts: dict[tuple[int, int] | None, list[str]] = collections.defaultdict(list)
  for path in paths:
    match = _IN_BLOCK.fullmatch(path)
    place = (int(match[1]), int(match[2])) if match else None
    module = match[3] if match else path.partition('/')[2].rpartition('/')[0]
    if module not in parts[place]:
      parts[place].append(module)
  alike = collections.defaultdict(list)
  for place, modules in sorted(parts.items(), key=lambda item: item[0] or (0, 0)):
    alike[', '.join(sorted(modules))].append(place)
  return '; '.join(names + _in_blocks(places) for names, places in alike.items())


def _in_blocks(places: list[tuple[int, int] | None]) -> str:
  blocks = collections.defaultdict(list)
  for stage, block in filter(None, places):
    blocks[stage].append(block)
  texts = (f'stage {stage} block {_span(numbers)}' for stage, numbers in blocks.items())
  return f' in {", ".join(texts)}' if blocks else ''


def _span(numbers: list[int]) -> str:
  """'2-4', where they are consecutive."""
  if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
    return f'{numbers[0]}-{numbers[-1]}'
  return '+'.join(map(str, numbers))


def _first(names: tuple[str, ...]) -> str:
  more = f' and {len(names) - 1} more' if len(names) > 1 else ''
  return f'{shown(names[0])}{more}' if names else ''
