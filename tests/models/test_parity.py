"""Every backbone against PyTorch: torchvision's, timm's, or our own plain transcription.

The weights of a random PyTorch network are moved to ours, and the logits of both are compared in
float32: in evaluation mode, in training mode, and in evaluation mode again after one update.

Nothing is at a value that would hide a mistake: batch norms have random scales, biases and running
statistics, and AFI's weights differ between its sources. Logits are centred and scaled to a
standard deviation of 1 over the pictures, so that they say what tells the pictures apart; 1e-4 of
that is the tolerance.

What is chosen so that float32 can tell. A ReLU's gradient jumps where its input crosses zero; one
rounding error that crosses it changes an update by up to two percent, in PyTorch's own float32
against its float64 too. So batch norms shift their channels by 2 to 3 standard deviations, where a
hundredth of the values is below zero and few are next to it; and the learning rate is 0.0002, not
the recipes' 0.1, with which a random network's logits grow to hundreds or more in one update on
four pictures.

Which running variance. Flax adds the batch's biased variance (divided by n) to the running one,
PyTorch the unbiased one (divided by n - 1). Ours keeps Flax's: the networks of the zoo are trained
and evaluated with it, and at the sizes that are trained the two hardly differ (n is at least
64 * 4 * 4 in the recipes). Here n is as small as 16, so the update of PyTorch's running variance is
multiplied by (n - 1) / n before its logits are compared with ours.
"""

import dataclasses
import functools
import importlib
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from afi_flax import config, losses, optim
from afi_flax.models import create_model

CURE = '`make parity` installs what fits together and runs these tests'
torch = pytest.importorskip('torch', reason=f'PyTorch is not installed: {CURE}')

from tests.models import torch_networks  # noqa: E402, it imports torch

pytestmark = [pytest.mark.parity, pytest.mark.slow]

TOLERANCE = 1e-4  # absolute, on logits of standard deviation 1
LEARNING_RATE = 0.0002
NUM_CLASSES = 100
BATCH = 4


@dataclasses.dataclass(frozen=True)
class Names:
  """What a family of PyTorch networks calls the modules of ours.

  Attributes:
    block: a block's name, with the numbers of its stage and of itself in the stage.
    first: the numbers of the first stage and of a stage's first block; ours are 1.
    inside: in a block, PyTorch's name -> ours, each followed by what is the same in both.
    outside: the same for what is in no block.
    ours: a block of ours, with its two numbers.
  """

  block: str
  first: tuple[int, int]
  inside: dict[str, str]
  outside: dict[str, str]
  ours: str = 'stage{}_block{}/'

  def path(self, module: str) -> str:
    """PyTorch's name of a module -> its path in our variables."""
    match = re.match(self.block, module)
    if not match:
      return _renamed(module, self.outside)
    numbers = [int(n) + 1 - first for n, first in zip(match.groups(), self.first, strict=True)]
    return self.ours.format(*numbers) + _renamed(module[match.end() :], self.inside)


def _renamed(module: str, names: dict[str, str]) -> str:
  for theirs, ours in names.items():
    if module == theirs or module.startswith(f'{theirs}.'):
      return ours + module.removeprefix(theirs).replace('.', '/')
  raise KeyError(f'no name for {module}')


RESNET = Names(
  r'layer(\d)\.(\d+)\.',
  (1, 0),
  {
    **{f'conv{i}': f'conv{i}/conv' for i in (1, 2, 3)},
    **{f'bn{i}': f'conv{i}/bn' for i in (1, 2, 3)},
    'downsample.0': 'shortcut/conv',
    'downsample.1': 'shortcut/bn',
    'se.fc1': 'attention/reduce',
    'se.fc2': 'attention/expand',
  },
  {'conv1': 'stem/conv', 'bn1': 'stem/bn', 'fc': 'head/dense'},
)
MOBILENETV2 = Names(
  r'blocks\.([1-6])\.(\d)\.',
  (0, 0),
  {
    'conv_pw': 'expand/conv',
    'bn1': 'expand/bn',
    'conv_dw': 'depthwise/conv',
    'bn2': 'depthwise/bn',
    'conv_pwl': 'project/conv',
    'bn3': 'project/bn',
  },
  {
    'conv_stem': 'stem/conv',
    'bn1': 'stem/bn',
    'blocks.0.0.conv_dw': 'stage1_block1/depthwise/conv',  # which has no expansion
    'blocks.0.0.bn1': 'stage1_block1/depthwise/bn',
    'blocks.0.0.conv_pw': 'stage1_block1/project/conv',
    'blocks.0.0.bn2': 'stage1_block1/project/bn',
    'conv_head': 'last/conv',
    'bn2': 'last/bn',
    'classifier': 'head/dense',
  },
)
SHUFFLENETV2 = Names(
  r'stage(\d)\.(\d)\.',
  (2, 0),
  {
    'branch1.0': 'left_depthwise/conv',
    'branch1.1': 'left_depthwise/bn',
    'branch1.2': 'left_conv/conv',
    'branch1.3': 'left_conv/bn',
    'branch2.0': 'conv1/conv',
    'branch2.1': 'conv1/bn',
    'branch2.3': 'depthwise/conv',
    'branch2.4': 'depthwise/bn',
    'branch2.5': 'conv2/conv',
    'branch2.6': 'conv2/bn',
  },
  {
    'conv1.0': 'stem/conv',
    'conv1.1': 'stem/bn',
    'conv5.0': 'last/conv',
    'conv5.1': 'last/bn',
    'fc': 'head/dense',
  },
)
DENSENET = Names(
  r'features\.denseblock(\d)\.denselayer(\d+)\.',
  (1, 1),
  {'norm1': 'bn/bn', 'conv1': 'conv1/conv', 'norm2': 'conv1/bn', 'conv2': 'conv2'},
  {
    'features.conv0': 'stem/conv',
    'features.norm0': 'stem/bn',
    **{f'features.transition{i}.norm': f'transition{i}_bn/bn' for i in (1, 2, 3)},
    **{f'features.transition{i}.conv': f'transition{i}_conv' for i in (1, 2, 3)},
    'features.norm5': 'last_bn/bn',
    'classifier': 'head/dense',
  },
  'stage{}_layer{}_',
)


def transcription_names(**inside: str) -> Names:
  """Of `torch_networks`; `inside`: what this family's blocks call their convolutions."""
  fuse = {
    'afi.w1': 'fuse/afi/reduce',
    'afi.w2': 'fuse/afi/expand',
    'afi.attention.conv': 'fuse/attention/channels',
    'afi.attention.spatial': 'fuse/attention/space',
    'afi.attention': 'fuse/attention',
  }
  theirs = {name.replace('_', '.'): ours for name, ours in inside.items()}
  outside = {'stem.conv1': 'stem', 'conv_last': 'last', 'fc': 'head/dense'}
  return Names(r'stages\.(\d)\.blocks\.(\d)\.', (0, 0), {**theirs, **fuse}, outside)


OUR_RESNET = transcription_names(
  first='conv1', then_conv2='conv2', then_conv3='conv3', shortcut='shortcut'
)
OUR_MOBILENETV2 = transcription_names(
  first='expand', then_conv2='depthwise', then_conv3='project', shortcut='shortcut'
)
OUR_SHUFFLENETV2 = transcription_names(
  first='conv1',
  then_conv2='depthwise',
  then_conv3='conv2',
  left_conv1='left_depthwise',
  left_conv2='left_conv',
)


def required(package: str):
  """The imported package; the test skips where it is absent or does not load."""
  try:
    return importlib.import_module(package)
  except ModuleNotFoundError as error:  # the package, or what it needs
    pytest.skip(f'{error.name} is not installed: {CURE}')
  except RuntimeError as error:  # torchvision beside another build of PyTorch than its own
    pytest.skip(f'{package} does not load beside PyTorch {torch.__version__} ({error}): {CURE}')


@dataclasses.dataclass(frozen=True)
class Case:
  """A network of ours and its counterpart.

  Attributes:
    source: where the counterpart comes from.
    make: of the counterpart, given num_classes.
    names: how it calls its modules.
    size: side of the pictures.
    arguments: of `create_model`.
  """

  source: str
  make: Callable[[int], torch.nn.Module]
  names: Names
  size: int
  arguments: dict = dataclasses.field(default_factory=dict)


def torchvision_case(name: str, names: Names) -> Case:
  def make(num_classes):
    return required('torchvision').models.get_model(name, weights=None, num_classes=num_classes)

  return Case('torchvision', make, names, 64)


def timm_case(name: str, names: Names, **arguments) -> Case:
  def make(num_classes):
    return required('timm').create_model(name, pretrained=False, num_classes=num_classes)

  return Case('timm', make, names, 64, arguments)


def transcribed_cases(backbone, make, names, reductions=(4, 16), **attentions):
  """Plain, AFI and AFI-B, and AFI with each of these attentions on its result."""
  forms = {
    backbone: None,
    f'afi_{backbone}': torch_networks.Setting(True, reductions[0]),
    f'afi_{backbone}_b': torch_networks.Setting(False, reductions[1]),
    **{
      f'afi_{backbone}_{suffix}': torch_networks.Setting(True, reductions[0], attention)
      for suffix, attention in attentions.items()
    },
  }
  return {
    name: Case('transcription', functools.partial(make, setting), names, 32)
    for name, setting in forms.items()
  }


CASES = {
  'resnet50': torchvision_case('resnet50', RESNET),
  'resnext50_32x4d': torchvision_case('resnext50_32x4d', RESNET),
  'shufflenetv2_x1_0': torchvision_case('shufflenet_v2_x1_0', SHUFFLENETV2),
  'densenet121': torchvision_case('densenet121', DENSENET),
  'mobilenetv2': timm_case('mobilenetv2_100', MOBILENETV2),
  'se_resnet50': timm_case('seresnet50', RESNET, se_bias=True),
  'afi_resnet50': Case(
    'transcription',
    functools.partial(torch_networks.resnet50, torch_networks.Setting(True, 4)),
    OUR_RESNET,
    64,
  ),
  **transcribed_cases(
    'resnet20',
    functools.partial(torch_networks.cifar_resnet, 3),
    OUR_RESNET,
    se=torch_networks.SE,
    ge=torch_networks.GE,
    cbam=torch_networks.CBAM,
    eca=torch_networks.ECA,
  ),
  **transcribed_cases('resnext29_32x4d', torch_networks.resnext29, OUR_RESNET, (4, 8)),
  **transcribed_cases(
    'mobilenetv2_cifar',
    torch_networks.mobilenetv2,
    OUR_MOBILENETV2,
    (16, 16),
    eca=torch_networks.ECA,
  ),
  **transcribed_cases('shufflenetv2_x1_0_cifar', torch_networks.shufflenetv2, OUR_SHUFFLENETV2),
}


def pictures(size: int) -> torch.Tensor:
  """[BATCH,3,size,size] of random contrast and colour, so that the logits tell them apart."""
  contrast = 0.5 + torch.rand(BATCH, 3, 1, 1)
  return contrast * torch.randn(BATCH, 3, size, size) + torch.randn(BATCH, 3, 1, 1)


def randomise(network: torch.nn.Module, images: torch.Tensor) -> None:
  """Leaves nothing at an initial value, but every activation at a usual size."""
  norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
  for norm in norms:
    torch.nn.init.uniform_(norm.weight, 0.5, 1.2)
    norm.bias.copy_(norm.weight * (2 + torch.rand_like(norm.bias)))
    norm.momentum = 1.0
  for name, weight in network.named_parameters():
    if name.endswith(('afi.w1.weight', 'afi.w2.weight')):
      weight *= 4  # so that the sources' weights differ
  network.train()(images)  # running statistics <- those of the batch
  for norm in norms:
    norm.momentum = 0.1
    norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
    norm.running_var *= 0.7 + 0.6 * torch.rand_like(norm.running_var)
  classifier = [m for m in network.modules() if isinstance(m, torch.nn.Linear)][-1]
  logits = network.eval()(images)
  scale = 1 / (logits - logits.mean(0)).std()
  classifier.weight *= scale
  classifier.bias.copy_((classifier.bias - logits.mean(0)) * scale)


def transplanted(network: torch.nn.Module, names: Names) -> dict:
  """The network's variables as ours, in NumPy."""
  leaves = {'running_mean': 'mean', 'running_var': 'var', 'bias': 'bias'}
  flat = {}
  for name, tensor in network.state_dict().items():
    module, leaf = name.rsplit('.', 1)
    if leaf == 'num_batches_tracked':
      continue
    collection = 'batch_stats' if leaf.startswith('running') else 'params'
    value = tensor.numpy().copy()
    path = names.path(module)
    if leaf == 'weight' and value.ndim == 1:
      leaf = 'scale'
    elif leaf == 'weight':
      leaf, value = 'kernel', np.moveaxis(value, (0, 1), (-1, -2))  # [out,in,...] -> [...,in,out]
    if path.endswith(('/reduce', '/expand')) and value.ndim == 4:  # timm's SE: 1x1 convolutions
      value = value[0, 0]
    key = (collection, *path.split('/'), leaves.get(leaf, leaf))
    assert key not in flat, f'{key} comes twice'
    flat[key] = value
  return traverse_util.unflatten_dict(flat)


def shapes(tree: dict) -> dict:
  return {path: x.shape for path, x in traverse_util.flatten_dict(tree).items()}


def make_optimiser():
  """The recipes' SGD but for the rate: momentum 0.9, weight decay 1e-4 on everything."""
  plan = config.Optim(
    peak_lr=LEARNING_RATE,
    schedule='step',
    total_steps=10,
    warmup_steps=0,
    boundaries=(),
    factor=0.1,
    momentum=0.9,
    nesterov=False,
    weight_decay=1e-4,
    clip_norm=0.0,
  )
  return optim.make(plan)


def torch_step(network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor):
  """One update in place; running variances as Flax keeps them. Returns the training logits."""
  norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
  before = [m.running_var.clone() for m in norms]
  counts = {}
  hooks = [
    m.register_forward_hook(lambda m, x, _: counts.update({m: x[0].numel() // x[0].shape[1]}))
    for m in norms
  ]
  optimiser = torch.optim.SGD(network.parameters(), LEARNING_RATE, 0.9, weight_decay=1e-4)
  logits = network.train()(images)
  torch.nn.functional.cross_entropy(logits, labels).backward()
  optimiser.step()
  for hook in hooks:
    hook.remove()
  for norm, old in zip(norms, before, strict=True):
    n = counts[norm]
    kept = (1 - norm.momentum) * old
    norm.running_var.copy_(kept + (norm.running_var - kept) * (n - 1) / n)  # unbiased -> biased
  return logits.detach()


def flax_step(model, variables, images, labels):
  """The same update of ours: variables and the training logits."""
  optimiser = make_optimiser()

  def loss(params):
    logits, updated = model.apply(
      {**variables, 'params': params}, images, train=True, mutable=['batch_stats']
    )
    return losses.cross_entropy(logits, labels).mean(), (logits, updated)

  params = variables['params']
  gradients, (logits, updated) = jax.grad(loss, has_aux=True)(params)
  updates, _ = optimiser.update(gradients, optimiser.init(params), params)
  return {'params': jax.tree.map(jnp.add, params, updates), **updated}, logits


def compared(case: Case, model) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """{mode: (our logits, PyTorch's)}, each [BATCH,NUM_CLASSES]."""
  network, images = case.make(NUM_CLASSES), pictures(case.size)
  labels = torch.randint(NUM_CLASSES, [BATCH])
  with torch.no_grad():
    randomise(network, images)
  x, y = jnp.asarray(images.numpy().transpose(0, 2, 3, 1)), jnp.asarray(labels.numpy())
  variables = transplanted(network, case.names)
  initial = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
  assert shapes(variables) == shapes(initial)

  evaluate = jax.jit(lambda variables: model.apply(variables, x, train=False))
  step = jax.jit(functools.partial(flax_step, model))
  ours = {'evaluation': evaluate(variables)}
  variables, ours['training'] = step(variables, x, y)
  ours['after one step'] = evaluate(variables)
  with torch.no_grad():
    theirs = {'evaluation': network.eval()(images)}
  theirs['training'] = torch_step(network, images, labels)
  with torch.no_grad():
    theirs['after one step'] = network.eval()(images)
  return {mode: (np.asarray(ours[mode]), theirs[mode].numpy()) for mode in ours}


@pytest.mark.parametrize('name', CASES)
def test_matches_pytorch(name, record_property):
  case = CASES[name]
  torch.manual_seed(0)
  logits = compared(case, create_model(name, NUM_CLASSES, **case.arguments))
  differences = {mode: float(np.abs(a - b).max()) for mode, (a, b) in logits.items()}
  moved = float(np.abs(logits['after one step'][1] - logits['evaluation'][1]).max())
  record_property('parity', {'network': name, 'source': case.source, **differences, 'moved': moved})
  assert moved > 0.1, 'the step must show'
  assert max(differences.values()) < TOLERANCE, differences
