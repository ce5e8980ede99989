"""What PyTorch's networks call the arrays of ours.

One direction, from our path to their name, so that a table says for every array of a network which
name it must have in a file; a name that comes out of no array is one that ours does not have.

Sources: the state dicts of torchvision 0.28 and timm 1.0.31.
"""

import dataclasses
import re
from collections.abc import Callable

from afi_flax.errors import UserError
from afi_flax.models.mobilenet_v2 import IMAGENET_STAGES

# The last part of a path -> of a name.
_LEAVES = {
  'kernel': 'weight',
  'scale': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'var': 'running_var',
}


@dataclasses.dataclass(frozen=True)
class Names:
  """How a family of PyTorch networks calls the modules of ours.

  Attributes:
    source: who calls them so.
    block: (stage, block in the stage), both from 1 -> how names in that block begin.
    inside: in a block, our module -> theirs; what stands below both is the same.
    outside: the same for what is in no block, or is an exception in one.
    ours: how paths in a block of ours begin, with its two numbers.
  """

  source: str
  block: Callable[[int, int], str]
  inside: dict[str, str]
  outside: dict[str, str]
  ours: str = r'stage(\d+)_block(\d+)/'

  def of(self, path: str) -> str:
    """Our path of an array -> their name.

    >>> RESNET.of('params/stage1_block2/conv1/conv/kernel')
    'layer1.1.conv1.weight'

    Args:
      path: 'params/' or 'batch_stats/', the modules and the array, joined by '/'.

    Raises:
      KeyError: they have no such module.
    """
    _, _, inner = path.partition('/')
    module, _, leaf = inner.rpartition('/')
    name = _renamed(module, self.outside)
    if name is None and (match := re.match(self.ours, module)):
      name = _renamed(module[match.end() :], self.inside)
      name = name and self.block(*map(int, match.groups())) + name
    if name is None:
      raise KeyError(f'{self.source} has no name for {path}')
    return f'{name}.{_LEAVES[leaf]}'


def _renamed(module: str, names: dict[str, str]) -> str | None:
  for ours, theirs in names.items():
    if module == ours or module.startswith(f'{ours}/'):
      return theirs + module.removeprefix(ours).replace('/', '.')
  return None


RESNET = Names(
  'torchvision and timm',
  lambda stage, block: f'layer{stage}.{block - 1}.',
  {
    **{f'conv{i}/conv': f'conv{i}' for i in (1, 2, 3)},
    **{f'conv{i}/bn': f'bn{i}' for i in (1, 2, 3)},
    'shortcut/conv': 'downsample.0',
    'shortcut/bn': 'downsample.1',
    'attention/reduce': 'se.fc1',
    'attention/expand': 'se.fc2',
  },
  {'stem/conv': 'conv1', 'stem/bn': 'bn1', 'head/dense': 'fc'},
)


def _torchvision_mobilenet_block(stage: int, block: int) -> str:
  """Blocks are numbered through, from 1; 0 is the stem."""
  before = sum(blocks for _, _, blocks, _ in IMAGENET_STAGES[: stage - 1])
  return f'features.{before + block}.conv.'


MOBILENETV2_TORCHVISION = Names(
  'torchvision',
  _torchvision_mobilenet_block,
  {
    'expand/conv': '0.0',
    'expand/bn': '0.1',
    'depthwise/conv': '1.0',
    'depthwise/bn': '1.1',
    'project/conv': '2',
    'project/bn': '3',
  },
  {
    'stem/conv': 'features.0.0',
    'stem/bn': 'features.0.1',
    'stage1_block1/depthwise/conv': 'features.1.conv.0.0',  # which has no expansion
    'stage1_block1/depthwise/bn': 'features.1.conv.0.1',
    'stage1_block1/project/conv': 'features.1.conv.1',
    'stage1_block1/project/bn': 'features.1.conv.2',
    'last/conv': 'features.18.0',
    'last/bn': 'features.18.1',
    'head/dense': 'classifier.1',
  },
)
MOBILENETV2_TIMM = Names(
  'timm',
  lambda stage, block: f'blocks.{stage - 1}.{block - 1}.',
  {
    'expand/conv': 'conv_pw',
    'expand/bn': 'bn1',
    'depthwise/conv': 'conv_dw',
    'depthwise/bn': 'bn2',
    'project/conv': 'conv_pwl',
    'project/bn': 'bn3',
  },
  {
    'stem/conv': 'conv_stem',
    'stem/bn': 'bn1',
    'stage1_block1/depthwise/conv': 'blocks.0.0.conv_dw',
    'stage1_block1/depthwise/bn': 'blocks.0.0.bn1',
    'stage1_block1/project/conv': 'blocks.0.0.conv_pw',
    'stage1_block1/project/bn': 'blocks.0.0.bn2',
    'last/conv': 'conv_head',
    'last/bn': 'bn2',
    'head/dense': 'classifier',
  },
)
SHUFFLENETV2 = Names(
  'torchvision',
  lambda stage, block: f'stage{stage + 1}.{block - 1}.',
  {
    'left_depthwise/conv': 'branch1.0',
    'left_depthwise/bn': 'branch1.1',
    'left_conv/conv': 'branch1.2',
    'left_conv/bn': 'branch1.3',
    'conv1/conv': 'branch2.0',
    'conv1/bn': 'branch2.1',
    'depthwise/conv': 'branch2.3',
    'depthwise/bn': 'branch2.4',
    'conv2/conv': 'branch2.5',
    'conv2/bn': 'branch2.6',
  },
  {
    'stem/conv': 'conv1.0',
    'stem/bn': 'conv1.1',
    'last/conv': 'conv5.0',
    'last/bn': 'conv5.1',
    'head/dense': 'fc',
  },
)


def _densenet(source: str, dot: str) -> Names:
  """`dot`: what stands before the number of a layer's module."""
  transitions = (1, 2, 3)
  return Names(
    source,
    lambda stage, layer: f'features.denseblock{stage}.denselayer{layer}.',
    {
      'bn/bn': f'norm{dot}1',
      'conv1/conv': f'conv{dot}1',
      'conv1/bn': f'norm{dot}2',
      'conv2': f'conv{dot}2',
    },
    {
      'stem/conv': 'features.conv0',
      'stem/bn': 'features.norm0',
      **{f'transition{i}_bn/bn': f'features.transition{i}.norm' for i in transitions},
      **{f'transition{i}_conv': f'features.transition{i}.conv' for i in transitions},
      'last_bn/bn': 'features.norm5',
      'head/dense': 'classifier',
    },
    r'stage(\d+)_layer(\d+)_',
  )


DENSENET = _densenet('torchvision and timm', '')
# densenet121-a639ec97.pth, which torchvision offers, is older than its code, which renames.
DENSENET_OLD = _densenet("torchvision's older files", '.')

_RESNETS = ('resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152', 'resnext50_32x4d')
_MOBILENETS = ('mobilenetv2', 'mobilenetv2_x0_5', 'mobilenetv2_x0_75', 'mobilenetv2_x1_4')
_SHUFFLENETS = tuple(f'shufflenetv2_{width}' for width in ('x0_5', 'x1_0', 'x1_5', 'x2_0'))
# Backbones with a counterpart -> the tables that a file may follow.
TABLES: dict[str, tuple[Names, ...]] = {
  **dict.fromkeys(_RESNETS, (RESNET,)),
  **dict.fromkeys(_MOBILENETS, (MOBILENETV2_TORCHVISION, MOBILENETV2_TIMM)),
  **dict.fromkeys(_SHUFFLENETS, (SHUFFLENETV2,)),
  'densenet121': (DENSENET, DENSENET_OLD),
}


def tables(backbone: str) -> tuple[Names, ...]:
  """Those that a file with a network's weights may follow; UserError where there are none."""
  if backbone not in TABLES:
    raise UserError(
      f'neither torchvision nor timm has {backbone}; those that have a counterpart are '
      f'{", ".join(TABLES)}'
    )
  return TABLES[backbone]
