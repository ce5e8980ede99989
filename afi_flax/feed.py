"""Where training steps get their batches: from the host, one by one, or on the devices."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from afi_flax import background, config, on_device, report, sharding, speed, steps
from afi_flax.analysis import memory
from afi_flax.data import distort, pipeline, sources
from afi_flax.state import TrainState

Source = sources.Arrays | sources.Encoded


class Compiled(NamedTuple):
  """A training step, ready to be run."""

  program: Callable
  says: str  # how long that took, and what memory it needs


class Taken(NamedTuple):
  """What some training steps came to."""

  state: TrainState  # after them
  numbers: jax.Array | np.ndarray  # f32 [n,3], or [3] of one step, as the step returns them
  examples: Callable[[int], jax.Array]  # of the batch of step k of them: i32 [B]
  count: int = 1  # n


class HostFeed:
  """Training steps on batches that the host makes, a few ahead of the devices.

  Attributes:
    most: steps that can be taken at once.
  """

  most = 1

  def __init__(
    self,
    plan: config.Plan,
    source: Source,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    clock: speed.Clock,
    give_up: Callable[[], bool],
  ):
    """Opens nothing; UserError if the pictures do not go with the plan.

    Args:
      plan: of the run.
      source: of the training split.
      model: of the plan.
      optimizer: of the plan.
      mesh: of the devices.
      clock: goes from the first step on, until someone pauses it; gets the steps that are made.
      give_up: asked while there is no batch; where it says so, there will be none.
    """
    self._plan, self._source, self._mesh = plan, source, mesh
    self._clock, self._give_up = clock, give_up
    _host_batches(plan, source, data_step=0).close()
    self._step = steps.jit_train_step(
      model,
      optimizer,
      plan.data,
      plan.step,
      sharding.replicated(mesh),
      plan.run.deterministic,
    )
    self._compiling: futures.Future[Compiled] | None = None
    self._program: Callable | None = None
    self._batches: Iterator[steps.Batch] = iter(())

  @property
  def compiled(self) -> bool:
    """Whether there is a program."""
    return self._program is not None

  def compile(self, state: TrainState) -> None:
    """Begins to compile for states like this one, of arrays or of their shapes."""
    batch = memory.train_batch(self._plan.data.image_size, self._plan.batch_size, self._mesh)
    self._compiling = compile_step(self._plan, self._mesh, self._step, (state, batch))

  @contextlib.contextmanager
  def begun(self, data_step: int) -> Iterator[None]:
    """While entered, `take` goes on from that batch."""
    batches = pipeline.prefetch(
      _host_batches(self._plan, self._source, data_step),
      lambda batch: sharding.put_batch(batch, self._mesh),
      give_up=self._give_up,
    )
    with contextlib.closing(batches) as self._batches:
      yield

  def take(self, state: TrainState, count: int, console: report.Console) -> Taken | None:
    """Makes steps, without waiting for the devices; None if `give_up` says so.

    Args:
      state: before them; donated.
      count: how many, 1 to `most`.
      console: told of the compilation before the first.

    Raises:
      UserError: a device has less memory than the step needs.
    """
    if self._program is not None:
      self._clock.resume()  # a wait for data is part of the speed
    batch = next(self._batches, None)
    if batch is None:
      return None
    if self._program is None:
      if self._compiling is None:
        self.compile(state)
      self._program = _wait(self._compiling, console, self._give_up)
      if self._program is None:
        return None
      self._clock.resume()
    state, numbers = self._program(state, batch)
    self._clock.steps += 1
    return Taken(state, numbers, lambda k: batch['example'])


class DeviceFeed:
  """Training steps on a data set that the devices hold; its methods are those of `HostFeed`."""

  def __init__(
    self,
    plan: config.Plan,
    source: Source,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    clock: speed.Clock,
  ):
    """Uploads the split; UserError if that cannot be."""
    self._plan, self._mesh, self._clock = plan, mesh, clock
    self._num_examples = len(source)
    _host_batches(plan, source, data_step=0).close()
    self._pictures = on_device.upload(source, plan.data.train_split, mesh)
    step = steps.make_train_step(model, optimizer, plan.data, plan.step)
    whole = sharding.replicated(mesh)
    (device, *_) = mesh.local_devices
    self._chunks = on_device.Chunks(
      on_device.make_train_body(step, plan.seed, plan.data.augment, mesh),
      whole,
      steps.compiler_options(plan.run.deterministic, device),
    )
    zeros = jax.jit(lambda: jnp.zeros([on_device.WINDOW, 3]), out_shardings=whole)
    self._numbers = zeros()
    self._data_step, self._window, self._order = 0, -1, None
    self._compiling: futures.Future[Compiled] | None = None

  @property
  def compiled(self) -> bool:
    """As the other feed's."""
    return self._chunks.program is not None

  def compile(self, state: TrainState) -> None:
    """As the other feed's."""
    order = on_device.order_shapes(self._plan.batch_size, self._mesh)
    arguments = self._chunks.arguments((state, self._numbers), self._pictures, order)
    self._compiling = compile_step(
      self._plan, self._mesh, self._chunks.step, arguments, data_set=self._pictures
    )

  @contextlib.contextmanager
  def begun(self, data_step: int) -> Iterator[None]:
    """As the other feed's."""
    self._data_step = data_step
    yield

  @property
  def most(self) -> int:
    """Steps that can be taken at once."""
    return min(on_device.WINDOW - self._data_step % on_device.WINDOW, self._chunks.most)

  def take(self, state: TrainState, count: int, console: report.Console) -> Taken:
    """As the other feed's, but waits for them."""
    window, first = divmod(self._data_step, on_device.WINDOW)
    if window != self._window:
      self._window = window
      self._order = on_device.send_order(
        self._num_examples, self._plan.seed, self._plan.batch_size, window, self._mesh
      )
    inputs = self._pictures, self._order
    if self._chunks.program is None:
      if self._compiling is None:
        self.compile(state)
      self._chunks.program = _wait(self._compiling, console, lambda: False)
    self._clock.resume()
    state, self._numbers = self._chunks((state, self._numbers), first, count, *inputs)
    self._clock.steps += count
    self._data_step += count
    _, example = self._order
    numbers = np.asarray(self._numbers)[first : first + count].copy()  # they will be overwritten
    return Taken(state, numbers, lambda k: example[first + k], count)


def compile_step(
  plan: config.Plan,
  mesh: Mesh,
  step: jax.stages.Wrapped,
  arguments: tuple,
  data_set: Sequence[jax.Array] = (),
) -> futures.Future[Compiled]:
  """Traces a step, and compiles it in the background: a start has other things to do.

  It is compiled ahead of the first call: a later batch of another shape is an error, not a wait.

  Args:
    plan: of the run.
    mesh: of the devices.
    step: to compile.
    arguments: like those of the calls to come, or their shapes.
    data_set: those of them, or parts of them, that are a whole data set.

  Returns:
    What ends with UserError if a device has less memory than the step needs.
  """
  start = time.perf_counter()
  cure = memory.train_cure(plan, mesh.size)
  share = ''
  if data_set:
    cure += ', or --config.data.on_device=False'
    size = sum(x.nbytes for x in data_set) / memory.MIB
    share = f', of which the data set {size:,.0f} MiB'
  lowered = step.lower(*arguments)

  def finish() -> Compiled:
    program = memory.compile_or_explain(lowered, cure)
    needs = memory.check_fits(program, mesh.local_devices, cure)
    took = f'{time.perf_counter() - start:.1f} s'
    return Compiled(
      program, f'Compiled the training step in {took}; it needs {needs} of memory{share}.'
    )

  return background.begin(finish)


def _wait(
  compiling: futures.Future[Compiled], console: report.Console, give_up: Callable[[], bool]
) -> Callable | None:
  """The program, or None where `give_up` says so before it is there."""
  if not compiling.done() and not console.has_bar:
    console.say('Compiling the training step ...')
  while not futures.wait([compiling], timeout=0.2).done:
    if give_up():
      return None
  program, says = compiling.result()
  console.say(says)
  return program


def _host_batches(plan: config.Plan, source: Source, data_step: int) -> Iterator[pipeline.Batch]:
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
