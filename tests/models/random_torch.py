"""Random PyTorch networks and pictures for which float32 can tell a mistake from its rounding."""

import importlib

import pytest
import torch

CURE = '`make parity` installs what fits together and runs these tests'
BATCH = 4


def required(package: str):
  """The imported package; the test skips where it is absent or does not load."""
  try:
    return importlib.import_module(package)
  except ModuleNotFoundError as error:  # the package, or what it needs
    pytest.skip(f'{error.name} is not installed: {CURE}')
  except RuntimeError as error:  # torchvision beside another build of PyTorch than its own
    pytest.skip(f'{package} does not load beside PyTorch {torch.__version__} ({error}): {CURE}')


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
