"""What accelerators have: memory, and how fast they are at best."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import jax

GIB = 2**30
_CGROUP_LIMIT = pathlib.Path('/sys/fs/cgroup/memory.max')  # of a container, version 2


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip, by its maker's data sheet."""

  memory: int  # bytes
  peak: float  # dense bfloat16 FLOP/s; float16 where there is no bfloat16
  bandwidth: float  # of its memory, bytes/s


# By the name that JAX has for the device. TPUs: cloud.google.com/tpu/docs/system-architecture;
# GPUs: NVIDIA's data sheets, without sparsity.
CHIPS = {
  'TPU v2': Chip(16 * GIB, 45e12, 700e9),
  'TPU v3': Chip(32 * GIB, 123e12, 900e9),
  'TPU v4': Chip(32 * GIB, 275e12, 1228e9),
  'TPU v5 lite': Chip(16 * GIB, 197e12, 819e9),
  'TPU v5': Chip(95 * GIB, 459e12, 2765e9),
  'TPU v6 lite': Chip(32 * GIB, 918e12, 1638e9),
  'Tesla V100-SXM2-16GB': Chip(16 * GIB, 125e12, 900e9),
  'NVIDIA L4': Chip(24 * GIB, 121e12, 300e9),
  'NVIDIA A100-SXM4-40GB': Chip(40 * GIB, 312e12, 1555e9),
  'NVIDIA A100-SXM4-80GB': Chip(80 * GIB, 312e12, 2039e9),
  'NVIDIA H100 PCIe': Chip(80 * GIB, 756e12, 2039e9),
  'NVIDIA H100 80GB HBM3': Chip(80 * GIB, 989e12, 3352e9),
  'NVIDIA H200': Chip(141 * GIB, 989e12, 4800e9),
}


def count_chips(devices: Sequence[jax.Device]) -> int:
  """Chips that the devices are: a TPU v2, v3 or v4 chip may appear as two devices, one a core."""
  if devices[0].platform != 'tpu':
    return len(devices)
  return len({(getattr(d, 'slice_index', 0), tuple(d.coords)) for d in devices})


def memory_bytes(devices: Sequence[jax.Device]) -> int | None:
  """Bytes that a program may use on each of these equal devices; None where that is not known.

  Of a device that is there, what JAX may take of it; of the CPU, this host's memory (or its
  container's), in equal parts for the devices that it is divided into; of a TPU of a topology that
  is not there, its share of a chip's.
  """
  device = devices[0]
  if device.platform == 'cpu':
    return _host_memory() // jax.local_device_count()
  if device in jax.local_devices():
    stats = device.memory_stats() or {}
    if 'bytes_limit' in stats:
      return stats['bytes_limit']
  chip = CHIPS.get(device.device_kind)
  return chip.memory * count_chips(devices) // len(devices) if chip else None


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
  """FLOP/s of all the devices together at best, in bfloat16; None where that is not known."""
  chip = CHIPS.get(devices[0].device_kind)
  return chip.peak * count_chips(devices) if chip else None


def seconds_at_best(devices: Sequence[jax.Device], flops: float, accessed: float) -> float | None:
  """The least time that the devices could take for a program; None where that is not known.

  Args:
    devices: equal ones.
    flops: operations of all devices together, at their bfloat16 peak.
    accessed: bytes that each device reads and writes in its memory, at its full bandwidth.
  """
  chip = CHIPS.get(devices[0].device_kind)
  if chip is None:
    return None
  share = count_chips(devices) / len(devices)  # of a chip, that a device is
  return max(flops / (chip.peak * count_chips(devices)), accessed / (chip.bandwidth * share))


def _host_memory() -> int:
  physical = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  try:
    return min(physical, int(_CGROUP_LIMIT.read_text()))
  except (OSError, ValueError):  # no container, or one without a limit: 'max'
    return physical
