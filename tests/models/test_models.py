import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afi_flax.errors import UserError
from afi_flax.models import create_model, list_models

GOLDEN = json.loads((pathlib.Path(__file__).parent / 'golden_counts.json').read_text())


def abstract(name, num_classes, size, **kwargs):
  model = create_model(name, num_classes, **kwargs)
  _, variables = outputs_and_variables(model, size)
  return variables, model


def outputs_and_variables(model, size):
  images = jnp.zeros([2, size, size, 3])
  return jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images, train=False))


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize('name', list_models())
def test_parameter_count(name):
  golden = GOLDEN[name]
  model = create_model(name, golden['classes'])
  logits, variables = outputs_and_variables(model, golden['size'])
  assert count(variables['params']) == golden['parameters']
  assert logits.shape == (2, golden['classes'])
  assert logits.dtype == jnp.float32


def test_every_golden_count_is_of_a_model():
  assert set(GOLDEN) == set(list_models())


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
    ('afi_resnet33', None, "did you mean 'afi_resnet3"),
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
  assert list_models('afi_resnet32*') == ['afi_resnet32', 'afi_resnet32_b']
  assert 'resnet50' in list_models()
  assert list_models('nothing*') == []


@pytest.mark.parametrize('name', ['resnet50', 'afi_resnet50', 'afi_resnet20_b'])
def test_only_computation_is_in_bfloat16(name):
  size = GOLDEN[name]['size']
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
