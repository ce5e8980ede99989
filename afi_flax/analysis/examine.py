"""One pass over a split with a trained network: how good it is, and what its inside does."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from afi_flax import config, losses, metrics, preprocess, sharding, steps
from afi_flax.analysis import memory, reuse, selectivity
from afi_flax.analysis.quality import Mistake, Reliability, Tally
from afi_flax.analysis.reuse import Reuse
from afi_flax.data import imagenet, pipeline, sources
from afi_flax.errors import UserError
from afi_flax.models import fusion_weights
from afi_flax.run import Run, check_classes, check_same_data

__all__ = ['Examination', 'Mistake', 'Reliability', 'Reuse', 'examine']

_CURE = 'use a smaller eval_batch_size'
Source = sources.Arrays | sources.Encoded
Sums = dict[str, dict[str, Any]]  # {'selectivity' or 'reuse': {block: f32 [K,...]}}


@dataclasses.dataclass(frozen=True)
class Examination:
  """What a pass over a split says of a network.

  Attributes:
    split: as the config names it; with its data set where that is another than the one trained on.
    class_names: K names.
    examples: pictures that were counted: all that can be read.
    top1: fraction.
    top5: fraction, of the first min(5, K) classes.
    nll: mean negative log-likelihood, nats.
    confusion: i64 [K,K], true x predicted.
    reliability: of 15 equal bins.
    mistakes: at most 32, the most confident ones first.
    selectivity: {block: f64 [C], the class selectivity index of each channel, NaN of a dead one};
      {} for a network without such places. See `selectivity.py`.
    reuse: {block: its fusion weights}; {} for a plain network.
    train_top1: fraction, on training pictures in evaluation mode; None where none were asked for.
    train_examples: how many these are.
  """

  split: str
  class_names: tuple[str, ...]
  examples: int
  top1: float
  top5: float
  nll: float
  confusion: np.ndarray
  reliability: Reliability
  mistakes: tuple[Mistake, ...]
  selectivity: dict[str, np.ndarray]
  reuse: dict[str, Reuse]
  train_top1: float | None
  train_examples: int


def examine(
  run: Run,
  split: str | None = None,
  data_dir: str | None = None,
  on_progress: Callable[[int, int], None] = lambda done, total: None,
  train_examples: int | None = None,
) -> Examination:
  """Looks at every example of a split once, and at some of the training split.

  In evaluation mode, in batches of the run's `eval_batch_size`. What is added up lies on the
  devices and has a row for each class: it does not grow with the split.

  Args:
    run: from `load_run`, on the devices that it was loaded to.
    split: of the data set that the run is evaluated on, such as 'test' or 'train[98%:]'; None: the
      run's own.
    data_dir: where the data are; None: where they were in training.
    on_progress: told (examples done, examples in all), those of training included.
    train_examples: how many of the training split at most, a sample that depends on the run's seed
      only; None: as many as the split has; 0: none.

  Raises:
    UserError: data that cannot be read, are of other classes, have several labels a picture, or
      differ between processes; a network that gives NaN.
  """
  data = run.plan.data
  if data_dir is not None:
    data = dataclasses.replace(data, data_dir=data_dir)
  spec = split or data.eval_split
  source, train = _open(run, data, data.eval_dataset, spec), None
  wanted = len(source) if train_examples is None else train_examples
  if wanted < 0:
    raise UserError(f'--train_examples {wanted} must be 0 (none) or more')
  if wanted:
    train = sources.sample(_open_training(run, data), wanted, run.plan.seed)
  total = len(source) + (len(train) if train else 0)
  look = _Pass(run, data)
  tally, sums = look(source, lambda done: on_progress(done, total))
  if not tally.examples:
    raise UserError(f'no picture of {spec!r} can be read; look at {data.data_dir!r}')
  seen = look(train, lambda done: on_progress(len(source) + done, total))[0] if train else None
  counts = tally.confusion.sum(axis=1)
  return Examination(
    split=spec if data.eval_dataset == data.dataset else f'{data.eval_dataset} {spec}',
    class_names=run.readable_names,
    examples=tally.examples,
    top1=tally.top1,
    top5=tally.top5,
    nll=tally.nll,
    confusion=tally.confusion,
    reliability=tally.reliability(),
    mistakes=tally.mistakes,
    selectivity={
      block: selectivity.index(sums['selectivity'][block], counts)
      for block in selectivity.in_order(sums['selectivity'])
    },
    reuse={
      block: reuse.summarise(block, sums['reuse'][block], counts)
      for block in selectivity.in_order(sums['reuse'])
    },
    train_top1=seen.top1 if seen and seen.examples else None,
    train_examples=seen.examples if seen else 0,
  )


def _open(run: Run, data: config.Data, dataset: str, spec: str) -> Source:
  """The split; UserError where it is not what the network can be examined on."""
  source = sources.open_split(dataset, data.data_dir, spec)
  check_classes(run.class_names, sources.describe(dataset, data.data_dir).class_names)
  if isinstance(source, imagenet.RealLabels):
    raise UserError(
      f'data.eval_dataset {dataset!r} has several labels a picture, and a confusion matrix wants '
      'one; use imagenet2012'
    )
  check_same_data(run.plan.dataset, len(source))
  return source


def _open_training(run: Run, data: config.Data) -> Source:
  try:
    return _open(run, data, data.dataset, data.train_split)
  except UserError as error:
    raise UserError(f'{error}; --train_examples=0 does without training pictures') from error


class _Pass:
  """Runs the network over splits, with a program that is compiled once."""

  def __init__(self, run: Run, data: config.Data):
    self._run, self._data = run, data
    self._mesh = jax.tree.leaves(run.variables)[0].sharding.mesh
    self._batch_size = run.plan.padded_eval_batch(self._mesh.size)
    whole = sharding.replicated(self._mesh)
    self._step = jax.jit(
      functools.partial(_observe, run.model, data),
      out_shardings=whole,
      compiler_options=steps.compiler_options(
        run.plan.run.deterministic, self._mesh.local_devices[0]
      ),
    )
    self._add = jax.jit(functools.partial(jax.tree.map, jnp.add), donate_argnums=0)
    self._program: jax.stages.Compiled | None = None

  def __call__(self, source: Source, on_progress: Callable[[int], None]) -> tuple[Tally, Sums]:
    """What the network says of every example, and the sums f64; `on_progress` is told how many."""
    tally, done = Tally(len(self._run.class_names)), 0
    sums = waiting = None  # rows of one batch wait, so that the devices work while the host counts
    with contextlib.closing(self._batches(source)) as batches:
      for batch in batches:
        self._program = self._program or self._compile(batch)
        rows, more = self._program(self._run.variables, batch)
        sums = self._add(sums, more) if sums else more
        if waiting:
          _count(tally, waiting)
          done += self._batch_size
          on_progress(done)
        waiting = rows
    _count(tally, waiting)
    on_progress(len(source))
    return tally, jax.tree.map(lambda x: np.asarray(x, np.float64), sums)

  def _compile(self, batch: steps.Batch) -> jax.stages.Compiled:
    program = memory.compile_or_explain(self._step.lower(self._run.variables, batch), _CURE)
    memory.check_fits(program, self._mesh.local_devices, _CURE)
    return program

  def _batches(self, source: Source) -> Iterator[steps.Batch]:
    host = pipeline.eval_batches(
      source,
      batch_size=self._batch_size,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      image_size=self._data.eval_image_size,
      resize=self._data.eval_resize,
      workers=self._run.plan.run.workers,
      max_unreadable=self._data.max_unreadable,
    )
    return pipeline.prefetch(host, lambda batch: sharding.put_batch(batch, self._mesh))


def _count(tally: Tally, rows: dict[str, jax.Array]) -> None:
  rows = {name: np.asarray(x) for name, x in rows.items()}
  real = rows.pop('mask') > 0
  tally.add(**{name: x[real] for name, x in rows.items()})


def _observe(
  model: nn.Module, data: config.Data, variables: dict, batch: steps.Batch
) -> tuple[dict[str, jax.Array], Sums]:
  """Rows for a Tally, with the mask, and sums over the batch's pictures of each class."""
  images = preprocess.normalise(batch['image'], data.mean, data.std)
  logits, sown = model.apply(
    variables,
    images,
    train=False,
    capture_intermediates=selectivity.is_needed,
    mutable='intermediates',
  )
  inside = sown.get('intermediates', {})
  pictures = {
    'selectivity': {
      block: x.astype('float32').mean(axis=(1, 2))
      for block, x in selectivity.places(inside).items()
    },
    'reuse': {block: reuse.of_pictures(s) for block, s in fusion_weights(inside).items()},
  }
  label = batch['label']
  rows = {
    'example': batch['example'],
    'label': label,
    'mask': batch['mask'],
    'predicted': logits.argmax(axis=-1).astype('int32'),
    'probability': nn.softmax(logits).max(axis=-1),
    'rank': metrics.label_rank(logits, label),
    'loss': losses.cross_entropy(logits, label),
  }
  # A product, which devices do for their own rows and add up; a scatter they would gather for.
  classes = nn.one_hot(label, logits.shape[-1]) * batch['mask'][:, None]

  def by_class(x: jax.Array) -> jax.Array:
    return jnp.einsum('bk,bc->kc', classes, x, precision='highest')

  return rows, jax.tree.map(by_class, pictures)
