"""Files that PyTorch writes; and networks of torchvision and timm, imported from files."""

import argparse
import dataclasses
import functools
import pickle

import jax
import numpy as np
import pytest
from flax import traverse_util

from afi_flax import models
from afi_flax.errors import UserError
from afi_flax.interop import state_dicts, weights
from afi_flax.interop.transfer import transfer

torch = pytest.importorskip(
  'torch', reason='PyTorch is not installed: `make parity` installs it and runs these tests'
)

from tests.models.random_torch import pictures, randomise, required  # noqa: E402, it imports torch

pytestmark = [pytest.mark.parity, pytest.mark.slow]

TOLERANCE = 1e-4  # absolute, on logits of standard deviation 1
NUM_CLASSES = 100


def saved(tmp_path, what, **options):
  torch.save(what, tmp_path / 'a.pth', **options)
  return str(tmp_path / 'a.pth')


@pytest.mark.parametrize('zipped', [True, False])
def test_dtypes(tmp_path, zipped):
  state = {
    'a': torch.tensor([1.5], dtype=torch.float16),
    'b': torch.nn.Parameter(torch.tensor([3.140625], dtype=torch.bfloat16)),
    'bn.num_batches_tracked': torch.tensor(5),
  }
  read = state_dicts.read(saved(tmp_path, state, _use_new_zipfile_serialization=zipped))
  assert {name: x.tolist() for name, x in read.arrays.items()} == {'a': [1.5], 'b': [3.140625]}
  assert {x.dtype for x in read.arrays.values()} == {np.dtype('float32')}
  assert read.ignored == ('bn.num_batches_tracked',)
  assert read.dtypes == 'bfloat16, float16'


def test_what_training_scripts_save(tmp_path):
  """Of timm: flags, optimiser and averages beside the weights."""
  one, two = torch.ones(2), 2 * torch.ones(2)
  checkpoint = {
    'epoch': 3,
    'arch': 'resnet18',
    'state_dict': {'module.fc.bias': one},
    'state_dict_ema': {'module.fc.bias': two, 'n_averaged': torch.tensor(9)},
    'optimizer': {'state': {}},
    'args': argparse.Namespace(lr=0.1, model='resnet18'),
  }
  read = state_dicts.read(saved(tmp_path, checkpoint))
  assert read.entry == 'state_dict_ema'
  assert read.arrays['fc.bias'].tolist() == [2, 2]
  assert read.ignored == ('epoch', 'arch', 'state_dict', 'optimizer', 'args', 'n_averaged')


class Unwanted:
  def __reduce__(self):
    return print, ('run',)


def test_nothing_is_run(tmp_path, capsys):
  for what in ({'a': torch.ones(2), 'b': Unwanted()}, torch.nn.Linear(2, 2)):
    with pytest.raises(UserError, match='weights-only loader of PyTorch refuses') as caught:
      state_dicts.read(saved(tmp_path, what))
    assert '\n' not in str(caught.value)
  path = tmp_path / 'b.pth'
  path.write_bytes(pickle.dumps(Unwanted()))
  with pytest.raises(UserError, match='weights-only loader of PyTorch refuses'):
    state_dicts.read(str(path))
  assert capsys.readouterr().out == ''


@pytest.mark.parametrize(
  ('what', 'says'),
  [
    ({'epoch': 3}, "holds no state dict but 'epoch'"),
    ([torch.ones(2)], 'holds no state dict but a list'),
    ({'a': torch.ones(2, dtype=torch.int8)}, 'a is of int8'),
  ],
)
def test_what_is_no_state_dict(tmp_path, what, says):
  with pytest.raises(UserError, match=says):
    state_dicts.read(saved(tmp_path, what))


def test_a_damaged_file(tmp_path):
  path = tmp_path / 'a.pth'
  torch.save({'a': torch.ones(100)}, path)
  path.write_bytes(path.read_bytes()[:300])
  with pytest.raises(UserError, match='is damaged or holds more than weights'):
    state_dicts.read(str(path))


@dataclasses.dataclass(frozen=True)
class Peer:
  """A network of another package and its name in ours."""

  package: str
  name: str
  ours: str

  def make(self) -> torch.nn.Module:
    package = required(self.package)
    if self.package == 'timm':
      return package.create_model(self.name, pretrained=False, num_classes=NUM_CLASSES)
    return package.models.get_model(self.name, weights=None, num_classes=NUM_CLASSES)


_timm, _torchvision = functools.partial(Peer, 'timm'), functools.partial(Peer, 'torchvision')
RESNETS = ('resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152', 'resnext50_32x4d')
SHUFFLENETS = ('x0_5', 'x1_0', 'x1_5', 'x2_0')
PEERS = [
  *(make(name, name) for make in (_torchvision, _timm) for name in RESNETS),
  *(_timm(f'seresnet{depth}', f'se_resnet{depth}') for depth in (50, 101, 152)),
  _torchvision('mobilenet_v2', 'mobilenetv2'),
  _timm('mobilenetv2_050', 'mobilenetv2_x0_5'),
  _timm('mobilenetv2_075', 'mobilenetv2_x0_75'),
  _timm('mobilenetv2_100', 'mobilenetv2'),
  _timm('mobilenetv2_140', 'mobilenetv2_x1_4'),
  *(_torchvision(f'shufflenet_v2_{x}', f'shufflenetv2_{x}') for x in SHUFFLENETS),
  _torchvision('densenet121', 'densenet121'),
  _timm('densenet121', 'densenet121'),
]


def files(tmp_path, network):
  """One file of each kind."""
  kept = network.state_dict()
  torch.save(kept, tmp_path / 'a.pth')
  required('safetensors.torch').save_file(
    {name: x.contiguous() for name, x in kept.items()}, tmp_path / 'a.safetensors'
  )
  return [str(tmp_path / name) for name in ('a.pth', 'a.safetensors')]


@pytest.mark.parametrize('peer', PEERS, ids=lambda peer: f'{peer.package}-{peer.name}')
def test_imported_networks_compute_the_same(tmp_path, peer, record_property):
  torch.manual_seed(0)
  network = peer.make()
  with torch.no_grad():
    randomise(network, pictures(64))
  loaded = []
  for path in files(tmp_path, network):
    source = weights.read(path, peer.ours)
    chosen, report = transfer(source, source.model)
    assert not report.left | report.initialised
    assert (source.model.name, source.model.num_classes) == (peer.ours, NUM_CLASSES)
    loaded.append(chosen)
  for name, value in loaded[0].items():
    np.testing.assert_array_equal(value, loaded[1][name], err_msg=name)
  model = models.create_model(**vars(source.model))
  variables = traverse_util.unflatten_dict(loaded[0], sep='/')
  apply = jax.jit(lambda variables, x: model.apply(variables, x, train=False))
  differences = {}
  for size in (64, 224):
    images = pictures(size)
    with torch.no_grad():
      theirs = network.eval()(images).numpy()
    ours = apply(variables, images.numpy().transpose(0, 2, 3, 1))
    differences[f'{size} pixels'] = float(np.abs(ours - theirs).max())
  record_property('imported', {'network': peer.ours, 'source': peer.package, **differences})
  assert max(differences.values()) < TOLERANCE, differences


def test_older_names_of_densenet(tmp_path):
  """As densenet121-a639ec97.pth has them, which torchvision renames when it loads it."""
  state = required('torchvision').models.densenet121(weights=None).state_dict()
  old = {}
  for name, x in state.items():
    for module in ('norm1', 'norm2', 'conv1', 'conv2'):
      if 'denselayer' in name:
        name = name.replace(f'.{module}.', f'.{module[:-1]}.{module[-1]}.')
    old[name] = x
  assert 'features.denseblock1.denselayer1.norm.1.weight' in old
  source = weights.read(saved(tmp_path, old), 'densenet121')
  assert 'older files' in source.where
  assert len(source.arrays) == sum('num_batches' not in name for name in state)


@pytest.mark.parametrize(
  ('name', 'ours', 'says'),
  [
    ('resnet50d', 'resnet50', 'a stem of three 3x3 convolutions'),
    (
      'seresnet18',
      'se_resnet18',
      "[64,8,1,1] and must be [64,4] and 5 more; timm's SE has at least 8",
    ),
    ('legacy_seresnet50', 'se_resnet50', 'strides in its first 1x1 convolution'),
    ('mobilenetv2_110d', 'mobilenetv2', 'give a state dict of mobilenetv2'),
    ('resnet50_gn', 'resnet50', 'it lacks layer1.0.bn1.running_mean [64] and '),
    ('ecaresnet26t', 'resnet50', 'a stem of three 3x3 convolutions'),
    ('resnet34', 'resnet18', 'it holds resnet34'),
    ('wide_resnet50_2', 'resnet50', 'layer1.0.bn1.bias is [128] and must be [64]'),
    ('densenet169', 'densenet121', 'there is no place for'),
  ],
)
def test_networks_with_other_definitions_are_refused(tmp_path, name, ours, says):
  network = required('timm').create_model(name, pretrained=False)
  with pytest.raises(UserError) as caught:
    weights.read(files(tmp_path, network)[0], ours)
  assert says in str(caught.value)
  assert '\n' not in str(caught.value)
