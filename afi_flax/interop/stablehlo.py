"""Export as StableHLO with the weights inside, for JAX on CPUs, GPUs and TPUs without Flax.

The file is what `jax.export` serialises (https://docs.jax.dev/en/latest/export/export.html), which
JAX promises to read for six months at least.
"""

import pathlib
from collections.abc import Callable

import jax
import jax.export
import numpy as np

from afi_flax.interop.network import Network

NAME = 'model.stablehlo'
PLATFORMS = ('cpu', 'cuda', 'tpu')
PACKAGES = ('jax', 'jaxlib')
ABOUT = f'StableHLO for {", ".join(PLATFORMS)}'


def loading(network: Network) -> str:
  """Python from `images` to `logits`."""
  del network
  return f"""\
import jax, jax.export

exported = jax.export.deserialize(bytearray(pathlib.Path('{NAME}').read_bytes()))
logits = np.asarray(jax.jit(exported.call)(images))
"""


def write(network: Network, folder: pathlib.Path) -> None:
  """Writes `model.stablehlo`: images [b,S,S,3] -> logits f32 [b,K], for every b.

  On the CPU it has the forms of `models.grouped_conv`; elsewhere convolutions are plain.
  """
  (batch,) = jax.export.symbolic_shape('b')
  images = jax.ShapeDtypeStruct((batch, *network.input.shape), network.input.dtype)
  variables = network.variables
  function = jax.jit(lambda images: network(variables, images))
  exported = jax.export.export(function, platforms=PLATFORMS)(images)
  (folder / NAME).write_bytes(exported.serialize())


def load(folder: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
  """Images -> logits, as the file has them."""
  exported = jax.export.deserialize(bytearray((folder / NAME).read_bytes()))
  call = jax.jit(exported.call)
  return lambda images: np.asarray(call(images))
