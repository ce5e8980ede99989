import jax
import pytest
from flax import linen as nn

from benchmarks import live_buffers
from benchmarks.live_buffers import Arena, Buffer


class Network(nn.Module):
  """A wide stem and a narrow block, by the names that the backbones use."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(64, (3, 3), name='stem')(x)  # [8,32,32,64] f32: 2 MiB
    x = nn.max_pool(x, (3, 3), (2, 2))
    return nn.Conv(4, (3, 3), name='stage1_block1')(x)


def test_reads_what_xla_writes_down():
  x = jax.ShapeDtypeStruct((8, 32, 32, 4), 'float32')
  network = Network()
  variables = jax.eval_shape(network.init, jax.random.key(0), x)
  arena = live_buffers.read_arena(jax.jit(network.apply).lower(variables, x))
  usage = arena.usage()
  assert 0.95 * arena.size <= max(usage) <= arena.size
  largest = live_buffers.kept(arena)[0]
  assert (largest.part, largest.size) == ('stem', 8 * 32 * 32 * 64 * 4)
  peaks = live_buffers.peak_by_part(arena)
  assert list(peaks) == ['stem', 'stage1_block1']
  assert peaks['stage1_block1'] == 8 * 15 * 15 * 64 * 4
  assert peaks['stem'] >= largest.size + 8 * 15 * 15 * 64 * 4  # and what is pooled of it


@pytest.fixture
def arena():
  """Four instructions: b is written in place of a; c lies above; d comes when a and b are gone."""
  a = Buffer('stem', 'conv/conv_general_dilated', 100, 0, 0, 1)
  b = Buffer('stem', 'max', 100, 0, 1, 2)
  c = Buffer('stage1_block1', 'conv1/bn/sub', 50, 100, 1, 3)
  d = Buffer('', 'iota', 60, 0, 3, 3)
  return Arena(150, (a, b, c, d), ('stem', 'stem', 'stage1_block1', 'head'))


def test_what_lies_in_one_place_counts_once(arena):
  assert arena.usage() == [100, 150, 150, 110]
  assert [b.what for b in arena.live(2)] == ['max', 'conv1/bn/sub']


def test_sums(arena):
  assert live_buffers.peak_by_part(arena) == {'stem': 150, 'stage1_block1': 150, 'head': 110}
  assert live_buffers.by_stage(arena.live(3)) == {'stage1': 50, 'other': 60}
  unit = live_buffers._UNIT
  buffers = [
    Buffer('stage1_block2', 'conv1/conv/conv_general_dilated', unit, 0, 0, 0),
    Buffer('stage1_block2', 'conv1/bn/sub', unit // 2, 0, 0, 0),
    Buffer('stage1_block2', 'max', 4 * unit, 0, 0, 0),
    Buffer('stage1_block2', 'conv1/bn/mean', 256, 0, 0, 0),
    Buffer('stage1_block3', 'conv1/bn/sub', unit, 0, 0, 0),
  ]
  assert live_buffers.by_operation(buffers, 'stage1_block2') == {
    'conv1: convolution': 1.0,
    'conv1: x - mean': 0.5,
    'output': 4.0,
  }


@pytest.mark.slow
def test_draws(tmp_path):
  sizes = {'plain': {'stem': 10**6, 'other': 0}, 'afi': {'stem': 10**6, 'other': 1}}
  live_buffers.draw(tmp_path / 'a.png', sizes, sizes)
  assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')
