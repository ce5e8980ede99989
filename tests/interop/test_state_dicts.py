"""Files of weights and other files, without PyTorch; with it: test_pth.py."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from afi_flax.errors import UserError
from afi_flax.interop import state_dicts


def save(path, **arrays):
  save_file({name: np.asarray(x) for name, x in arrays.items()}, path)
  return str(path)


def test_floats_become_float32_and_counters_are_left(tmp_path):
  half = np.array([1.5, -2.0], 'float16')
  path = save(tmp_path / 'a', single=half.astype('float32'), half=half)
  state = state_dicts.read(path)
  assert state.dtypes == 'float16, float32'
  assert {x.dtype for x in state.arrays.values()} == {np.dtype('float32')}
  np.testing.assert_array_equal(state.arrays['half'], [1.5, -2.0])
  path = save(tmp_path / 'b', weight=half, num_batches_tracked=np.array(3), n_averaged=np.array(1))
  state = state_dicts.read(path)
  assert list(state.arrays) == ['weight']
  assert sorted(state.ignored) == ['n_averaged', 'num_batches_tracked']


def test_bfloat16(tmp_path):
  """Which NumPy does not have: the file is written by hand."""
  header = json.dumps({'x': {'dtype': 'BF16', 'shape': [2], 'data_offsets': [0, 4]}}).encode()
  values = np.array([1.0, 3.140625], jnp.bfloat16)
  path = tmp_path / 'a.safetensors'
  path.write_bytes(len(header).to_bytes(8, 'little') + header + values.tobytes())
  state = state_dicts.read(str(path))
  np.testing.assert_array_equal(state.arrays['x'], np.array([1.0, 3.140625], 'float32'))
  assert state.dtypes == 'bfloat16'


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.module.', 'model.'])
def test_what_stands_before_every_name_is_taken_off(tmp_path, prefix):
  one = np.ones(2, 'float32')
  path = save(tmp_path / 'a', **{f'{prefix}fc.weight': one, f'{prefix}model.bias': one})
  assert sorted(state_dicts.read(path).arrays) == ['fc.weight', 'model.bias']


def refusal(path):
  with pytest.raises(UserError) as caught:
    state_dicts.read(str(path))
  assert '\n' not in str(caught.value)
  return str(caught.value)


def test_what_is_no_weight_is_refused(tmp_path):
  path = save(tmp_path / 'a', x=np.ones(2, 'int8'))
  assert 'x is of I8; weights must be float32' in refusal(path)
  path = save(tmp_path / 'b', x=np.array([1.0, np.nan], 'float32'))
  assert 'x holds NaN or infinity' in refusal(path)


def test_other_files_are_refused(tmp_path):
  path = tmp_path / 'a'
  assert f'{path} cannot be read: No such file' in refusal(path)
  assert 'cannot be read: Is a directory' in refusal(tmp_path)
  path.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:4d7a')
  assert "neither a .safetensors nor a file of PyTorch: it begins with 'version" in refusal(path)
  path.write_bytes(b'')
  assert 'neither' in refusal(path)
  save(path, x=np.ones([8, 8], 'float32'))
  path.write_bytes(path.read_bytes()[:-5])
  assert 'is a damaged .safetensors (' in refusal(path)
  path.write_bytes(b'\xff' * 8 + b'{"x"')
  assert 'is a damaged .safetensors (' in refusal(path)


def test_without_pytorch_its_files_are_refused_with_the_cure(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  path = tmp_path / 'a.pth'
  path.write_bytes(b'PK\x03\x04 and so on')
  assert "pip install -e '.[torch]'" in refusal(path)
