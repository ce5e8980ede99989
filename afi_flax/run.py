"""A run's folder, opened for use: the network, its weights, its classes and its preprocessing."""

import contextlib
import dataclasses
import functools
import pathlib

import jax
import ml_collections
from flax import linen as nn
from jax.sharding import Mesh

from afi_flax import config as config_lib
from afi_flax import models, optim, preprocess, sharding
from afi_flax import state as state_lib
from afi_flax.checkpoint import Checkpoints
from afi_flax.data import imagenet
from afi_flax.errors import UserError
from afi_flax.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """How pictures become what the network takes.

  Attributes:
    image_size: pixels of the centre crop.
    resize: pixels of the short side before it.
    mean: of each channel, in 0..1.
    std: of each channel, in 0..1.
  """

  image_size: int
  resize: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]

  def __call__(self, images: jax.Array) -> jax.Array:
    """u8 [B, image_size, image_size, 3] -> f32, normalised."""
    return preprocess.normalise(images, self.mean, self.std)


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained network: `model.apply(variables, preprocessing(images), train=False)`.

  Attributes:
    model: the Linen module.
    variables: `params` and `batch_stats`, f32; their moving average where the run has one.
    class_names: K names, in the order of the logits.
    preprocessing: u8 pictures -> the network's input.
    step: of the checkpoint.
    plan: the resolved config.
  """

  model: nn.Module
  variables: dict
  class_names: tuple[str, ...]
  preprocessing: Preprocessing
  step: int
  plan: config_lib.Plan

  @functools.cached_property
  def readable_names(self) -> tuple[str, ...]:
    """The classes in words, also where the data have ids: 'tench' for 'n01440764'."""
    return imagenet.readable(self.class_names)


def load_run(
  workdir: str | pathlib.Path,
  checkpoint: str | int = 'last',
  config: ml_collections.ConfigDict | None = None,
  mesh: Mesh | None = None,
) -> Run:
  """Opens what a training run left in its folder.

  Args:
    workdir: the run's folder.
    checkpoint: 'last', 'best' or a step.
    config: None: the folder's own; else one that differs from it in nothing but how and on what
      it is evaluated.
    mesh: where the weights go; None: all devices.

  Raises:
    UserError: there is no run, no such checkpoint, or it is damaged or another model's.
  """
  mesh = mesh or sharding.make_mesh()
  folder = Workdir(workdir)
  stored = folder.read_config()
  if config is not None:
    of_evaluation = 'data.eval_dataset', 'data.eval_split', 'data.on_device', 'eval_batch_size'
    folder.check_config(config.to_dict(), (*config_lib.MAY_DIFFER, *of_evaluation), must_agree=())
  config = config or ml_collections.ConfigDict(stored)
  plan = config_lib.resolve(config, dataset=_read_dataset(folder))
  model = models.create_model(**dataclasses.asdict(plan.model))
  abstract = state_lib.abstract(
    model,
    optim.make(plan.optim),
    plan.data.image_size,
    sharding.replicated(mesh),
    ema=plan.step.regularisation.ema_decay > 0,
  )
  state, step = restore(folder, abstract, str(checkpoint))
  data = plan.data
  return Run(
    model=model,
    variables=state.eval_variables,
    class_names=plan.dataset.class_names,
    preprocessing=Preprocessing(data.eval_image_size, data.eval_resize, data.mean, data.std),
    step=step,
    plan=plan,
  )


def _read_dataset(folder: Workdir) -> config_lib.Dataset:
  """UserError where dataset.json is not what a run writes."""
  stored = folder.read_dataset()
  names = stored.get('class_names')
  sizes = [stored.get(key) for key in ('num_train', 'num_eval')]
  if (
    set(stored) != {field.name for field in dataclasses.fields(config_lib.Dataset)}
    or not isinstance(stored['name'], str)
    or not (isinstance(names, list) and names and all(isinstance(name, str) for name in names))
    or not all(type(size) is int and size > 0 for size in sizes)
  ):
    raise UserError(
      f'{folder.dataset_path} is not as the run wrote it: it must hold name, class_names, '
      'num_train and num_eval; put back a copy of it'
    )
  return config_lib.Dataset(**stored | {'class_names': tuple(names)})


def check_classes(trained: tuple[str, ...], found: tuple[str, ...]) -> None:
  """UserError where the classes of data are not those that a network was trained on."""
  if found != trained:
    differ = (i for i, (a, b) in enumerate(zip(trained, found, strict=False)) if a != b)
    i = next(differ, min(len(trained), len(found)))
    raise UserError(
      f'class {i} was {[*trained, "absent"][i]!r} in training and is {[*found, "absent"][i]!r} '
      'here; give data of the same classes'
    )


def check_same_data(dataset: config_lib.Dataset, num_eval: int) -> None:
  """All processes must ask.

  Args:
    dataset: as this process finds it, or as the run has it.
    num_eval: how many examples this process finds to evaluate.

  Raises:
    UserError: a process finds others than the first.
  """
  if (other := sharding.process_that_differs(repr((dataset, num_eval)))) is not None:
    raise UserError(
      f'process {other} finds other data than process 0; this one, {jax.process_index()}, finds '
      f'{dataset.num_train:,} training and {num_eval:,} evaluation examples of '
      f'{len(dataset.class_names)} classes; all hosts need the same files in data.data_dir'
    )


def restore(
  folder: Workdir, abstract: state_lib.TrainState, checkpoint: str, or_older: bool = False
) -> tuple[state_lib.TrainState, int]:
  """The state of the 'last', the 'best' or a numbered checkpoint, and its step.

  Args:
    folder: of the run.
    abstract: shapes, dtypes and shardings of the state.
    checkpoint: which one.
    or_older: where the last one is damaged, whether the newest good one will do.
  """
  if checkpoint not in ('last', 'best') and not checkpoint.isdecimal():
    raise UserError(f'checkpoint {checkpoint!r} must be last, best or the number of a step')
  step = int(checkpoint) if checkpoint.isdecimal() else None
  place = folder.best if checkpoint == 'best' else folder.checkpoints
  with contextlib.ExitStack() as stack:
    checkpoints, best = (
      stack.enter_context(contextlib.closing(Checkpoints(path, keep=1)))
      for path in (folder.checkpoints, folder.best)
    )
    last_steps, best_steps = checkpoints.steps(), best.steps()
    if step is not None and step not in (*last_steps, *best_steps):
      there = ', '.join(map(str, sorted({*last_steps, *best_steps}))) or 'none'
      raise UserError(f'no checkpoint of step {step} in {folder.folder}; there are: {there}')
    only_best = step in best_steps and step not in last_steps
    chosen = best if checkpoint == 'best' or only_best else checkpoints
    found = chosen.restore(abstract, step)
  if found is None:
    raise UserError(f'no checkpoint in {place}: the run has not saved one')
  if chosen.damaged and not or_older:
    raise UserError(
      f'checkpoint {max(chosen.damaged)} in {place} is damaged, as the log says; the newest good '
      f'one has the number {found[1]}: give that'
    )
  return found
