import functools
import tomllib

import pytest
import yaml

from afi_flax.config import without_paths
from afi_flax.interop import model_card, stablehlo
from tests.interop import trained

EVALUATED = {'step': 7, 'split': 'test', 'loss': 1.25, 'top1': 0.5123, 'top5': 0.9, 'examples': 100}
RECORDS = [
  {'step': 3, 'split': 'test', 'loss': 2.0, 'top1': 0.4, 'top5': 0.8, 'examples': 100},
  {'step': 7, 'split': 'train', 'loss': 0.1, 'top1': 0.99, 'top5': 1.0, 'examples': 640},
]


@functools.cache
def network(**changes):
  return trained.network('afi_resnet20', **changes)


def card(network, *records, checkpoint='last'):
  return model_card.text(network, stablehlo, checkpoint, records)


def header(text):
  _, between, _ = text.split('---\n', 2)
  return yaml.safe_load(between)


def test_the_accuracy_is_that_of_the_step_and_names_the_split():
  text = card(network(), *RECORDS, EVALUATED)
  assert '| test | 100 | 51.23% | 90.00% | 1.2500 |' in text
  assert '40.00%' not in text
  assert '99.00%' not in text
  assert 'optimistic' not in text
  (result,) = header(text)['model-index'][0]['results']
  assert result['dataset']['split'] == 'test'
  assert [metric['value'] for metric in result['metrics']] == [0.5123, 0.9]


def test_of_the_best_it_says_what_it_was_picked_on():
  assert 'which makes it optimistic' in card(network(), EVALUATED, checkpoint='best')


def test_where_the_accuracy_is_not_known_it_says_so():
  text = card(network(), *RECORDS)
  assert 'Not known: the run was not evaluated at step 7.' in text
  assert '--mode=eval --workdir=RUN --checkpoint=7' in text
  assert 'model-index' not in header(text)


def test_header_and_figures():
  text = card(network())
  assert header(text)['pipeline_tag'] == 'image-classification'
  assert header(text)['datasets'] == ['fake_cifar']
  assert '| parameters | 225,210 |' in text
  assert '# afi_resnet20, fake_cifar' in text
  assert '| input `images` | [b, 16, 16, 3], RGB, bytes' in text
  assert 'resized to 20 pixels (bilinear), 16 x 16 cut' in text


def test_what_was_done_is_said_and_what_was_not_is_not():
  plain = card(network())
  for word in ('mixup', 'label smoothing', 'moving average', 'Nesterov', 'clipped'):
    assert word not in plain.partition('<details>')[0]
  changes = {'data.mixup': 0.2, 'loss.label_smoothing': 0.1, 'ema_decay': 0.99}
  text = card(network(**changes)).partition('<details>')[0]
  for words in (
    'none, mixup 0.2',
    'cross_entropy, label smoothing 0.1',
    'moving average, decay 0.99',
  ):
    assert words in text


def test_fine_tuning_says_from_what_and_of_which_parts():
  plain = card(network()).partition('<details>')[0]
  assert not any(word in plain for word in ('starts from', 'frozen', 'below the head', 'parts'))
  changes = {
    'run.init_from': '/home/someone/cifar/',
    'optimizer.frozen': ('stem', 'stage1'),
    'optimizer.layer_decay': 0.75,
    'micro_batches': 2,
  }
  text = card(network(**changes)).partition('<details>')[0]
  assert '| starts from | the weights of cifar |' in text
  assert '| frozen | stem, stage1 |' in text
  assert ', times 0.75 for every block further below the head |' in text
  assert '| batch | computed in 2 parts, one after another |' in text
  assert '/home' not in text
  resumed = card(network(**changes, **{'run.resume': '/home/someone/runs/first'}))
  assert '| starts from | the last checkpoint of first |' in resumed


@pytest.mark.parametrize('key', ['data.data_dir', 'run.init_from', 'run.resume'])
def test_no_path_of_the_machine(key):
  config = trained.config_of('afi_resnet20', 16)
  config.update_from_flattened_dict({key: '/home/someone/secret'})
  published = without_paths(config.to_dict())
  assert '/home/someone' not in str(published)
  assert set(published) == set(config.to_dict())


def test_the_licence_is_that_of_the_code(root):
  project = tomllib.loads((root / 'pyproject.toml').read_text())['project']
  assert project['license'] == model_card.CODE_LICENSE
