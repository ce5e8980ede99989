"""Evaluation over a whole split: every example counts exactly once.

The last batch is padded to the shape of the others and masked, so one compiled program serves any
number of examples, devices and processes.
"""

import time
from collections.abc import Callable

import jax
import ml_collections
from flax import linen as nn
from jax.sharding import Mesh

from afi_flax import metrics, report, run, sharding, steps
from afi_flax.analysis import memory
from afi_flax.config import Plan, complete
from afi_flax.data import pipeline, sources
from afi_flax.errors import UserError
from afi_flax.workdir import Workdir


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
    self._source = sources.open_split(data.eval_dataset, data.data_dir, data.eval_split)
    self._batch_size = plan.padded_eval_batch(mesh.size)
    self._check_classes(sources.describe(data.eval_dataset, data.data_dir).class_names)
    run.check_same_data(plan.dataset, len(self._source))
    self._host_batches().close()  # a size that does not go with the pictures shows now
    self._step = steps.jit_eval_step(
      model, plan.data, sharding.replicated(mesh), plan.run.deterministic
    )
    self._compiled = None

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
    start = time.perf_counter()
    total = len(self._source)
    parts = []
    batches = pipeline.prefetch(self._host_batches(), self._put)
    try:
      for done, batch in enumerate(batches, start=1):
        if self._compiled is None:
          before = time.perf_counter()
          lowered = self._step.lower(variables, batch)
          self._compiled = memory.compile_or_explain(lowered, memory.EVAL_CURE)
          memory.check_fits(self._compiled, self._mesh.local_devices, memory.EVAL_CURE)
          start += time.perf_counter() - before
        parts.append(self._compiled(variables, batch))
        if len(parts) > 2:  # not further ahead of the device than the bar should be
          parts[-3]['examples'].block_until_ready()
        on_progress(min(done * self._batch_size, total), total)
        if should_stop(done):
          return None
    finally:
      batches.close()
    record = metrics.means(parts)
    rate = record['examples'] / (time.perf_counter() - start)
    return {'split': self.split} | record | {'images_per_second': rate}

  def _check_classes(self, found: tuple[str, ...]) -> None:
    trained = self._plan.dataset.class_names
    if found != trained:
      differ = (i for i, (a, b) in enumerate(zip(trained, found, strict=False)) if a != b)
      i = next(differ, min(len(trained), len(found)))
      raise UserError(
        f'class {i} was {[*trained, "absent"][i]!r} in training and is {[*found, "absent"][i]!r} '
        'here; give data of the same classes'
      )

  def _host_batches(self):
    data = self._plan.data
    return pipeline.eval_batches(
      self._source,
      batch_size=self._batch_size,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      image_size=data.eval_image_size,
      resize=data.eval_resize,
      workers=self._plan.run.workers,
      max_unreadable=data.max_unreadable,
    )

  def _put(self, batch):
    return sharding.put_batch(batch, self._mesh)


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
