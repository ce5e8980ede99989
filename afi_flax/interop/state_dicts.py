"""Files of weights: `.safetensors`, and what PyTorch saves (`.pth`, `.pt`, `.bin`).

Which of them a file is, its first bytes say. A `.safetensors` is a JSON header and numbers. A file
of PyTorch is a pickle, which runs whatever it names: it is read by nothing but PyTorch's
weights-only loader, which builds tensors and containers and refuses all else.
"""

import argparse
import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from afi_flax import files
from afi_flax.errors import UserError, shown

# What safetensors calls the dtypes of weights; all become float32.
_FLOATS = {'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}
# What a state dict holds beside weights: PyTorch's batch norms count batches, averages updates.
_COUNTERS = re.compile(r'(.*\.)?(num_batches_tracked|n_averaged)')
# Where training scripts keep the state dict in what they save; averages first, as timm takes them.
_ENTRIES = ('state_dict_ema', 'model_ema', 'state_dict', 'model', 'model_state_dict')
# What DataParallel, torch.compile and Lightning put before every name.
_PREFIXES = ('module.', '_orig_mod.', 'model.')


@dataclasses.dataclass(frozen=True)
class StateDict:
  """What a file holds.

  Attributes:
    arrays: f32, by name.
    metadata: the texts in the header of a .safetensors; {} of PyTorch's files.
    dtypes: those that the file has, in words.
    entry: of what was saved, the one that holds the arrays; '': all of it.
    ignored: names of what is no weight.
    sha256: of the file, in hexadecimal.
  """

  arrays: dict[str, np.ndarray]
  metadata: dict[str, str]
  dtypes: str
  entry: str
  ignored: tuple[str, ...]
  sha256: str


@dataclasses.dataclass(frozen=True)
class _Stored:
  """An array of a file: its dtype in words, and what makes it."""

  dtype: str
  array: Callable[[], np.ndarray]


def read(path: str) -> StateDict:
  """Reads a file of weights; float16, bfloat16 and float64 become float32.

  Args:
    path: on a disk or in a bucket.

  Raises:
    UserError: it cannot be read, is another kind of file, holds what would have to be run, or
      numbers that are no weights.
  """
  try:
    data = files.read(files.absolute(path))
  except OSError as error:
    raise UserError(
      f'{path} cannot be read: {error.strerror}; give a file of weights, such as '
      'afi_flax.export --format safetensors writes'
    ) from error
  metadata, entry, ignored = {}, '', ()
  if data[8:9] == b'{':
    stored, metadata = _safetensors(data, path)
  elif data[:4] == b'PK\x03\x04' or data[:1] == b'\x80':  # a zip file, or a bare pickle
    stored, entry, ignored = _torch(data, path)
  else:
    raise UserError(
      f'{path} is neither a .safetensors nor a file of PyTorch: it begins with '
      f'{shown(data[:40].decode("latin-1"))!r}; if it was downloaded, do that again'
    )
  stored = _without_prefix(stored)
  weights = {name: item for name, item in stored.items() if not _COUNTERS.fullmatch(name)}
  return StateDict(
    arrays={name: _float32(name, item, path) for name, item in weights.items()},
    metadata=metadata,
    dtypes=', '.join(sorted({item.dtype for item in weights.values()})),
    entry=entry,
    ignored=(*ignored, *(name for name in stored if name not in weights)),
    sha256=hashlib.sha256(data).hexdigest(),
  )


def _without_prefix(stored: dict[str, _Stored]) -> dict[str, _Stored]:
  """Without what stands before the name of every weight."""
  names = [name for name in stored if not _COUNTERS.fullmatch(name)]
  for prefix in _PREFIXES:
    if names and all(name.startswith(prefix) for name in names):
      shorter = {name.removeprefix(prefix): item for name, item in stored.items()}
      return _without_prefix(shorter)
  return stored


def _float32(name: str, item: _Stored, path: str) -> np.ndarray:
  if item.dtype not in _FLOATS.values():
    raise UserError(
      f'{path}: {shown(name)} is of {item.dtype}; weights must be float32, float16 or bfloat16, '
      'not quantised'
    )
  array = np.asarray(item.array(), 'float32')
  if not np.isfinite(array).all():
    raise UserError(f'{path}: {shown(name)} holds NaN or infinity; give weights that are finite')
  return array


def _safetensors(data: bytes, path: str) -> tuple[dict[str, _Stored], dict[str, str]]:
  """The arrays and the metadata. The format: 8 bytes of the header's size, JSON, the numbers."""
  try:
    tensors = safetensors.deserialize(data)  # which checks all sizes and offsets
  except safetensors.SafetensorError as error:
    raise UserError(
      f'{path} is a damaged .safetensors ({error}); if it was downloaded or copied, do that again'
    ) from error
  header = json.loads(data[8 : 8 + int.from_bytes(data[:8], 'little')])
  stored = {name: _of_safetensors(tensor) for name, tensor in sorted(tensors)}
  return stored, header.get('__metadata__', {})


def _of_safetensors(tensor: dict[str, Any]) -> _Stored:
  dtype = _FLOATS.get(tensor['dtype'], tensor['dtype'])

  def array():
    return np.frombuffer(tensor['data'], jnp.dtype(dtype)).reshape(tensor['shape'])

  return _Stored(dtype, array)


def _torch(data: bytes, path: str) -> tuple[dict[str, _Stored], str, tuple[str, ...]]:
  """The tensors, the entry that they are in, and what there is besides."""
  try:
    import torch
  except ModuleNotFoundError as error:
    raise UserError(
      f"{path} is a file of PyTorch, which must read it: pip install -e '.[torch]'; or give the "
      'weights as .safetensors'
    ) from error
  try:
    # Training scripts save their flags beside the weights: a Namespace, attributes and no code.
    with torch.serialization.safe_globals([argparse.Namespace]):
      saved = torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)
  except Exception as error:  # PyTorch documents none, and a damaged file raises many
    raise UserError(
      f'{path} is damaged or holds more than weights, which the weights-only loader of PyTorch '
      f'refuses ({_why(error)}); save model.state_dict() alone, or as .safetensors'
    ) from error
  whole = saved if isinstance(saved, Mapping) else {}
  entry = next((name for name in _ENTRIES if isinstance(whole.get(name), Mapping)), '')
  state = whole[entry] if entry else whole
  stored = {str(n): _of_torch(x) for n, x in state.items() if isinstance(x, torch.Tensor)}
  if not stored:
    there = ', '.join(repr(name) for name in list(whole)[:8]) or f'a {type(saved).__name__}'
    raise UserError(f'{path} holds no state dict but {there}; save model.state_dict()')
  besides = (str(name) for name in whole if name != entry) if entry else ()
  return stored, entry, (*besides, *(str(n) for n in state if str(n) not in stored))


def _of_torch(tensor: Any) -> _Stored:
  dtype = str(tensor.dtype).removeprefix('torch.')
  return _Stored(dtype, lambda: tensor.detach().float().numpy())


def _why(error: Exception) -> str:
  """The sentence that says it, of the pages that PyTorch writes."""
  found = re.search(r'WeightsUnpickler error: (.*)', str(error))
  lines = (found[1] if found else str(error)).strip().splitlines()
  return shown(lines[0])[:150] if lines else type(error).__name__
