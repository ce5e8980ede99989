"""A trained network as one function of pictures: what every format of `exports` writes down."""

import dataclasses
from typing import Any

import jax
import numpy as np

from afi_flax import models
from afi_flax.run import Run


@dataclasses.dataclass(frozen=True, eq=False)  # what jax.jit takes has a hash
class Network:
  """What is exported.

  Attributes:
    run: the trained network.
    config: of the run, every key, without paths of the machine that it was trained on.
    preprocessing: whether the function takes u8 pictures and normalises them itself.
    dtype: of the computation; '': that of the run.
  """

  run: Run
  config: dict[str, Any]
  preprocessing: bool = True
  dtype: str = ''

  @property
  def variables(self) -> dict[str, Any]:
    """`params` and `batch_stats` f32, on the host: what devices they were on is not exported."""
    return jax.tree.map(np.asarray, self.run.variables)

  @property
  def input(self) -> jax.ShapeDtypeStruct:
    """Of one picture: [S,S,3], u8, or f32 if it must be normalised before."""
    size = self.run.preprocessing.image_size
    return jax.ShapeDtypeStruct((size, size, 3), 'uint8' if self.preprocessing else 'float32')

  def __call__(self, variables: dict[str, Any], images: jax.Array) -> jax.Array:
    """Images [B,S,S,3] as `input` says -> logits f32 [B,K]."""
    arguments = dataclasses.asdict(self.run.plan.model)
    arguments |= {'remat': 'none', 'dtype': self.dtype or arguments['dtype']}
    if self.preprocessing:
      images = self.run.preprocessing(images)
    return models.create_model(**arguments).apply(variables, images, train=False)
