import importlib.util
import types

import pytest

from benchmarks import common, machine, peers, step

MS = {'resnet20': (40.0, 10.0), 'afi_resnet20': (36.0, 12.0)}  # train, eval


class Fake:
  """Steps that are not taken."""

  device = types.SimpleNamespace(device_kind='cpu')
  plan = types.SimpleNamespace(batch_size=64)

  def __init__(self, name, batch_size, dtype):
    self.name = name

  def calls(self):
    return dict.fromkeys(step.MODES)

  def flops(self, mode):
    return {'train': 3e9, 'eval': 1e9}[mode]

  def accessed(self, mode):
    return 2**20

  def paper_flops(self):
    return {'resnet20': 100, 'afi_resnet20': 83}[self.name]


@pytest.fixture
def rows(monkeypatch):
  """Of a plain network, for which PyTorch takes 30 and 8 ms at best, and of its AFI form."""
  times = {(name, mode): MS[name][i] for name in MS for i, mode in enumerate(step.MODES)}
  for layout, (train, eval_) in {'contiguous': (50.0, 8.0), 'channels_last': (30.0, 9.0)}.items():
    times |= {('torch', 'train', layout): train, ('torch', 'eval', layout): eval_}
  monkeypatch.setattr(step, 'Ours', Fake)
  monkeypatch.setattr(step, '_peers', lambda *_: {})
  monkeypatch.setattr(step, 'milliseconds', lambda calls, rounds: times)
  limits = machine.Limits(flops=1e12, bandwidth=2**20 / 0.006)
  return step.measure('resnet20', ['plain', 'afi'], 64, 'float32', 3, limits)


def test_a_row_for_each_network_and_mode(rows):
  assert [(row['network'], row['mode']) for row in rows] == [
    (name, mode) for name in MS for mode in step.MODES
  ]
  train, eval_, afi, _ = rows
  assert train['ratio_to_torch'] == 0.75  # speeds: 30 ms over 40
  assert train['torch_layout'] == 'channels_last'
  assert train['torch_ms_by_layout'] == {'contiguous': 50.0, 'channels_last': 30.0}
  assert (eval_['ratio_to_torch'], eval_['torch_layout']) == (0.8, 'contiguous')
  assert afi['torch_ms'] is None, 'PyTorch has the plain network only'
  assert (train['ratio_to_plain'], afi['ratio_to_plain']) == (1.0, 0.9)
  assert afi['flops_ratio_to_plain'] == 0.83
  assert afi['pictures_per_second'] == round(64 / 0.036, 1)
  assert train['roofline'] == 0.15  # 6 ms for the bytes, 3 for the operations
  assert '0.75' in step.show(rows)


def test_they_take_turns_and_medians_count(monkeypatch):
  now, taken = [0.0], []

  def call(name, *seconds):
    coming = list(seconds)

    def run(number):
      taken.append((name, number))
      now[0] += number * (coming.pop(0) if len(coming) > 1 else coming[0])

    return run

  monkeypatch.setattr(step.time, 'perf_counter', lambda: now[0])
  times = step.milliseconds({'a': call('a', 9, 0.02), 'b': call('b', 9, 0.5, 0.5, 8, 0.5)}, 3)
  assert times == pytest.approx({'a': 20.0, 'b': 500.0})
  assert taken[4:] == 3 * [('a', 5), ('b', 1)], 'a tenth of a second, or one step'


def test_peers_are_known_or_the_reason_is():
  for backbone in step.BACKBONES:
    why = peers.missing(backbone)
    package = 'timm' if backbone == 'resnet50' else 'torch'
    assert why == ('' if importlib.util.find_spec(package) else f'{package} is not installed')
  assert peers.missing('densenet121') == 'none is known'


def test_the_limit_is_the_slower_of_both():
  limits = machine.Limits(flops=10.0, bandwidth=5.0)
  assert limits.seconds(20, 5) == 2
  assert limits.seconds(20, 50) == 10


@pytest.mark.slow
def test_of_a_real_network(capsys):
  limits = machine.measure('float32', rounds=1)
  assert limits.flops > 1e9 < limits.bandwidth
  rows = step.measure('resnet20', ['plain'], 8, 'float32', 1, limits)
  assert [row['mode'] for row in rows] == ['train', 'eval']
  for row in rows:
    assert row['ms'] > 0 < row['roofline']
    assert row['batch_size'] == 8
  assert rows[0]['gflops'] == pytest.approx(3 * rows[1]['gflops'], rel=0.01)
  assert step.plan('resnet50', 0, 'float32').batch_size == 16
  assert step.plan('afi_resnet20_b', 0, 'float32').batch_size == 64
  assert common.ROUNDS.default > 1
