"""Runs that were never trained, of networks that compile in no time."""

import dataclasses
import functools

import jax
import numpy as np
from flax import traverse_util

from afi_flax import config, sharding
from afi_flax.models.fusion import Fusion
from afi_flax.models.resnet import BasicBlock, ResNet
from afi_flax.run import Preprocessing, Run
from configs import digits_afi_resnet20

SIDE = 16  # pixels of a digit


def network(*fusions: Fusion | None, blocks=(3, 2)) -> ResNet:
  """Two stages, of 8 and 16 channels."""
  return ResNet(blocks, (8, 16), BasicBlock, 'cifar', 10, fusions, stem_width=8)


def make(model, devices=1, batch_size=16, split='test[:40]') -> Run:
  """A run on the handwritten digits, of random weights and statistics."""
  recipe = digits_afi_resnet20.get_config()
  recipe.data.eval_split, recipe.eval_batch_size = split, batch_size
  plan = config.resolve(recipe)
  mesh = sharding.make_mesh(jax.devices()[:devices])
  data = plan.data
  return Run(
    model=model,
    variables=sharding.put_whole(random_variables(model), mesh),
    class_names=plan.dataset.class_names,
    preprocessing=Preprocessing(SIDE, SIDE, data.mean, data.std),
    step=0,
    plan=plan,
  )


def changed(run: Run, path: str, change) -> Run:
  """With `change` of one of its variables, such as 'params/head/dense/bias'."""
  flat = traverse_util.flatten_dict(run.variables, sep='/')
  how = flat[path].sharding
  flat[path] = jax.device_put(change(np.asarray(flat[path]).copy()), how)
  return dataclasses.replace(run, variables=traverse_util.unflatten_dict(flat, sep='/'))


def random_variables(model) -> dict:
  """Nothing at a value that would hide a mistake. In NumPy: a jitted init takes seconds."""
  rng = np.random.default_rng(0)
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), 'float32')
  init = functools.partial(model.init, jax.random.key(0), train=False)
  shapes = traverse_util.flatten_dict(jax.eval_shape(init, images))
  made = {path: _drawn(path, x.shape, rng).astype(np.float32) for path, x in shapes.items()}
  return traverse_util.unflatten_dict(made)


def _drawn(path: tuple[str, ...], shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
  match path[-1]:
    case 'var' | 'scale':
      return rng.uniform(0.5, 1.5, shape)
    case 'mean' | 'bias':
      return rng.normal(0, 0.3, shape)
  gain = {'afi': 3, 'dense': 0.3}  # so that the sources' weights differ, and few are sure
  gain = next((gain[part] for part in path if part in gain), 1.4)
  return rng.normal(0, gain / np.sqrt(np.prod(shape[:-1])), shape)
