"""The zoo: one table from a name to a network, in the manner of timm.

A name is `[afi_]backbone[_b]`: `resnet32` is the plain network, `afi_resnet32` the paper's first
setting, `afi_resnet32_b` its second.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Sequence

from flax import linen as nn

from afi_flax.errors import UserError, unknown
from afi_flax.models.fusion import AFI, Fusion
from afi_flax.models.resnet import BasicBlock, Bottleneck, ResNet

__all__ = ['AFI', 'create_model', 'list_models']


@dataclasses.dataclass(frozen=True)
class Backbone:
  """An entry of the table.

  Attributes:
    make: (num_classes, fusions, dtype) -> module.
    num_stages: stages that can carry AFI, counted from 1.
    reductions: r of the AFI and of the AFI-B form.
  """

  make: Callable[..., nn.Module]
  num_stages: int
  reductions: tuple[int, int] = (4, 16)


def _cifar_resnet(depth: int) -> Backbone:
  """ResNet-(6N+2)."""
  blocks = ((depth - 2) // 6,) * 3
  return Backbone(
    lambda **kwargs: ResNet(blocks, (16, 32, 64), BasicBlock, 'cifar', **kwargs), num_stages=3
  )


def _imagenet_resnet(blocks: tuple[int, ...], block: type[BasicBlock] | type[Bottleneck]):
  return Backbone(
    lambda **kwargs: ResNet(blocks, (64, 128, 256, 512), block, 'imagenet', **kwargs), num_stages=4
  )


BACKBONES: dict[str, Backbone] = {
  'resnet20': _cifar_resnet(20),
  'resnet32': _cifar_resnet(32),
  'resnet44': _cifar_resnet(44),
  'resnet56': _cifar_resnet(56),
  'resnet110': _cifar_resnet(110),
  'resnet18': _imagenet_resnet((2, 2, 2, 2), BasicBlock),
  'resnet34': _imagenet_resnet((3, 4, 6, 3), BasicBlock),
  'resnet50': _imagenet_resnet((3, 4, 6, 3), Bottleneck),
  'resnet101': _imagenet_resnet((3, 4, 23, 3), Bottleneck),
  'resnet152': _imagenet_resnet((3, 8, 36, 3), Bottleneck),
}


def list_models(pattern: str = '*') -> list[str]:
  """Names of all networks that match a shell pattern.

  >>> list_models('afi_resnet32*')
  ['afi_resnet32', 'afi_resnet32_b']
  """
  forms = ('{}', 'afi_{}', 'afi_{}_b')
  names = sorted(form.format(backbone) for backbone in BACKBONES for form in forms)
  return fnmatch.filter(names, pattern)


def create_model(
  name: str,
  num_classes: int = 1000,
  stages: Sequence[int] | None = None,
  dtype: str = 'float32',
) -> nn.Module:
  """The network of that name.

  >>> import jax, jax.numpy as jnp
  >>> model = create_model('afi_resnet32', num_classes=100)
  >>> images = jnp.zeros([1, 32, 32, 3])
  >>> variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
  >>> sum(p.size for p in jax.tree.leaves(variables['params']))
  378228

  Args:
    name: one of `list_models()`.
    num_classes: K.
    stages: which stages, from 1, carry AFI; None: all. Only for `afi_*` networks.
    dtype: of the computation, 'float32' or 'bfloat16'.

  Returns:
    A Linen module, `init(key, images, train=False)` and `apply(variables, images, train=...)`:
    images f32 [B,H,W,3], normalised -> logits f32 [B,K].

  Raises:
    UserError: unknown name, stages that the network does not have, or stages of a plain network.
  """
  if name not in list_models():
    raise unknown('model', name, list_models(), 'See afi_flax.models.list_models().')
  is_afi = name.startswith('afi_')
  is_b = name.endswith('_b')
  backbone = BACKBONES[name.removeprefix('afi_').removesuffix('_b')]
  fusion = None
  if is_afi:
    fusion = Fusion('full' if is_b else 'half', backbone.reductions[is_b])
  every = tuple(range(1, backbone.num_stages + 1))
  if stages is not None and not is_afi:
    raise UserError(
      f'model.stages {tuple(stages)} has no meaning for the plain {name!r}; use afi_{name}'
    )
  stages = every if stages is None else tuple(stages)
  if not stages or not set(stages) <= set(every) or len(set(stages)) < len(stages):
    raise UserError(f'model.stages {stages} must be some of {every}, each once, for {name!r}')
  fusions = tuple(fusion if i in stages else None for i in every)
  return backbone.make(num_classes=num_classes, fusions=fusions, dtype=dtype)
