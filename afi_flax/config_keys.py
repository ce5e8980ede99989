"""The keys of a config: which there are, and what kind of value each takes.

A config file sets what it likes, and a run's config.json may have been edited; flags are checked by
ml_collections. What the values mean is explained where they are resolved.
"""

import math
import os
from collections.abc import Iterator
from typing import Any

from afi_flax.errors import UserError, unknown

Kind = type | tuple[type]  # (float,) is any number of them

KINDS: dict[str, Kind] = {
  'seed': int,
  'model.name': str,
  'model.stages': (int,),
  'model.dtype': str,
  'model.se_bias': bool,
  'model.remat': str,
  'model.drop_path': float,
  'batch_norm.scope': str,
  'data.dataset': str,
  'data.eval_dataset': str,
  'data.data_dir': str,
  'data.train_split': str,
  'data.eval_split': str,
  'data.image_size': int,
  'data.eval_image_size': int,
  'data.eval_resize': int,
  'data.augment': str,
  'data.antialias': bool,
  'data.auto_augment': str,
  'data.color_jitter': (float,),
  'data.lighting': float,
  'data.mixup': float,
  'data.cutmix': float,
  'data.erasing': float,
  'data.mean': (float,),
  'data.std': (float,),
  'data.on_device': bool,
  'data.max_unreadable': int,
  'batch_size': int,
  'micro_batches': int,
  'eval_batch_size': int,
  'epochs': float,
  'ema_decay': float,
  'loss.name': str,
  'loss.label_smoothing': float,
  'loss.target_threshold': float,
  'schedule.name': str,
  'schedule.base_lr': float,
  'schedule.base_batch_size': int,
  'schedule.boundaries': (float,),
  'schedule.factor': float,
  'schedule.warmup_epochs': float,
  'optimizer.name': str,
  'optimizer.momentum': float,
  'optimizer.nesterov': bool,
  'optimizer.weight_decay': float,
  'optimizer.decay_vectors': bool,
  'optimizer.clip_norm': float,
  'optimizer.layer_decay': float,
  'optimizer.frozen': (str,),
  'run.resume': str,
  'run.init_from': str,
  'run.workers': int,
  'run.max_steps': int,
  'run.log_every_steps': int,
  'run.eval_every_epochs': float,
  'run.save_every_steps': int,
  'run.keep': int,
  'run.on_nonfinite': str,
  'run.max_nonfinite': int,
  'run.deterministic': bool,
  'run.profile_steps': int,
}
_GROUPS = {key.rpartition('.')[0] for key in KINDS} - {''}
_WHAT = {
  bool: 'True or False',
  int: 'a whole number of less than 2^63',
  float: 'a number that fits a float32',
  str: 'a string',
  (int,): 'a tuple of whole numbers',
  (float,): 'a tuple of numbers',
  (str,): 'a tuple of strings',
}
_MAX_FLOAT32 = 3.4028234e38


def check(config: dict[Any, Any]) -> None:
  """Explains a key that there is not, and a value of another kind; not which are missing.

  Raises:
    UserError: with the key, its value and what it should be.
  """
  for key, value in _leaves(config):
    if key in _GROUPS:
      keys = ', '.join(k for k in KINDS if k.startswith(f'{key}.'))
      raise UserError(f'{key} {_shown(value)} must be a group of keys: {keys}')
    if key not in KINDS:
      raise unknown('config key', key, KINDS, 'All are in configs/common.py.')
    if not _is(value, KINDS[key]):
      raise UserError(f'{key} {_shown(value)} must be {_WHAT[KINDS[key]]}')


def check_complete(config: dict[Any, Any]) -> None:
  """UserError for a key that is missing."""
  there = {key for key, _ in _leaves(config)}
  if missing := [key for key in KINDS if key not in there]:
    more = f' and {len(missing) - 1} more' if len(missing) > 1 else ''
    raise UserError(f'the config lacks the key {missing[0]!r}{more}; compare configs/common.py')


def _leaves(tree: dict[Any, Any], above: str = '') -> Iterator[tuple[str, Any]]:
  """Keys in full with their values; groups that hold keys are gone into."""
  for name, value in tree.items():
    key = f'{above}{name}'
    if key in _GROUPS and isinstance(value, dict):
      yield from _leaves(value, f'{key}.')
    else:
      yield key, value


def _is(value: Any, kind: Kind) -> bool:
  if isinstance(kind, tuple):
    return isinstance(value, list | tuple) and all(_is(item, kind[0]) for item in value)
  if kind is str:
    return isinstance(value, str) and _can_be_a_path(value)
  if kind is bool or isinstance(value, bool):
    return kind is bool and isinstance(value, bool)
  if kind is int:
    return isinstance(value, int) and abs(value) < 2**63
  # What is not finite is explained where it is resolved.
  fits = isinstance(value, int | float) and (abs(value) <= _MAX_FLOAT32 or value != value)
  return fits or value in (math.inf, -math.inf)


def _can_be_a_path(text: str) -> bool:
  try:
    return b'\0' not in os.fsencode(text)
  except UnicodeEncodeError:  # half of a surrogate pair
    return False


def _shown(value: Any) -> str:
  try:
    text = repr(value)
  except ValueError:  # a number of thousands of digits
    text = f'({type(value).__name__})'
  return text if len(text) <= 80 else f'{text[:80]}...'
