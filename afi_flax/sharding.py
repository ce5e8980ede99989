"""The mesh and its shardings: the only file that names a device axis.

One axis, 'data': every device holds the whole state and an equal share of the batch. Under
`jax.jit` a mean over the batch is the mean over all devices, so nothing else needs to know how many
there are.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

PyTree = Any


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of the given devices, or of all devices of all processes."""
  devices = jax.devices() if devices is None else devices
  return Mesh(np.asarray(devices), ('data',), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds all of it: the state, metrics."""
  return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
  """The leading axis is divided over the devices: batches."""
  return NamedSharding(mesh, PartitionSpec('data'))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's share [b, ...] of every array -> global arrays [B, ...] on the devices."""
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split(mesh), x), batch)


def gather(x: jax.Array) -> np.ndarray:
  """A batch's array [B, ...], that is divided over the devices of all processes. All must ask."""
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def any_process(flag: bool) -> bool:
  """Whether the flag is set on any process. All of them must ask."""
  return bool(multihost_utils.process_allgather(np.array(flag)).any())


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
