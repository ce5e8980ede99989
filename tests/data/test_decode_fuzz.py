"""Damaged pictures by the million: each gives a picture or a reason, and nothing else happens."""

import json
import subprocess
import sys

import pytest

from tests.data import fuzz_decode

PROCESSES = 2


@pytest.mark.fault(
  'picture',
  '1,000,000 pictures with 1 to 3 random damages',
  'decoded or refused; no crash, hang, leak',
)
def test_damaged_pictures(tmp_path, root, at_full_size, record_property):
  """In processes of their own, each of which writes down what it is about to decode.

  An input that ends its process, by a crash, by more than its CPU seconds or by more memory, is
  left in the folder that the message names.
  """
  count = 500_000 if at_full_size else 1000
  record_property('tries', PROCESSES * count)
  runs = []
  for i in range(PROCESSES):
    folder = tmp_path / str(i)
    folder.mkdir()
    command = [sys.executable, '-X', 'faulthandler', '-W', 'error', '-m', 'tests.data.fuzz_decode']
    with open(folder / 'said', 'w') as said:  # libtiff says something of each damaged TIFF
      process = subprocess.Popen(
        [*command, str(i * count), str(count), str(folder)],
        stdout=subprocess.PIPE, stderr=said, text=True, cwd=root,
      )  # fmt: skip
    runs.append((process, folder))
  for process, folder in runs:
    out, _ = process.communicate()
    said = (folder / 'said').read_text()[-2000:]
    assert process.returncode == 0, f'{process.returncode}, by {folder}/input: {said}'
    found = json.loads(out)
    print(found)
    assert found['inputs'] == count
    assert found['decoded'] + found['refused'] == count
    assert found['decoded'] > count / 10
    assert found['refused'] > count / 10
    assert found['peak_mib'] < 256
    assert found['left_mib'] < 64


def test_an_input_is_made_again_from_its_number():
  pictures = fuzz_decode.corpus()
  inputs = [fuzz_decode.mutated(pictures, i) for i in range(50)]
  assert inputs == [fuzz_decode.mutated(pictures, i) for i in range(50)]
  assert len(set(inputs)) == 50
  assert not set(inputs) & set(pictures)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('body', 'ends'),
  [
    ('raise ZeroDivisionError', 1),
    ('raise decode.UnreadableError("much") from MemoryError()', 1),
    ('import numpy; numpy.zeros(2 << 30, "u1")', 1),
    ('import os; os.abort()', -6),
    ('import ctypes; ctypes.string_at(0)', -11),
    ('\n  while True: pass', -27),
  ],
  ids=['exception', 'memory', 'much memory', 'abort', 'crash', 'hang'],
)
def test_the_fuzzer_sees_what_it_looks_for(body, ends, tmp_path, root):
  code = (
    'import pathlib, sys\n'
    'from afi_flax.data import decode\n'
    'from tests.data import fuzz_decode\n'
    f'def broken(*_, **__): {body}\n'
    'decode.crop_resize, fuzz_decode._SECONDS = broken, 1\n'
    'fuzz_decode.main(0, 50, pathlib.Path(sys.argv[1]))\n'
  )
  command = [sys.executable, '-c', code, str(tmp_path)]
  done = subprocess.run(command, cwd=root, capture_output=True, check=False)
  assert done.returncode == ends
  assert (tmp_path / 'input').stat().st_size
