import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afi_flax.errors import UserError
from afi_flax.models import BACKBONES, _forms, create_model, list_models

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


@pytest.mark.slow
@pytest.mark.parametrize('backbone', BACKBONES)
def test_parameter_counts(backbone):
  """Every form of the backbone."""
  names = [n for n in list_models() if _forms()[n].backbone == backbone]
  assert len(names) == (1 if backbone == 'densenet121' else 22)
  for name in names:
    check(name)


def test_every_golden_count_is_of_a_model():
  assert set(GOLDEN) == set(list_models())


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
  ],
)
def test_refuses(name, stages, says):
  with pytest.raises(UserError, match=says):
    create_model(name, stages=stages)


def test_list_models_filters():
  assert list_models('*_resnet32') == ['afi_resnet32', 'afi_se_resnet32', 'se_resnet32']
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
  pools = [
    e for e in jaxpr.jaxpr.eqns if e.primitive.name == 'reduce_sum' and e.params['axes'] == (1, 2)
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
