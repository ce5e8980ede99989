"""Any config at all either makes a consistent plan or fails in one line that names the key."""

import collections
import dataclasses
import importlib
import json
import math
import pathlib
import re

import ml_collections
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afi_flax import config_keys, models, optim, run
from afi_flax.config import Dataset, Plan, complete, resolve
from afi_flax.errors import UserError
from configs import common

CONFIGS = sorted(p.stem for p in pathlib.Path('configs').glob('*.py') if p.stem != 'common')
FOLDER = Dataset('image_folder', ('cat', 'dog', 'emu'), num_train=5000, num_eval=100)
KEYS = sorted(config_keys.KINDS)
GROUPS = sorted({key.partition('.')[0] for key in KEYS if '.' in key})


def load(name, arg=''):
  config = importlib.import_module(f'configs.{name}').get_config(arg)
  if name.startswith('finetune'):
    config.run.init_from = 'runs/other'
  return config


BASES = [
  load(name, arg).to_dict()
  for name in CONFIGS
  for arg in ('', 'smoke', *(['a3', 'a3,smoke'] if name.startswith('imagenet') else []))
]

# ---- what may stand in a config

PARTS = ('body', 'head', 'stem', 'stage1', 'stage2', 'stage4', 'last')
words = sorted({str(value) for base in BASES for value in flatten_dict(base, sep='.').values()})
numbers = st.one_of(
  st.integers(),
  st.integers(-3, 70),
  st.sampled_from([0, 1, -1, 2**31, 2**32, 2**63, 2**63 - 1, 10**30, 10**400]),
  st.floats(),
  st.floats(0, 1),
  st.sampled_from([0.0, -0.0, 1e-320, 1e-46, 1e38, 1e39, 1e308, math.inf, -math.inf, math.nan]),
  st.sampled_from([np.float32(0.5), np.float64(0.5), np.int64(3), 2j]),
)
texts = st.one_of(
  st.text(max_size=8),
  st.sampled_from(words),
  st.sampled_from(models.list_models()),
  st.sampled_from(
    ['', '\n', '\0', '\ud800', 'é\u202e', 'x' * 5000, '~nobody-of-this-name', '²', '9' * 5000]
  ),
  st.from_regex(r'(train|test|val|validation)\[-?[\d.]{0,4}%?:-?[\d.]{0,4}%?\]', fullmatch=True),
  st.from_regex(r'rand(-(m|n|p|mstd|mmax|inc)[\d.]{1,4}){0,4}', fullmatch=True),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts, st.binary(max_size=3))
values = st.one_of(
  scalars,
  st.lists(st.floats(0, 1), max_size=5).map(tuple),
  st.lists(st.integers(-1, 5), max_size=5).map(tuple),
  st.lists(scalars, max_size=5),
  st.dictionaries(st.text('abcdef_', min_size=1, max_size=5), scalars, max_size=2),
)
of_kind = {  # likelier to get past the first check
  int: numbers.filter(lambda x: type(x) is int),
  float: numbers.filter(lambda x: type(x) is float),
  bool: st.booleans(),
  str: texts,
  (int,): st.lists(st.integers(-1, 5), max_size=4).map(tuple),
  (float,): st.lists(st.floats(0, 1), max_size=5).map(tuple),
  (str,): st.lists(st.one_of(texts, st.sampled_from(PARTS)), max_size=3).map(tuple),
}
changes = st.one_of(
  *(st.tuples(st.just(key), of_kind[config_keys.KINDS[key]]) for key in KEYS),
  st.tuples(st.sampled_from([*KEYS, *GROUPS]), values),
  st.tuples(st.sampled_from(KEYS), st.just(...)),  # the key is removed
  st.tuples(
    st.builds(
      '{}{}{}'.format,
      st.sampled_from(['', *(f'{group}.' for group in GROUPS)]),
      st.text('abcdefghijklmnopqrstuvwxyz_é\n', min_size=1, max_size=12),
      st.sampled_from(['', '.x', '.x.y']),
    ),
    values,
  ),
)


def changed(base: dict, edits: list[tuple]) -> ml_collections.ConfigDict:
  """A config with keys set, added or removed."""
  flat = flatten_dict(base, sep='.', keep_empty_nodes=True)
  for key, value in edits:
    flat = {k: v for k, v in flat.items() if not f'{k}.'.startswith(f'{key}.')}
    above = [key[:i] for i, c in enumerate(key) if c == '.']
    flat = {k: v for k, v in flat.items() if k not in above}
    if value is not ...:
      flat[key] = value
  return ml_collections.ConfigDict(unflatten_dict(flat, sep='.'))


# ---- what holds of a plan


def check(plan: Plan, config: dict, devices: int) -> None:
  """Every number follows from the config, and is what the code can work with."""
  batch, n = plan.batch_size, plan.dataset.num_train
  steps = plan.optim.total_steps
  for path, value in flatten_dict(dataclasses.asdict(plan), sep='.').items():
    value = sum(value, ()) if path == 'optim.rates' else value  # pairs
    for item in value if isinstance(value, tuple) else (value,):
      # NumPy's float64 is a float, and may stand in a config file.
      assert item is None or isinstance(item, int | float | bool | str), (path, item)
      if isinstance(item, int | float) and path != 'run.eval_every':
        assert math.isfinite(item), (path, item)
  for field in ('batch_size', 'eval_batch_size', 'seed'):
    assert type(getattr(plan, field)) is int
  assert 1 <= batch <= n
  assert batch % devices == 0
  assert batch // devices % plan.step.micro_batches == 0
  assert devices % plan.step.batch_norm_parts == 0
  assert steps == math.ceil(config['epochs'] * n / batch)
  assert 1 <= steps < 2**31
  assert plan.steps_per_epoch == n / batch
  assert 0 <= plan.optim.warmup_steps < steps
  assert all(0 <= b <= steps for b in plan.optim.boundaries)
  assert list(plan.optim.boundaries) == sorted(plan.optim.boundaries)
  assert len(plan.optim.boundaries) == len(config['schedule']['boundaries'])
  schedule = config['schedule']
  assert plan.optim.peak_lr == schedule['base_lr'] * batch / schedule['base_batch_size'] > 0
  assert plan.data.eval_resize >= plan.data.eval_image_size >= 1
  assert plan.data.image_size >= 1
  assert 1 <= plan.run.stop_step <= steps
  assert plan.run.eval_every >= 1
  assert plan.run.evaluates_at(plan.run.stop_step)
  assert not plan.run.evaluates_at(0)
  assert plan.padded_eval_batch(devices) % devices == 0
  assert plan.model.num_classes == len(plan.dataset.class_names)
  assert len(plan.data.mean) == len(plan.data.std) == 3
  assert min(plan.data.std) > 0
  rate = optim.schedule(plan.optim)
  for step in (0, plan.optim.warmup_steps, steps // 2, steps - 1):
    assert 0 <= float(rate(step)) <= float(np.float32(plan.optim.peak_lr)) * (1 + 1e-6), step
    if plan.optim.schedule == 'step' and step >= plan.optim.warmup_steps:
      drops = sum(step >= b for b in plan.optim.boundaries)
      wanted = plan.optim.peak_lr * plan.optim.factor**drops
      assert float(rate(step)) == pytest.approx(wanted, rel=1e-5, abs=1e-37)
  optim.make(plan.optim)
  rates, decay = dict(plan.optim.rates), config['optimizer']['layer_decay']
  assert plan.step.frozen == plan.optim.frozen
  assert bool(plan.step.frozen) == bool(config['optimizer']['frozen'])
  assert 'head' not in rates or rates['head'] == 1 >= rates['stem'] == min(rates.values())
  assert bool(rates) == (decay != 1)


def resolves_or_explains(base: dict, edits: list[tuple], devices: int, folder: bool) -> bool:
  """Whether it resolved."""
  config = changed(base, edits)
  dataset = FOLDER if folder or base['data']['dataset'] == 'image_folder' else None
  try:
    plan = resolve(config, devices, dataset)
  except UserError as error:
    text = str(error)
    assert text.isprintable(), text
    assert len(text) <= 1000
    assert names_a_key(text, edits), text
    return False
  check(plan, complete(config.to_dict()), devices)
  return True


def names_a_key(text: str, edits: list[tuple]) -> bool:
  keys = [*KEYS, *GROUPS, 'data_dir', *(key for key, _ in edits)]
  return any(re.search(rf'(?<!\w){re.escape(repr(key)[1:-1])}(?!\w)', text) for key in keys)


def test_what_is_not_changed_resolves():
  assert all(resolves_or_explains(base, [], 1, folder=True) for base in BASES)


@pytest.mark.fault('config', 'one key of any value', 'a consistent plan, or one line')
def test_one_change(at_full_size, record_property):
  record_property('tries', tries := 20_000 if at_full_size else 100)
  search(resolves_or_explains, 1, tries)


@pytest.mark.fault('config', 'several keys of any value', 'a consistent plan, or one line')
def test_several_changes(at_full_size, record_property):
  record_property('tries', tries := 10_000 if at_full_size else 60)
  search(resolves_or_explains, 5, tries)


def search(of, most: int, examples: int) -> None:
  outcomes = collections.Counter()

  @settings(
    max_examples=examples,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
  )
  @given(
    st.sampled_from(BASES),
    st.lists(changes, min_size=1, max_size=most),
    st.sampled_from([1, 8]),
    st.booleans(),
  )
  def try_one(base, edits, devices, folder):
    outcomes[of(base, edits, devices, folder)] += 1

  try_one()
  assert all(outcomes[resolved] > examples / 20 for resolved in (True, False)), outcomes


# ---- what the most likely mistakes are told


OTHER_TYPES = [
  ('batch_size', '64', "batch_size '64' must be a whole number of less than 2^63"),
  ('batch_size', 64.0, 'batch_size 64.0 must be a whole number'),
  ('batch_size', True, 'batch_size True must be a whole number'),
  ('batch_size', None, 'batch_size None must be a whole number'),
  ('batch_size', {'a': 1}, "batch_size {'a': 1} must be a whole number"),
  ('seed', 10**5000, 'seed (int) must be a whole number'),
  ('epochs', '300', "epochs '300' must be a number"),
  ('epochs', 10**400, 'epochs 1000'),
  (
    'epochs',
    1e12,
    'epochs 1000000000000.0 are 7.81e+14 steps of batch_size 64; use at most 2.75e+06',
  ),
  ('model', 'resnet20', "model 'resnet20' must be a group of keys: model.name, model.stages"),
  ('model.name', None, 'model.name None must be a string'),
  ('model.stages', 1, 'model.stages 1 must be a tuple of whole numbers'),
  ('data.mean', 0.5, 'data.mean 0.5 must be a tuple of numbers'),
  ('data.mean', ('0.5',) * 3, "data.mean ('0.5', '0.5', '0.5') must be a tuple of numbers"),
  ('data.data_dir', 'a\0b', "data.data_dir 'a\\x00b' must be a string"),
  ('data.data_dir', '~nobody-of-this-name', 'there is no such user'),
  ('data.train_split', 'trian', "data.train_split: unknown split of cifar100 'trian'"),
  ('optimizer.nesterov', 1, 'optimizer.nesterov 1 must be True or False'),
  ('schedule.base_lr', 1e37, 'schedule.base_lr 1e+37 makes a peak learning rate of 1e+37'),
  ('schedule.factor', 10.0, 'schedule.factor 10.0 must be more than 0 and at most 1'),
]


@pytest.mark.fault('config', 'a value of another type in the config file', 'one line with the key')
@pytest.mark.parametrize(
  ('key', 'value', 'says'), OTHER_TYPES, ids=[key for key, *_ in OTHER_TYPES]
)
def test_refuses_other_types(key, value, says):
  config = changed(load('cifar100_resnet32').to_dict(), [(key, value)])
  with pytest.raises(UserError, match=re.escape(says)) as error:
    resolve(config)
  assert str(error.value).isprintable()


@pytest.mark.fault('config', 'an unknown key, at any depth', 'one line with the nearest one')
@pytest.mark.parametrize(
  ('key', 'nearest'),
  [
    ('batchsize', 'batch_size'),
    ('data.imagesize', 'data.image_size'),
    ('shedule.base_lr', 'schedule'),
  ],
)
def test_refuses_unknown_keys(key, nearest):
  config = changed(load('cifar100_resnet32').to_dict(), [(key, 1)])
  with pytest.raises(
    UserError, match=f"unknown config key '{key.partition('.')[0]}.*mean '{nearest}"
  ):
    resolve(config)


def test_the_keys_are_those_of_base():
  kinds = {}
  for key, value in flatten_dict(common.base().to_dict(), sep='.').items():
    kinds[key] = type(value)
  assert kinds.keys() == config_keys.KINDS.keys()
  for key, kind in config_keys.KINDS.items():
    assert kinds[key] is (tuple if isinstance(kind, tuple) else kind), key


def test_numbers_of_other_types_that_do():
  """A whole number of epochs, and what comes back from config.json."""
  config = load('cifar100_resnet32')
  plan = resolve(config)
  base = config.to_dict()
  assert resolve(changed(base, [('epochs', 300), ('schedule.boundaries', [0.5, 0.75])])) == plan


# ---- hand-edited files of a run


@pytest.mark.fault('config', 'config.json or dataset.json edited by hand', 'one line with the cure')
@pytest.mark.parametrize(
  ('name', 'edit', 'says'),
  [
    ('config', {'batch_size': '64'}, "batch_size '64' must be a whole number"),
    ('config', {'data': 3}, 'data 3 must be a group of keys'),
    ('config', {'data': {}}, "the config lacks the key 'data.dataset' and 9 more"),
    ('config', {'batchsize': 64}, "unknown config key 'batchsize'; did you mean 'batch_size'?"),
    ('dataset', {'num_train': '1000'}, 'dataset.json is not as the run wrote it'),
    ('dataset', {'num_train': -1}, 'dataset.json is not as the run wrote it'),
    ('dataset', {'class_names': 'cat'}, 'dataset.json is not as the run wrote it'),
    ('dataset', {'class_names': []}, 'dataset.json is not as the run wrote it'),
    ('dataset', {'names': []}, 'dataset.json is not as the run wrote it'),
  ],
)
def test_files_edited_by_hand(tmp_path, name, edit, says):
  files = {'config': load('cifar100_resnet32').to_dict(), 'dataset': dataclasses.asdict(FOLDER)}
  files[name] |= edit
  for each, content in files.items():
    (tmp_path / f'{each}.json').write_text(json.dumps(content))
  with pytest.raises(UserError, match=re.escape(says)) as error:
    run.load_run(tmp_path)
  assert str(error.value).isprintable()
