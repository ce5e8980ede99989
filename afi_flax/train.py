"""The training loop: reads top to bottom and decides when.

What is due at a step is done between two steps, in one order: log, save, evaluate, keep the best,
stop. All of it is a function of the step and of what is on disk, so a run that is stopped anywhere
and started again goes through the same states and writes the same lines as one that was not.
"""

import collections
import contextlib
import dataclasses
import math
import secrets
import time

import jax
import jax.numpy as jnp
import ml_collections

from afi_flax import config as config_lib
from afi_flax import metrics, models, optim, report, run, sharding, speed, steps
from afi_flax import state as state_lib
from afi_flax.analysis import memory
from afi_flax.checkpoint import Checkpoints
from afi_flax.data import distort, pipeline, sources
from afi_flax.errors import StoppedError, UserError
from afi_flax.evaluate import Evaluator
from afi_flax.workdir import StopSignals, Workdir

# Steps that the host may be ahead of the device, and so late in noticing a loss that is not finite.
MAX_AHEAD = 8


def train(config: ml_collections.ConfigDict, folder: str) -> None:
  """Trains as the config says, from where the folder's run stands.

  Args:
    config: as a file in `configs/` returns it.
    folder: the run's folder: new, or of the same run.

  Raises:
    UserError: a mistake in the config, the data or the folder; a loss that is not finite.
    StoppedError: SIGTERM or SIGINT came, and the state is saved.
  """
  # Whatever a config can get wrong shows before anything is written.
  plan = config_lib.resolve(config, jax.device_count())
  mesh = sharding.make_mesh()
  model = models.create_model(**vars(plan.model))
  optimizer = optim.make(plan.optim)
  source = sources.open_split(plan.data.dataset, plan.data.data_dir, plan.data.train_split)
  _host_batches(plan, source, data_step=0).close()
  evaluator = Evaluator(plan, model, mesh)

  workdir = Workdir(folder)
  writer = jax.process_index() == 0
  token = int(sharding.first_process_says(secrets.randbelow(2**24)))  # exact in a float32
  with (
    workdir.open_for_training(config.to_dict(), dataclasses.asdict(plan.dataset), writer, token),
    StopSignals() as signals,
    contextlib.closing(Checkpoints(workdir.checkpoints, plan.run.keep)) as checkpoints,
    contextlib.closing(Checkpoints(workdir.best, keep=1)) as best,
  ):
    state, origin = _initial_state(plan, model, optimizer, mesh, checkpoints)
    step = start = int(state.step)
    checkpoints.set_aside(newer_than=start)
    best.set_aside(newer_than=start)
    workdir.cut_back(start)
    best_top1 = _best_so_far(workdir, evaluator.split, best.steps())
    rate = optim.schedule(plan.optim)
    train_step = steps.jit_train_step(
      model, optimizer, plan.data, plan.step, sharding.replicated(mesh), plan.model.remat
    )
    zeros = jax.jit(metrics.zeros, out_shardings=sharding.replicated(mesh))
    batches = pipeline.prefetch(
      _host_batches(plan, source, int(state.data_step)),
      lambda batch: sharding.put_batch(batch, mesh),
    )
    losses = collections.deque()  # of the steps that the device has not been seen to finish
    clock = speed.Clock(plan, model, mesh)
    with (
      contextlib.closing(_reporter(workdir, plan, start, writer)) as reporter,
      contextlib.closing(speed.Trace(workdir.profile, plan.run.profile_steps)) as trace,
      contextlib.closing(batches),
    ):
      reporter.say(_introduction(plan, state, mesh.size, origin))
      while True:
        stop = _stopping(signals, step)
        at_end = step >= plan.run.stop_step
        log = step % plan.run.log_every == 0 or at_end
        evaluate = plan.run.evaluates_at(step)
        save = step % plan.run.save_every == 0 or evaluate or stop
        if log or save:
          _check_finite(losses, step)
          clock.pause()
        if log and int(state.metric_sums['examples']):  # none right after a restart
          record = {'step': step, 'split': 'train'} | metrics.means([state.metric_sums])
          reporter.train(record | clock.speed() | _partial(plan, step), float(rate(step - 1)))
          if not _partial(plan, step):
            state = state.replace(metric_sums=zeros())
        if save and step > 0:
          workdir.sync()
          checkpoints.save(step, state)
        if evaluate:
          record = evaluator(
            state.eval_variables, reporter.evaluating, lambda batches: _stopping(signals, batches)
          )
          stop = stop or record is None
          if record:
            if record['top1'] >= best_top1:
              best_top1 = record['top1']
              best.save(step, state)
            reporter.evaluation({'step': step} | record)
            reporter.draw_curves()
        if stop or at_end:
          break

        if step == start:
          batch = next(batches)
          train_step = _compile(train_step, state, batch, plan, mesh, reporter)
          clock.resume()
        else:
          clock.resume()
          batch = next(batches)  # a wait for data is part of the speed
        state, loss = train_step(state, batch)
        step += 1
        clock.steps += 1
        losses.append(loss)
        _check_finite(losses, step, ahead=MAX_AHEAD)
        checkpoints.poll()
        best.poll()
        workdir.poll()
        reporter.progress(step)
        trace.after(step - start, loss)
  if stop:
    raise StoppedError(
      f'stopped by {signals.requested or "a signal to another process"} at step {step}; '
      'the same command goes on with it'
    )
  reporter.summary(evaluator.split)


def _initial_state(
  plan: config_lib.Plan, model, optimizer, mesh, checkpoints: Checkpoints
) -> tuple[state_lib.TrainState, str]:
  """Where the run starts, and in words: its own folder, else run.resume, run.init_from, scratch."""
  replicated = sharding.replicated(mesh)
  size, ema = plan.data.image_size, plan.step.regularisation.ema_decay > 0
  abstract = state_lib.abstract(model, optimizer, size, replicated, ema)
  if found := checkpoints.restore(abstract):
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


def _reporter(
  workdir: Workdir, plan: config_lib.Plan, start: int, enabled: bool
) -> report.Reporter:
  return report.Reporter(
    workdir,
    total_steps=plan.optim.total_steps,
    stop_step=plan.run.stop_step,
    steps_per_epoch=plan.steps_per_epoch,
    start_step=start,
    enabled=enabled,
    title=f'{plan.model.name} on {plan.dataset.name}',
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


def _compile(train_step, state, batch, plan: config_lib.Plan, mesh, reporter: report.Reporter):
  """Compiles ahead of the first call: a later batch of another shape is an error, not a wait.

  Says what memory the step needs, or raises UserError if a device has less.
  """
  start = time.perf_counter()
  if not reporter.console.has_bar:
    reporter.say('Compiling the training step ...')
  cure = memory.train_cure(plan, mesh.size)
  compiled = memory.compile_or_explain(train_step.lower(state, batch), cure)
  needs = memory.check_fits(compiled, mesh.local_devices, cure)
  seconds = time.perf_counter() - start
  reporter.say(f'Compiled the training step in {seconds:.1f} s; it needs {needs} of memory.')
  return compiled


def _partial(plan: config_lib.Plan, step: int) -> dict[str, bool]:
  """What marks a line before which max_steps came: a run that goes on writes the whole one."""
  whole = step % plan.run.log_every == 0 or step == plan.optim.total_steps
  return {} if whole else {'partial': True}


def _stopping(signals: StopSignals, step: int) -> bool:
  """Whether to stop after this step, or batch of an evaluation.

  Several processes must agree: every few steps, as it costs a trip.
  """
  if jax.process_count() == 1:
    return signals.requested is not None
  return step % MAX_AHEAD == 0 and sharding.any_process(signals.requested is not None)


def _check_finite(losses: collections.deque, step: int, ahead: int = 0) -> None:
  """Waits until the device is at most `ahead` steps behind `step`, and looks at their losses."""
  while len(losses) > ahead:
    loss = float(losses.popleft())
    if not math.isfinite(loss):
      raise UserError(
        f'the loss of step {step - len(losses)} is {loss}; use a lower schedule.base_lr, more '
        'schedule.warmup_epochs or optimizer.clip_norm=1'
      )


def _best_so_far(workdir: Workdir, split: str, steps_there: list[int]) -> float:
  """The top-1 of the best checkpoint that is there, as the first process knows it; else -1."""
  records = workdir.read_metrics()
  seen = [r['top1'] for r in records if r['split'] == split and r['step'] in steps_there]
  return sharding.first_process_says(max(seen, default=-1.0))
