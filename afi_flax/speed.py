"""How fast training goes: pictures a second, utilisation of the devices, a trace."""

import time

import jax
import numpy as np
from absl import logging

from afi_flax import config
from afi_flax.analysis import cost, devices


class Clock:
  """Speed of the training steps: evaluating, saving and compiling left out."""

  def __init__(self, plan: config.Plan, model, mesh):
    self.steps = 0
    self._batch_size = plan.batch_size
    peak = devices.peak_flops(list(mesh.devices.flat))
    # Seconds that a picture would take at the devices' peak; None where that is not known.
    of_picture = model, plan.data.image_size, plan.step.frozen
    self._at_best = peak and cost.train_flops(*of_picture) / peak
    self._seconds = 0.0
    self._since: float | None = None

  def resume(self) -> None:
    if self._since is None:
      self._since = time.perf_counter()

  def pause(self) -> None:
    if self._since is not None:
      self._seconds += time.perf_counter() - self._since
      self._since = None

  def speed(self) -> dict[str, float]:
    """`images_per_second` over the steps since it was last asked; 0 if there was none.

    And `mfu`, model FLOPs utilisation: the share of the devices' bfloat16 peak that the network's
    own operations are, where the peak is known.
    """
    speed = self._batch_size * self.steps / self._seconds if self.steps else 0.0
    self.steps, self._seconds = 0, 0.0
    mfu = {} if self._at_best is None else {'mfu': speed * self._at_best}
    return {'images_per_second': speed} | mfu


class Trace:
  """A trace of some steps for XProf, from the tenth on, when compiling and caches are behind."""

  def __init__(self, folder, num_steps: int):
    self._folder, self._num_steps = folder, num_steps
    self._active = self._done = False
    self._steps = 0  # of this process
    self._turns = (10, 10 + num_steps) if num_steps else ()

  @property
  def ahead(self) -> int | None:
    """Steps until it begins or ends; None: it does not any more."""
    return next((turn - self._steps for turn in self._turns if turn > self._steps), None)

  def after(self, steps: int, numbers: jax.Array | np.ndarray) -> None:
    """After so many more steps, not past `ahead`, and what they returned."""
    self._steps += steps
    if self._steps in self._turns:
      jax.block_until_ready(numbers)
      self.close()
      if self._steps == 10:
        jax.profiler.start_trace(str(self._folder))
        self._active = self._done = True

  def close(self) -> None:
    if self._active:
      jax.profiler.stop_trace()
      self._active = False
    elif self._num_steps and not self._done:
      logging.warning('no trace: run.profile_steps begins after the tenth step')
