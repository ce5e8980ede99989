"""Grad-CAM and Grad-CAM++: where a network sees what speaks for a class, at any of its stages.

Sources: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
Localization" (2017), eqs. 1 and 2, and Chattopadhay et al., "Grad-CAM++" (2018), eqs. 10 and 19.
With A the map after the stage, y the class's logit and g = dy/dA:

```
heat = relu(sum_c w_c A_c)
Grad-CAM    w_c = mean of g over all pixels
Grad-CAM++  w_c = sum of a relu(g) over all pixels, a = g^2 / (2 g^2 + g^3 sum of A_c), 0 where g is
```
The score of Grad-CAM++ is exp(y); exp(y) multiplies all weights of a picture alike, and drops out
of a heat map that is divided by its largest value.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from afi_flax import steps
from afi_flax.errors import UserError
from afi_flax.run import Run


@dataclasses.dataclass(frozen=True)
class Cams:
  """Where a network looks.

  Attributes:
    heat: f32 [B,h,w], at the stage's resolution, in 0..1 of each picture's largest; 0 everywhere
      where nothing speaks for the class.
    classes: i32 [B], the class that is explained.
    probabilities: f32 [B,K], softmax.
  """

  heat: np.ndarray
  classes: np.ndarray
  probabilities: np.ndarray


def stages(run: Run) -> int:
  """How many stages can be looked at: 1 to this."""
  named = (re.match(r'stage(\d+)_', name) for name in run.variables['params'])
  return max(int(match[1]) for match in named if match)


class GradCam:
  """Grad-CAM of one stage of a network, in evaluation mode: compiled once for a size of batch.

  Attributes:
    stage: the stage, from 1.
  """

  def __init__(self, run: Run, stage: int | None = None, plus_plus: bool = False):
    """Grad-CAM, or Grad-CAM++, of the map after a stage; None: the last one.

    Raises:
      UserError: the network has no such stage.
    """
    last = stages(run)
    self.stage = last if stage is None else stage
    if not 1 <= self.stage <= last:
      raise UserError(f'stage {stage}: {run.plan.model.name!r} has stages 1 to {last}; give one')
    self._run = run
    device, *_ = jax.tree.leaves(run.variables)[0].devices()
    self._program = jax.jit(
      functools.partial(_cams, run, self.stage, plus_plus),
      compiler_options=steps.compiler_options(run.plan.run.deterministic, device),
    )

  def __call__(self, images: np.ndarray, classes: np.ndarray | None = None) -> Cams:
    """Looks at pictures.

    Args:
      images: u8 [B,H,W,3], cut as in evaluation.
      classes: i32 [B], what to explain; None: what the network predicts.

    Raises:
      UserError: a class that there is not.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
      raise ValueError(f'images must be u8 [B,H,W,3], got {images.dtype} {images.shape}')
    if classes is not None:
      classes = np.asarray(classes, np.int32)
      if classes.shape != images.shape[:1]:
        raise ValueError(f'classes must be [{len(images)}], one a picture, got {classes.shape}')
      number = len(self._run.class_names)
      if (wrong := classes[(classes < 0) | (classes >= number)]).size:
        raise UserError(f'class {wrong[0]}: the network has classes 0 to {number - 1}; give one')
    heat, classes, logits = self._program(self._run.variables, images, classes)
    return Cams(
      _of_the_largest(np.asarray(heat)), np.asarray(classes), np.asarray(nn.softmax(logits))
    )


def _cams(
  run: Run,
  stage: int,
  plus_plus: bool,
  variables: dict,
  images: jax.Array,
  classes: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Heat f32 [B,h,w] of any size, the classes i32 [B] and the logits f32 [B,K]."""
  x = run.preprocessing(images)
  maps = run.model.clone(features_only=True).apply(variables, x, train=False)[stage - 1]
  logits, gradient_of = jax.vjp(
    functools.partial(_logits, run.model, variables, x, stage), maps.astype('float32')
  )
  if classes is None:
    classes = logits.argmax(axis=-1).astype('int32')
  (gradients,) = gradient_of(nn.one_hot(classes, logits.shape[-1]))
  return heat_maps(maps.astype('float32'), gradients, plus_plus), classes, logits


def heat_maps(maps: jax.Array, gradients: jax.Array, plus_plus: bool) -> jax.Array:
  """relu of the sum of a map's weighted channels.

  Args:
    maps: A, f32 [B,h,w,C].
    gradients: g of the class's logit, f32 [B,h,w,C].
    plus_plus: by Grad-CAM++.

  Returns:
    f32 [B,h,w].
  """
  if plus_plus:
    # a with g^2 taken out of the fraction, which float32 would lose where g is small.
    below = 2 + gradients * maps.sum(axis=(1, 2), keepdims=True)
    a = jnp.where(gradients == 0, 0, 1 / jnp.where(below == 0, 1, below))
    weights = (a * nn.relu(gradients)).sum(axis=(1, 2))
  else:
    weights = gradients.mean(axis=(1, 2))
  return nn.relu(jnp.einsum('bhwc,bc->bhw', maps, weights, precision='highest'))


def _of_the_largest(heat: np.ndarray) -> np.ndarray:
  """f32 [B,h,w] >= 0, each picture divided by its largest value where that is not 0."""
  largest = heat.max(axis=(1, 2), keepdims=True)
  return heat / np.where(largest > 0, largest, 1)


def _logits(
  model: nn.Module, variables: dict, images: jax.Array, stage: int, maps: jax.Array
) -> jax.Array:
  """f32 [B,K], where the map after the stage is `maps`, f32 [B,h,w,C].

  In all networks of the zoo it is the first argument of the first layer after the stage.
  """
  before = after = ''  # names of the layer before, and of the first one after the stage

  def replace(call, args, kwargs, context):
    nonlocal before, after
    path = context.module.path
    if context.method_name != '__call__' or len(path) != 1:
      return call(*args, **kwargs)
    of_stage = [name.startswith(f'stage{stage}_') for name in (before, path[0])]
    before = path[0]
    if of_stage == [True, False]:
      after = path[0]
    if path[0] == after:
      args = (maps.astype(args[0].dtype), *args[1:])
    return call(*args, **kwargs)

  with nn.intercept_methods(replace):
    return model.apply(variables, images, train=False)
