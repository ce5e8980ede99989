"""Networks as if they had been trained, without training them."""

import dataclasses
import math
import pathlib
import re

import jax
import numpy as np
from PIL import Image

from afi_flax import config as config_lib
from afi_flax import models, optim, sharding, state
from afi_flax.checkpoint import Checkpoints
from afi_flax.interop.network import Network
from afi_flax.models.layers import plain_forms
from afi_flax.run import Preprocessing, Run
from afi_flax.workdir import Workdir
from configs import common

# A network of every family, with and without groups: pixels of its pictures, and a factor that
# makes its logits as large as those of a trained one.
FAMILIES = {
  'afi_resnet20': (16, 1.0),
  'afi_resnet20_b': (16, 1.0),
  'afi_resnext29_32x4d': (18, 1.0),
  'afi_mobilenetv2_cifar_b_eca': (32, 0.05),
  'afi_shufflenetv2_x0_5_cifar_cbam': (32, 5.0),
  'afi_resnet50': (64, 0.1),
}


def config_of(name, size):
  """A run on fake pictures of 10 classes."""
  config = common.base()
  config.model.name = name
  config.data.dataset = 'fake_cifar'
  config.data.image_size = size
  config.data.eval_resize = size + 4
  config.data.mean, config.data.std = common.IMAGENET_STATISTICS
  return config


def network(name, preprocessing=True, **changes):
  """A Network of FAMILIES whose weights and statistics are not at their initial values."""
  size, factor = FAMILIES[name]
  config = config_of(name, size)
  config.update_from_flattened_dict(changes)
  plan = config_lib.resolve(config)
  made = filled(_abstract(plan), seed=1)
  made.params['head']['dense']['kernel'] *= factor
  run = Run(
    model=models.create_model(**vars(plan.model)),
    variables=made.variables,
    class_names=plan.dataset.class_names,
    preprocessing=Preprocessing(size, size + 4, plan.data.mean, plan.data.std),
    step=7,
    plan=plan,
  )
  return Network(run, config_lib.complete(config.to_dict()), preprocessing)


def save(folder: pathlib.Path, config, step=7, records=(), seed=1):
  """A run's folder with a checkpoint, as `train` leaves it."""
  plan = config_lib.resolve(config)
  workdir = Workdir(folder)
  with workdir.open_for_training(config.to_dict(), dataclasses.asdict(plan.dataset)):
    for record in records:
      workdir.append_metrics(record)
    checkpoints = Checkpoints(workdir.checkpoints)
    whole = sharding.replicated(sharding.make_mesh())
    checkpoints.save(step, jax.device_put(filled(_abstract(plan), seed), whole), wait=True)
    checkpoints.close()


def pictures(network, number):
  """u8, or normalised f32, [number,S,S,3]."""
  size = network.run.preprocessing.image_size
  images = np.random.default_rng(number).integers(0, 256, [number, size, size, 3], 'uint8')
  return images if network.preprocessing else np.asarray(network.run.preprocessing(images))


def logits(network, images):
  """By Flax, [B,K]; in plain forms, which take a tenth of the time to compile for the CPU."""
  options = {'xla_backend_optimization_level': 0}
  with plain_forms():
    return np.asarray(jax.jit(network, compiler_options=options)(network.variables, images))


def _abstract(plan):
  model = models.create_model(**vars(plan.model))
  whole = sharding.replicated(sharding.make_mesh())
  ema = plan.step.regularisation.ema_decay > 0
  return state.abstract(model, optim.make(plan.optim), plan.data.image_size, whole, ema)


def filled(tree, seed):
  """Random numbers for abstract arrays: of a trained network's size, by the array's name."""
  rng = np.random.default_rng(seed)

  def fill(path, x):
    if not np.issubdtype(x.dtype, np.floating):
      return np.zeros(x.shape, x.dtype)
    name = str(getattr(path[-1], 'key', ''))
    if name in ('scale', 'var'):
      return rng.uniform(0.5, 1, x.shape).astype(x.dtype)
    deviation = math.sqrt(2 / math.prod(x.shape[:-1])) if name == 'kernel' else 0.1
    return rng.normal(0, deviation, x.shape).astype(x.dtype)

  return jax.tree_util.tree_map_with_path(fill, tree)


def python_of_card(folder):
  """The Python of an export's model card, for which a picture is put there."""
  (code,) = re.findall(r'```python\n(.*?)```', (folder / 'README.md').read_text(), re.DOTALL)
  rng = np.random.default_rng(3)
  picture = Image.fromarray(rng.integers(0, 256, [40, 30, 3], 'uint8'))
  picture.save(folder / 'picture.jpg')
  return code
