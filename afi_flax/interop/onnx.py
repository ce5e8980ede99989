"""Export as ONNX, for onnxruntime and what else reads it, through the converter jax2onnx.

Source of the format: https://onnx.ai/onnx/.
"""

import contextlib
import io
import json
import logging
import pathlib
from collections.abc import Callable, Iterator

import jax
import numpy as np

from afi_flax.interop.network import Network
from afi_flax.models.layers import plain_forms

NAME = 'model.onnx'
OPSET = 21  # what onnxruntime has since 1.18
PACKAGES = ('onnx', 'jax2onnx', 'onnxruntime', 'jax')
ABOUT = f'ONNX, opset {OPSET}'


def loading(network: Network) -> str:
  """Python from `images` to `logits`."""
  del network
  return f"""\
import onnxruntime

network = onnxruntime.InferenceSession('{NAME}')
(logits,) = network.run(['logits'], {{'images': images}})
"""


def write(network: Network, folder: pathlib.Path) -> None:
  """Writes `model.onnx`: images [b,S,S,3] -> logits f32 [b,K], for every b; metadata inside."""
  import onnx

  variables = network.variables
  images = jax.ShapeDtypeStruct(('b', *network.input.shape), network.input.dtype)
  with plain_forms(), _hushed():
    from jax2onnx import to_onnx

    model = to_onnx(
      lambda images: network(variables, images),
      [images],
      model_name=network.run.plan.model.name,
      opset=OPSET,
      input_names=['images'],
      output_names=['logits'],
    )
  preprocessing = network.run.preprocessing
  onnx.helper.set_model_props(
    model,
    {
      'class_names': json.dumps(network.run.readable_names),
      'image_size': str(preprocessing.image_size),
      'resize': str(preprocessing.resize),
      'mean': json.dumps(preprocessing.mean),
      'std': json.dumps(preprocessing.std),
      'step': str(network.run.step),
    },
  )
  onnx.checker.check_model(model, full_check=True)
  onnx.save(model, folder / NAME)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
  """While entered, nothing is printed or logged: jax2onnx tells of each of its steps."""
  before = logging.root.manager.disable
  logging.disable(logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.disable(before)


def load(folder: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
  """Images -> logits, as onnxruntime computes them on the CPU."""
  import onnxruntime

  session = onnxruntime.InferenceSession(folder / NAME, providers=['CPUExecutionProvider'])
  return lambda images: session.run(['logits'], {'images': images})[0]
