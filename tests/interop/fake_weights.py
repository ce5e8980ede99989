"""Random weights of our networks, under our names and under PyTorch's."""

import json

import numpy as np
from safetensors.numpy import save_file

from afi_flax.config import Model
from afi_flax.interop import weights
from afi_flax.interop.weights import Source


def model(name: str, num_classes: int = 5, stages=None, se_bias: bool = False) -> Model:
  return Model(name, num_classes, stages, 'float32', se_bias, 'none')


def arrays(network: Model, seed: int = 0) -> dict[str, np.ndarray]:
  """Of every variable, by path; such that activations stay at a usual size."""
  draws = np.random.default_rng(seed)

  def draw(path, shape):
    if path.endswith(('/scale', '/var')):
      return draws.uniform(0.5, 1.5, shape)
    return draws.normal(0, np.prod(shape[:-1]) ** -0.5 if len(shape) > 1 else 0.1, shape)

  return {
    path: draw(path, shape).astype('float32') for path, shape in weights.shapes(network).items()
  }


def source(network: Model, class_names=None) -> Source:
  return Source('them', network, class_names, arrays(network))


def as_torch(ours: dict[str, np.ndarray], table) -> dict[str, np.ndarray]:
  """As PyTorch would save them: kernels [out,in,...], of SE as 1x1 convolutions."""
  theirs = {}
  for path, value in ours.items():
    if path.endswith('/kernel'):
      value = value.transpose((3, 2, 0, 1) if value.ndim == 4 else (1, 0))
      if '/attention/' in path:
        value = value[:, :, None, None]
    theirs[table.of(path)] = np.ascontiguousarray(value)
    if path.endswith('/mean'):
      theirs[table.of(path).replace('running_mean', 'num_batches_tracked')] = np.array(7)
  return theirs


def save_ours(path, network: Model, class_names) -> dict[str, np.ndarray]:
  """A file as an export of ours writes it, but with paths; the arrays."""
  config = {
    'model': {'name': network.name, 'stages': network.stages or ()},
    'data': {'data_dir': '/theirs/data'},
    'run': {'resume': '/theirs/run', 'init_from': '/theirs/weights.pth'},
  }
  made = arrays(network)
  save_file(
    made,
    path,
    {
      'format': 'afi_flax',
      'config': json.dumps(config),
      'class_names': json.dumps(class_names),
      'step': '12',
    },
  )
  return made
