"""The training loop: reads top to bottom and decides when.

What is due at a step is done between two steps, in one order: log, save, evaluate, keep the best,
stop. All of it is a function of the step and of what is on disk, so a run that is stopped anywhere
and started again goes through the same states and writes the same lines as one that was not.
"""

import contextlib
import dataclasses
import secrets
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import linen as nn
from jax.sharding import Mesh

from afi_flax import config as config_lib
from afi_flax import feed, metrics, models, nonfinite, optim, report, sharding, speed, start
from afi_flax import state as state_lib
from afi_flax.checkpoint import Checkpoints
from afi_flax.data import sources
from afi_flax.errors import StoppedError, UserError
from afi_flax.evaluate import Evaluator
from afi_flax.workdir import StopSignals, Workdir


def train(config: ml_collections.ConfigDict, folder: str) -> None:
  """Trains as the config says, from where the folder's run stands.

  Args:
    config: as a file in `configs/` returns it.
    folder: the run's folder: new, or of the same run.

  Raises:
    UserError: a mistake in the config, the data or the folder; numbers that are not finite.
    FailedError: what the run writes cannot be written any more.
    StoppedError: SIGTERM or SIGINT came, and the state is saved.
  """
  # Whatever a config can get wrong shows before anything is written.
  plan = config_lib.resolve(config, jax.device_count())
  with (
    StopSignals() as signals,
    _open(plan, Workdir(folder), signals, config.to_dict()) as parts,
  ):
    past = 0
    while True:
      training = _Pass(parts, past)
      try:
        stopped = training.go_on()
        break
      except nonfinite.RollBackError as back:
        past = back.data_step
        del training  # so that its state makes room for another
  if stopped:
    raise StoppedError(
      f'stopped by {signals.requested or "a signal to another process"} at step {training.step}; '
      'the same command goes on with it'
    )
  training.reporter.summary(parts.evaluator.split)


@dataclasses.dataclass(frozen=True)
class _Parts:
  """What a run is made of, from its start to its end."""

  plan: config_lib.Plan
  workdir: Workdir
  signals: StopSignals
  mesh: Mesh
  model: nn.Module
  optimizer: optax.GradientTransformation
  feed: feed.HostFeed | feed.DeviceFeed
  evaluator: Evaluator
  clock: speed.Clock
  checkpoints: Checkpoints
  best: Checkpoints
  trace: speed.Trace
  give_up: Callable[[], bool]  # whether to stop at once, which only a process that is alone may
  taken: start.Taken | None  # of run.init_from, where the run is new


@contextlib.contextmanager
def _open(
  plan: config_lib.Plan, workdir: Workdir, signals: StopSignals, config: dict
) -> Iterator[_Parts]:
  """Opens the data, then the workdir, which is locked while this is entered."""
  data, how, closing = plan.data, plan.run, contextlib.closing
  mesh = sharding.make_mesh()
  model, optimizer = models.create_model(**vars(plan.model)), optim.make(plan.optim)
  clock = speed.Clock(plan, model, mesh)
  source = sources.open_split(data.dataset, data.data_dir, data.train_split)
  given = plan, source, model, optimizer, mesh, clock
  alone = jax.process_count() == 1  # several must agree on where to stop

  def give_up() -> bool:
    return alone and signals.requested is not None

  steps = feed.DeviceFeed(*given) if data.on_device else feed.HostFeed(*given, give_up)
  evaluator = Evaluator(plan, model, mesh)
  is_new = sharding.first_process_says(workdir.is_new)
  taken = start.init_from(plan, mesh) if is_new and how.init_from and not how.resume else None
  token = int(sharding.first_process_says(secrets.randbelow(2**24)))
  dataset, writer = dataclasses.asdict(plan.dataset), jax.process_index() == 0
  with (
    workdir.open_for_training(config, dataset, writer, token),
    closing(Checkpoints(workdir.checkpoints, how.keep, how.saves_at)) as last,
    closing(Checkpoints(workdir.best, 1, how.saves_at)) as best,
    closing(speed.Trace(workdir.profile, how.profile_steps)) as trace,
  ):
    yield _Parts(
      plan, workdir, signals, mesh, model, optimizer, steps, evaluator, clock, last, best, trace,
      give_up, taken,
    )  # fmt: skip


class _Pass:
  """A run from its last checkpoint, or where it starts, to its end, or until it is rolled back.

  Attributes:
    reporter: what a person sees of it.
  """

  def __init__(self, parts: _Parts, past: int):
    """Restores or makes the state and takes what is newer out of the folder.

    Args:
      parts: of the run.
      past: 0, or the first batch to take, later than the one that the checkpoint would go on with.
    """
    plan, workdir = parts.plan, parts.workdir
    self._parts, self._plan, self._workdir = parts, plan, workdir
    parts.clock.pause()
    parts.clock.speed()  # of steps that may have been rolled back
    self._zeros = jax.jit(metrics.zeros, out_shardings=sharding.replicated(parts.mesh))
    self._rate = jax.jit(optim.schedule(plan.optim))  # else each of its operations is compiled
    initial = self._begin()
    self._state, self._origin = start.initial_state(
      plan, parts.mesh, parts.checkpoints, initial, rolling_back=past > 0, taken=parts.taken
    )
    if past:
      counter = jax.device_put(jnp.int32(past), sharding.replicated(parts.mesh))
      self._state = self._state.replace(data_step=counter)
    step, self._data_step = int(self._state.step), int(self._state.data_step)
    parts.checkpoints.set_aside(newer_than=step)
    # One that is not on schedule was found where max_steps ended the run, and has no line any more.
    passing = [n for n in parts.best.steps() if not plan.run.saves_at(n)]
    parts.best.set_aside(step, [n for n in passing if n < step or not plan.run.evaluates_at(n)])
    workdir.cut_back(step, self._data_step)
    self._best_top1 = _best_so_far(workdir, parts.evaluator.split, parts.best.steps())
    self._attended = -1  # the last step whose log lines, checkpoint and evaluation are done
    self.reporter = report.Reporter(
      workdir,
      total_steps=plan.optim.total_steps,
      stop_step=plan.run.stop_step,
      steps_per_epoch=plan.steps_per_epoch,
      start_step=step,
      enabled=jax.process_index() == 0,
      title=f'{plan.model.name} on {plan.dataset.name}',
      compiled=parts.feed.compiled,
    )
    self._watch = nonfinite.Watch(plan.run, workdir, step, self._data_step, self.reporter.say)

  def _begin(self) -> state_lib.Initial:
    """Has compiled in the background what will be needed, and takes longest of a start."""
    parts, plan = self._parts, self._plan
    initial = start.make_initial(plan, parts.model, parts.optimizer, parts.mesh)
    there = parts.checkpoints.steps()
    new = not there and not plan.run.resume
    if new:
      initial.make()
    if not parts.feed.compiled and not (there and there[-1] >= plan.run.stop_step):
      parts.feed.compile(initial.abstract)
    while new and not initial.ready(seconds=0.2):
      if parts.give_up():
        raise StoppedError(
          f'stopped by {parts.signals.requested} before the first step; the same command starts it'
        )
    return initial

  @property
  def step(self) -> int:
    """Updates made, if all is well with those that the device has not been seen to finish."""
    return self._watch.step

  def go_on(self) -> bool:
    """To the end; whether it was stopped.

    Raises:
      nonfinite.RollBackError: it is to go on anew, past a batch.
    """
    with contextlib.closing(self.reporter), self._parts.feed.begun(self._data_step):
      devices = self._parts.mesh.size
      self.reporter.say(_introduction(self._plan, self._state, devices, self._origin))
      while True:
        stop = self._stopping(self.step)
        if stop or self._plan.run.due_at(self.step):
          stop = self._attend(stop)
          if stop or self.step >= self._plan.run.stop_step:
            return stop
        self._take_steps()

  def _stopping(self, step: int) -> bool:
    """Whether to stop after this step, or batch of an evaluation."""
    return sharding.agree_to_stop(self._parts.signals.requested is not None, step)

  def _attend(self, stop: bool) -> bool:
    """Does what is due after this step, once; whether to stop."""
    step, how = self._watch.settle(), self._plan.run
    self._parts.clock.pause()
    new, self._attended = step != self._attended, step
    evaluate = new and how.evaluates_at(step)
    if new and (step % how.log_every == 0 or step >= how.stop_step):
      self._log(step)
    if step and (stop or evaluate or (new and how.saves_at(step))):
      self._save(step)
    if evaluate:
      stop = not self._evaluate(step) or stop
    return stop

  def _log(self, step: int) -> None:
    if not int(self._state.metric_sums['examples']):
      return  # right after a restart
    record = {'step': step, 'split': 'train'} | metrics.means([self._state.metric_sums])
    partial = _partial(self._plan, step)
    self.reporter.train(record | self._parts.clock.speed() | partial, float(self._rate(step - 1)))
    if not partial:
      self._state = self._state.replace(metric_sums=self._zeros())

  def _save(self, step: int) -> None:
    if not state_lib.all_finite(self._state):
      raise UserError(
        f'the update of a step up to {step} was too large for a float, so nothing is saved; use a '
        'lower schedule.base_lr'
      )
    # Or a kill could leave this one, the line of that evaluation, and no best.
    self._parts.best.wait()
    self._workdir.sync()
    self._parts.checkpoints.save(step, self._state)

  def _evaluate(self, step: int) -> bool:
    """False if a signal ended it."""
    evaluator, progress = self._parts.evaluator, self.reporter.evaluating
    record = evaluator(self._state.eval_variables, progress, self._stopping)
    if record is None:
      return False
    if record['top1'] >= self._best_top1:
      self._best_top1 = record['top1']
      self._parts.best.save(step, self._state)
    self.reporter.evaluation({'step': step} | record)
    self.reporter.draw_curves()
    return True

  def _take_steps(self) -> None:
    """As many as the feed takes at once, past nothing that is to be done between two."""
    parts = self._parts
    limits = parts.feed.most, parts.trace.ahead, sharding.steps_to_agreement(self.step)
    count = self._plan.run.due_in(self.step, min(n for n in limits if n is not None))
    taken = parts.feed.take(self._state, count, self.reporter.console)
    if taken is None:
      return  # a signal came, and nothing else
    self._state = taken.state
    self._watch.add(taken.numbers, taken.examples)
    parts.checkpoints.poll()
    parts.best.poll()
    self._workdir.poll()
    self.reporter.progress(self.step)
    parts.trace.after(taken.count, taken.numbers)


def _introduction(plan: config_lib.Plan, state, device_count: int, origin: str) -> str:
  """What is about to be trained, in words and a table."""
  data, optimum = plan.dataset, plan.optim
  kind = jax.devices()[0].device_kind
  return '\n'.join(
    (
      state_lib.parameter_table(state.params, plan.step.frozen),
      f'{plan.model.name} ({plan.model.dtype}) on {data.name}: {data.num_train:,} training and '
      f'{data.num_eval:,} evaluation examples, {len(data.class_names)} classes',
      f'{optimum.total_steps:,} steps of {plan.batch_size} on {device_count} x {kind}, peak '
      f'learning rate {optimum.peak_lr:g}; {origin}',
    )
  )


def _partial(plan: config_lib.Plan, step: int) -> dict[str, bool]:
  """What marks a line before which max_steps came: a run that goes on writes the whole one."""
  whole = step % plan.run.log_every == 0 or step == plan.optim.total_steps
  return {} if whole else {'partial': True}


def _best_so_far(workdir: Workdir, split: str, steps_there: list[int]) -> float:
  """The top-1 of the best checkpoint that is there, as the first process knows it; else -1."""
  records = workdir.read_metrics()
  seen = [r['top1'] for r in records if r['split'] == split and r['step'] in steps_there]
  return sharding.first_process_says(max(seen, default=-1.0))
