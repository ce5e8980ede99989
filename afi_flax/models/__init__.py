"""The zoo: one table from a name to a network, in the manner of timm.

A name is `[se_|ge_|cbam_|eca_]backbone`, or `afi_[se_]backbone[_b][_se|_ge|_cbam|_eca]`:
  resnet32               the plain network
  afi_resnet32           the paper's first setting: half of each first convolution is reused
  afi_resnet32_b         its second setting, AFI-B
  se_resnet50            Squeeze-and-Excitation on every block's output; so ge_, cbam_, eca_
  afi_mobilenetv2_cifar_eca  an attention on the result of AFI
Forms for 32-pixel pictures of networks that also have an ImageNet form end in `_cifar`.
"""

import dataclasses
import fnmatch
import functools
import itertools
from collections.abc import Callable, Sequence

import jax
from flax import linen as nn

from afi_flax.errors import UserError, unknown
from afi_flax.models import mobilenet_v2, shufflenet_v2
from afi_flax.models.attention import ATTENTIONS
from afi_flax.models.densenet import DenseNet
from afi_flax.models.fusion import AFI, REMATS, Fusion, fusion_weights
from afi_flax.models.resnet import BasicBlock, Bottleneck, ResNet

__all__ = [
  'AFI',
  'Form',
  'create_model',
  'form',
  'fusion_weights',
  'image_size',
  'list_models',
  'residual_blocks',
  'stage_shapes',
]


@dataclasses.dataclass(frozen=True)
class Backbone:
  """An entry of the table.

  Attributes:
    make: (num_classes, fusions, attention, dtype, remat, features_only) -> module.
    blocks: of every stage, which can carry AFI if they are several; (): it has no such form.
    reductions: r of the AFI and of the AFI-B form.
    image_size: side of the pictures that it is made for, in pixels.
    residual: its blocks add what they compute to their input.
  """

  make: Callable[..., nn.Module]
  blocks: Sequence[int]
  reductions: tuple[int, int] = (4, 16)
  image_size: int = 224
  residual: bool = True


def _resnet(
  blocks: Sequence[int],
  block: Callable[..., nn.Module],
  stem: str = 'imagenet',
  width: int = 64,
  reductions: tuple[int, int] = (4, 16),
  **options: int,
) -> Backbone:
  widths = tuple(width * 2**i for i in range(len(blocks)))
  make = functools.partial(ResNet, blocks, widths, block, stem, **options)
  return Backbone(make, blocks, reductions, image_size=32 if stem == 'cifar' else 224)


def _cifar_resnet(depth: int) -> Backbone:
  """ResNet-(6N+2)."""
  return _resnet(((depth - 2) // 6,) * 3, BasicBlock, 'cifar', width=16, stem_width=16)


def _shufflenet(widths: tuple[int, int, int, int], cifar: bool) -> Backbone:
  make = functools.partial(shufflenet_v2.ShuffleNetV2, widths, cifar)
  size = 32 if cifar else 224
  return Backbone(make, shufflenet_v2.BLOCKS, image_size=size, residual=False)


def _mobilenet(cifar: bool, multiplier: float = 1.0) -> Backbone:
  make = functools.partial(mobilenet_v2.MobileNetV2, cifar, multiplier=multiplier)
  blocks = tuple(n for _, _, n, _ in mobilenet_v2.IMAGENET_STAGES)
  return Backbone(make, blocks, reductions=(16, 16), image_size=32 if cifar else 224)


_RESNEXT_BLOCK = functools.partial(Bottleneck, groups=32, expansion=2)
_SHUFFLENET_WIDTHS = {
  'x0_5': (48, 96, 192, 1024),
  'x1_0': (116, 232, 464, 1024),
  'x1_5': (176, 352, 704, 1024),
  'x2_0': (224, 488, 976, 2048),
}

BACKBONES: dict[str, Backbone] = {
  **{f'resnet{depth}': _cifar_resnet(depth) for depth in (20, 32, 44, 56, 110)},
  'resnet18': _resnet((2, 2, 2, 2), BasicBlock),
  'resnet34': _resnet((3, 4, 6, 3), BasicBlock),
  'resnet50': _resnet((3, 4, 6, 3), Bottleneck),
  'resnet101': _resnet((3, 4, 23, 3), Bottleneck),
  'resnet152': _resnet((3, 8, 36, 3), Bottleneck),
  'resnet18_cifar': _resnet((2, 2, 2, 2), BasicBlock, 'cifar'),
  'resnet34_cifar': _resnet((3, 4, 6, 3), BasicBlock, 'cifar'),
  'resnet50_cifar': _resnet((3, 4, 6, 3), Bottleneck, 'cifar'),
  'resnext29_32x4d': _resnet(
    (3, 3, 3), _RESNEXT_BLOCK, 'cifar', width=128, reductions=(4, 8), stem_kernel=1
  ),
  'resnext50_32x4d': _resnet((3, 4, 6, 3), _RESNEXT_BLOCK, width=128),
  'mobilenetv2_cifar': _mobilenet(cifar=True),
  'mobilenetv2': _mobilenet(cifar=False),
  'mobilenetv2_x0_5': _mobilenet(cifar=False, multiplier=0.5),
  'mobilenetv2_x0_75': _mobilenet(cifar=False, multiplier=0.75),
  'mobilenetv2_x1_4': _mobilenet(cifar=False, multiplier=1.4),
  **{f'shufflenetv2_{x}_cifar': _shufflenet(w, True) for x, w in _SHUFFLENET_WIDTHS.items()},
  **{f'shufflenetv2_{x}': _shufflenet(w, False) for x, w in _SHUFFLENET_WIDTHS.items()},
  # The paper of ShuffleNetV2 has 244 where the 32-pixel variant has 224.
  'shufflenetv2_x2_0': _shufflenet((244, 488, 976, 2048), cifar=False),
  'densenet121': Backbone(
    lambda fusions, attention, remat, **kwargs: DenseNet((6, 12, 24, 16), **kwargs), blocks=()
  ),
}


@dataclasses.dataclass(frozen=True)
class Form:
  """A name of the zoo, taken apart.

  Attributes:
    backbone: the plain network's name.
    setting: '', 'half' or 'full': plain, AFI, AFI-B.
    block_attention: '' or which one is on every block's output.
    fusion_attention: '' or which one is on the result of AFI.
  """

  backbone: str
  setting: str = ''
  block_attention: str = ''
  fusion_attention: str = ''

  @property
  def name(self) -> str:
    afi, b = ('afi_' if self.setting else ''), ('_b' if self.setting == 'full' else '')
    before = f'{self.block_attention}_' if self.block_attention else ''
    after = f'_{self.fusion_attention}' if self.fusion_attention else ''
    return f'{afi}{before}{self.backbone}{b}{after}'


@functools.cache
def _forms() -> dict[str, Form]:
  """All names."""
  forms = []
  for backbone, entry in BACKBONES.items():
    if not entry.blocks:
      forms.append(Form(backbone))
      continue
    forms += [Form(backbone, '', block_attention) for block_attention in ('', *ATTENTIONS)]
    for block_attention in ('', 'se'):
      for setting, after in itertools.product(('half', 'full'), ('', *ATTENTIONS)):
        forms.append(Form(backbone, setting, block_attention, after))
  return {form.name: form for form in forms}


DTYPES = ('float32', 'bfloat16')


def list_models(pattern: str = '*') -> list[str]:
  """Names of all networks that match a shell pattern.

  >>> list_models('afi*_resnet32')
  ['afi_resnet32', 'afi_se_resnet32']
  """
  return sorted(fnmatch.filter(_forms(), pattern))


def form(name: str) -> Form:
  """What a name says.

  >>> form('afi_se_resnet50_b')
  Form(backbone='resnet50', setting='full', block_attention='se', fusion_attention='')

  Raises:
    UserError: there is no such network.
  """
  if name not in _forms():
    raise unknown('model', name, _forms(), 'See afi_flax.models.list_models().')
  return _forms()[name]


def image_size(name: str) -> int:
  """Side of the pictures that the network is made for, in pixels: 32 or 224."""
  return BACKBONES[form(name).backbone].image_size


def residual_blocks(name: str) -> int:
  """Blocks, over all stages, for `keep` of a network's call; 0: it has no residual branches."""
  backbone = BACKBONES[form(name).backbone]
  return sum(backbone.blocks) if backbone.residual else 0


def create_model(
  name: str,
  num_classes: int = 1000,
  stages: Sequence[int] | None = None,
  dtype: str = 'float32',
  se_bias: bool = False,
  remat: str = 'none',
  features_only: bool = False,
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
    stages: which stages, from 1, carry AFI; None: all that can. Only for `afi_*` networks, and
      for stages of several blocks: the first one of a stage has nothing to reuse.
    dtype: of the computation, 'float32' or 'bfloat16'.
    se_bias: biases in Squeeze-and-Excitation, as timm's networks have them. Only for `se_*`.
    remat: what is not kept for the gradient but computed again, so that training needs less memory:
      'none', 'fusion' (what is elementwise: normalisation, ReLU, R and the concatenation) or
      'block' (all inside a block).
    features_only: leave the classifier out and return the last map of every stage, a list of
      [B,H_i,W_i,C_i], for detection and segmentation heads; `stage_shapes` says which C_i. The
      variables of the whole network fit.

  Returns:
    A Linen module, `init(key, images, train=False)` and `apply(variables, images, train=...)`:
    images f32 [B,H,W,3], normalised -> logits f32 [B,K].

  Raises:
    UserError: unknown name, or an argument that has no meaning for the network.
  """
  named = form(name)
  backbone = BACKBONES[named.backbone]
  _check_remat(named, backbone, remat)
  if se_bias and named.block_attention != 'se':
    raise UserError(f'model.se_bias has no meaning for {name!r}: no SE on its blocks; use se_...')
  if dtype not in DTYPES:
    raise unknown('model.dtype', dtype, DTYPES)
  if num_classes < 1:
    raise UserError(f'num_classes {num_classes} must be 1 or more')
  attention = ATTENTIONS[named.block_attention] if named.block_attention else None
  return backbone.make(
    num_classes=num_classes,
    fusions=_fusions(named, backbone, stages),
    attention=functools.partial(attention, use_bias=True) if se_bias else attention,
    dtype=dtype,
    remat=remat,
    features_only=features_only,
  )


def _fusions(
  form: Form, backbone: Backbone, stages: Sequence[int] | None
) -> tuple[Fusion | None, ...]:
  if isinstance(stages, int):
    raise UserError(f'model.stages {stages} must be a tuple; use ({stages},)')
  every = tuple(range(1, len(backbone.blocks) + 1))
  if not form.setting:
    if stages is not None:
      raise UserError(
        f'model.stages {tuple(stages)} has no meaning for plain {form.name!r}; use afi_...'
      )
    return (None,) * len(every)
  several = tuple(i for i in every if backbone.blocks[i - 1] > 1)
  chosen = several if stages is None else tuple(stages)
  if set(chosen) - set(every) or len(set(chosen)) < len(chosen) or not chosen:
    raise UserError(
      f'model.stages {chosen} must be some of {several}, each once, for {form.name!r}'
    )
  if single := set(chosen) - set(several):
    raise UserError(
      f'model.stages {chosen}: stage {min(single)} of {form.name!r} has one block, so nothing to '
      f'reuse; use some of {several}'
    )
  reduction = backbone.reductions[form.setting == 'full']
  attention = ATTENTIONS[form.fusion_attention] if form.fusion_attention else None
  fusion = Fusion(form.setting, reduction, attention)
  return tuple(fusion if i in chosen else None for i in every)


def _check_remat(form: Form, backbone: Backbone, remat: str) -> None:
  if remat not in REMATS:
    raise unknown('model.remat', remat, REMATS)
  if remat != 'none' and not backbone.blocks:
    raise UserError(f"model.remat {remat!r} has no meaning for {form.name!r}; use 'none'")


def stage_shapes(model: nn.Module, image_size: int) -> list[tuple[int, int]]:
  """(channels, stride) of every map that a network made with `features_only` returns.

  >>> stage_shapes(create_model('resnet50', features_only=True), image_size=64)
  [(256, 4), (512, 8), (1024, 16), (2048, 32)]

  Args:
    model: the network.
    image_size: side of the pictures, in pixels; strides are exact if it is a multiple of them.

  Raises:
    UserError: a network with its classifier, or pictures smaller than the largest stride.
  """
  if not model.features_only:
    raise UserError('stage_shapes wants a network without classifier; use features_only=True')
  images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), 'float32')
  init = functools.partial(model.init_with_output, jax.random.key(0), train=False)
  maps, _ = jax.eval_shape(init, images)
  if not maps[-1].shape[1]:
    raise UserError(f'image_size {image_size} leaves nothing of the last map; use 32 or more')
  return [(x.shape[-1], image_size // x.shape[1]) for x in maps]
