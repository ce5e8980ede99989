"""The mesh and its shardings: the only file that names a device axis.

One axis, 'data': every device holds the whole state and an equal share of the batch. Under
`jax.jit` a mean over the batch is the mean over all devices, so nothing else needs to know how many
there are.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

PyTree = Any
_AGREE_EVERY = 8  # steps, since it costs a trip


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of the given devices, or of all devices of all processes."""
  devices = jax.devices() if devices is None else devices
  return Mesh(np.asarray(devices), ('data',), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds all of it: the state, metrics."""
  return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """This axis, the leading one of a batch, is divided over the devices."""
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, 'data'))


def put_batch(batch: PyTree, mesh: Mesh, axis: int = 0) -> PyTree:
  """This process's share, [b, ...] for axis 0, of every array -> global arrays on the devices."""
  how = split(mesh, axis)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(how, x), batch)


def put_whole(arrays: PyTree, mesh: Mesh) -> PyTree:
  """Arrays that are the same in every process -> all of them on every device."""
  how = replicated(mesh)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(how, x), arrays)


def share_by_share(function: Callable[[PyTree, PyTree], PyTree], mesh: Mesh) -> Callable:
  """(whole, split) -> split: each device computes its rows by itself, with all of `whole`."""
  specs = PartitionSpec(), PartitionSpec('data')
  return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[1])


def gather(x: jax.Array) -> np.ndarray:
  """A batch's array [B, ...], that is divided over the devices of all processes. All must ask."""
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def any_process(flag: bool) -> bool:
  """Whether the flag is set on any process. All of them must ask."""
  return bool(multihost_utils.process_allgather(np.array(flag)).any())


def agree_to_stop(wish: bool, step: int) -> bool:
  """Whether all processes stop after this step: where one wishes it, a few steps later."""
  if jax.process_count() == 1:
    return wish
  return step % _AGREE_EVERY == 0 and any_process(wish)


def steps_to_agreement(step: int) -> int | None:
  """Steps until `agree_to_stop` may say so; None for a process that is alone."""
  return None if jax.process_count() == 1 else _AGREE_EVERY - step % _AGREE_EVERY


def process_that_differs(text: str) -> int | None:
  """The first process whose text is not the first process's, or None. All of them must ask."""
  if jax.process_count() == 1:
    return None
  digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.int32)
  digests = multihost_utils.process_allgather(digest)  # [P,8]
  differ = np.flatnonzero((digests != digests[:1]).any(axis=1))
  return int(differ[0]) if differ.size else None


def first_process_says(value: float) -> float:
  """The first process's value, on all of them: a float64, or an int of up to 53 bits, exactly.

  All of them must ask.
  """
  if jax.process_count() == 1:
    return value
  bits = np.frombuffer(np.float64(value).tobytes(), np.int32)  # JAX would round it to float32
  told = np.asarray(multihost_utils.broadcast_one_to_all(bits))
  return float(np.frombuffer(told.tobytes(), np.float64)[0])
