"""The training loop: reads top to bottom and decides when.

What is due at a step is done between two steps, in one order: log, save, evaluate, keep the best,
stop. All of it is a function of the step and of what is on disk, so a run that is stopped anywhere
and started again goes through the same states and writes the same lines as one that was not.
"""

import contextlib
import dataclasses
import secrets
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_collections

from afi_flax import config as config_lib
from afi_flax import metrics, models, nonfinite, optim, report, run, sharding, speed, steps
from afi_flax import state as state_lib
from afi_flax.analysis import memory
from afi_flax.checkpoint import Checkpoints
from afi_flax.data import distort, pipeline, sources
from afi_flax.errors import StoppedError, UserError
from afi_flax.evaluate import Evaluator
from afi_flax.workdir import StopSignals, Workdir

_AGREE_EVERY = 8  # steps; processes that each may get a signal ask each other, which costs a trip


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
  with StopSignals() as signals:
    training = _Training(plan, Workdir(folder), signals)
    with training.opened(config.to_dict()):
      past = 0
      while True:
        try:
          stopped = training.go_on(past)
          break
        except nonfinite.RollBackError as back:
          past = back.data_step
  if stopped:
    raise StoppedError(
      f'stopped by {signals.requested or "a signal to another process"} at step {training.step}; '
      'the same command goes on with it'
    )
  training.reporter.summary(training.evaluator.split)


class _Training:
  """A run while it trains.

  Attributes:
    evaluator: of the split that is evaluated as it goes.
    reporter: what a person sees of it.
  """

  def __init__(self, plan: config_lib.Plan, workdir: Workdir, signals: StopSignals):
    """Opens the data; nothing is written yet. The signals may ask for a stop."""
    self._plan, self._workdir, self._signals = plan, workdir, signals
    self._mesh = sharding.make_mesh()
    self._model = models.create_model(**vars(plan.model))
    self._optimizer = optim.make(plan.optim)
    data = plan.data
    self._source = sources.open_split(data.dataset, data.data_dir, data.train_split)
    _host_batches(plan, self._source, data_step=0).close()
    self.evaluator = Evaluator(plan, self._model, self._mesh)
    self._rate = optim.schedule(plan.optim)
    self._zeros = jax.jit(metrics.zeros, out_shardings=sharding.replicated(self._mesh))
    self._clock = speed.Clock(plan, self._model, self._mesh)
    self._taken = 0  # steps, by this process
    self._program: jax.stages.Compiled | None = None
    self._state: state_lib.TrainState | None = None

  @property
  def step(self) -> int:
    """Updates made, if all is well with those that the device has not been seen to finish."""
    return self._watch.step

  @contextlib.contextmanager
  def opened(self, config: dict) -> Iterator[None]:
    """While entered, the workdir is locked and its checkpoints are open."""
    token = int(sharding.first_process_says(secrets.randbelow(2**24)))
    dataset, writer = dataclasses.asdict(self._plan.dataset), jax.process_index() == 0
    workdir, how, closing = self._workdir, self._plan.run, contextlib.closing
    with (
      workdir.open_for_training(config, dataset, writer, token),
      closing(Checkpoints(workdir.checkpoints, how.keep, how.saves_at)) as last,
      closing(Checkpoints(workdir.best, 1, how.saves_at)) as best,
      closing(speed.Trace(workdir.profile, how.profile_steps)) as trace,
    ):
      self._checkpoints, self._best, self._trace = last, best, trace
      yield

  def go_on(self, past: int) -> bool:
    """From the last checkpoint, or where the run starts, to its end.

    Args:
      past: 0, or the first batch to take, later than the one that the checkpoint would go on with.

    Returns:
      Whether it was stopped.

    Raises:
      nonfinite.RollBackError: it is to go on anew, past a batch.
    """
    origin = self._start(past)
    with (
      contextlib.closing(self.reporter),
      contextlib.closing(self._open_batches()) as batches,
    ):
      self.reporter.say(_introduction(self._plan, self._state, self._mesh.size, origin))
      while True:
        stop = _stopping(self._signals, self.step)
        if stop or self._plan.run.due_at(self.step):
          stop = self._attend(stop)
          if stop or self.step >= self._plan.run.stop_step:
            return stop
        self._take_step(batches)

  def _start(self, past: int) -> str:
    """Restores or makes the state and takes what is newer out of the folder; where from."""
    plan, workdir, self._state = self._plan, self._workdir, None
    self._clock.pause()
    self._clock.speed()  # of steps that may have been rolled back
    self._state, origin = _initial_state(
      plan, self._model, self._optimizer, self._mesh, self._checkpoints, rolling_back=past > 0
    )
    if past:
      counter = jax.device_put(jnp.int32(past), sharding.replicated(self._mesh))
      self._state = self._state.replace(data_step=counter)
    step, data_step = int(self._state.step), int(self._state.data_step)
    self._checkpoints.set_aside(newer_than=step)
    # One that is not on schedule was found where max_steps ended the run, and has no line any more.
    passing = [n for n in self._best.steps() if not plan.run.saves_at(n)]
    self._best.set_aside(step, [n for n in passing if n < step or not plan.run.evaluates_at(n)])
    workdir.cut_back(step, data_step)
    self._best_top1 = _best_so_far(workdir, self.evaluator.split, self._best.steps())
    self._attended = -1  # the last step whose log lines, checkpoint and evaluation are done
    self.reporter = report.Reporter(
      workdir,
      total_steps=plan.optim.total_steps,
      stop_step=plan.run.stop_step,
      steps_per_epoch=plan.steps_per_epoch,
      start_step=step,
      enabled=jax.process_index() == 0,
      title=f'{plan.model.name} on {plan.dataset.name}',
      compiled=self._program is not None,
    )
    self._watch = nonfinite.Watch(plan.run, workdir, step, data_step, self.reporter.say)
    return origin

  def _open_batches(self) -> Iterator[steps.Batch]:
    alone = jax.process_count() == 1  # several must agree on where to stop
    return pipeline.prefetch(
      _host_batches(self._plan, self._source, int(self._state.data_step)),
      lambda batch: sharding.put_batch(batch, self._mesh),
      give_up=lambda: alone and self._signals.requested is not None,
    )

  def _attend(self, stop: bool) -> bool:
    """Does what is due after this step, once; whether to stop."""
    step, how = self._watch.settle(), self._plan.run
    self._clock.pause()
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
    self.reporter.train(record | self._clock.speed() | partial, float(self._rate(step - 1)))
    if not partial:
      self._state = self._state.replace(metric_sums=self._zeros())

  def _save(self, step: int) -> None:
    if not state_lib.all_finite(self._state):
      raise UserError(
        f'the update of a step up to {step} was too large for a float, so nothing is saved; use a '
        'lower schedule.base_lr'
      )
    self._best.wait()  # or a kill could leave this one, the line of that evaluation, and no best
    self._workdir.sync()
    self._checkpoints.save(step, self._state)

  def _evaluate(self, step: int) -> bool:
    """False if a signal ended it."""
    record = self.evaluator(
      self._state.eval_variables,
      self.reporter.evaluating,
      lambda batches: _stopping(self._signals, batches),
    )
    if record is None:
      return False
    if record['top1'] >= self._best_top1:
      self._best_top1 = record['top1']
      self._best.save(step, self._state)
    self.reporter.evaluation({'step': step} | record)
    self.reporter.draw_curves()
    return True

  def _take_step(self, batches: Iterator[steps.Batch]) -> None:
    if self._program is not None:
      self._clock.resume()  # a wait for data is part of the speed
    batch = next(batches, None)
    if batch is None:
      return  # a signal came, and nothing else
    if self._program is None:
      self._program = self._compile(batch)
      self._clock.resume()
    self._state, numbers = self._program(self._state, batch)
    self._taken += 1
    self._clock.steps += 1
    self._watch.add(numbers, batch['example'])
    self._checkpoints.poll()
    self._best.poll()
    self._workdir.poll()
    self.reporter.progress(self.step)
    self._trace.after(self._taken, numbers)

  def _compile(self, batch: steps.Batch) -> jax.stages.Compiled:
    """Compiles ahead of the first call: a later batch of another shape is an error, not a wait.

    Says what memory the step needs, or raises UserError if a device has less.
    """
    plan, mesh, start = self._plan, self._mesh, time.perf_counter()
    if not self.reporter.console.has_bar:
      self.reporter.say('Compiling the training step ...')
    train_step = steps.jit_train_step(
      self._model,
      self._optimizer,
      plan.data,
      plan.step,
      sharding.replicated(mesh),
      plan.model.remat,
      plan.run.deterministic,
    )
    cure = memory.train_cure(plan, mesh.size)
    compiled = memory.compile_or_explain(train_step.lower(self._state, batch), cure)
    needs = memory.check_fits(compiled, mesh.local_devices, cure)
    seconds = time.perf_counter() - start
    self.reporter.say(f'Compiled the training step in {seconds:.1f} s; it needs {needs} of memory.')
    return compiled


def _initial_state(
  plan: config_lib.Plan, model, optimizer, mesh, checkpoints: Checkpoints, rolling_back: bool
) -> tuple[state_lib.TrainState, str]:
  """Where the run starts, and in words: its own folder, else run.resume, run.init_from, scratch."""
  replicated = sharding.replicated(mesh)
  size, ema = plan.data.image_size, plan.step.regularisation.ema_decay > 0
  abstract = state_lib.abstract(model, optimizer, size, replicated, ema)
  if found := checkpoints.restore(abstract, on_schedule=rolling_back):
    return found[0], f'resumed at step {found[1]}'
  if plan.run.resume:
    state, step = run.restore(Workdir(plan.run.resume), abstract, 'last')
    return state, f'goes on from step {step} of {plan.run.resume}'
  state = state_lib.initialise(model, optimizer, size, plan.seed, replicated, ema)
  if plan.run.init_from:
    other = run.load_run(plan.run.init_from, mesh=mesh)
    if jax.tree.map(jnp.shape, other.variables) != jax.tree.map(jnp.shape, state.variables):
      raise UserError(
        f'run.init_from {plan.run.init_from} holds {other.plan.model.name!r} of '
        f'{len(other.class_names)} classes; give a run of {plan.model.name!r} of '
        f'{plan.model.num_classes} classes'
      )
    copy = jax.tree.map(jnp.copy, other.variables)  # the step frees params and ema one by one
    state = state.replace(**other.variables, ema=copy if ema else None)
    return state, f'starts with the weights of step {other.step} of {plan.run.init_from}'
  return state, 'starts from scratch'


def _introduction(plan: config_lib.Plan, state, device_count: int, origin: str) -> str:
  """What is about to be trained, in words and a table."""
  data, optimum = plan.dataset, plan.optim
  kind = jax.devices()[0].device_kind
  return '\n'.join(
    (
      state_lib.parameter_table(state.params),
      f'{plan.model.name} ({plan.model.dtype}) on {data.name}: {data.num_train:,} training and '
      f'{data.num_eval:,} evaluation examples, {len(data.class_names)} classes',
      f'{optimum.total_steps:,} steps of {plan.batch_size} on {device_count} x {kind}, peak '
      f'learning rate {optimum.peak_lr:g}; {origin}',
    )
  )


def _host_batches(plan: config_lib.Plan, source, data_step: int):
  return pipeline.train_batches(
    source,
    seed=plan.seed,
    data_step=data_step,
    batch_size=plan.batch_size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    augment=plan.data.augment,
    antialias=plan.data.antialias,
    distortion=distort.make(
      plan.data.auto_augment, plan.data.color_jitter, plan.data.lighting, plan.data.mean
    ),
    image_size=plan.data.image_size,
    workers=plan.run.workers,
    max_unreadable=plan.data.max_unreadable,
  )


def _partial(plan: config_lib.Plan, step: int) -> dict[str, bool]:
  """What marks a line before which max_steps came: a run that goes on writes the whole one."""
  whole = step % plan.run.log_every == 0 or step == plan.optim.total_steps
  return {} if whole else {'partial': True}


def _stopping(signals: StopSignals, step: int) -> bool:
  """Whether to stop after this step, or batch of an evaluation, on which all processes agree."""
  if jax.process_count() == 1:
    return signals.requested is not None
  return step % _AGREE_EVERY == 0 and sharding.any_process(signals.requested is not None)


def _best_so_far(workdir: Workdir, split: str, steps_there: list[int]) -> float:
  """The top-1 of the best checkpoint that is there, as the first process knows it; else -1."""
  records = workdir.read_metrics()
  seen = [r['top1'] for r in records if r['split'] == split and r['step'] in steps_there]
  return sharding.first_process_says(max(seen, default=-1.0))
