"""The CIFAR networks, AFI-ResNet-50 and their AFI and AFI-B forms in plain PyTorch.

Written from the paper and its fitted reading, not from the Flax code, in the shortest form rather
than the fastest: features are stacked and pooled anew in every block. For tests of parity only.
"""

import collections
import dataclasses
import math

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812, as PyTorch's own documentation does

MOBILENET = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
             (6, 160, 3, 2), (6, 320, 1, 1))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Setting:
  """How blocks 2 to n of a stage reuse features."""

  halved: bool  # AFI halves the first convolution, AFI-B keeps its width
  reduction: int
  attention: type[nn.Module] | None = None  # on R_k

  def own_width(self, w: int) -> int:
    return w // 2 if self.halved else w


def sequence(**layers: nn.Module) -> nn.Sequential:
  return nn.Sequential(collections.OrderedDict(layers))


def conv_bn(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
  conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
  return sequence(conv=conv, bn=nn.BatchNorm2d(cout))


class SE(nn.Module):
  def __init__(self, c: int):
    super().__init__()
    self.reduce = nn.Linear(c, max(1, c // 16), bias=False)
    self.expand = nn.Linear(max(1, c // 16), c, bias=False)

  def forward(self, x):
    scale = self.expand(F.relu(self.reduce(x.mean((2, 3))))).sigmoid()
    return x * scale[:, :, None, None]


class GE(nn.Module):
  def __init__(self, c: int):
    super().__init__()

  def forward(self, x):
    return x * x.mean((2, 3), keepdim=True).sigmoid()


class CBAM(nn.Module):
  def __init__(self, c: int):
    super().__init__()
    self.reduce = nn.Linear(c, max(1, c // 16), bias=False)
    self.expand = nn.Linear(max(1, c // 16), c, bias=False)
    self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

  def forward(self, x):
    mean, most = (self.expand(F.relu(self.reduce(z))) for z in (x.mean((2, 3)), x.amax((2, 3))))
    x = x * (mean + most).sigmoid()[:, :, None, None]
    maps = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    return x * self.spatial(maps).sigmoid()


class ECA(nn.Module):
  def __init__(self, c: int):
    super().__init__()
    kernel = int(abs((math.log2(c) + 1) / 2))
    kernel += 1 - kernel % 2
    self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

  def forward(self, x):
    scale = self.conv(x.mean((2, 3))[:, None]).sigmoid()[:, 0]
    return x * scale[:, :, None, None]


class AFI(nn.Module):
  """Eqs. 1 and 2, the attention on the result, and its concatenation with the block's own X_k.

  With more than one group, X_k and R_k are interleaved: every group sees its own part of both.
  """

  def __init__(self, w: int, setting: Setting, groups: int = 1):
    super().__init__()
    c = setting.own_width(w)
    hidden = max(1, c // setting.reduction)
    self.groups = 1 if setting.halved else groups
    self.w1 = nn.Linear(c, hidden, bias=False)
    self.w2 = nn.Linear(hidden, c, bias=False)
    self.attention = setting.attention(c) if setting.attention else nn.Identity()

  def forward(self, own, features):
    x = torch.stack(features, 1)  # [B,N,c,H,W]
    weights = self.w2(F.relu(self.w1(x.mean((3, 4))))).softmax(1)  # [B,N,c]
    result = self.attention((weights[..., None, None] * x).sum(1))
    b, _, h, w = own.shape
    parts = [y.reshape(b, self.groups, -1, h, w) for y in (own, result)]
    return torch.cat(parts, 2).reshape(b, -1, h, w)


def align(x1, c: int, size):
  """A plain block's X_1 as the later blocks take it: c channels at the stage's resolution."""
  if x1.shape[-2:] != size:
    x1 = F.avg_pool2d(x1, 2, 2, ceil_mode=True, count_include_pad=False)
  return F.pad(x1[:, :c], (0, 0, 0, 0, 0, max(0, c - x1.shape[1])))


class Block(nn.Module):
  """First convolution, what follows on it (and on R_k), and a shortcut: all residual networks."""

  def __init__(self, first, then, shortcut, relu: bool, afi: AFI | None):
    super().__init__()
    self.first, self.then, self.shortcut, self.relu, self.afi = first, then, shortcut, relu, afi

  def forward(self, x, features):
    own = F.relu(self.first(x))
    y = self.then(self.afi(own, features) if self.afi else own)
    if self.shortcut is not None:
      y = y + self.shortcut(x)
    return (F.relu(y) if self.relu else y), own


def shortcut_bn(cin: int, cout: int, stride: int) -> nn.Module:
  return nn.Identity() if cin == cout and stride == 1 else conv_bn(cin, cout, 1, stride)


def fused_widths(w: int, setting: Setting | None) -> tuple[int, int]:
  """Channels out of the first convolution, and into the second."""
  if setting is None:
    return w, w
  own = setting.own_width(w)
  return own, 2 * own


def basic_block(cin, w, stride, setting):
  own, both = fused_widths(w, setting)
  afi = AFI(w, setting) if setting else None
  then = sequence(conv2=conv_bn(both, w, 3))
  return Block(conv_bn(cin, own, 3, stride), then, shortcut_bn(cin, w, stride), True, afi)


def bottleneck(cin, w, cout, stride, setting, groups=1):
  own, both = fused_widths(w, setting)
  afi = AFI(w, setting, groups) if setting else None
  conv2 = conv_bn(both, w, 3, stride, groups)
  then = sequence(conv2=conv2, relu=nn.ReLU(), conv3=conv_bn(w, cout, 1))
  return Block(conv_bn(cin, own, 1), then, shortcut_bn(cin, cout, stride), True, afi)


def inverted_residual(cin, expansion, cout, stride, setting):
  w = expansion * cin
  own, both = fused_widths(w, setting)
  afi = AFI(w, setting, groups=w) if setting else None
  conv2 = conv_bn(both, w, 3, stride, groups=w)
  then = sequence(conv2=conv2, relu=nn.ReLU(), conv3=conv_bn(w, cout, 1))
  shortcut = shortcut_bn(cin, cout, 1) if stride == 1 else None
  return Block(conv_bn(cin, own, 1), then, shortcut, False, afi)


def shuffle(left, right):
  """Interleaves the channels of the two branches."""
  return torch.stack([left, right], 2).flatten(1, 2)


class ShuffleUnit(nn.Module):
  """A unit that strides where `left` is a branch of its own, else one that splits its input."""

  def __init__(self, cin: int, w: int, stride: int, setting: Setting | None):
    super().__init__()
    own, both = fused_widths(w, setting)
    self.left = None
    if stride == 2:
      depthwise = conv_bn(cin, cin, 3, 2, groups=cin)
      self.left = sequence(conv1=depthwise, conv2=conv_bn(cin, w, 1), relu=nn.ReLU())
    self.first = conv_bn(cin if stride == 2 else w, own, 1)
    conv2 = conv_bn(both, w, 3, stride, groups=w)
    self.then = sequence(conv2=conv2, conv3=conv_bn(w, w, 1), relu=nn.ReLU())
    self.afi = AFI(w, setting, groups=w) if setting else None

  def forward(self, x, features):
    left, right = (self.left(x), x) if self.left else x.chunk(2, 1)
    own = F.relu(self.first(right))
    y = self.then(self.afi(own, features) if self.afi else own)
    return shuffle(left, y), own


class Stage(nn.Module):
  """Blocks of one output shape; block k gets X_1 to X_{k-1}, of c channels each."""

  def __init__(self, blocks: list[nn.Module], c: int):
    super().__init__()
    self.blocks, self.c = nn.ModuleList(blocks), c

  def forward(self, x):
    features = []
    for block in self.blocks:
      x, own = block(x, features)
      features.append(align(own, self.c, x.shape[2:]))
    return x


def network(stem, stages, channels: int, num_classes: int, conv=None) -> nn.Module:
  tail = {} if conv is None else {'conv_last': conv, 'relu_last': nn.ReLU()}
  pool = {'pool': nn.AdaptiveAvgPool2d(1), 'flatten': nn.Flatten()}
  return sequence(
    stem=stem, stages=nn.Sequential(*stages), **tail, **pool, fc=nn.Linear(channels, num_classes)
  )


def own_width(w: int, setting: Setting | None) -> int:
  return setting.own_width(w) if setting else w


def cifar_resnet(n: int, setting: Setting | None, num_classes: int) -> nn.Module:
  """ResNet-(6n+2)."""
  stages, cin = [], 16
  for stage, w in enumerate((16, 32, 64)):
    blocks = [basic_block(cin, w, 2 if stage else 1, None)]
    blocks += [basic_block(w, w, 1, setting) for _ in range(n - 1)]
    stages.append(Stage(blocks, own_width(w, setting)))
    cin = w
  return network(sequence(conv1=conv_bn(3, 16, 3), relu=nn.ReLU()), stages, 64, num_classes)


def bottleneck_stages(cin, widths, counts, expansion, setting, groups=1) -> list[Stage]:
  stages = []
  for stage, (w, count) in enumerate(zip(widths, counts, strict=True)):
    cout = expansion * w
    blocks = [bottleneck(cin, w, cout, 2 if stage else 1, None, groups)]
    blocks += [bottleneck(cout, w, cout, 1, setting, groups) for _ in range(count - 1)]
    stages.append(Stage(blocks, own_width(w, setting)))
    cin = cout
  return stages


def resnet50(setting: Setting | None, num_classes: int) -> nn.Module:
  stem = sequence(conv1=conv_bn(3, 64, 7, 2), relu=nn.ReLU(), pool=nn.MaxPool2d(3, 2, 1))
  stages = bottleneck_stages(64, (64, 128, 256, 512), (3, 4, 6, 3), 4, setting)
  return network(stem, stages, 2048, num_classes)


def resnext29(setting: Setting | None, num_classes: int) -> nn.Module:
  """32x4d for CIFAR."""
  stages = bottleneck_stages(64, (128, 256, 512), (3, 3, 3), 2, setting, groups=32)
  return network(sequence(conv1=conv_bn(3, 64, 1), relu=nn.ReLU()), stages, 1024, num_classes)


def mobilenetv2(setting: Setting | None, num_classes: int) -> nn.Module:
  """For CIFAR."""
  stages, cin = [], 32
  for expansion, c, count, stride in MOBILENET:
    blocks = [inverted_residual(cin, expansion, c, stride, None)]
    blocks += [inverted_residual(c, expansion, c, 1, setting) for _ in range(count - 1)]
    stages.append(Stage(blocks, own_width(expansion * c, setting)))
    cin = c
  stem = sequence(conv1=conv_bn(3, 32, 3), relu=nn.ReLU())
  return network(stem, stages, 1280, num_classes, conv_bn(320, 1280, 1))


def shufflenetv2(setting: Setting | None, num_classes: int) -> nn.Module:
  """1x, for CIFAR."""
  stages, cin = [], 24
  for width, count in ((116, 4), (232, 8), (464, 4)):
    w = width // 2
    blocks = [ShuffleUnit(cin, w, 2, None)]
    blocks += [ShuffleUnit(width, w, 1, setting) for _ in range(count - 1)]
    stages.append(Stage(blocks, own_width(w, setting)))
    cin = width
  stem = sequence(conv1=conv_bn(3, 24, 3), relu=nn.ReLU())
  return network(stem, stages, 1024, num_classes, conv_bn(464, 1024, 1))
