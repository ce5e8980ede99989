import fractions
import importlib
import itertools
import json
import math
import pathlib
import re

import jax
import ml_collections
import pytest

from afi_flax import config as config_lib
from afi_flax import models, optim, sharding, state
from afi_flax.config import Dataset, parse_variant, resolve
from afi_flax.config_keys import KINDS
from afi_flax.data import pipeline, sources
from afi_flax.errors import UserError
from afi_flax.models.attention import ATTENTIONS
from configs import common

CONFIGS = sorted(p.stem for p in pathlib.Path('configs').glob('*.py') if p.stem != 'common')
# Every row of the paper's Tables 1, 2, 4 and 5.
ROWS = {
  'cifar100_resnet32': 'resnet32',
  'cifar100_afi_resnet32': 'afi_resnet32',
  'cifar100_afi_resnet32:b': 'afi_resnet32_b',
  'cifar100_afi_resnet32:stages=1': ('afi_resnet32', 1),
  'cifar100_afi_resnet32:stages=2': ('afi_resnet32', 2),
  'cifar100_afi_resnet32:stages=3': ('afi_resnet32', 3),
  'cifar100_resnet110': 'resnet110',
  'cifar100_afi_resnet110': 'afi_resnet110',
  'cifar100_afi_resnet110:b': 'afi_resnet110_b',
  'cifar100_afi_resnet110:stages=1': ('afi_resnet110', 1),
  'cifar100_afi_resnet110:stages=2': ('afi_resnet110', 2),
  'cifar100_afi_resnet110:stages=3': ('afi_resnet110', 3),
  'cifar100_shufflenetv2': 'shufflenetv2_x1_0_cifar',
  'cifar100_afi_shufflenetv2': 'afi_shufflenetv2_x1_0_cifar',
  'cifar100_afi_shufflenetv2:b': 'afi_shufflenetv2_x1_0_cifar_b',
  'cifar100_mobilenetv2': 'mobilenetv2_cifar',
  'cifar100_afi_mobilenetv2': 'afi_mobilenetv2_cifar',
  'cifar100_afi_mobilenetv2:b': 'afi_mobilenetv2_cifar_b',
  'cifar100_afi_mobilenetv2:se': 'afi_mobilenetv2_cifar_se',
  'cifar100_afi_mobilenetv2:ge': 'afi_mobilenetv2_cifar_ge',
  'cifar100_afi_mobilenetv2:cbam': 'afi_mobilenetv2_cifar_cbam',
  'cifar100_afi_mobilenetv2:eca': 'afi_mobilenetv2_cifar_eca',
  'cifar100_resnext29': 'resnext29_32x4d',
  'cifar100_afi_resnext29': 'afi_resnext29_32x4d',
  'cifar100_afi_resnext29:b': 'afi_resnext29_32x4d_b',
  'imagenet_resnet50': 'resnet50',
  'imagenet_afi_resnet50': 'afi_resnet50',
  'imagenet_afi_resnet50:b': 'afi_resnet50_b',
  'imagenet_resnet50:se': 'se_resnet50',
  'imagenet_resnet152': 'resnet152',
  'imagenet_afi_resnet152': 'afi_resnet152',
  'imagenet_resnet152:se': 'se_resnet152',
}
FOLDER = config_lib.Dataset('image_folder', ('cat', 'dog'), num_train=1000, num_eval=100)


def load(name, arg=''):
  config = importlib.import_module(f'configs.{name}').get_config(arg)
  if name.startswith('finetune'):
    config.run.init_from = 'runs/other'
  return config


def variants(name):
  recipes = ('a3', 'a3,smoke') if name.startswith('imagenet') else ()
  recipes = ('head', 'head,smoke') if name.startswith('finetune') else recipes
  if not load(name).model.name.startswith('afi_'):
    return ('', 'smoke', 'se', *recipes)
  some = ('', 'smoke', 'b', 'stages=2', 'b,stages=2+3', 'stages=2,cbam,b')
  return (*some, *common.ATTENTIONS, *recipes)


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_resolves_and_initialises(name):
  names = ['', 'smoke']
  for arg in variants(name):
    config = load(name, arg)
    dataset = FOLDER if config.data.dataset == 'image_folder' else None
    plan = resolve(config, dataset=dataset)
    assert plan.optim.total_steps > 0
    assert plan.model.num_classes == len(plan.dataset.class_names)
    assert plan.model.name in models.list_models()
    again = resolve(ml_collections.ConfigDict(json.loads(config.to_json())), dataset=dataset)
    assert again == plan, 'config.json must give the same run'
    if arg in names:
      mesh = sharding.make_mesh(jax.devices()[:1])
      model = models.create_model(**vars(plan.model))
      shapes = state.abstract(
        model, optim.make(plan.optim), plan.data.image_size, sharding.replicated(mesh)
      )
      assert shapes.params['head']['dense']['kernel'].shape[1] == plan.model.num_classes


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_says_what_it_is(name):
  doc = importlib.import_module(f'configs.{name}').__doc__
  assert f'python -m afi_flax.main --config configs/{name}.py' in doc
  assert 'xpect' in doc
  with pytest.raises(UserError, match='unknown config variant'):
    load(name, 'bee')


def test_every_key_is_explained(root):
  lines = (root / 'configs' / 'common.py').read_text().split('def cifar(')[0].splitlines()
  keys = [
    (line, above)
    for above, line in itertools.pairwise(lines)
    if re.match(r' +config\.[\w.]+ = (?!ml_collections)', line)
  ]
  assert len(keys) == len(KINDS)
  for line, above in keys:
    assert '  # ' in line or above.strip().startswith('#'), f'no comment: {line.strip()}'


@pytest.mark.parametrize('row', ROWS)
def test_every_row_of_the_paper_is_a_variant(row):
  name, _, arg = row.partition(':')
  model = resolve(load(name, arg)).model
  wanted = ROWS[row] if isinstance(ROWS[row], tuple) else (ROWS[row],)
  assert (model.name, *(model.stages or ())) == wanted
  assert model.num_classes == (100 if name.startswith('cifar100') else 1000)


def test_variants_combine():
  assert set(common.ATTENTIONS) == set(ATTENTIONS)
  config = load('cifar100_afi_mobilenetv2', 'eca,smoke,stages=2+3,b')
  assert config.model.name == 'afi_mobilenetv2_cifar_b_eca'
  assert config.model.stages == (2, 3)
  assert config.data.dataset == 'fake_cifar'
  config = load('imagenet_resnet50', 'smoke,se')
  assert config.model.name == 'se_resnet50'
  assert config.data.dataset == 'fake_imagenet'


def test_paper_recipe_cifar():
  plan = resolve(load('cifar100_afi_resnet32'))
  assert plan.steps_per_epoch == 781.25
  assert plan.optim.total_steps == 234375
  assert plan.optim.boundaries == (117188, 175781)
  assert plan.optim.peak_lr == 0.1
  evaluations = [step for step in range(234376) if plan.run.evaluates_at(step)]
  assert evaluations[:3] == [782, 1563, 2344]
  assert evaluations[-1] == 234375
  assert len(evaluations) == 300


def test_learning_rate_and_steps_follow_the_batch_size():
  config = load('imagenet_afi_resnet50')
  assert resolve(config).optim.peak_lr == 0.1 * 64 / 256
  config.batch_size = 1024
  plan = resolve(config)
  assert plan.optim.peak_lr == 0.4
  assert plan.optim.total_steps == -(-90 * 1281167 // 1024)
  assert plan.optim.boundaries == tuple(
    round(f / 90 * plan.optim.total_steps) for f in (30, 60, 80)
  )


def test_strikes_back_recipe():
  """A3, on the batch that it was made for."""
  config = load('imagenet_afi_resnet50', 'a3,b')
  plan = resolve(config)
  assert plan.model.name == 'afi_resnet50_b'
  assert (plan.batch_size, plan.optim.peak_lr, plan.optim.name) == (2048, 0.008, 'lamb')
  assert plan.optim.total_steps == -(-100 * 1281167 // 2048)
  assert plan.optim.warmup_steps == round(5 * 1281167 / 2048)
  assert (plan.data.image_size, plan.data.eval_image_size, plan.data.eval_resize) == (160, 224, 235)
  assert plan.step.regularisation == config_lib.Regularisation(
    loss='bce', target_threshold=0.2, mixup=0.1, cutmix=1.0
  )
  assert load('imagenet_resnet50', 'smoke,a3').data.eval_image_size == 68
  for name in ('cifar100_resnet32', 'image_folder'):
    with pytest.raises(UserError, match="unknown config variant 'a3'"):
      load(name, 'a3')


def test_a_config_that_is_older_than_some_keys():
  config = load('cifar100_afi_resnet32')
  plan = resolve(config)
  assert plan.step == config_lib.Step()
  with config.unlocked():
    for key in config_lib._SINCE:
      *group, name = key.split('.')
      del (config[group[0]] if group else config)[name]
    del config.loss, config.batch_norm
  assert resolve(config) == plan


def test_frozen_parts_and_rates():
  config = load('cifar100_resnet32')
  config.run.init_from = 'runs/other'
  config.optimizer.frozen, config.optimizer.layer_decay = ('stem', 'stage1'), 0.5
  plan = resolve(config)
  assert plan.step.frozen == ('stem', *(f'stage1_block{k}' for k in range(1, 6)))
  rates = dict(plan.optim.rates)
  assert (rates['head'], rates['stage3_block5'], rates['stage3_block1']) == (1, 0.5, 0.5**5)
  assert rates['stem'] == 0.5**16
  config.optimizer.frozen = ('body',)
  assert set(resolve(config).optim.frozen) == set(rates) - {'head'}


@pytest.mark.parametrize(
  ('frozen', 'layer_decay', 'init_from', 'says'),
  [
    (('stage4',), 1.0, 'runs/x', "unknown optimizer.frozen 'stage4'; did you mean 'stage"),
    (('eyes',), 1.0, 'runs/x', "frozen 'eyes'. Known: body, head, stage1, stage2, stage3, stem. T"),
    (('stem,stage1',), 1.0, 'runs/x', 'They are of afi_resnet32. Repeat the flag for several.'),
    (('body', 'head'), 1.0, 'runs/x', "('body', 'head') leaves nothing to train"),
    ((), 0.0, 'runs/x', 'optimizer.layer_decay 0.0 must be more than 0 and at most 1'),
    ((), float('nan'), 'runs/x', 'optimizer.layer_decay nan must be'),
    (('stem',), 1.0, '', "optimizer.frozen ('stem',) is for weights that were trained before: add"),
    ((), 0.9, '', 'optimizer.layer_decay 0.9 is for weights that were trained before: add --con'),
  ],
)
def test_refuses_parts(frozen, layer_decay, init_from, says):
  config = load('cifar100_afi_resnet32')
  config.optimizer.frozen, config.optimizer.layer_decay = frozen, layer_decay
  config.run.init_from = init_from
  with pytest.raises(UserError, match=re.escape(says)) as error:
    resolve(config)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['afi_shufflenetv2_x1_0_cifar', 'densenet121'])
def test_drop_path_needs_residual_branches(name):
  config = load('cifar100_resnet32')
  config.model.name, config.model.drop_path = name, 0.1
  with pytest.raises(UserError, match=r'model\.drop_path 0\.1 has no meaning'):
    resolve(config)


def test_max_steps_leaves_the_schedule():
  config = load('cifar100_resnet32')
  config.run.max_steps = 10
  plan = resolve(config)
  assert plan.run.stop_step == 10
  assert plan.optim.total_steps == 234375


@pytest.mark.parametrize('every', [0.5, 1.0, 2.5, 7.0])
@pytest.mark.parametrize('batch', [64, 60, 1000])
def test_evaluates_at_the_end_and_not_just_before(every, batch):
  config = load('digits_afi_resnet20')
  config.batch_size, config.epochs, config.run.eval_every_epochs = batch, 7.0, every
  plan = resolve(config)
  steps = [n for n in range(plan.run.stop_step + 1) if plan.run.evaluates_at(n)]
  assert len(steps) == min(-(-7 // every), plan.run.stop_step)
  assert steps[-1] == plan.run.stop_step == plan.optim.total_steps


@pytest.mark.parametrize(
  ('num_train', 'batch', 'every'),
  [(50000, 48, 1.0), (50000, 96, 1.0), (50000, 48, 0.2), (1437, 48, 0.2), (1281167, 1024, 0.3)],
)
def test_no_evaluation_is_missed(num_train, batch, every):
  """Against fractions, which do not round: 479 steps of 48 are 40 times 0.2 epochs of 2874."""
  config = load('cifar100_resnet32')
  config.batch_size, config.epochs, config.run.eval_every_epochs = batch, 20.0, every
  plan = resolve(config, dataset=Dataset('cifar100', ('a', 'b'), num_train, 100))
  exact = fractions.Fraction(num_train, batch) * fractions.Fraction(str(every))
  due = {math.ceil(k * exact) for k in range(1, math.floor(plan.run.stop_step / exact) + 1)}
  found = {n for n in range(plan.run.stop_step + 1) if plan.run.evaluates_at(n)}
  assert found == due | {plan.run.stop_step}
  saved = {n for n in range(plan.run.stop_step + 1) if plan.run.saves_at(n)}
  assert saved == due | set(range(1000, plan.run.stop_step + 1, 1000))


def test_splits_of_two_data_sets_do_not_overlap():
  config = load('imagenet_afi_resnet50')
  assert resolve(config).data.eval_dataset == 'imagenet2012'
  config.data.eval_dataset, config.data.eval_split = 'fake_imagenet', 'train[:50]'
  plan = resolve(config)
  assert plan.data.eval_dataset == 'fake_imagenet'
  assert (plan.dataset.name, plan.dataset.num_eval) == ('imagenet2012', 50)


def test_hold_out():
  config = load('cifar100_resnet32')
  config.data.train_split, config.data.eval_split = 'train[:98%]', 'train[98%:]'
  plan = resolve(config)
  assert (plan.dataset.num_train, plan.dataset.num_eval) == (49000, 1000)


@pytest.mark.parametrize('name', CONFIGS)
def test_every_smoke_variant_has_batches(name):
  plan = resolve(load(name, 'smoke'))
  assert plan.optim.total_steps == 4
  data = plan.data
  source = sources.open_split(data.dataset, data.data_dir, data.train_split)
  train = pipeline.train_batches(
    source,
    seed=0,
    data_step=0,
    batch_size=plan.batch_size,
    augment=data.augment,
    image_size=data.image_size,
  )
  assert next(train)['image'].shape == (16, data.image_size, data.image_size, 3)
  train.close()
  source = sources.open_split(data.dataset, data.data_dir, data.eval_split)
  held_out = pipeline.eval_batches(
    source, batch_size=16, image_size=data.image_size, resize=data.eval_resize
  )
  assert sum(batch['mask'].sum() for batch in held_out) == 32


@pytest.mark.fault('config', 'a key is missing', 'one line with the key')
def test_a_config_that_lacks_a_key():
  config = load('cifar100_resnet32')
  with config.unlocked():
    del config.model.dtype
  with pytest.raises(UserError, match='dtype'):
    resolve(config)


@pytest.mark.parametrize('error', [AttributeError, KeyError])
def test_a_mistake_in_the_code_is_not_blamed_on_the_config(error, monkeypatch):
  def mistaken(*_):
    raise error('ours')

  monkeypatch.setattr(config_lib, '_check_batch', mistaken)
  with pytest.raises(error, match='ours'):
    resolve(load('cifar100_resnet32'))


def test_keys_that_a_config_sets_are_those_of_base():
  def keys(tree):
    return {k: keys(v) if isinstance(v, dict) else type(v) for k, v in tree.items()}

  for name in CONFIGS:
    assert keys(load(name).to_dict()) == keys(common.base().to_dict()), name


@pytest.mark.fault('config', 'a value that has no meaning', 'one line with the key and the cure')
@pytest.mark.parametrize(
  ('key', 'value', 'says'),
  [
    ('batch_size', 0, 'batch_size 0 must be at least 1'),
    ('batch_size', 100, 'batch_size 100 is not divisible by 8 devices; use 96 or 104'),
    ('batch_size', 4, 'not divisible by 8 devices; use 8'),
    ('batch_size', 80000, 'more than the 50000 training examples'),
    ('eval_batch_size', 0, 'eval_batch_size 0'),
    ('micro_batches', 3, 'must divide the 8 pictures of a device; use one of 1, 2, 4, 8'),
    ('batch_norm.scope', '3', "batch_norm.scope '3' must be 'global', 'device' or a number of dev"),
    ('batch_norm.scope', 'all', "batch_norm.scope 'all' must be"),
    ('batch_norm.scope', '²', "batch_norm.scope '²' must be"),
    ('epochs', 0.0, 'epochs 0'),
    ('epochs', float('nan'), 'epochs nan'),
    ('seed', -1, 'seed -1'),
    ('model.name', 'afi_resnet33', "unknown model 'afi_resnet33'; did you mean 'afi_resnet3"),
    ('model.stages', (3, 4), 'model.stages .3, 4. must be some of .1, 2, 3.'),
    ('model.dtype', 'float16', "unknown model.dtype 'float16'"),
    ('model.se_bias', True, 'model.se_bias has no meaning'),
    ('model.remat', 'all', "unknown model.remat 'all'"),
    ('data.dataset', 'cifar101', "did you mean 'cifar10"),
    ('data.augment', 'flip', 'unknown data.augment'),
    ('data.antialias', False, 'data.antialias False has no meaning'),
    ('data.eval_dataset', 'cifar11', "did you mean 'cifar1"),
    ('data.eval_split', 'tset', 'tset'),
    ('data.eval_split', 'train[:1%]', 'overlaps data.train_split .train. in 500 examples'),
    ('data.eval_resize', 16, 'data.eval_resize 16'),
    ('data.image_size', 0, 'data.image_size 0'),
    ('data.std', (0.1, 0.1, 0.0), 'data.std'),
    ('data.mean', (0.1,), 'data.mean'),
    ('data.mean', (0.1, 0.1, float('nan')), 'data.mean .* must be finite'),
    ('data.lighting', float('inf'), 'data.lighting inf must be finite'),
    ('data.color_jitter', (float('nan'), 0.0, 0.0, 0.0), 'data.color_jitter .* finite'),
    ('data.eval_image_size', 64, 'data.eval_resize 40 is less than data.eval_image_size 64'),
    ('data.eval_image_size', -1, 'data.eval_image_size -1'),
    ('data.auto_augment', 'rand-z1', "data.auto_augment 'rand-z1'"),
    ('data.mixup', -0.1, 'data.mixup -0.1 must be at least 0'),
    ('data.mixup', float('nan'), 'data.mixup nan must be finite and at least 0'),
    ('data.cutmix', -1.0, 'data.cutmix -1.0'),
    ('data.erasing', 1.5, 'data.erasing 1.5'),
    ('loss.name', 'mse', "unknown loss.name 'mse'"),
    ('loss.label_smoothing', 1.0, 'loss.label_smoothing 1.0'),
    ('loss.target_threshold', 0.2, 'loss.target_threshold 0.2 has no meaning'),
    ('model.drop_path', 1.0, 'model.drop_path 1.0'),
    ('ema_decay', 1.0, 'ema_decay 1.0'),
    ('optimizer.name', 'adam', "unknown optimizer.name 'adam'"),
    ('optimizer.momentum', -1.0, 'optimizer.momentum -1'),
    ('optimizer.momentum', 1.0, 'optimizer.momentum 1.0 must be at least 0 and less than 1'),
    ('optimizer.weight_decay', float('inf'), 'optimizer.weight_decay inf must be finite'),
    ('schedule.name', 'linear', "unknown schedule.name 'linear'"),
    ('schedule.base_lr', 0.0, 'schedule.base_lr 0'),
    ('schedule.boundaries', (0.7, 0.5), 'schedule.boundaries'),
    ('schedule.boundaries', (30.0, 60.0), 'schedule.boundaries'),
    ('schedule.warmup_epochs', 300.0, 'schedule.warmup_epochs 300'),
    ('run.log_every_steps', 0, 'run.log_every_steps 0'),
    ('run.eval_every_epochs', 0.0, 'run.eval_every_epochs 0'),
    ('run.eval_every_epochs', float('nan'), 'run.eval_every_epochs nan'),
    ('run.keep', 0, 'run.keep 0'),
  ],
)
def test_refuses(key, value, says):
  config = load('cifar100_afi_resnet32')
  config.data.eval_resize = 40 if key == 'data.eval_image_size' else 0
  with config.unlocked():
    config.update_from_flattened_dict({key: value})
  with pytest.raises(UserError, match=says.replace('(', r'\(')) as error:
    resolve(config, device_count=8)
  assert '\n' not in str(error.value)


def test_a_mistake_in_the_model_shows_before_the_data_are_looked_for():
  config = load('image_folder')
  config.data.data_dir = '/none'
  with pytest.raises(UserError, match='/none'):
    resolve(config)
  config.model.name = 'resnet51'
  with pytest.raises(UserError, match="unknown model 'resnet51'"):
    resolve(config)


@pytest.mark.parametrize(
  ('arg', 'says'),
  [
    ('c', "unknown config variant 'c'"),
    ('B', "unknown config variant 'B'. Known: b, cbam, eca, ge, se, stages."),
    ('stages=1,c', "unknown config variant 'c'"),
    ('stages=1,2', "unknown config variant '2'"),
    ('b=1', "'b=1' takes no value; use 'b'"),
    ('eca=3', "'eca=3' takes no value; use 'eca'"),
    ('stages', "'stages' must be stages=1 or stages=1+2"),
    ('stages=', "'stages=' must be stages=1"),
    ('stages=x', "'stages=x' must be stages=1"),
    ('stages=²', "'stages=²' must be stages=1"),
    ('se,eca', "'se' and 'eca' do not go together; use one"),
    ('cbam,b,ge', "'cbam' and 'ge' do not go together; use one"),
    ('b,b', "'b' and 'b' do not go together; use one"),
    ('stages=1,stages=2', "'stages=1' and 'stages=2' do not go together; use one"),
  ],
)
def test_refuses_variants(arg, says):
  with pytest.raises(UserError, match=re.escape(says)) as error:
    parse_variant(arg, ('se', 'eca', 'ge', 'cbam'), b=False, stages=())
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('arg', ['b', 'se,ge', 'stages=1', 'se=1', 'se,se'])
def test_plain_networks_refuse(arg):
  with pytest.raises(UserError, match='config variant') as error:
    load('imagenet_resnet50', arg)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('scope', 'parts'), [('global', 1), ('device', 8), ('1', 8), ('4', 2), ('8', 1), ('16', 1)]
)
def test_batch_norm_scope(scope, parts):
  config = load('cifar100_afi_resnet32')
  config.batch_norm.scope = scope
  assert resolve(config, device_count=8).step.batch_norm_parts == parts


def test_nothing_that_is_due_is_overstepped():
  made = load('digits_afi_resnet20')
  made.run.log_every_steps, made.run.save_every_steps = 7, 10
  how = resolve(made).run
  for most in (1, 4, 100):
    for step in range(60):
      count = how.due_in(step, most)
      assert 1 <= count <= most
      assert not any(how.due_at(n) for n in range(step + 1, step + count))
      assert count == most or how.due_at(step + count)
