import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afi_flax import steps
from afi_flax.errors import UserError
from afi_flax.models import (
  BACKBONES,
  _forms,
  create_model,
  fusion_weights,
  list_models,
  stage_shapes,
)
from afi_flax.models.fusion import Fusion
from afi_flax.models.resnet import BasicBlock, ResNet

GOLDEN = json.loads((pathlib.Path(__file__).parent / 'golden_counts.json').read_text())

# What others publish: the AFI paper's tables (where AFI and AFI-B agree with them to the last digit
# that they print), torchvision's models, and for SE the AFI paper.
PUBLISHED = {
  'resnet32': 472_756,
  'afi_resnet32': 378_228,
  'afi_resnet32_b': 668_980,
  'resnet110': 1_736_564,
  'afi_resnet110': 1_334_820,  # the paper: 1.35M
  'afi_resnet110_b': 2_570_516,
  'mobilenetv2_cifar': 2_412_212,
  'afi_mobilenetv2_cifar': 2_248_868,
  'afi_mobilenetv2_cifar_b': 2_835_428,
  'resnext29_32x4d': 4_866_468,
  'afi_resnext29_32x4d': 4_262_564,
  'afi_resnext29_32x4d_b': 5_232_036,
  'shufflenetv2_x1_0_cifar': 1_356_104,  # the paper: 0.94M, 0.95M, 1.29M
  'afi_shufflenetv2_x1_0_cifar': 1_254_314,
  'afi_shufflenetv2_x1_0_cifar_b': 1_403_142,
  'resnet50': 25_557_032,
  'afi_resnet50': 23_849_256,
  'afi_resnet50_b': 33_854_504,  # the paper: 33.86M
  'resnet152': 60_192_808,
  'afi_resnet152': 54_667_560,
  'se_resnet50': 28_071_976,
  'se_resnet152': 66_770_984,
  'resnet18': 11_689_512,
  'resnet34': 21_797_672,
  'resnet101': 44_549_160,
  'resnext50_32x4d': 25_028_904,
  'mobilenetv2': 3_504_872,
  'shufflenetv2_x0_5': 1_366_792,
  'shufflenetv2_x1_0': 2_278_604,
  'shufflenetv2_x1_5': 3_503_624,
  'shufflenetv2_x2_0': 7_393_996,
  'densenet121': 7_978_856,
}


def abstract(name, num_classes, size, **kwargs):
  model = create_model(name, num_classes, **kwargs)
  _, variables = outputs_and_variables(model, size)
  return variables, model


def outputs_and_variables(model, size):
  images = jnp.zeros([2, size, size, 3])
  return jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images, train=False))


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def check(name):
  golden = GOLDEN[name]
  logits, variables = outputs_and_variables(create_model(name, golden['classes']), 32)
  assert count(variables['params']) == golden['parameters'], name
  assert logits.shape == (2, golden['classes'])
  assert logits.dtype == jnp.float32


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_parameter_count(name):
  assert GOLDEN[name]['parameters'] == PUBLISHED[name]
  check(name)


def test_every_golden_count_is_of_a_model():
  """The counts themselves: test_cost, and by `model.init` those that others publish."""
  assert set(GOLDEN) == set(list_models())
  for backbone in BACKBONES:
    names = [n for n in list_models() if _forms()[n].backbone == backbone]
    assert len(names) == (1 if backbone == 'densenet121' else 25)


def test_an_attention_on_the_result_adds_what_it_should():
  """Table 2: on R_k of blocks 2 to n of AFI-MobileNetV2's five stages of several blocks."""
  c = [(6 * w // 2, n - 1) for w, n in ((24, 2), (32, 3), (64, 4), (96, 3), (160, 3))]
  added = {
    'ge': 0,
    'se': sum(n * 2 * w * (w // 16) for w, n in c),
    'cbam': sum(n * (2 * w * (w // 16) + 7 * 7 * 2) for w, n in c),
    'eca': sum(n * (3 if w < 128 else 5) for w, n in c),
  }
  base = GOLDEN['afi_mobilenetv2_cifar']['parameters']
  for name, more in added.items():
    assert GOLDEN[f'afi_mobilenetv2_cifar_{name}']['parameters'] - base == more, name


def test_chosen_stages():
  full = count(abstract('afi_resnet32', 100, 32)[0]['params'])
  plain = count(abstract('resnet32', 100, 32)[0]['params'])
  saved = []
  for stage in (1, 2, 3):
    variables, _ = abstract('afi_resnet32', 100, 32, stages=(stage,))
    saved.append(plain - count(variables['params']))
    fused = {name.split('_')[0] for name, block in variables['params'].items() if 'fuse' in block}
    assert fused == {f'stage{stage}'}
    blocks = [n for n, block in variables['params'].items() if 'fuse' in block]
    assert len(blocks) == 4, 'block 1 has nothing to reuse'
  assert sum(saved) == plain - full
  assert count(abstract('afi_resnet32', 100, 32, stages=(1, 2, 3))[0]['params']) == full


@pytest.mark.parametrize(
  ('name', 'stages', 'says'),
  [
    ('afi_resnet33', None, "did you mean 'afi_"),
    ('se_densenet121', None, "did you mean 'densenet121'"),
    ('resnet32_b', None, 'unknown model'),
    ('resnet32_se', None, 'unknown model'),
    ('vit', None, 'unknown model'),
    ('resnet32', (1,), 'plain'),
    ('afi_resnet32', (4,), r'some of \(1, 2, 3\)'),
    ('afi_resnet32', (), r'some of \(1, 2, 3\)'),
    ('afi_resnet32', (1, 1), 'each once'),
    ('afi_resnet32', 1, r'1 must be a tuple; use \(1,\)'),
    ('afi_mobilenetv2', (8,), r'some of \(2, 3, 4, 5, 6\), each once'),
    ('afi_mobilenetv2', (7,), r'stage 7 of .* one block, .* use some of \(2, 3, 4, 5, 6\)'),
    ('afi_mobilenetv2_cifar_b', (2, 1), r'stage 1 of .* one block, .* use some of \(2, 3'),
  ],
)
def test_refuses(name, stages, says):
  with pytest.raises(UserError, match=says):
    create_model(name, stages=stages)


@pytest.mark.parametrize(
  ('name', 'arguments', 'says'),
  [
    ('resnet32', {'se_bias': True}, 'no SE on its blocks'),
    ('afi_mobilenetv2_cifar_se', {'se_bias': True}, 'no SE on its blocks'),
    ('resnet32', {'remat': 'all'}, 'Known: block, fusion, none'),
    ('resnet32', {'dtype': 'float16'}, 'Known: bfloat16, float32'),
    ('resnet32', {'num_classes': 0}, 'must be 1 or more'),
    ('densenet121', {'remat': 'block'}, "no meaning for 'densenet121'"),
  ],
)
def test_refuses_arguments(name, arguments, says):
  with pytest.raises(UserError, match=says):
    create_model(name, **arguments)


def test_se_with_biases():
  """timm's seresnet50 has 28,088,024 parameters: 2 x 2,560 / 16 ... biases more than ours."""
  variables, _ = abstract('se_resnet50', 1000, 32, se_bias=True)
  assert count(variables['params']) == 28_088_024


@pytest.mark.parametrize(
  ('name', 'size', 'shapes'),
  [
    ('afi_resnet20', 32, [(16, 1), (32, 2), (64, 4)]),
    ('resnet50', 64, [(256, 4), (512, 8), (1024, 16), (2048, 32)]),
    (
      'afi_mobilenetv2',
      64,
      [(16, 2), (24, 4), (32, 8), (64, 16), (96, 16), (160, 32), (320, 32)],
    ),
    ('afi_shufflenetv2_x1_0', 64, [(116, 8), (232, 16), (464, 32)]),
    ('densenet121', 64, [(256, 4), (512, 8), (1024, 16), (1024, 32)]),
  ],
)
def test_features_only(name, size, shapes):
  assert stage_shapes(create_model(name, features_only=True), size) == shapes


def test_stage_shapes_refuses():
  with pytest.raises(UserError, match='features_only'):
    stage_shapes(create_model('resnet20'), 32)
  with pytest.raises(UserError, match='use 32 or more'):
    stage_shapes(create_model('densenet121', features_only=True), 16)


def test_fusion_weights_are_in_the_order_of_the_network():
  """jax.jit sorts the blocks by name."""
  sown = {
    f'stage{i}_block{k}': {'fuse': {'afi': {'weights': (k,)}}} for i, k in ((2, 2), (1, 10), (1, 9))
  }
  assert list(fusion_weights(sown | {'head': {}})) == [
    'stage1_block9',
    'stage1_block10',
    'stage2_block2',
  ]


def tiny(**arguments):
  return ResNet((3, 2), (8, 16), BasicBlock, 'cifar', 10, (Fusion(), Fusion()), **arguments)


@functools.cache
def tiny_variables():
  """Variables of the tiny network that are not at their initial values, and pictures."""
  images = jax.random.normal(jax.random.key(1), [2, 8, 8, 3])
  options = {'xla_backend_optimization_level': 0}
  init = jax.jit(
    lambda: tiny().init(jax.random.key(0), images, train=False), compiler_options=options
  )
  variables = init()
  params = jax.tree.map(lambda x: 1.5 * x + 0.1, variables['params'])
  return {**variables, 'params': params}, images


def test_features_are_those_of_the_whole_network():
  variables, images = tiny_variables()
  apply = jax.jit(lambda model: model.apply(variables, images, train=False), static_argnums=0)
  maps = apply(tiny(features_only=True))
  assert [x.shape for x in maps] == [(2, 8, 8, 8), (2, 4, 4, 16)]
  dense = variables['params']['head']['dense']
  want = maps[-1].mean(axis=(1, 2)) @ dense['kernel'] + dense['bias'][None]
  got = apply(tiny())
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_fusion_weights_come_with_the_logits():
  variables, images = tiny_variables()
  apply = jax.jit(lambda v: tiny().apply(v, images, train=False, mutable='intermediates'))
  logits, sown = apply(variables)
  assert logits.shape == (2, 10)
  weights = fusion_weights(sown['intermediates'])
  assert {name: w.shape for name, w in weights.items()} == {
    'stage1_block2': (2, 1, 4),
    'stage1_block3': (2, 2, 4),
    'stage2_block2': (2, 1, 8),
  }
  for w in weights.values():
    np.testing.assert_allclose(w.sum(axis=1), 1, rtol=1e-6)


def gradients(remat):
  """A compiled gradient as training takes it, and what it is taken at."""
  variables, _ = tiny_variables()
  images = jax.random.normal(jax.random.key(2), [8, 16, 16, 3])  # activations, not weights, weigh

  def loss(params):
    logits, updated = tiny(remat=remat).apply(
      {**variables, 'params': params}, images, train=True, mutable=['batch_stats']
    )
    return (logits**2).mean(), updated

  options = steps.compiler_options(False, jax.devices()[0])
  compiled = jax.jit(jax.grad(loss, has_aux=True), compiler_options=options)
  return compiled.lower(variables['params']).compile(), variables['params']


def test_remat_saves_memory_and_changes_nothing():
  compiled, params = gradients('none')
  want = compiled(params)
  memory = [compiled.memory_analysis().temp_size_in_bytes]
  for remat in ('fusion', 'block'):
    compiled, params = gradients(remat)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), compiled(params), want
    )
    memory.append(compiled.memory_analysis().temp_size_in_bytes)
  assert memory[0] > memory[1] > memory[2]


def test_list_models_filters():
  assert list_models('*_resnet32') == [
    f'{form}_resnet32' for form in ('afi', 'afi_se', 'cbam', 'eca', 'ge', 'se')
  ]
  assert 'resnet50' in list_models()
  assert list_models('nothing*') == []


@pytest.mark.parametrize('name', ['resnet50', 'afi_resnet50', 'afi_resnet20_b'])
def test_only_computation_is_in_bfloat16(name):
  size = 32
  variables, model = abstract(name, 10, size, dtype='bfloat16')
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  images = jnp.zeros([2, size, size, 3])
  jaxpr = jax.make_jaxpr(lambda v: model.apply(v, images, train=False))(variables)
  convolutions = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == 'conv_general_dilated']
  assert convolutions
  assert {v.aval.dtype for e in convolutions for v in e.invars} == {jnp.dtype('bfloat16')}
  assert jaxpr.out_avals[0].dtype == jnp.float32


def test_pools_every_feature_once():
  """A stage of n blocks pools n - 1 features for reuse, not one for each block and source."""
  variables, model = abstract('afi_resnet32', 100, 32)
  jaxpr = jax.make_jaxpr(lambda v: model.apply(v, jnp.zeros([2, 32, 32, 3]), train=False))(
    variables
  )

  def equations(jaxpr):
    for equation in jaxpr.eqns:
      yield equation
      if equation.primitive.name == 'jit':
        yield from equations(equation.params['jaxpr'].jaxpr)

  pools = [
    e
    for e in equations(jaxpr.jaxpr)
    if e.primitive.name == 'reduce_sum' and e.params['axes'] == (1, 2)
  ]
  assert len(pools) == 3 * 4 + 1  # features 1 to 4 of each stage, and the head


def test_initial_weights():
  model = create_model('afi_resnet20', 10)
  variables = jax.jit(
    lambda: model.init(jax.random.key(0), jnp.zeros([1, 32, 32, 3]), train=False)
  )()
  params = variables['params']
  kernel = params['stage3_block3']['conv2']['conv']['kernel']
  np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / (3 * 3 * 64)), rtol=0.02)  # fan out
  dense = params['head']['dense']
  for values, fan_in in (
    (dense['kernel'], 64),
    (params['stage3_block3']['fuse']['afi']['reduce']['kernel'], 32),
  ):
    assert np.abs(values).max() <= fan_in**-0.5
    np.testing.assert_allclose(np.std(values), fan_in**-0.5 / np.sqrt(3), rtol=0.15)
  assert 0 < np.abs(dense['bias']).max() <= 64**-0.5
  bn = params['stem']['bn']
  assert (bn['scale'] == 1).all()
  assert (bn['bias'] == 0).all()
