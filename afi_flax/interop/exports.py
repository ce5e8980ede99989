"""Exports of a run: a folder with the network in another format, its classes and a model card.

  README.md         the model card, with Python that loads the network
  class_names.json  in the order of the logits
  export.json       for programs: what goes in and comes out, how pictures are cut, all the files
  the network       `NAME` of its format's file here

The folder is made beside its place and moved there when it is whole, in the place of an older
export.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import numpy as np

from afi_flax import files
from afi_flax.config import complete, without_paths
from afi_flax.errors import FailedError, UserError, unknown
from afi_flax.interop import model_card, onnx, safetensors, savedmodel, stablehlo
from afi_flax.interop.network import Network
from afi_flax.models.layers import plain_forms
from afi_flax.run import load_run
from afi_flax.workdir import Workdir

MANIFEST = 'export.json'
# Largest difference from Flax that is let pass, relative to the largest logit; see `Export`.
_TOLERANCES = {'float32': 1e-4, 'bfloat16': 0.1}


@dataclasses.dataclass(frozen=True)
class Format:
  """A format, by the file that writes it.

  Attributes:
    module: has `NAME`, `ABOUT`, `PACKAGES`, `write`, `load` and `loading`.
    needs: a package of an extra; '': none.
    extra: its name.
    dtype: of the computation; '': the run's.
    weights_only: there is no function that could take pictures.
  """

  module: ModuleType
  needs: str = ''
  extra: str = ''
  dtype: str = ''
  weights_only: bool = False


# onnxruntime has no bfloat16 convolution for CPUs.
FORMATS = {
  'stablehlo': Format(stablehlo),
  'savedmodel': Format(savedmodel, needs='tensorflow', extra='tensorflow'),
  'onnx': Format(onnx, needs='jax2onnx', extra='onnx', dtype='float32'),
  'safetensors': Format(safetensors, weights_only=True),
}


@dataclasses.dataclass(frozen=True)
class Export:
  """What `export_run` made.

  Attributes:
    folder: of the export.
    step: of the checkpoint.
    difference: the largest between the logits of Flax and of what was written, for two random
      pictures, divided by the largest of Flax's logits (by 1 where that is less).
  """

  folder: pathlib.Path
  step: int
  difference: float


def export_run(
  workdir: str | os.PathLike,
  form: str,
  checkpoint: str = 'last',
  preprocessing: bool = True,
  out: str | os.PathLike | None = None,
  say: Callable[[str], None] = lambda text: None,
) -> Export:
  """Exports a run's checkpoint, its moving average where it has one, and compares it with Flax.

  Args:
    workdir: the run's folder.
    form: a key of FORMATS.
    checkpoint: 'last', 'best' or a step.
    preprocessing: whether the network takes u8 pictures and normalises them itself.
    out: the folder to make; None: `export/FORMAT` in the run's.
    say: told what is being done.

  Raises:
    UserError: there is no such run, checkpoint or format; a package is missing; the folder holds
      what no export wrote; what was written does not compute what Flax does.
  """
  chosen = _chosen(form)
  place, config = _place(Workdir(workdir), form, out), Workdir(workdir).read_config()
  say(f'restoring {checkpoint} of {workdir}')
  run = load_run(workdir, checkpoint)
  network = Network(
    run,
    without_paths(complete(config)),
    preprocessing and not chosen.weights_only,
    chosen.dtype,
  )
  records = Workdir(workdir).read_metrics()
  with _replacing(place) as folder:
    say(f'converting {run.plan.model.name} to {form}')
    chosen.module.write(network, folder)
    say('comparing it with Flax')
    difference = _compare(network, chosen.module.load(folder))
    card = model_card.text(network, chosen.module, checkpoint, records)
    _write(folder, 'README.md', card)
    _write(folder, 'class_names.json', json.dumps(run.readable_names, indent=1) + '\n')
    contents = {'files': [*files.names(folder), MANIFEST]}
    _write(folder, MANIFEST, json.dumps(_manifest(network, form) | contents, indent=1) + '\n')
  return Export(place, run.step, difference)


def _chosen(form: str) -> Format:
  if form not in FORMATS:
    raise unknown('format', form, FORMATS)
  chosen = FORMATS[form]
  if chosen.needs and importlib.util.find_spec(chosen.needs) is None:
    raise UserError(f"format {form!r} needs {chosen.needs}; pip install -e '.[{chosen.extra}]'")
  return chosen


def _place(workdir: Workdir, form: str, out: str | os.PathLike | None) -> pathlib.Path:
  """Where the export goes; UserError where it must not."""
  place = files.absolute(workdir.exports / form if out is None else out)
  if files.in_bucket(place):
    raise UserError(f'exports are written to a disk, not to {place}; give --out, a folder on one')
  files.check_ours(place, MANIFEST, 'export')
  return place


@contextlib.contextmanager
def _replacing(place: pathlib.Path) -> Iterator[pathlib.Path]:
  """A new folder while entered, which takes the place of `place` unless an error ends it."""
  try:
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix='.export-') as beside:
      folder = pathlib.Path(beside) / 'new'
      folder.mkdir()
      yield folder
      if place.exists():
        place.rename(folder.with_name('old'))
      folder.rename(place)
  except OSError as error:
    raise FailedError(
      f'cannot write {place}: {error.strerror or error}; mend that, or give another --out'
    ) from error


def _compare(network: Network, exported: Callable[[np.ndarray], np.ndarray]) -> float:
  """The difference from Flax on the CPU, as in `Export`; UserError where it is too large."""
  size = network.run.preprocessing.image_size
  images = np.random.default_rng(0).integers(0, 256, [2, size, size, 3], 'uint8')
  try:
    cpu = jax.local_devices(backend='cpu')[0]
  except RuntimeError as error:
    raise UserError(
      'exports are compared with Flax on the CPU, which JAX_PLATFORMS leaves out; append ,cpu to it'
    ) from error
  # In plain forms, which compile in less time than others save on two pictures.
  with jax.default_device(cpu), plain_forms():
    if not network.preprocessing:
      images = np.asarray(network.run.preprocessing(images))
    options = {'xla_backend_optimization_level': 0}
    expected = jax.jit(network, compiler_options=options)(network.variables, images)
    found = exported(images)
  largest = max(1.0, float(np.abs(expected).max()))
  difference = float(np.abs(found - expected).max()) / largest
  tolerance = _TOLERANCES[network.dtype or network.run.plan.model.dtype]
  if not difference <= tolerance:
    raise UserError(
      f'the export differs from Flax by {difference:.1e} of the largest logit, more than '
      f'{tolerance:.0e}; other versions of its packages may convert it right'
    )
  return difference


def _manifest(network: Network, form: str) -> dict[str, Any]:
  run, picture = network.run, network.input
  return {
    'format': form,
    'network': run.plan.model.name,
    'step': run.step,
    'input': {
      'name': 'images',
      'shape': ['b', *picture.shape],
      'dtype': picture.dtype.name,
      'values': 'RGB, 0..255' if network.preprocessing else '(RGB / 255 - mean) / std',
    },
    'output': {'name': 'logits', 'shape': ['b', len(run.class_names)], 'dtype': 'float32'},
    **dataclasses.asdict(run.preprocessing),  # image_size, resize, mean, std
    'interpolation': 'bilinear',
  }


def _write(folder: pathlib.Path, name: str, text: str) -> None:
  (folder / name).write_text(text, encoding='utf-8')
