"""Weights as safetensors, with what is needed to make the network for them.

`model.safetensors` has a tensor f32 for every array, named by its collection and path, joined
by '/': 'params/stage1_block1/conv1/conv/kernel', 'batch_stats/stem/bn/mean'. Kernels are as in
Flax: [height, width, in, out]. The file's metadata, strings all:

  format       'afi_flax'
  config       JSON of the run's config
  class_names  JSON list, in the order of the logits
  step         of the checkpoint

Source of the format: https://huggingface.co/docs/safetensors.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from afi_flax.interop.network import Network
from afi_flax.interop.weights import FORMAT
from afi_flax.models import create_model

NAME = 'model.safetensors'
PACKAGES = ('jax', 'flax', 'safetensors')
ABOUT = 'its weights alone, as safetensors'


def loading(network: Network) -> str:
  """Python from `images` to `logits`; the network is made by its name."""
  model = dataclasses.asdict(network.run.plan.model)
  plain = {'stages': None, 'dtype': 'float32', 'se_bias': False, 'remat': 'none'}
  given = {key: value for key, value in model.items() if value != plain.get(key)}
  arguments = ', '.join(f'{key}={value!r}' for key, value in given.items() if key != 'name')
  return f"""\
import jax
from flax.traverse_util import unflatten_dict
from safetensors.flax import load_file

from afi_flax.models import create_model

model = create_model({model['name']!r}, {arguments})
variables = unflatten_dict(load_file('{NAME}'), sep='/')
logits = np.asarray(jax.jit(model.apply, static_argnames='train')(variables, images, train=False))
"""


def write(network: Network, folder: pathlib.Path) -> None:
  """Writes `model.safetensors`."""
  from safetensors.numpy import save_file

  tensors = flatten_dict(network.variables, sep='/')
  metadata = {
    'format': FORMAT,
    'config': json.dumps(network.config),
    'class_names': json.dumps(network.run.class_names),
    'step': str(network.run.step),
  }
  contiguous = {name: np.ascontiguousarray(x, 'float32') for name, x in tensors.items()}
  save_file(contiguous, folder / NAME, metadata)
  (folder / NAME).chmod((folder / NAME).parent.stat().st_mode & 0o666)  # it would be ours alone


def load(folder: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
  """Normalised images -> logits, of what the file says and nothing else."""
  from safetensors import safe_open
  from safetensors.numpy import load_file

  with safe_open(folder / NAME, 'numpy') as file:
    metadata = file.metadata()
  variables = unflatten_dict(load_file(folder / NAME), sep='/')
  config = json.loads(metadata['config'])['model']
  model = create_model(
    config['name'],
    len(json.loads(metadata['class_names'])),
    stages=config['stages'] or None,
    dtype=config['dtype'],
    se_bias=config['se_bias'],
  )
  call = jax.jit(functools.partial(model.apply, train=False))
  return lambda images: np.asarray(call(variables, images))
