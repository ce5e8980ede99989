"""What of one network's weights another takes."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from afi_flax import models
from afi_flax.errors import UserError
from afi_flax.interop import weights
from afi_flax.interop.transfer import transfer
from tests.interop import fake_weights
from tests.interop.fake_weights import model


def logits(network, arrays, images):
  variables = traverse_util.unflatten_dict(arrays, sep='/')
  made = models.create_model(**vars(network))
  apply = jax.jit(
    lambda v, x: made.apply(v, x, train=False),
    compiler_options={'xla_backend_optimization_level': 0},  # to compile sooner what runs once
  )
  return apply(variables, images)


def test_the_same_network_takes_all():
  source = fake_weights.source(model('resnet20'))
  chosen, report = transfer(source, source.model)
  assert chosen.keys() == source.arrays.keys() == report.taken.keys()
  assert all(chosen[path] is source.arrays[path] for path in chosen)
  numbers = sum(x.size for x in chosen.values())
  assert str(report).splitlines() == [
    'them: resnet20, 5 classes -> resnet20, 5 classes',
    f'  taken       {len(chosen)} arrays, {numbers:,} numbers',
  ]


def test_another_number_of_classes_gets_a_new_classifier():
  source = fake_weights.source(model('resnet20'), ('a', 'b', 'c', 'd', 'e'))
  chosen, report = transfer(source, model('resnet20', 7), tuple('abcdefg'))
  head = {'params/head/dense/kernel', 'params/head/dense/bias'}
  assert chosen.keys() == source.arrays.keys() - head
  assert report.initialised == {
    'params/head/dense/bias': (7,),
    'params/head/dense/kernel': (64, 7),
  }
  assert report.left.keys() == head
  assert '  initialised head/dense\n  left        head/dense' in str(report)


def test_as_many_other_classes_are_said():
  source = fake_weights.source(model('resnet20'), ('a', 'b', 'c', 'd', 'e'))
  assert 'of other classes' in str(transfer(source, source.model, tuple('vwxyz'))[1])
  assert 'of other classes' not in str(transfer(source, source.model, tuple('abcde'))[1])


def test_afi_from_the_plain_network():
  """First halves of the first convolutions of blocks 2 and 3, all else as it is; AFI is new."""
  source = fake_weights.source(model('resnet20'))
  chosen, report = transfer(source, model('afi_resnet20', stages=(2, 3)))
  for path, value in source.arrays.items():
    _, module, *inside = path.split('/')
    halved = module in ('stage2_block2', 'stage2_block3', 'stage3_block2', 'stage3_block3')
    if halved and inside[0] == 'conv1':
      value = value[..., : value.shape[-1] // 2]
      assert path in report.cut
    np.testing.assert_array_equal(chosen[path], value, err_msg=path)
  assert len(report.cut) == 4 * 5
  assert {path.split('/')[2] for path in report.initialised} == {'fuse'}
  assert len(report.initialised) == 4 * 2
  text = str(report)
  assert 'first half  conv1/bn, conv1/conv in stage 2 block 2-3, stage 3 block 2-3' in text
  assert 'initialised fuse/afi/expand, fuse/afi/reduce in stage 2 block 2-3, stage 3 block' in text


@pytest.mark.slow
@pytest.mark.parametrize(
  'backbone', ['resnet20', 'resnext29_32x4d', 'mobilenetv2_cifar', 'shufflenetv2_x0_5_cifar']
)
def test_afi_b_computes_what_the_plain_network_does(backbone):
  source = fake_weights.source(model(backbone))
  network = model(f'afi_{backbone}_b')
  chosen, report = transfer(source, network)
  assert report.widened
  draws = np.random.default_rng(1)
  new = {
    path: draws.normal(size=shape).astype('float32') for path, shape in report.initialised.items()
  }
  images = draws.normal(size=(2, 32, 32, 3)).astype('float32')
  plain = logits(source.model, source.arrays, images)
  between_pictures = np.abs(plain[0] - plain[1]).max()
  assert between_pictures > 1e-3
  ours = logits(network, chosen | new, images)
  np.testing.assert_allclose(ours, plain, atol=0.01 * between_pictures)


def test_an_attention_is_added():
  source = fake_weights.source(model('resnet20'))
  chosen, report = transfer(source, model('se_resnet20', se_bias=True))
  assert chosen.keys() == source.arrays.keys()
  assert all('/attention/' in path for path in report.initialised)
  assert not report.left


@pytest.mark.parametrize(
  ('name', 'target', 'says'),
  [
    ('resnet20', 'resnet32', 'they have other layers'),
    ('se_resnet20', 'resnet20', 'no place for params/stage1_block1/attention/'),
    ('afi_resnet20', 'resnet20', 'params/stage1_block2/conv1/bn/bias is [8] and must be [16]'),
    ('afi_resnet20', 'afi_resnet20_b', 'stage1_block2/conv1/bn/bias is [8] and must be [16]'),
    ('eca_resnet20', 'se_resnet20', 'no place for params/stage1_block1/attention/channels'),
  ],
)
def test_what_cannot_start_another_is_refused(name, target, says):
  with pytest.raises(UserError) as caught:
    transfer(fake_weights.source(model(name)), model(target))
  said = str(caught.value)
  assert says in said
  assert f'cannot start {target}, 5 classes' in said
  assert '\n' not in said


def test_biases_of_se_name_their_cure():
  source = fake_weights.source(model('se_resnet20', se_bias=True))
  with pytest.raises(UserError, match=r'attention/\w+/bias; .* add --config\.model\.se_bias=True$'):
    transfer(source, model('se_resnet20'))
  with pytest.raises(UserError, match='give weights of the same network'):
    transfer(source, model('resnet20'))


def test_an_array_of_the_body_that_is_missing_is_refused():
  source = fake_weights.source(model('resnet20'))
  del source.arrays['params/stage2_block2/conv2/conv/kernel']
  with pytest.raises(UserError, match=r'it lacks params/stage2_block2/conv2/conv/kernel \[3,3,32'):
    transfer(source, source.model)


def test_shapes_are_those_of_the_variables():
  network = model('afi_resnet20')
  made = models.create_model(**vars(network))
  images = np.zeros([1, 32, 32, 3], 'float32')
  variables = jax.eval_shape(lambda: made.init(jax.random.key(0), images, train=False))
  ours = {'/'.join(key.key for key in path) for path, _ in jax.tree.leaves_with_path(variables)}
  assert set(weights.shapes(network)) == {p for p in ours if not p.startswith('intermediates')}
