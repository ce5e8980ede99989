import json
import re
import subprocess
import sys

import pytest

from benchmarks import startup


def test_phases_are_in_the_order_of_their_ends():
  ends = {'start': 10.0, 'jax': 11.0, 'state': 15.0, startup.DATA: 12.5}
  phases = startup.phases(ends)
  assert phases == {'jax': 1.0, startup.DATA: 1.5, 'state': 2.5}
  assert list(phases) == ['jax', startup.DATA, 'state']


def test_ratios_are_of_medians():
  ours = [{'jax': 2.0, 'compile': c} for c in (4.0, 90.0, 7.0)]
  jax = [{'jax': 2.0, 'program': p, 'compile': 4.0} for p in (3.0, 1.0, 80.0)]
  found = {(which, cache): rounds for cache in startup.CACHES for which, rounds in
           (('ours', ours), ('jax', jax))}  # fmt: skip
  cold, warm = startup.summarise('a.py', found)
  assert (cold['cache'], warm['cache']) == startup.CACHES
  assert (cold['seconds'], cold['jax_seconds'], cold['script_seconds']) == (9.0, 6.0, 9.0)
  assert (cold['ratio_to_jax'], cold['ratio_to_script'], cold['rounds']) == (1.5, 1.0, 3)
  assert cold['phases'] == {'jax': 2.0, 'compile': 7.0}
  lines = startup.show([cold, warm]).splitlines()
  assert lines[1].split() == ['a.py', 'cold', '9.0', '6.0', '9.0', '1.50', '1.00']
  assert lines[5].split() == ['a.py', 'cold', 'ours', '2.0', '7.0']
  assert lines[6].split() == ['a.py', 'cold', 'script', '2.0', '3.0', '4.0']


def test_lines_that_tell_what_is_over():
  lines = {
    'state': '8 steps of 16 on 1 x cpu, peak learning rate 0.1; starts from scratch',
    'batch': 'Compiling the training step ...',
    'trace': 'Finished jaxpr to MLIR module conversion jit(train_step) in 0.412378788 sec',
    'compile': 'Compiled the training step in 6.3 s; it needs 188 MiB of memory.',
    'step': '1/4  epoch 0.25  loss 4.734  top-1  0.0%  lr 0.025      3.2 pictures/s',
  }
  for what, line in lines.items():
    told = [name for name, end in startup.OURS.items() if end and re.search(end, line)]
    # Where the first batch comes after the program, one line tells of both.
    assert told == (['batch', 'compile'] if what == 'compile' else [what])


@pytest.mark.slow
def test_command(tmp_path):
  recipe = 'configs/cifar100_resnet32.py:smoke'
  command = f'-m benchmarks.startup --recipes={recipe} --rounds=1 --json={tmp_path}/a.json'
  subprocess.run([sys.executable, *command.split()], check=True)
  cold, warm = json.loads((tmp_path / 'a.json').read_text())['rows']
  for row in (cold, warm):
    assert list(row['phases']) == list(startup.OURS)
    assert list(row['jax_phases']) == list(startup.JAX)
    assert sum(row['phases'].values()) == pytest.approx(row['seconds'], abs=0.1)


@pytest.mark.slow
def test_a_start_that_fails(tmp_path):
  with pytest.raises(startup.UserError, match=r"(?s)ended before 'program'.*no_such\.py"):
    startup.run('jax', ['no_such.py'], tmp_path)
