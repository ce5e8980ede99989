"""PyTorch's training and evaluation steps of the same networks, as a good user of it writes them.

On a GPU: channels-last, bfloat16 by autocast where that is asked for, and torch.compile. On the
CPU: float32 as it comes (oneDNN), in the memory layout that is asked for. PyTorch is imported when
a step is made, so that a benchmark without it can go on without its rows.
"""

import importlib.util
import os
from collections.abc import Callable

LAYOUTS = ('contiguous', 'channels_last')

_CIFAR = {
  **{f'resnet{6 * n + 2}': lambda t, k, n=n: t.cifar_resnet(n, None, k) for n in (3, 5, 7, 9, 18)},
  'resnext29_32x4d': lambda t, k: t.resnext29(None, k),
  'mobilenetv2_cifar': lambda t, k: t.mobilenetv2(None, k),
  'shufflenetv2_x1_0_cifar': lambda t, k: t.shufflenetv2(None, k),
}
_TIMM = ('resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152', 'resnext50_32x4d')


def missing(backbone: str) -> str:
  """Why there is no peer of this network here; '' if there is one."""
  package = 'timm' if backbone in _TIMM else 'torch'
  if backbone not in _CIFAR and backbone not in _TIMM:
    return 'none is known'
  return '' if importlib.util.find_spec(package) else f'{package} is not installed'


def _network(backbone: str, num_classes: int):
  if backbone in _TIMM:
    import timm

    return timm.create_model(backbone, num_classes=num_classes)
  from tests.models import torch_networks

  return _CIFAR[backbone](torch_networks, num_classes)


def make_steps(
  backbone: str, batch_size: int, image_size: int, num_classes: int, dtype: str, layout: str
) -> dict[str, Callable[[int], None]]:
  """{'train': f, 'eval': f}: f(n) takes n steps on one random batch and waits for the last.

  A step is what ours is: u8 pictures normalised on the device, logits, mean cross-entropy and, in
  training, its gradient and an update by SGD with Nesterov's momentum and weight decay.
  """
  import torch
  from torch.nn import functional

  torch.set_num_threads(os.cpu_count() or 1)
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  form = torch.channels_last if layout == 'channels_last' else torch.contiguous_format
  network = _network(backbone, num_classes).to(device, memory_format=form)
  optimizer = torch.optim.SGD(
    network.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, nesterov=True
  )
  images = torch.randint(0, 256, (batch_size, 3, image_size, image_size), dtype=torch.uint8)
  images = images.to(device, memory_format=form)
  labels = torch.randint(0, num_classes, (batch_size,), device=device)
  forward = torch.compile(network) if device == 'cuda' else network

  def loss_of(batch):
    with torch.autocast(device, torch.bfloat16, enabled=dtype == 'bfloat16'):
      logits = forward(((batch.float() / 255) - 0.5) / 0.25)
    return functional.cross_entropy(logits.float(), labels)

  def wait():
    if device == 'cuda':
      torch.cuda.synchronize()

  def train(number: int) -> None:
    network.train()
    for _ in range(number):
      optimizer.zero_grad()
      loss_of(images).backward()
      optimizer.step()
    wait()

  def evaluate(number: int) -> None:
    network.eval()
    with torch.inference_mode():
      for _ in range(number):
        loss_of(images)
    wait()

  return {'train': train, 'eval': evaluate}
