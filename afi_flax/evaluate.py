"""Evaluation over a whole split: every example counts exactly once.

The last batch is padded to the shape of the others and masked, so one compiled program serves any
number of examples, devices and processes.
"""

import collections
import contextlib
import functools
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from afi_flax import metrics, on_device, report, run, sharding, steps
from afi_flax.analysis import memory
from afi_flax.config import Plan, complete
from afi_flax.data import pipeline, sources
from afi_flax.workdir import Workdir

Source = sources.Arrays | sources.Encoded
Compile = Callable[[jax.stages.Lowered], jax.stages.Compiled]


class Evaluator:
  """Evaluates variables of one model on one split, as often as asked.

  Attributes:
    split: what is evaluated, as the config names it; with its data set where that is another than
      the one trained on.
  """

  def __init__(self, plan: Plan, model: nn.Module, mesh: Mesh):
    """Opens the split, on all processes at once; UserError where it cannot be read or differs."""
    data = plan.data
    self.split = _split_name(data.dataset, data.eval_dataset, data.eval_split)
    self._plan, self._mesh = plan, mesh
    source = sources.open_split(data.eval_dataset, data.data_dir, data.eval_split)
    self._total, self._batch_size = len(source), plan.padded_eval_batch(mesh.size)
    found = sources.describe(data.eval_dataset, data.data_dir).class_names
    run.check_classes(plan.dataset.class_names, found)
    run.check_same_data(plan.dataset, self._total)
    self._compiling = 0.0  # seconds
    _host_batches(plan, source, self._batch_size).close()  # what does not go together shows now
    sums = _SumsOnDevice if data.on_device else _SumsFromHost
    self._sums = sums(plan, source, self._batch_size, model, mesh, self._compile)

  def __call__(
    self,
    variables: dict,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[int], bool] = lambda batches: False,
  ) -> dict | None:
    """Counts every example of the split once.

    Args:
      variables: `params` and `batch_stats`, on the mesh.
      on_progress: told (examples done, examples in all).
      should_stop: asked after every batch, with their number so far; where it says so, the
        evaluation ends with None. All processes have as many batches.

    Returns:
      `split`, `loss` (nats), `top1` and `top5` (fractions), `examples` and `images_per_second`.
    """
    before, start = self._compiling, time.perf_counter()
    parts = []
    with contextlib.closing(self._sums(variables)) as sums:
      for more in sums:
        parts += more
        on_progress(min(len(parts) * self._batch_size, self._total), self._total)
        if should_stop(len(parts)):
          return None
    record = metrics.means(parts)
    seconds = time.perf_counter() - start - (self._compiling - before)
    return {'split': self.split} | record | {'images_per_second': record['examples'] / seconds}

  def _compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    start = time.perf_counter()
    compiled = memory.compile_or_explain(lowered, memory.EVAL_CURE)
    memory.check_fits(compiled, self._mesh.local_devices, memory.EVAL_CURE)
    self._compiling += time.perf_counter() - start
    return compiled


class _SumsFromHost:
  """The sums of each batch of a split, whose batches the host makes."""

  def __init__(
    self,
    plan: Plan,
    source: Source,
    batch_size: int,
    model: nn.Module,
    mesh: Mesh,
    compile_: Compile,
  ):
    self._batches = functools.partial(_host_batches, plan, source, batch_size)
    self._mesh, self._compile = mesh, compile_
    whole = sharding.replicated(mesh)
    self._step = steps.jit_eval_step(model, plan.data, whole, plan.run.deterministic)
    self._program: jax.stages.Compiled | None = None

  def __call__(self, variables: dict) -> Iterator[list[metrics.Sums]]:
    """One by one, and not further ahead of the device than the bar should be."""
    batches = pipeline.prefetch(
      self._batches(), lambda batch: sharding.put_batch(batch, self._mesh)
    )
    ahead = collections.deque()
    with contextlib.closing(batches):
      for batch in batches:
        if self._program is None:
          self._program = self._compile(self._step.lower(variables, batch))
        ahead.append(self._program(variables, batch))
        if len(ahead) > 2:
          ahead.popleft()['examples'].block_until_ready()
        yield [ahead[-1]]


class _SumsOnDevice:
  """The same of a split that the devices hold."""

  def __init__(
    self,
    plan: Plan,
    source: Source,
    batch_size: int,
    model: nn.Module,
    mesh: Mesh,
    compile_: Compile,
  ):
    """Uploads the split; UserError if that cannot be."""
    self._compile = compile_
    self._num_batches = -(-len(source) // batch_size)
    self._pictures = on_device.upload(source, plan.data.eval_split, mesh)
    step, whole = steps.make_eval_step(model, plan.data), sharding.replicated(mesh)
    self._chunks = on_device.Chunks(
      on_device.make_eval_body(step, batch_size, mesh),
      whole,
      steps.compiler_options(plan.run.deterministic, mesh.local_devices[0]),
    )
    self._zeros = jax.jit(
      lambda: jax.tree.map(lambda x: jnp.zeros([self._num_batches], x.dtype), metrics.zeros()),
      out_shardings=whole,
    )

  def __call__(self, variables: dict) -> Iterator[list[metrics.Sums]]:
    """Of as many at once as are worth a wait."""
    sums = self._zeros()
    if self._chunks.program is None:
      arguments = self._chunks.arguments(sums, variables, self._pictures)
      self._chunks.program = self._compile(self._chunks.step.lower(*arguments))
    done = 0
    while done < self._num_batches:
      limits = self._chunks.most, self._num_batches - done, sharding.steps_to_agreement(done)
      count = min(n for n in limits if n is not None)
      sums = self._chunks(sums, done, count, variables, self._pictures)
      there = {
        name: np.asarray(values)[done : done + count].copy() for name, values in sums.items()
      }
      yield [{name: there[name][k] for name in there} for k in range(count)]
      done += count


def _host_batches(plan: Plan, source: Source, batch_size: int) -> Iterator[pipeline.Batch]:
  return pipeline.eval_batches(
    source,
    batch_size=batch_size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    image_size=plan.data.eval_image_size,
    resize=plan.data.eval_resize,
    workers=plan.run.workers,
    max_unreadable=plan.data.max_unreadable,
  )


def _split_name(trained_on: str, dataset: str, split: str) -> str:
  return split if dataset == trained_on else f'{dataset} {split}'


def evaluate_run(
  workdir: str, checkpoint: str = 'last', config: ml_collections.ConfigDict | None = None
) -> dict:
  """Evaluates a run's checkpoint.

  Args:
    workdir: as for `run.load_run`.
    checkpoint: as for `run.load_run`.
    config: as for `run.load_run`.

  Returns:
    As an Evaluator, and `step`; with `picked_on` where the checkpoint is the best on these very
    pictures, which makes its accuracy optimistic.
  """
  mesh = sharding.make_mesh()
  loaded = run.load_run(workdir, checkpoint, config, mesh)
  data, stored = loaded.plan.data, complete(Workdir(workdir).read_config())['data']
  own_dataset = stored['eval_dataset'] or stored['dataset']
  own_split = _split_name(stored['dataset'], own_dataset, stored['eval_split'])
  # imagenet2012_real has the pictures of imagenet2012.
  datasets = {name.removesuffix('_real') for name in (data.eval_dataset, own_dataset)}
  picked = checkpoint == 'best' and len(datasets) == 1 and data.eval_split == stored['eval_split']
  evaluator = Evaluator(loaded.plan, loaded.model, mesh)
  console = report.Console(jax.process_index() == 0)
  try:
    record = evaluator(loaded.variables, console.evaluating)
  finally:
    console.close()
  return {'step': loaded.step} | record | ({'picked_on': own_split} if picked else {})
