from types import SimpleNamespace

import jax
import pytest

from afi_flax.analysis import devices


def tpu(kind, coords, slice_index=0):
  return SimpleNamespace(platform='tpu', device_kind=kind, coords=coords, slice_index=slice_index)


def test_the_cores_of_a_chip_share_what_it_has():
  cores = [tpu('TPU v3', (x, y, 0)) for x in range(2) for y in range(2) for _ in range(2)]
  assert devices.count_chips(cores) == 4
  assert devices.memory_bytes(cores) == 16 * devices.GIB
  assert devices.peak_flops(cores) == 4 * 123e12


def test_slices_have_the_same_coordinates():
  chips = [tpu('TPU v5 lite', (x, 0, 0), n) for x in range(2) for n in range(3)]
  assert devices.count_chips(chips) == 6
  assert devices.memory_bytes(chips) == 16 * devices.GIB
  assert devices.peak_flops(chips) == 6 * 197e12


def test_the_slower_of_computing_and_memory():
  cores = [tpu('TPU v3', (x, 0, 0)) for x in range(2) for _ in range(2)]
  assert devices.seconds_at_best(cores, 2 * 123e12, 225e9) == 1.0
  assert devices.seconds_at_best(cores, 1e12, 450e9) == 1.0
  assert devices.seconds_at_best(jax.devices(), 1e12, 1e9) is None


def test_what_is_not_known():
  gpu = [SimpleNamespace(platform='gpu', device_kind='of next year')]
  assert devices.memory_bytes(gpu) is None
  assert devices.peak_flops(gpu) is None
  assert devices.peak_flops(jax.devices()) is None


@pytest.mark.parametrize('limit', ['8000000', 'max\n', None])
def test_the_devices_of_a_cpu_share_the_memory_of_the_host_or_container(
  tmp_path, monkeypatch, limit
):
  if limit:
    (tmp_path / 'memory.max').write_text(limit)
  monkeypatch.setattr(devices, '_CGROUP_LIMIT', tmp_path / 'memory.max')
  monkeypatch.setattr('os.sysconf', {'SC_PAGE_SIZE': 4096, 'SC_PHYS_PAGES': 10_000}.get)
  host = 8_000_000 if limit == '8000000' else 40_960_000
  assert devices.memory_bytes(jax.devices()) == host // jax.local_device_count()
