import json

import pytest

from afi_flax.models import image_size, list_models
from benchmarks import compile_time


def test_covers_every_network_for_small_pictures():
  names = [name for backbone in compile_time.BACKBONES for name in compile_time.forms(backbone)]
  without_attention = [
    name
    for name in list_models()
    if image_size(name) == 32 and not {'se', 'ge', 'cbam', 'eca'} & set(name.split('_'))
  ]
  assert sorted(names) == without_attention


def test_what_was_done_is_written_when_the_run_is_interrupted(tmp_path, monkeypatch, capsys):
  lasts = iter([(1.0, 2.0), (2.0, 4.0), (1.0, 3.0), (3.0, 6.0)])

  def seconds(name):
    try:
      return next(lasts)
    except StopIteration:
      raise KeyboardInterrupt from None

  monkeypatch.setattr(compile_time, 'seconds', seconds)
  with pytest.raises(KeyboardInterrupt):
    compile_time.measure(['resnet20', 'resnet32'], 2, str(tmp_path / 'times.json'))
  plain, afi, full = json.loads((tmp_path / 'times.json').read_text())['rows']
  assert plain == {
    'network': 'resnet20',
    'parameters': 278_324,
    'gflops': pytest.approx(1.32, abs=0.005),
    'trace_seconds': 2.0,
    'compile_seconds': 4.0,
    'ratio_to_plain': 1.0,
    'rounds': 2,
  }
  assert (afi['network'], afi['ratio_to_plain'], afi['rounds']) == ('afi_resnet20', 1.0, 1)
  assert (full['network'], full['ratio_to_plain']) == ('afi_resnet20_b', 0.67)
  assert capsys.readouterr().out.splitlines()[1] == '2 of 12: afi_resnet20 in 6.0 s'
  shown = compile_time.show([plain, afi, full]).splitlines()
  assert shown[1].split() == ['resnet20', '278,324', '1.32', '2.0', '4.0', '1.00']
