"""What a network and a run are like that weights alone are given for."""

import ml_collections

from afi_flax import models
from afi_flax.config import Model
from afi_flax.errors import UserError
from afi_flax.interop.weights import Source

_IMAGENET = 1000


def target(source: Source, name: str | None, num_classes: int = 0) -> Model:
  """The network that weights start.

  Args:
    source: the weights.
    name: of the network; None: theirs.
    num_classes: 0: theirs.
  """
  name = name or source.model.name
  same = name == source.model.name
  return Model(
    name=name,
    num_classes=num_classes or source.model.num_classes or _IMAGENET,
    stages=source.model.stages if same else None,
    dtype='float32',
    se_bias=_has_se_bias(source, name),
    remat='none',
  )


def config(source: Source, name: str | None) -> ml_collections.ConfigDict:
  """The config of a run with such weights: their own, or ImageNet's.

  Args:
    source: the weights.
    name: of the network; None: theirs.

  Raises:
    UserError: they are of other classes than ImageNet's, or the configs are not at hand.
  """
  name = name or source.model.name
  if source.config is not None:
    made = ml_collections.ConfigDict(source.config)
    if name != source.model.name:
      made.model.name, made.model.stages = name, ()
  else:
    made = _imagenet(source, name)
  made.model.se_bias = _has_se_bias(source, name)
  return made


def _imagenet(source: Source, name: str) -> ml_collections.ConfigDict:
  if source.model.num_classes != _IMAGENET:
    raise UserError(
      f'{source.where} has {source.model.num_classes or "no"} classes, not the 1,000 of ImageNet; '
      'give the --config of their data, such as configs/image_folder.py'
    )
  try:
    from configs import common
  except ModuleNotFoundError as error:  # it lies beside the package, and is no part of it
    raise UserError(
      "no --config; give one, such as the repository's configs/imagenet_resnet50.py"
    ) from error
  return common.imagenet(name)


def _has_se_bias(source: Source, name: str) -> bool:
  return source.model.se_bias and models.form(name).block_attention == 'se'
