"""From a config, which holds what a person sets, to a Plan, with every number derived from it.

The only reader of ConfigDict keys, and the place where a wrong one is explained.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import ml_collections

from afi_flax import config_keys
from afi_flax.data import augment, distort, sources
from afi_flax.errors import UserError, shown, unknown
from afi_flax.models import create_model, parts, residual_blocks

# Keys that may differ when a run is resumed: they change neither its numbers nor its data.
MAY_DIFFER = ('run', 'data.data_dir')  # where a run goes on
MUST_AGREE = ('run.init_from',)  # but for these
_SMALLEST, _LARGEST = 1e-30, 1e30  # learning rates: within float32, with room to work with
_MAX_STEPS = 2**31 - 1  # what an int32 on the device counts
# Keys that there have not always been, with what runs did before.
_SINCE = {
  'batch_norm.scope': 'global',
  'data.antialias': True,
  'data.auto_augment': '',
  'data.color_jitter': (0.0, 0.0, 0.0, 0.0),
  'data.cutmix': 0.0,
  'data.erasing': 0.0,
  'data.eval_dataset': '',
  'data.eval_image_size': 0,
  'data.lighting': 0.0,
  'data.mixup': 0.0,
  'data.on_device': False,
  'ema_decay': 0.0,
  'loss.label_smoothing': 0.0,
  'loss.name': 'cross_entropy',
  'loss.target_threshold': 0.0,
  'micro_batches': 1,
  'model.drop_path': 0.0,
  'model.remat': 'none',
  'model.se_bias': False,
  'optimizer.decay_vectors': True,
  'optimizer.frozen': (),
  'optimizer.layer_decay': 1.0,
  'run.deterministic': False,
  'run.max_nonfinite': 10,
  'run.on_nonfinite': 'raise',
}


@dataclasses.dataclass(frozen=True)
class Dataset:
  """What a run must know of its data before it opens them; kept in the run's folder."""

  name: str
  class_names: tuple[str, ...]
  num_train: int
  num_eval: int


@dataclasses.dataclass(frozen=True)
class Model:
  """What `models.create_model` is given."""

  name: str
  num_classes: int
  stages: tuple[int, ...] | None
  dtype: str
  se_bias: bool
  remat: str


@dataclasses.dataclass(frozen=True)
class Data:
  """Where pictures come from and how they are cut."""

  dataset: str
  data_dir: str
  train_split: str
  eval_split: str
  image_size: int  # pixels, of training
  eval_resize: int  # pixels of the short side before the centre crop
  augment: str
  mean: tuple[float, float, float]  # of channels in 0..1
  std: tuple[float, float, float]
  max_unreadable: int
  eval_image_size: int  # pixels, of evaluation
  auto_augment: str = ''  # as timm writes it; '': none
  color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
  lighting: float = 0.0
  antialias: bool = True  # of random_resized_crop_flip
  eval_dataset: str = ''  # what is evaluated
  on_device: bool = False  # whether all of it is kept there


@dataclasses.dataclass(frozen=True)
class Regularisation:
  """What a step does to the pictures, the targets and the network; by itself nothing."""

  loss: str = 'cross_entropy'  # or 'bce'
  label_smoothing: float = 0.0
  target_threshold: float = 0.0  # of bce; 0: off
  mixup: float = 0.0  # alpha; 0: off
  cutmix: float = 0.0
  erasing: float = 0.0  # probability
  drop_path: float = 0.0  # probability for the last block
  num_blocks: int = 0  # that drop_path counts
  ema_decay: float = 0.0  # 0: off


@dataclasses.dataclass(frozen=True)
class Step:
  """How a training step goes about its batch."""

  seed: int = 0  # of the draws on the device
  micro_batches: int = 1  # into which a batch is cut, computed one after another
  batch_norm_parts: int = 1  # into which each of them is cut; each is normalised by itself
  regularisation: Regularisation = Regularisation()
  frozen: tuple[str, ...] = ()  # names of modules of the network


@dataclasses.dataclass(frozen=True)
class Optim:
  """The optimiser and its schedule, in steps."""

  peak_lr: float
  schedule: str  # 'step' | 'cosine'
  total_steps: int
  warmup_steps: int
  boundaries: tuple[int, ...]
  factor: float
  momentum: float
  nesterov: bool
  weight_decay: float
  clip_norm: float  # 0: off
  name: str = 'sgd'  # or 'lars', 'adamw', 'lamb'
  decay_vectors: bool = True
  frozen: tuple[str, ...] = ()  # names of modules of the network
  rates: tuple[tuple[str, float], ...] = ()  # of all modules, what their lr is multiplied by; (): 1


@dataclasses.dataclass(frozen=True)
class Run:
  """How the run goes about it; in one in which all is well, none changes more than last bits."""

  resume: str
  init_from: str
  workers: int
  stop_step: int
  log_every: int  # steps
  eval_every: float  # steps, not whole where an epoch has no whole number of batches
  save_every: int  # steps
  keep: int
  profile_steps: int
  on_nonfinite: str  # 'raise' | 'skip' | 'rollback'
  max_nonfinite: int  # batches that may be skipped or rolled back from
  deterministic: bool

  def due_at(self, step: int) -> bool:
    """Whether there is anything to write, save or evaluate after `step`."""
    return step >= self.stop_step or step % self.log_every == 0 or self.saves_at(step)

  def due_in(self, step: int, most: int) -> int:
    """Steps from `step` to the next one after which something is due; at most so many."""
    return next((n for n in range(1, most) if self.due_at(step + n)), most)

  def evaluates_at(self, step: int) -> bool:
    """Whether `step` is the first one after a multiple of `eval_every`, or the last of the run."""
    return self._ends_epochs(step) or (step > 0 and step >= self.stop_step)

  def saves_at(self, step: int) -> bool:
    """Whether every run with these intervals saves after `step`, wherever it is stopped."""
    return step > 0 and (step % self.save_every == 0 or self._ends_epochs(step))

  def _ends_epochs(self, step: int) -> bool:
    slack = 1e-6  # of steps: 479 / 11.975 is a little less than 40
    times = math.floor((step + slack) / self.eval_every)
    return times > 0 and step == math.ceil(times * self.eval_every - slack)


@dataclasses.dataclass(frozen=True)
class Plan:
  """A run, resolved: every number that the code uses."""

  seed: int
  model: Model
  data: Data
  dataset: Dataset
  batch_size: int  # global
  eval_batch_size: int  # global, before it is padded to a multiple of the devices
  steps_per_epoch: float
  optim: Optim
  run: Run
  step: Step

  def padded_eval_batch(self, device_count: int) -> int:
    """The least multiple of the devices that is at least `eval_batch_size`."""
    return math.ceil(self.eval_batch_size / device_count) * device_count


def complete(config: dict[str, Any]) -> dict[str, Any]:
  """The config of a run that may be older than some keys, with what it did without them."""
  filled = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
  for key, value in _SINCE.items():
    group, _, name = key.rpartition('.')
    place = filled.setdefault(group, {}) if group else filled
    if isinstance(place, dict):
      place.setdefault(name, value)
  return filled


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
  """A complete config with '' for every path of the machine that it was used on."""
  paths = {'data': ('data_dir',), 'run': ('resume', 'init_from')}
  return config | {group: config[group] | dict.fromkeys(keys, '') for group, keys in paths.items()}


def resolve(
  config: ml_collections.ConfigDict, device_count: int = 1, dataset: Dataset | None = None
) -> Plan:
  """Derives every dependent number, and explains every wrong one.

  Args:
    config: as a file in `configs/` returns it, or as a run's `config.json` stores it.
    device_count: devices, of all processes, that share a batch.
    dataset: sizes and names; None: looked up from the data set's table or folder.

  Raises:
    UserError: one line with the key, its value, the limit and the cure.
  """
  try:
    given = config.to_dict()
    config_keys.check(given)
    completed = complete(given)
    config_keys.check_complete(completed)
    return _resolve(ml_collections.ConfigDict(completed), device_count, dataset)
  except ml_collections.config_dict.RequiredValueError as error:
    raise UserError(_one_line(f'the config lacks a value: {error}')) from error
  except UserError as error:
    raise type(error)(_one_line(str(error))) from error


def _one_line(text: str) -> str:
  """Printable and of bounded length, whatever the values that it quotes."""
  text = shown(text)
  return text if len(text) <= 1000 else f'{text[:500]} ... {text[-400:]}'


def _resolve(config: ml_collections.ConfigDict, device_count: int, dataset: Dataset | None) -> Plan:
  # Mistakes in these show before a large folder is listed.
  _model(config.model, num_classes=1)
  frozen, rates = _modules(config)
  dataset = dataset or _measure(config.data)
  batch = config.batch_size
  _check_batch(batch, device_count, dataset.num_train)
  _at_least('eval_batch_size', config.eval_batch_size, 1)
  if not 0 < config.epochs < math.inf:
    raise UserError(f'epochs {config.epochs} must be more than 0')
  if not 0 <= config.seed < 2**32:
    raise UserError(f'seed {config.seed} must be in 0..4294967295')
  steps_per_epoch = dataset.num_train / batch
  total_steps = math.ceil(config.epochs * dataset.num_train / batch)
  if total_steps >= _MAX_STEPS:
    raise UserError(
      f'epochs {config.epochs} are {total_steps:.3g} steps of batch_size {batch}; use at most '
      f'{_MAX_STEPS * batch / dataset.num_train:.3g}'
    )
  return Plan(
    seed=config.seed,
    model=_model(config.model, len(dataset.class_names)),
    data=_data(config.data),
    dataset=dataset,
    batch_size=batch,
    eval_batch_size=min(config.eval_batch_size, dataset.num_eval),
    steps_per_epoch=steps_per_epoch,
    optim=dataclasses.replace(
      _optim(config.optimizer, config.schedule, batch, steps_per_epoch, total_steps),
      frozen=frozen,
      rates=rates,
    ),
    run=_run(config.run, steps_per_epoch, total_steps),
    step=Step(
      seed=config.seed,
      micro_batches=_micro_batches(config.micro_batches, batch, device_count),
      batch_norm_parts=_batch_norm_parts(config.batch_norm.scope, device_count),
      regularisation=_regularisation(config),
      frozen=frozen,
    ),
  )


def _measure(data: ml_collections.ConfigDict) -> Dataset:
  info = sources.describe(data.dataset, data.data_dir)
  with _naming('data.train_split'):
    train, first, last = sources.split_range(data.train_split, info)
  eval_info = sources.describe(_eval_dataset(data), data.data_dir)
  with _naming('data.eval_split'):
    held, start, stop = sources.split_range(data.eval_split, eval_info)
  same = eval_info.name == info.name
  if same and train == held and max(first, start) < min(last, stop):
    raise UserError(
      f'data.eval_split {data.eval_split!r} overlaps data.train_split {data.train_split!r} in '
      f'{min(last, stop) - max(first, start)} examples; use parts such as train[:98%], train[98%:]'
    )
  if same and data.eval_split == 'train':
    raise UserError("data.eval_split 'train' would be taken for training; name it train[:100%]")
  return Dataset(info.name, info.class_names, last - first, stop - start)


@contextlib.contextmanager
def _naming(key: str) -> Iterator[None]:
  """Puts the key before what is said of its value."""
  try:
    yield
  except UserError as error:
    raise type(error)(f'{key}: {error}') from error


def _eval_dataset(data: ml_collections.ConfigDict) -> str:
  return data.eval_dataset or data.dataset


def _check_batch(batch: int, device_count: int, num_train: int) -> None:
  _at_least('batch_size', batch, 1)
  if batch % device_count:
    below, above = batch // device_count * device_count, -(-batch // device_count) * device_count
    options = f'{below} or {above}' if below else f'{above}'
    raise UserError(f'batch_size {batch} is not divisible by {device_count} devices; use {options}')
  if batch > num_train:
    raise UserError(
      f'batch_size {batch} is more than the {num_train} training examples; use at most as many, by '
      '--config.batch_size'
    )


def _micro_batches(micro_batches: int, batch: int, device_count: int) -> int:
  share = batch // device_count
  if micro_batches < 1 or share % micro_batches:
    fits = [str(n) for n in range(1, share + 1) if share % n == 0]
    raise UserError(
      f'micro_batches {micro_batches} must divide the {share} pictures of a device; use one of '
      f'{", ".join(fits)}'
    )
  return micro_batches


def _batch_norm_parts(scope: str, device_count: int) -> int:
  if scope == 'global':
    return 1
  group = 1 if scope == 'device' else int(scope[:9]) if scope.isdecimal() else 0
  group = min(group, device_count)
  if not group or device_count % group:
    raise UserError(
      f"batch_norm.scope {scope!r} must be 'global', 'device' or a number of devices that divides "
      f'the {device_count} there are'
    )
  return device_count // group


def _model(model: ml_collections.ConfigDict, num_classes: int) -> Model:
  stages = tuple(model.stages) or None
  resolved = Model(model.name, num_classes, stages, model.dtype, model.se_bias, model.remat)
  create_model(**vars(resolved))  # explains what is wrong; makes no array
  return resolved


def _data(data: ml_collections.ConfigDict) -> Data:
  _at_least('data.image_size', data.image_size, 1)
  _at_least('data.eval_image_size', data.eval_image_size, 0)
  eval_size = data.eval_image_size or data.image_size
  if data.eval_resize and data.eval_resize < eval_size:
    key = 'eval_image_size' if data.eval_image_size else 'image_size'
    raise UserError(
      f'data.eval_resize {data.eval_resize} is less than data.{key} {eval_size}: '
      'the centre crop would not fit; use 0 for no margin'
    )
  _one_of('data.augment', data.augment, (*augment.IN_MEMORY, *augment.ENCODED[1:]))
  _at_least('data.max_unreadable', data.max_unreadable, 0)
  for key in ('mean', 'std'):
    if len(data[key]) != 3:
      raise UserError(f'data.{key} {tuple(data[key])} must have 3 values, one a channel')
    if not all(map(math.isfinite, data[key])):
      raise UserError(f'data.{key} {tuple(data[key])} must be finite')
  if min(data.std) <= 0:
    raise UserError(f'data.std {tuple(data.std)} must be more than 0')
  vectors = {key: tuple(data[key]) for key in ('mean', 'std', 'color_jitter')}
  # Explains what is wrong.
  distort.make(data.auto_augment, vectors['color_jitter'], data.lighting, vectors['mean'])
  if not data.antialias and data.augment != 'random_resized_crop_flip':
    raise UserError(
      f'data.antialias False has no meaning for data.augment {data.augment!r}; '
      "use True, or augment='random_resized_crop_flip'"
    )
  if data.on_device:
    _on_device(data)
  derived = {
    'eval_resize': data.eval_resize or eval_size,
    'eval_image_size': eval_size,
    'eval_dataset': _eval_dataset(data),
  }
  given = {field.name: data[field.name] for field in dataclasses.fields(Data)}
  return Data(**given | vectors | derived)


def _on_device(data: ml_collections.ConfigDict) -> None:
  """UserError for what is done to pictures on the host alone."""
  changes = {key: data[key] for key in ('auto_augment', 'lighting') if data[key]}
  if any(data.color_jitter):
    changes['color_jitter'] = tuple(data.color_jitter)
  if data.augment not in augment.IN_MEMORY:
    changes['augment'] = data.augment
  for key, value in changes.items():
    raise UserError(
      f'data.on_device True: data.{key} {value!r} is done on the host; use on_device=False, or '
      f'pictures without it'
    )


def _regularisation(config: ml_collections.ConfigDict) -> Regularisation:
  loss, data, drop_path = config.loss, config.data, config.model.drop_path
  made = Regularisation(
    loss=loss.name,
    label_smoothing=loss.label_smoothing,
    target_threshold=loss.target_threshold,
    mixup=data.mixup,
    cutmix=data.cutmix,
    erasing=data.erasing,
    drop_path=drop_path,
    num_blocks=residual_blocks(config.model.name) if drop_path else 0,
    ema_decay=config.ema_decay,
  )
  _one_of('loss.name', made.loss, ('cross_entropy', 'bce'))
  for key, value in (
    ('loss.label_smoothing', made.label_smoothing),
    ('loss.target_threshold', made.target_threshold),
    ('model.drop_path', made.drop_path),
    ('ema_decay', made.ema_decay),
  ):
    _at_least(key, value, 0, below=1)
  if not 0 <= made.erasing <= 1:
    raise UserError(f'data.erasing {made.erasing} must be a probability, 0 to 1')
  _at_least('data.mixup', made.mixup, 0)
  _at_least('data.cutmix', made.cutmix, 0)
  if made.target_threshold and made.loss != 'bce':
    raise UserError(
      f'loss.target_threshold {made.target_threshold} has no meaning for {made.loss!r}; '
      "use 0, or loss.name='bce'"
    )
  if drop_path and made.num_blocks < 2:
    raise UserError(
      f'model.drop_path {drop_path} has no meaning for {config.model.name!r}: no residual branch '
      'to drop; use 0'
    )
  return made


def _optim(
  optimizer: ml_collections.ConfigDict,
  schedule: ml_collections.ConfigDict,
  batch: int,
  steps_per_epoch: float,
  total_steps: int,
) -> Optim:
  _one_of('optimizer.name', optimizer.name, ('sgd', 'lars', 'adamw', 'lamb'))
  if optimizer.nesterov and optimizer.name not in ('sgd', 'lars'):
    raise UserError(
      f'optimizer.nesterov has no meaning for {optimizer.name!r}; use False, or sgd or lars'
    )
  _one_of('schedule.name', schedule.name, ('step', 'cosine'))
  _at_least('schedule.base_batch_size', schedule.base_batch_size, 1)
  if not 0 < schedule.factor <= 1:
    raise UserError(f'schedule.factor {schedule.factor} must be more than 0 and at most 1')
  if not 0 < schedule.base_lr < math.inf:
    raise UserError(f'schedule.base_lr {schedule.base_lr} must be more than 0')
  peak_lr = schedule.base_lr * batch / schedule.base_batch_size
  if not _SMALLEST < peak_lr < _LARGEST:
    raise UserError(
      f'schedule.base_lr {schedule.base_lr} makes a peak learning rate of {peak_lr:g} for '
      f'batch_size {batch} and base_batch_size {schedule.base_batch_size}; it must be in '
      f'{_SMALLEST:g}..{_LARGEST:g}'
    )
  _at_least('optimizer.momentum', optimizer.momentum, 0, below=1)
  for key in ('weight_decay', 'clip_norm'):
    _at_least(f'optimizer.{key}', optimizer[key], 0)
  _at_least('schedule.warmup_epochs', schedule.warmup_epochs, 0)
  fractions = tuple(schedule.boundaries)
  if list(fractions) != sorted(set(fractions)) or not all(0 < f < 1 for f in fractions):
    raise UserError(f'schedule.boundaries {fractions} must rise, as fractions of the run in (0, 1)')
  warmup_steps = round(schedule.warmup_epochs * steps_per_epoch)
  if warmup_steps >= total_steps and warmup_steps:
    raise UserError(
      f'schedule.warmup_epochs {schedule.warmup_epochs} ({warmup_steps} steps) does not leave any '
      f'of the {total_steps} steps; use less'
    )
  return Optim(
    peak_lr=peak_lr,
    schedule=schedule.name,
    total_steps=total_steps,
    warmup_steps=warmup_steps,
    boundaries=tuple(round(f * total_steps) for f in fractions),
    factor=schedule.factor,
    momentum=optimizer.momentum,
    nesterov=optimizer.nesterov,
    weight_decay=optimizer.weight_decay,
    clip_norm=optimizer.clip_norm,
    name=optimizer.name,
    decay_vectors=optimizer.decay_vectors,
  )


def _modules(
  config: ml_collections.ConfigDict,
) -> tuple[tuple[str, ...], tuple[tuple[str, float], ...]]:
  """The network's modules that are frozen, and the factors of all modules' learning rates."""
  given, decay = tuple(config.optimizer.frozen), config.optimizer.layer_decay
  if not 0 < decay <= 1:
    raise UserError(f'optimizer.layer_decay {decay} must be more than 0 and at most 1')
  if not given and decay == 1:
    return (), ()
  if not (config.run.init_from or config.run.resume):
    key, value, off = ('frozen', given, '()') if given else ('layer_decay', decay, '1.0')
    raise UserError(
      f'optimizer.{key} {value} is for weights that were trained before: add '
      f'--config.run.init_from=RUN, or use {off}'
    )
  names = parts.module_names(create_model(config.model.name))
  known = [*dict.fromkeys(map(parts.part, names)), 'body']
  for name in given:
    if name not in known:
      several = ' Repeat the flag for several.' if ',' in name else ''
      raise unknown('optimizer.frozen', name, known, f'They are of {config.model.name}.{several}')
  frozen = tuple(
    name
    for name in names
    if parts.part(name) in given or ('body' in given and parts.part(name) != 'head')
  )
  if len(frozen) == len(names):
    raise UserError(f'optimizer.frozen {given} leaves nothing to train; leave out a part')
  away = parts.distances(names)
  return frozen, tuple((name, decay ** away[name]) for name in names) if decay < 1 else ()


def _run(run: ml_collections.ConfigDict, steps_per_epoch: float, total_steps: int) -> Run:
  _at_least('run.workers', run.workers, 0, below=1025)
  for key, low in (
    ('max_steps', 0),
    ('log_every_steps', 1),
    ('save_every_steps', 1),
    ('keep', 1),
    ('profile_steps', 0),
    ('max_nonfinite', 0),
  ):
    _at_least(f'run.{key}', run[key], low)
  if not run.eval_every_epochs > 0:
    raise UserError(f'run.eval_every_epochs {run.eval_every_epochs} must be more than 0')
  _one_of('run.on_nonfinite', run.on_nonfinite, ('raise', 'skip', 'rollback'))
  return Run(
    resume=run.resume,
    init_from=run.init_from,
    workers=run.workers,
    stop_step=min(total_steps, run.max_steps or total_steps),
    log_every=run.log_every_steps,
    eval_every=max(1.0, run.eval_every_epochs * steps_per_epoch),
    save_every=run.save_every_steps,
    keep=run.keep,
    profile_steps=run.profile_steps,
    on_nonfinite=run.on_nonfinite,
    max_nonfinite=run.max_nonfinite,
    deterministic=run.deterministic,
  )


def _at_least(key: str, value: float, low: float, below: float = math.inf) -> None:
  if not low <= value < below:
    limit = f' and less than {below}' if below < math.inf else ''
    finite = '' if math.isfinite(value) else ' finite and'
    raise UserError(f'{key} {value} must be{finite} at least {low}{limit}')


def _one_of(key: str, value: str, options: tuple[str, ...]) -> None:
  if value not in options:
    raise unknown(key, value, options)


def parse_variant(
  arg: str, exclusive: tuple[str, ...] = (), **defaults: bool | tuple[int, ...]
) -> ml_collections.ConfigDict:
  """Reads what stands behind the colon of `--config file.py:b,stages=1+2`.

  >>> parse_variant('b,stages=1+2', b=False, smoke=False, stages=()).stages
  (1, 2)

  Args:
    arg: comma-separated names; a name whose default is a tuple takes `=` and numbers joined by `+`.
    exclusive: more names, without values, of which only one can be given.
    **defaults: the variants that the config knows, with what they are when not named.

  Raises:
    UserError: an unknown variant, with those that there are, a malformed or repeated one, or two
      that exclude each other.
  """
  values = dict.fromkeys(exclusive, False) | defaults
  given = {}  # name: the part that gave it
  for part in filter(None, arg.split(',')):
    name, equals, value = part.partition('=')
    if name not in values:
      raise unknown('config variant', name, values)
    clash = [p for n, p in given.items() if n == name or {n, name} <= set(exclusive)]
    if clash:
      raise UserError(f'config variants {clash[0]!r} and {part!r} do not go together; use one')
    given[name] = part
    if isinstance(values[name], tuple):
      if not equals or not all(n.isdecimal() for n in value.split('+')):
        raise UserError(f'config variant {part!r} must be {name}=1 or {name}=1+2')
      values[name] = tuple(int(n) for n in value.split('+'))
    elif equals:
      raise UserError(f'config variant {part!r} takes no value; use {name!r}')
    else:
      values[name] = True
  return ml_collections.ConfigDict(values)
