"""Export as a SavedModel, which TensorFlow and what is built on it load without JAX.

Through `jax.experimental.jax2tf`: the network is one operation of TensorFlow's graph, which holds
StableHLO, and the weights are its variables. Source of the format:
https://www.tensorflow.org/guide/saved_model.
"""

import pathlib
from collections.abc import Callable

import numpy as np

from afi_flax.interop.network import Network
from afi_flax.interop.stablehlo import PLATFORMS

NAME = 'saved_model'
PACKAGES = ('tensorflow', 'jax')
SIGNATURE = 'serving_default'
ABOUT = f'a SavedModel for {", ".join(PLATFORMS)}, signature `{SIGNATURE}`'


def loading(network: Network) -> str:
  """Python from `images` to `logits`."""
  del network
  return f"""\
import tensorflow as tf

network = tf.saved_model.load('{NAME}').signatures['{SIGNATURE}']
logits = network(images=tf.constant(images))['logits'].numpy()
"""


def write(network: Network, folder: pathlib.Path) -> None:
  """Writes `saved_model/`: images [b,S,S,3] -> logits f32 [b,K], for every b."""
  import tensorflow as tf
  from jax.experimental import jax2tf

  convert = jax2tf.convert(
    network,
    polymorphic_shapes=[None, '(b, ...)'],
    with_gradient=False,
    native_serialization_platforms=PLATFORMS,
  )
  module = tf.Module()
  module.weights = tf.nest.map_structure(tf.Variable, network.variables)
  images = tf.TensorSpec([None, *network.input.shape], network.input.dtype.name, name='images')

  @tf.function(autograph=False, input_signature=[images])
  def function(images):
    return {'logits': convert(module.weights, images)}

  module.__call__ = function
  tf.saved_model.save(module, str(folder / NAME), signatures={SIGNATURE: function})


def load(folder: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
  """Images -> logits, as TensorFlow reads them."""
  import tensorflow as tf

  network = tf.saved_model.load(str(folder / NAME)).signatures[SIGNATURE]
  # The network is kept: it is gone with what it was loaded with.
  return lambda images: network(images=tf.constant(images))['logits'].numpy()
