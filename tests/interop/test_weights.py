"""State dicts of torchvision, timm and ours as weights of our networks."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from afi_flax.errors import UserError
from afi_flax.interop import names, weights
from tests.interop import fake_weights
from tests.interop.fake_weights import as_torch

# One network of each kind of block; the others differ from it in numbers.
CASES = {
  'resnet18': names.RESNET,
  'mobilenetv2_x0_5': names.MOBILENETV2_TIMM,
  'shufflenetv2_x0_5': names.SHUFFLENETV2,
}
SLOW_CASES = [
  ('se_resnet50', names.RESNET),
  ('resnext50_32x4d', names.RESNET),
  ('mobilenetv2', names.MOBILENETV2_TORCHVISION),
  ('densenet121', names.DENSENET),
  ('densenet121', names.DENSENET_OLD),
]


@pytest.mark.parametrize(
  ('name', 'table'),
  [*CASES.items(), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)],
)
def test_every_array_comes_back_under_our_name(tmp_path, name, table):
  network = fake_weights.model(name, se_bias=name.startswith('se_'))
  ours = fake_weights.arrays(network)
  path = tmp_path / 'weights.safetensors'
  save_file(as_torch(ours, table), path)
  source = weights.read(str(path), name)
  assert source.model == network
  assert table.source in source.where
  assert source.arrays.keys() == ours.keys()
  for key, value in ours.items():
    np.testing.assert_array_equal(source.arrays[key], value, err_msg=key)
  assert len(source.ignored) == sum(key.endswith('/mean') for key in ours)


@pytest.fixture(scope='module')
def theirs():
  return as_torch(fake_weights.arrays(fake_weights.model('resnet18')), names.RESNET)


def refusal(tmp_path, state, wanted='resnet18'):
  path = tmp_path / 'weights.safetensors'
  save_file(state, path)
  with pytest.raises(UserError) as caught:
    weights.read(str(path), wanted)
  assert '\n' not in str(caught.value)
  return str(caught.value)


@pytest.mark.slow
def test_what_does_not_agree_is_named(tmp_path, theirs):
  """With both shapes and the cure."""
  without = {name: x for name, x in theirs.items() if name != 'layer2.0.conv1.weight'}
  said = refusal(tmp_path, without)
  assert 'does not hold resnet18: it lacks layer2.0.conv1.weight [128,64,3,3];' in said
  said = refusal(tmp_path, theirs | {'layer2.0.conv1.weight': np.ones([96, 64, 3, 3], 'float32')})
  assert 'layer2.0.conv1.weight is [96,64,3,3] and must be [128,64,3,3]; give a state dict' in said
  said = refusal(tmp_path, theirs | {'aux.weight': np.ones([3], 'float32')})
  assert 'there is no place for aux.weight [3];' in said


@pytest.mark.slow
def test_a_network_that_is_another_is_recognised(tmp_path, theirs):
  said = refusal(tmp_path, theirs, 'resnet34')
  assert said.endswith('it holds resnet18: use that, or another file')
  deep = {name: x for name, x in theirs.items() if name != 'conv1.weight'}
  deep['conv1.0.weight'] = np.ones([32, 3, 3, 3], 'float32')
  assert 'a stem of three 3x3 convolutions' in refusal(tmp_path, deep)


@pytest.mark.slow
@pytest.mark.parametrize('wanted', ['mobilenetv2', 'afi_mobilenetv2', 'shufflenetv2_x1_0'])
def test_se_where_the_backbone_has_no_names_for_it(tmp_path, wanted):
  state = {'layer1.0.se.fc1.weight': np.ones([16, 256, 1, 1], 'float32')}
  said = refusal(tmp_path, state, wanted)
  assert f'does not hold {wanted.removeprefix("afi_")}: it lacks ' in said
  assert 'there is no place for layer1.0.se.fc1.weight [16,256,1,1];' in said


@pytest.mark.slow
def test_a_classifier_that_is_one_number(tmp_path, theirs):
  said = refusal(tmp_path, theirs | {'fc.weight': np.array(1, 'float32')})
  assert 'does not hold resnet18: fc.bias is [5] and must be [1] and 1 more;' in said


def test_a_file_without_classifier(tmp_path, theirs):
  without = {name: x for name, x in theirs.items() if not name.startswith('fc.')}
  path = tmp_path / 'weights.safetensors'
  save_file(without, path)
  source = weights.read(str(path), 'resnet18')
  assert source.model.num_classes == 0
  assert not any(key.startswith(weights.HEAD) for key in source.arrays)


def test_networks_without_counterpart_are_refused(tmp_path, theirs):
  assert 'neither torchvision nor timm has resnet20' in refusal(tmp_path, theirs, 'resnet20')
  assert 'give --model NAME' in refusal(tmp_path, theirs, None)


def test_a_file_of_ours(tmp_path):
  path = tmp_path / 'weights.safetensors'
  network = fake_weights.model('afi_resnet20', 3, stages=(1, 2))
  saved = fake_weights.save_ours(path, network, ['a', 'b', 'c'])
  source = weights.read(str(path), None)
  assert source.model == network
  assert source.class_names == ('a', 'b', 'c')
  assert source.config['model']['name'] == 'afi_resnet20'
  assert '/theirs' not in str(source.config), 'another machine has other folders'
  assert 'step 12' in source.where
  assert source.arrays.keys() == saved.keys()
  for key, value in saved.items():
    np.testing.assert_array_equal(source.arrays[key], value)


@pytest.mark.parametrize(
  ('change', 'says'),
  [
    ({'config': '{'}, 'its header is not as that writes it (JSONDecodeError'),
    ({'config': '{"model": {"name": "afi_resnet20"}}'}, 'is not as that writes it (KeyError'),
    ({'class_names': '3'}, 'is not as that writes it (TypeError'),
    ({'config': json.dumps({'model': {'name': 'resnet21', 'stages': []}})}, 'unknown model'),
    (
      {'class_names': '["a"]'},
      'params/head/dense/bias is [3] and must be [1] and 1 more; export it again',
    ),
  ],
)
def test_a_file_of_ours_that_is_not_as_it_says(tmp_path, change, says):
  arrays = fake_weights.arrays(fake_weights.model('afi_resnet20', 3, stages=(1, 2)))
  config = json.dumps({'model': {'name': 'afi_resnet20', 'stages': [1, 2]}})
  header = {'format': 'afi_flax', 'config': config, 'class_names': '["a", "b", "c"]'}
  path = tmp_path / 'weights.safetensors'
  save_file(arrays, path, header | change)
  with pytest.raises(UserError) as caught:
    weights.read(str(path), 'afi_resnet20')
  assert says in str(caught.value)
  assert '\n' not in str(caught.value)
