"""A data set that lives on the devices, and many batches of it at once.

The host says which examples are next; the devices gather and augment them, by the code and with the
numbers of the host's pipeline. How many batches are taken at once changes no bit of the result.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from afi_flax import metrics, sharding, steps
from afi_flax.analysis import devices as hardware
from afi_flax.analysis import memory
from afi_flax.data import pipeline, sources
from afi_flax.errors import UserError
from afi_flax.state import TrainState

WINDOW = 256  # batches whose examples are sent at once
_PATIENCE = 2.0  # seconds that a signal, the bar and a line may wait for a chunk
_CURE = 'use --config.data.on_device=False'

PyTree = Any
Pictures = tuple[jax.Array, jax.Array]
Order = tuple[jax.Array, jax.Array]
Body = Callable[..., PyTree]  # (k i32 [], carry, *inputs) -> carry


class Chunks:
  """Runs a body for some k in a row: in one program that loops, on the devices.

  The trip count is an argument of the program, so that one serves chunks of any length.

  XLA's CPU compiler rewrites a convolution's gradients into what it has fast code for only outside
  of loops: in one, a step takes some 30 times as long. There the program is the body alone, called
  for each k.

  Attributes:
    step: the program, not compiled.
    program: the same compiled, which whoever has compiled it sets before the first call.
  """

  def __init__(
    self,
    body: Body,
    like: jax.sharding.Sharding,
    options: dict[str, str | bool],
    loops: bool | None = None,
  ):
    """Compiles nothing yet.

    Args:
      body: its carry is donated, the inputs stay.
      like: of the carry.
      options: for the compiler.
      loops: whether the program loops; None: where that is faster.
    """
    (device, *_) = like.device_set
    self._loops = device.platform != 'cpu' if loops is None else loops

    def chunk(carry: PyTree, bounds: np.ndarray, *inputs) -> PyTree:
      if not self._loops:
        return body(bounds[0], carry, *inputs)
      return jax.lax.fori_loop(bounds[0], bounds[1], lambda k, c: body(k, c, *inputs), carry)

    self.step = jax.jit(chunk, donate_argnums=0, out_shardings=like, compiler_options=options)
    self.program: Callable | None = None
    self._most = 1  # until it is known how long one takes

  @property
  def most(self) -> int:
    """How many k a process that is alone takes about two seconds for; of several, any number."""
    return self._most if jax.process_count() == 1 else WINDOW

  def arguments(self, carry: PyTree, *inputs) -> tuple:
    """Those of `step`, to compile it, for a carry and inputs, or shapes, like these."""
    return carry, _bounds(0, 1), *inputs

  def __call__(self, carry: PyTree, first: int, count: int, *inputs) -> PyTree:
    """Runs the body for so many k from `first` on, and waits for the carry, which it returns."""
    start = time.perf_counter()
    each = count if self._loops else 1
    for k in range(first, first + count, each):
      carry = self.program(carry, _bounds(k, k + each), *inputs)
    jax.block_until_ready(carry)
    self._most = max(1, int(_PATIENCE * count / (time.perf_counter() - start)))
    return carry


def _bounds(first: int, end: int) -> np.ndarray:
  return np.array([first, end], np.int32)


def upload(source: Any, split: str, mesh: Mesh) -> Pictures:
  """The split's images u8 [N,H,W,3] and labels i32 [N] on every device.

  Args:
    source: from `sources.open_split`.
    split: its name, for errors.
    mesh: of the devices.

  Raises:
    UserError: it is not decoded in memory, or larger than a device's.
  """
  if not isinstance(source, sources.Arrays):
    raise UserError(f'data.on_device True: the pictures of {split} are not in memory; {_CURE}')
  needed = source.images.nbytes + source.labels.nbytes
  there = hardware.memory_bytes(mesh.local_devices)
  if there is not None and needed > there:
    raise UserError(
      f'data.on_device True: {split} is {needed / memory.MIB:,.0f} MiB, and each device has '
      f'{there / memory.MIB:,.0f} MiB of memory; {_CURE}'
    )
  return sharding.put_whole((source.images, source.labels), mesh)


# ---- training


def send_order(num_examples: int, seed: int, batch_size: int, window: int, mesh: Mesh) -> Order:
  """What is in batches `window` * WINDOW to (`window` + 1) * WINDOW of the training stream.

  Args:
    num_examples: of the split.
    seed: of the run.
    batch_size: B, of the global batch.
    window: which, from 0.
    mesh: whose devices share a batch.

  Returns:
    Epoch and example: i32 [WINDOW,B], each batch split over the devices.
  """
  share = batch_size // jax.process_count()
  batch = np.arange(window * WINDOW, (window + 1) * WINDOW)
  row = np.arange(share) + jax.process_index() * share
  position = batch[:, None] * batch_size + row[None, :]
  order = pipeline.train_order(num_examples, seed, position)
  return sharding.put_batch(order, mesh, axis=1)


def order_shapes(batch_size: int, mesh: Mesh) -> Order:
  """Of what `send_order` sends."""
  shape = jax.ShapeDtypeStruct((WINDOW, batch_size), 'int32', sharding=sharding.split(mesh, axis=1))
  return shape, shape


def make_train_body(
  train_step: Callable[[TrainState, steps.Batch], tuple[TrainState, jax.Array]],
  seed: int,
  augment: str,
  mesh: Mesh,
) -> Body:
  """A training step as a body.

  Args:
    train_step: as `steps.make_train_step` returns it.
    seed: of the run.
    augment: one of `data.augment.IN_MEMORY`.
    mesh: whose devices share a batch.

  Returns:
    (k, (state, numbers f32 [WINDOW,3]), (images u8 [N,H,W,3], labels i32 [N]), (epoch, example)
    i32 [WINDOW,B]) -> the state after a step on the batch of row k, and row k of the numbers.
  """

  def make_batch(pictures, row):
    return pipeline.train_batch(sources.Arrays(*pictures), *row, seed, augment)

  make_batch = sharding.share_by_share(make_batch, mesh)

  def body(k, carry, pictures, order):
    state, numbers = carry
    row = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, k, keepdims=False), order)
    state, three = train_step(state, make_batch(pictures, row))
    return state, numbers.at[k].set(three)

  return body


# ---- evaluation


def make_eval_body(
  eval_step: Callable[[dict, steps.Batch], metrics.Sums], batch_size: int, mesh: Mesh
) -> Body:
  """An evaluation step as a body.

  Args:
    eval_step: as `steps.make_eval_step` returns it.
    batch_size: B.
    mesh: whose devices share a batch.

  Returns:
    (k, sums [batches] each, variables, pictures as in training) -> the sums with batch k's.
  """

  def make_batch(pictures, position):
    return pipeline.eval_batch(sources.Arrays(*pictures), position)

  make_batch = sharding.share_by_share(make_batch, mesh)

  def body(k, carry, variables, pictures):
    sums = eval_step(variables, make_batch(pictures, k * batch_size + jnp.arange(batch_size)))
    return jax.tree.map(lambda all_, one: all_.at[k].set(one), carry, sums)

  return body
