import numpy as np
import pytest

from benchmarks import on_device


def test_as_many_steps_as_fill_the_time(monkeypatch):
  """Of a way that takes a millisecond a step, by a clock that only it moves."""
  now = 0.0

  def run(count):
    nonlocal now
    now += count / 1000

  monkeypatch.setattr(on_device.time, 'perf_counter', lambda: now)
  assert on_device.steps_in(run, seconds=2.0) == 2000
  assert on_device.steps_in(run, seconds=2.0, most=256) == 256
  assert on_device.steps_in(run, seconds=0.0001) == 2


@pytest.mark.slow
def test_measures_training_and_seeds(monkeypatch, capsys):
  setting = on_device.Setting('resnet20', '/no', batch_size=2)
  assert 'random pictures: ' in capsys.readouterr().out
  rows = on_device.measure(setting, rounds=1, seconds=0.1)
  assert [row['way'] for row in rows] == [
    on_device.HOST, on_device.FROM_HOST, on_device.ON_DEVICE,
  ]  # fmt: skip
  for row in rows:
    assert row['pictures_per_second'] == pytest.approx(2e3 / row['ms'], rel=0.05)
  assert rows[1]['to_host'] == 1.0
  seeds = on_device.measure_seeds(setting, 2, rounds=1, seconds=0.1)
  assert seeds['ratio'] == pytest.approx(seeds['together_ms'] / seeds['in_turn_ms'], abs=1e-3)
  loop = on_device.measure_loop(setting, rounds=1, seconds=0.1)
  assert loop['ratio'] == pytest.approx(loop['loop_ms'] / loop['calls_ms'], abs=1e-3)
  said = on_device.show(rows, loop, seeds)
  assert '2 seeds: ' in said
  assert all(np.isfinite(value) for value in seeds.values())
