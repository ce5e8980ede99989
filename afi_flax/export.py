"""Takes a trained network elsewhere: StableHLO, a SavedModel, ONNX, or its weights alone.

  python -m afi_flax.export --workdir runs/afi32 --format onnx
  python -m afi_flax.export --workdir runs/afi32 --format stablehlo --checkpoint=best --out FOLDER

  stablehlo    what jax.export writes, for CPUs, NVIDIA GPUs and TPUs; read by JAX alone
  savedmodel   for TensorFlow; needs `pip install -e '.[tensorflow]'`
  onnx         for onnxruntime and others; needs `pip install -e '.[onnx]'`
  safetensors  the weights and, in its metadata, the config

The network takes pictures [b,S,S,3], of any number b, and gives logits f32 [b,K]. The folder, by
default export/FORMAT in the run's, holds besides it the names of the classes (class_names.json),
sizes and names for programs (export.json), and a model card with Python that loads it (README.md).
What was written is loaded again and compared with Flax: its logits for two random pictures may
differ by 1e-4 of the largest logit, by 0.1 of it where the network computes in bfloat16. Of a run
with a moving average of its weights, that is what is exported.
"""

import sys

from absl import flags

from afi_flax import commands
from afi_flax.errors import UserError
from afi_flax.interop import exports

_WORKDIR = flags.DEFINE_string('workdir', None, "The run's folder.")
_FORMAT = flags.DEFINE_string('format', None, f'One of {", ".join(exports.FORMATS)}.')
_CHECKPOINT = flags.DEFINE_string('checkpoint', 'last', 'last, best or the number of a step.')
_PREPROCESSING = flags.DEFINE_bool(
  'preprocessing',
  True,
  'True: it takes bytes 0..255 and normalises them itself; False: f32, normalised before. '
  'safetensors has no such thing.',
)
_OUT = flags.DEFINE_string(
  'out',
  None,
  "The folder to make; an older export there is replaced. Without it: export/FORMAT in the run's.",
)


def main(_) -> None:
  if _WORKDIR.value is None:
    raise UserError('no --workdir; give the folder of a run')
  if _FORMAT.value is None:
    raise UserError(f'no --format; give one of {", ".join(exports.FORMATS)}')
  export = exports.export_run(
    _WORKDIR.value,
    _FORMAT.value,
    _CHECKPOINT.value,
    _PREPROCESSING.value,
    _OUT.value,
    say=lambda text: print(text, file=sys.stderr, flush=True),
  )
  print(
    f"step {export.step} as {_FORMAT.value} in {export.folder}; its logits differ from Flax's by "
    f'at most {export.difference:.1e} of the largest logit; README.md there says how to load it'
  )


if __name__ == '__main__':
  commands.run(main)
