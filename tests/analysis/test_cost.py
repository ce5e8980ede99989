import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from afi_flax.analysis import cost, paper
from afi_flax.models import AFI, create_model, image_size, list_models
from afi_flax.models.fusion import Fusion, run_stage

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / 'models/golden_counts.json').read_text())
# How far our FLOPs may be from the paper's. ShuffleNetV2's cannot be had from what it names.
WITHIN = {'afi_mobilenetv2_cifar': 0.01} | {
  name: 0.005
  for name in (
    *('afi_resnet32', 'afi_resnet110', 'afi_resnext29_32x4d', 'afi_resnet50', 'afi_resnet152'),
    *('afi_resnet32_b', 'afi_resnet110_b', 'afi_resnext29_32x4d_b', 'afi_mobilenetv2_cifar_b'),
    'afi_resnet50_b',
  )
}
SHUFFLENET = {'': 1.48, 'afi': 1.30, 'b': 1.51}


def whole(name, **arguments):
  size = image_size(name)
  model = create_model(name, num_classes=100 if size == 32 else 1000, **arguments)
  return cost.total(cost.count(model, size))


@pytest.mark.parametrize('row', [r for r in paper.ROWS if r.gflops], ids=lambda r: r.model)
def test_flops_are_the_papers(row):
  ours = paper.compare(row)
  if 'shufflenet' in row.model:
    form = 'b' if row.model.endswith('_b') else row.model.split('_')[0].replace('shufflenetv2', '')
    assert round(ours['gflops'], 2) == SHUFFLENET[form]
    assert not ours['parameters_agree']
  elif row.model in WITHIN:
    assert ours['gflops'] == pytest.approx(ours['gflops_paper'], rel=WITHIN[row.model])
  else:
    assert ours['gflops_agree']
  assert bool(ours['reasons']) != (ours['parameters_agree'] and ours['gflops_agree'])
  assert ours['parameters'] == GOLDEN[row.model]['parameters']


@pytest.mark.slow
def test_every_network_has_its_golden_count():
  counts = {name: whole(name).parameters for name in list_models()}
  assert counts == {name: golden['parameters'] for name, golden in GOLDEN.items()}


def products(jaxpr):
  """Multiply-accumulates of all convolutions and matrix products of a traced function."""
  for equation in jaxpr.eqns:
    shapes = [v.aval.shape for v in equation.invars]
    if equation.primitive.name == 'conv_general_dilated':
      layout = equation.params['dimension_numbers']
      kernel, out = shapes[1], equation.outvars[0].aval
      yield out.size * functools.reduce(int.__mul__, kernel) // kernel[layout.rhs_spec[0]]
    elif equation.primitive.name == 'dot_general':
      (contracted, _), _ = equation.params['dimension_numbers']
      depth = functools.reduce(int.__mul__, (shapes[0][i] for i in contracted))
      yield equation.outvars[0].aval.size * depth
    if 'branches' in equation.params:  # one for each platform, the last for all others
      yield from products(equation.params['branches'][-1].jaxpr)
    for parameter in equation.params.values():
      if hasattr(parameter, 'jaxpr'):
        yield from products(parameter.jaxpr)


@pytest.mark.parametrize(
  ('name', 'size'),
  [('resnet20', 32), ('mobilenetv2', 64), ('se_resnet18', 64), ('afi_resnet20', 8)],
)
def test_macs_are_those_of_the_traced_program(name, size):
  model = create_model(name, 10)
  images = jax.ShapeDtypeStruct((1, size, size, 3), 'float32')
  variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
  traced = jax.make_jaxpr(functools.partial(model.apply, train=False))(variables, images)
  want = sum(products(traced.jaxpr))
  if name == 'afi_resnet20':  # Block 2 scores a row that block 3 fills: c x c / 4, in and out.
    want -= sum(2 * c * c // 4 for c in (8, 16, 32))
  assert cost.total(cost.count(model, size)).macs == want


def test_by_hand():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      x = nn.Conv(4, (3, 3), strides=2, feature_group_count=1, name='a')(x)
      x = nn.BatchNorm(use_running_average=not train, name='b')(x)
      x = nn.Conv(8, (1, 1), use_bias=False, feature_group_count=2, name='c')(x)
      return nn.Dense(5, name='d')(x.mean(axis=(1, 2)))

  a, b, c, d = cost.count(Net(), image_size=6)
  assert a == cost.Layer(('a',), '3x3 4', (3, 3), cost.Cost(112, 972, 972, 36))
  assert b == cost.Layer(('b',), '', (3, 3), cost.Cost(8, 0, 72, 0))
  assert c == cost.Layer(('c',), '1x1 8/2', (3, 3), cost.Cost(16, 144, 144, 72))
  assert d == cost.Layer(('d',), 'dense 5', (1, 1), cost.Cost(45, 40, 40, 0))


def test_shared_weights_count_once_and_their_operations_each_time():
  class Pair(nn.Module):
    first: nn.Module
    second: nn.Module

    @nn.compact
    def __call__(self, x):
      return self.second(self.first(x))

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      shared = nn.Conv(3, (1, 1), use_bias=False, name='shared')  # 9 weights
      own = nn.Conv(3, (1, 1), use_bias=False, name='own')
      return Pair(shared, own, name='pair')(shared(x))

  layers = cost.count(Net(), image_size=2)
  assert [layer.path for layer in layers] == [('shared',), ('shared',), ('own',)]
  assert [layer.cost.parameters for layer in layers] == [9, 0, 9]
  assert [layer.cost.macs for layer in layers] == [36, 36, 36]


@pytest.mark.parametrize('by_name', [False, True])
def test_afi_by_itself_counts_for_each_of_its_maps(by_name):
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      maps = [x, x + 1, x - 1]
      afi = AFI(reduction=1, name='afi')
      return afi(features=maps) if by_name else afi(maps)

  whole = cost.total(cost.count(Net(), image_size=4))
  assert (whole.parameters, whole.macs) == (2 * 9, 3 * 2 * 9)


def test_counts_do_not_depend_on_what_was_counted_before():
  names = ('afi_resnet20', 'afi_resnet20_b', 'afi_resnet20_se', 'se_resnet20', 'resnet20')
  fresh = {}
  for name in names:
    cost._SEEN.clear()
    fresh[name] = whole(name)
  assert {name: whole(name) for name in reversed(names)} == fresh
  assert len(set(fresh.values())) == len(names)
  assert whole('afi_resnet20', stages=(3,)) != fresh['afi_resnet20']


def test_stages_are_table_3():
  layers = cost.count(create_model('afi_resnet32', 100), image_size=32)
  rows = [(s.name, s.size, s.layers) for s in cost.stages(layers)]
  assert rows == [
    ('stem', (32, 32), '3x3 16'),
    ('stage1', (32, 32), '[3x3 16, 3x3 16] + 4 x [3x3 8, AFI, 3x3 16]'),
    ('stage2', (16, 16), '[3x3 32, 3x3 32] + 4 x [3x3 16, AFI, 3x3 32]'),
    ('stage3', (8, 8), '[3x3 64, 3x3 64] + 4 x [3x3 32, AFI, 3x3 64]'),
    ('head', (1, 1), 'dense 100'),
  ]
  stages = cost.stages(layers)
  assert sum(s.cost.parameters for s in stages) == 378_228
  assert stages[0].cost == cost.Cost(16 * 27 + 32, 27 * 16 * 1024, 29 * 16 * 1024, 16 * 1024)


def test_a_block_that_concatenates_all_features_counts_for_all():
  class Block(nn.Module):
    fusion: Fusion | None

    @nn.compact
    def __call__(self, x, features, train):
      made = nn.Conv(2, (1, 1), use_bias=False)(x)
      y = jnp.concatenate([made, *features.maps], axis=-1) if self.fusion else made
      return nn.Conv(4, (1, 1), use_bias=False)(y), made

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      make = lambda k, fusion: Block(fusion, name=f'block{k + 1}')  # noqa: E731
      return run_stage(make, 4, nn.Conv(4, (1, 1), use_bias=False)(x), 4, Fusion(), train)

  # The stem, then 4 -> 2 in every block, and 2, 4, 6 and 8 -> 4.
  assert cost.total(cost.count(Net(), 2)).parameters == 12 + 4 * 8 + 4 * (2 + 4 + 6 + 8)
