"""Heat maps of PyTorch networks by the `grad-cam` package, and of ours with the same weights."""

import dataclasses

import jax
import numpy as np
import pytest

from afi_flax.analysis.grad_cam import GradCam
from afi_flax.interop import weights
from afi_flax.models import create_model
from tests.models import test_parity as parity

torch = parity.torch
pytorch_grad_cam = pytest.importorskip(
  'pytorch_grad_cam', reason='grad-cam is not installed: `make parity` installs it'
)

from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget  # noqa: E402

from afi_flax import sharding  # noqa: E402
from tests.analysis import small_runs  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]

CASES = {**parity.CASES, 'resnet18': parity.torchvision_case('resnet18', parity.RESNET)}
# The stage, and the module of PyTorch's network whose output is the map after it.
STAGES = {
  'resnet18': (3, 'layer3.1'),
  'afi_resnet20': (1, 'stages.0'),
  'afi_resnet20_b': (2, 'stages.1'),
  'afi_mobilenetv2_cifar': (5, 'stages.4'),
}
TOLERANCE = 1e-3  # of heat from 0 to 1


def run_of(name, case, network):
  """Ours, with the weights of PyTorch's network."""
  model = create_model(name, parity.NUM_CLASSES, **case.arguments)
  images = jax.ShapeDtypeStruct((1, case.size, case.size, 3), 'float32')
  initial = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
  shapes = {path: x.shape for path, x in weights.flat(initial).items()}
  moved = parity.transplanted(network, case.names, shapes)
  variables = sharding.put_whole(moved, sharding.make_mesh())
  run = small_runs.make(small_runs.network(None, None))
  names = tuple(map(str, range(parity.NUM_CLASSES)))
  return dataclasses.replace(run, model=model, variables=variables, class_names=names)


def theirs(network, layer, images, classes, plus_plus):
  """f32 [B,h,w], at the resolution of the layer: the package's own are resized to the pictures'."""
  kind = pytorch_grad_cam.GradCAMPlusPlus if plus_plus else pytorch_grad_cam.GradCAM
  targets = [ClassifierOutputTarget(k) for k in classes]
  with kind(model=network, target_layers=[layer]) as look:
    look(images, targets)
    hooks = look.activations_and_grads
    activations, gradients = (x[0].numpy() for x in (hooks.activations, hooks.gradients))
    heat = look.get_cam_image(images, layer, targets, activations, gradients)
  return np.maximum(heat, 0)


def stretched(heat):
  """As the package does: each picture from 0 to 1; all 0 where it has one value everywhere."""
  heat = heat - heat.min(axis=(1, 2), keepdims=True)
  return heat / np.maximum(heat.max(axis=(1, 2), keepdims=True), 1e-30)


@pytest.mark.parametrize('name', STAGES)
def test_matches_the_package(name):
  torch.manual_seed(0)
  case = CASES[name]
  network = case.make(parity.NUM_CLASSES)
  cells = case.size // 8
  pictures = torch.randint(0, 256, [parity.BATCH, cells, cells, 3], dtype=torch.uint8).numpy()
  pictures = pictures.repeat(8, axis=1).repeat(8, axis=2)
  preprocessing = small_runs.make(small_runs.network(None, None)).preprocessing
  x = torch.tensor(np.asarray(preprocessing(pictures)).transpose(0, 3, 1, 2))
  classifier = [m for m in network.modules() if isinstance(m, torch.nn.Linear)][-1]
  with torch.no_grad():
    parity.randomise(network, x)
    classifier.weight *= 1000  # the package adds 1e-6 to a denominator of the size of squares
  run = run_of(name, case, network)
  classes, (stage, layer) = np.array([3, 0, 99, 41]), STAGES[name]
  for plus_plus in (False, True):
    found = stretched(GradCam(run, stage, plus_plus)(pictures, classes).heat)
    wanted = stretched(theirs(network, network.get_submodule(layer), x, classes, plus_plus))
    assert wanted.std() > 0.1
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)
