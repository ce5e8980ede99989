"""Batches whose numbers are not finite: the step leaves them out, this decides how the run goes on.

The host is some steps ahead of the device and finds out late. Until then it counts every batch as
an update; what is written or saved waits until the count is sure.
"""

import collections
import functools
import math
from collections.abc import Callable

import jax
import numpy as np

from afi_flax import config, sharding
from afi_flax.errors import UserError
from afi_flax.workdir import Workdir

# Steps that the host may be ahead of the device, and so late in noticing.
MAX_AHEAD = 8
_CURE = (
  'use a lower schedule.base_lr, more schedule.warmup_epochs or optimizer.clip_norm=1, or go on '
  'without such batches: --config.run.on_nonfinite=skip or rollback'
)


class RollBackError(Exception):
  """Not a mistake: the run goes back to its last checkpoint, and on from batch `data_step`."""

  def __init__(self, data_step: int):
    super().__init__(data_step)
    self.data_step = data_step


class Watch:
  """Counts the updates of a run and looks at the numbers of each.

  With several processes, all of them do the same.
  """

  def __init__(
    self,
    how: config.Run,
    workdir: Workdir,
    step: int,
    data_step: int,
    say: Callable[[str], None],
  ):
    """Starts from a state of `step` updates after `data_step` batches, the workdir cut back to it.

    Args:
      how: `on_nonfinite` and `max_nonfinite`.
      workdir: where each such batch is written down.
      step: updates made.
      data_step: batches consumed.
      say: tells a person of one that is left out.
    """
    self._how, self._workdir, self._say = how, workdir, say
    self._settled, self._data_step = step, data_step
    self._seen = int(sharding.first_process_says(len(workdir.read_nonfinite())))
    self._pending: collections.deque = collections.deque()

  @property
  def step(self) -> int:
    """Updates made, if all is well with those that the device has not been seen to finish."""
    return self._settled + len(self._pending)

  def add(self, numbers: jax.Array | np.ndarray, examples: Callable[[int], jax.Array]) -> None:
    """More steps.

    Args:
      numbers: f32 [n,3], or [3] of one step, as the step returns them.
      examples: those of the batch of step k of them, i32 [B].

    Raises:
      UserError, RollBackError: as `settle`, for a step some time ago.
    """
    rows = [numbers] if numbers.ndim == 1 else numbers
    self._pending.extend((row, functools.partial(examples, k)) for k, row in enumerate(rows))
    self.settle(MAX_AHEAD)

  def settle(self, ahead: int = 0) -> int:
    """Waits until the device is at most `ahead` steps behind; `step`, as it is known then.

    Raises:
      UserError: a batch was not finite and `on_nonfinite` says 'raise', or there were too many.
      RollBackError: it says 'rollback'.
    """
    while len(self._pending) > ahead:
      numbers, examples = self._pending.popleft()
      loss, norm, finite = np.asarray(numbers).tolist()
      self._data_step += 1
      if finite:
        self._settled += 1
      else:
        self._leave_out(loss, norm, examples())
    return self.step

  def _leave_out(self, loss: float, norm: float, examples: jax.Array) -> None:
    """Writes down the batch, which the state has no trace of, and does what the config says."""
    update, batch = self._settled + 1, self._data_step - 1
    self._workdir.append_nonfinite(
      {
        'step': update,
        'data_step': batch,
        'loss': _json(loss),
        'gradient_norm': _json(norm),
        'examples': sharding.gather(examples).tolist(),
      }
    )
    self._seen += 1
    path = self._workdir.shown(self._workdir.nonfinite_path)
    what = f'step {update}: loss {loss:g}, gradient norm {norm:g}'
    if math.isfinite(loss) and math.isfinite(norm):
      what += ', but not all of batch norm is finite'
    if self._how.on_nonfinite == 'raise':
      raise UserError(f'{what}; its examples are in {path}; {_CURE}')
    if self._seen > self._how.max_nonfinite:
      raise UserError(
        f'{what}; that is one more than run.max_nonfinite {self._how.max_nonfinite}, all are in '
        f'{path}; use a lower schedule.base_lr, or allow more'
      )
    of = f'{self._seen} of at most {self._how.max_nonfinite}, see {path}'
    if self._how.on_nonfinite == 'rollback':
      self._say(f'{what}: back to the last checkpoint and past batch {batch} ({of})')
      raise RollBackError(self._data_step)
    self._say(f'{what}: batch {batch} is left out ({of})')


def _json(value: float) -> float | str:
  """JSON has no NaN and no infinity."""
  return value if math.isfinite(value) else str(value)
