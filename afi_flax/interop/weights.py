"""The weights in a file, as variables of the network that they are of.

The file is a state dict of torchvision or timm, or a `.safetensors` of ours: arrays named
'params/stage1_block1/conv1/conv/kernel' and 'batch_stats/...', with the run's config and class
names in its header. Every name and every shape is checked: nothing is skipped in silence, and a
file that differs from its network in anything but the classifier is refused.

What names and shapes cannot tell: a network that differs in what has no weights. timm's resnetaa
and resnetblur, which smooth where they shrink, have the names of resnet, and so have ResNets that
stride in their first 1x1 convolution, as Caffe's do. So evaluate what was imported.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from flax import traverse_util

from afi_flax import config, models
from afi_flax.config import Model
from afi_flax.errors import UserError, shown
from afi_flax.interop import names, state_dicts

FORMAT = 'afi_flax'  # what the header of a file of ours says
HEAD = 'params/head/'
Shape = tuple[int, ...]

# Names of networks whose definitions are not ours, and which they are.
_OTHERS = (
  (r'conv1\.0\.weight', 'a stem of three 3x3 convolutions, as resnet50d has it'),
  (r'.*\.se_module\..*', 'a legacy SE-ResNet, which strides in its first 1x1 convolution'),
  (r'layer\d\.\d+\.se\.conv\.weight', 'the ECA of timm, which has other names and places'),
)


@dataclasses.dataclass(frozen=True)
class Source:
  """Weights, and the network that they are of.

  Attributes:
    where: in words.
    model: the network; of 0 classes where there is no classifier.
    class_names: in the order of the logits; None: unknown.
    arrays: f32 by path, 'params/...' and 'batch_stats/...'.
    ignored: names of what lies beside the weights.
    digest: of the file; '' of a run.
    config: of the run that the file is of, without paths of its machine; None: it is not ours.
  """

  where: str
  model: Model
  class_names: tuple[str, ...] | None
  arrays: Mapping[str, np.ndarray]
  ignored: tuple[str, ...] = ()
  digest: str = ''
  config: dict | None = None


def read(path: str, wanted: str | None) -> Source:
  """The weights in a file.

  Args:
    path: of the file, on a disk or in a bucket.
    wanted: name of the network that they will start. A file of torchvision or timm must hold its
      backbone, with or without SE. None: only a file of ours will do, which says it.

  Raises:
    UserError: the file cannot be read, or is not such a network's.
  """
  state = state_dicts.read(path)
  if state.metadata.get('format') == FORMAT:
    return _ours(state, path)
  if wanted is None:
    raise UserError(f'{path} does not say which network it holds; give --model NAME')
  return _theirs(state, path, models.form(wanted).backbone)


def shapes(model: Model) -> dict[str, Shape]:
  """Of every variable of a network, by path; makes no array."""
  network, size = models.create_model(**vars(model)), models.image_size(model.name)
  images = jax.ShapeDtypeStruct((1, size, size, 3), 'float32')
  made = jax.eval_shape(lambda x: network.init(jax.random.key(0), x, train=False), images)
  return {path: x.shape for path, x in flat(made).items()}


def flat(variables: Mapping) -> dict:
  """`params` and `batch_stats` by path: {'params/stem/conv/kernel': ...}."""
  kept = {name: variables[name] for name in ('params', 'batch_stats')}
  return traverse_util.flatten_dict(kept, sep='/')


def to_torch(path: str, shape: Shape) -> list[Shape]:
  """The shapes that PyTorch may give an array of ours.

  Kernels [...,in,out] are [out,in,...] there; dense ones may be 1x1 convolutions, as in timm's SE.

  >>> to_torch('params/stem/conv/kernel', (7, 7, 3, 64))
  [(64, 3, 7, 7)]
  >>> to_torch('params/head/dense/kernel', (2048, 1000))
  [(1000, 2048), (1000, 2048, 1, 1)]
  """
  if not path.endswith('/kernel'):
    return [shape]
  moved = (shape[-1], shape[-2], *shape[:-2])
  return [moved] if len(shape) > 2 else [moved, (*moved, 1, 1)]


def from_torch(path: str, value: np.ndarray, shape: Shape) -> np.ndarray:
  """An array of PyTorch's as ours, which has this shape."""
  if path.endswith('/kernel'):
    value = np.moveaxis(value, (0, 1), (-1, -2))
  return value.reshape(shape)


def _theirs(state: state_dicts.StateDict, path: str, backbone: str) -> Source:
  fit = _Fit(state.arrays, backbone)
  if fit.problems:
    raise UserError(f'{path} does not hold {fit.model.name}: {fit.problems}; {_cure(state, fit)}')
  entry = f', its entry {state.entry!r}' if state.entry else ''
  return Source(
    where=f'{path} (names of {fit.table.source}, {state.dtypes}{entry})',
    model=fit.model,
    class_names=None,
    arrays={p: from_torch(p, state.arrays[name], s) for name, (p, s) in fit.wanted.items()},
    ignored=state.ignored,
    digest=state.sha256,
  )


class _Fit:
  """How well arrays of PyTorch fit a backbone, with SE where they have that.

  Attributes:
    model: the network.
    table: of names.
    wanted: {name in the file: (our path, our shape)}.
    problems: what does not agree, in words; '': nothing.
  """

  def __init__(self, arrays: Mapping[str, np.ndarray], backbone: str):
    tables = names.tables(backbone)
    has_se = any('attention/reduce' in table.inside for table in tables)
    se = has_se and any('.se.fc1.' in name for name in arrays)
    biased = se and any(name.endswith('.se.fc1.bias') for name in arrays)
    name = f'se_{backbone}' if se else backbone
    ours = shapes(Model(name, 1, None, 'float32', biased, 'none'))
    self.table = max(tables, key=lambda table: len(arrays.keys() & set(map(table.of, ours))))
    classifier = arrays.get(self.table.of(f'{HEAD}dense/kernel'))
    classes = 0 if classifier is None else len(np.atleast_1d(classifier))
    for path in [path for path in ours if path.startswith(HEAD)]:
      ours[path] = (*ours[path][:-1], classes)
      if classifier is None:
        del ours[path]
    self.model = Model(name, classes, None, 'float32', biased, 'none')
    self.wanted = {self.table.of(path): (path, shape) for path, shape in ours.items()}
    self.problems = differences(
      {name: x.shape for name, x in arrays.items()},
      {name: to_torch(path, shape) for name, (path, shape) in self.wanted.items()},
    )


def differences(found: Mapping[str, Shape], wanted: Mapping[str, Sequence[Shape]]) -> str:
  """What is missing, of another shape, or too much, in words; '': nothing."""
  wrong = [name for name in wanted if name in found and found[name] not in wanted[name]]
  parts = (
    ('it lacks {}', [f'{n} {_brackets(wanted[n][0])}' for n in wanted if n not in found]),
    (
      '{}',
      [f'{n} is {_brackets(found[n])} and must be {_brackets(wanted[n][0])}' for n in wrong],
    ),
    (
      'there is no place for {}',
      [f'{shown(n)} {_brackets(found[n])}' for n in found if n not in wanted],
    ),
  )
  return ', '.join(text.format(_first(items)) for text, items in parts if items)


def _first(items: Sequence[str]) -> str:
  return items[0] + (f' and {len(items) - 1} more' if len(items) > 1 else '')


def _brackets(shape: Iterable[int]) -> str:
  return f'[{",".join(map(str, shape))}]'


def _cure(state: state_dicts.StateDict, fit: _Fit) -> str:
  for pattern, what in _OTHERS:
    if any(re.fullmatch(pattern, name) for name in state.arrays):
      return f'it has {what}: give a network without'
  if fit.model.name in ('se_resnet18', 'se_resnet34'):
    return "timm's SE has at least 8 hidden channels, ours w / 16: give another network"
  for backbone, tables in names.TABLES.items():
    if any(table.of('params/stem/conv/kernel') in state.arrays for table in tables):
      other = _Fit(state.arrays, backbone)
      if not other.problems:
        return f'it holds {other.model.name}: use that, or another file'
  return f'give a state dict of {fit.model.name} from torchvision or timm'


def _ours(state: state_dicts.StateDict, path: str) -> Source:
  try:
    whole = config.without_paths(config.complete(json.loads(state.metadata['config'])))
    given = whole['model']
    class_names = tuple(map(str, json.loads(state.metadata['class_names'])))
    stages = tuple(map(int, given['stages'])) or None
    model = Model(
      str(given['name']), len(class_names), stages, 'float32', bool(given['se_bias']), 'none'
    )
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise UserError(
      f'{path} says that it is of afi_flax, and its header is not as that writes it '
      f'({type(error).__name__}: {shown(str(error))}); export it again'
    ) from error
  found = {name: x.shape for name, x in state.arrays.items()}
  if problems := differences(found, {p: [shape] for p, shape in shapes(model).items()}):
    raise UserError(f'{path} does not hold {model.name}, as it says: {problems}; export it again')
  step = state.metadata.get('step', '?')
  return Source(
    where=f'{path} (afi_flax, step {shown(step)}, {state.dtypes})',
    model=model,
    class_names=class_names,
    arrays=state.arrays,
    ignored=state.ignored,
    digest=state.sha256,
    config=whole,
  )
