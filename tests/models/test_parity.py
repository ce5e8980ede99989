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
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from afi_flax import config, losses, optim
from afi_flax.interop import weights
from afi_flax.interop.names import DENSENET, MOBILENETV2_TIMM, RESNET, SHUFFLENETV2, Names
from afi_flax.models import create_model

torch = pytest.importorskip(
  'torch', reason='PyTorch is not installed: `make parity` installs it and runs these tests'
)

from tests.models import torch_networks  # noqa: E402, it imports torch
from tests.models.random_torch import BATCH, pictures, randomise, required  # noqa: E402, likewise

pytestmark = [pytest.mark.parity, pytest.mark.slow]

TOLERANCE = 1e-4  # absolute, on logits of standard deviation 1
LEARNING_RATE = 0.0002
NUM_CLASSES = 100


def transcription_names(**inside: str) -> Names:
  """Of `torch_networks`; `inside`: what this family's blocks call our convolutions."""
  fuse = {
    'fuse/afi/reduce': 'afi.w1',
    'fuse/afi/expand': 'afi.w2',
    'fuse/attention/channels': 'afi.attention.conv',
    'fuse/attention/space': 'afi.attention.spatial',
    'fuse/attention': 'afi.attention',
  }
  return Names(
    'torch_networks',
    lambda stage, block: f'stages.{stage - 1}.blocks.{block - 1}.',
    inside | fuse,
    {'stem': 'stem.conv1', 'last': 'conv_last', 'head/dense': 'fc'},
  )


OUR_RESNET = transcription_names(
  conv1='first', conv2='then.conv2', conv3='then.conv3', shortcut='shortcut'
)
OUR_MOBILENETV2 = transcription_names(
  expand='first', depthwise='then.conv2', project='then.conv3', shortcut='shortcut'
)
OUR_SHUFFLENETV2 = transcription_names(
  conv1='first',
  depthwise='then.conv2',
  conv2='then.conv3',
  left_depthwise='left.conv1',
  left_conv='left.conv2',
)


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
  'mobilenetv2': timm_case('mobilenetv2_100', MOBILENETV2_TIMM),
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


def transplanted(network: torch.nn.Module, names: Names, shapes: dict) -> dict:
  """The network's variables as ours, in NumPy; `shapes`: of ours, by path."""
  theirs = {
    name: tensor.numpy().copy()
    for name, tensor in network.state_dict().items()
    if not name.endswith('num_batches_tracked')
  }
  ours = {names.of(path): path for path in shapes}
  assert theirs.keys() == ours.keys()
  assert len(ours) == len(shapes)
  for name, path in ours.items():
    assert theirs[name].shape in weights.to_torch(path, shapes[path]), name
  flat = {p: weights.from_torch(p, theirs[name], shapes[p]) for name, p in ours.items()}
  return traverse_util.unflatten_dict(flat, sep='/')


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
  initial = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
  shapes = {path: leaf.shape for path, leaf in weights.flat(initial).items()}
  variables = transplanted(network, case.names, shapes)

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
