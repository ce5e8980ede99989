"""Where a run starts: in its own folder, from other weights, or from scratch."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import linen as nn
from flax import traverse_util
from jax.sharding import Mesh

from afi_flax import config as config_lib
from afi_flax import files, models, optim, run, sharding
from afi_flax import state as state_lib
from afi_flax.checkpoint import Checkpoints
from afi_flax.errors import UserError
from afi_flax.interop import weights
from afi_flax.interop.transfer import Report, transfer
from afi_flax.workdir import Workdir

Taken = tuple[dict[str, np.ndarray], Report]  # arrays by path, and what became of the others


def initial_state(
  plan: config_lib.Plan,
  mesh: Mesh,
  checkpoints: Checkpoints,
  initial: state_lib.Initial,
  rolling_back: bool,
  taken: Taken | None = None,
) -> tuple[state_lib.TrainState, str]:
  """The state in the run's folder, else by run.resume, by run.init_from, or from scratch.

  Args:
    plan: of the run.
    mesh: where the state will be.
    checkpoints: of the run's folder.
    initial: the state from scratch.
    rolling_back: whether only one that every such run has will do.
    taken: what `init_from` returns, where it was read already.

  Returns:
    The state, and in words where it is from.
  """
  if found := checkpoints.restore(initial.abstract, on_schedule=rolling_back):
    return found[0], f'resumed at step {found[1]}'
  if plan.run.resume:
    state, step = run.restore(Workdir(plan.run.resume), initial.abstract, 'last', or_older=True)
    return state, f'goes on from step {step} of {plan.run.resume}'
  state, report = _new_state(plan, mesh, initial, taken)
  return state, f'starts with the weights of {report}' if report else 'starts from scratch'


def make_initial(
  plan: config_lib.Plan, model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh
) -> state_lib.Initial:
  """The state from scratch, of the plan's network and optimiser."""
  ema = plan.step.regularisation.ema_decay > 0
  whole = sharding.replicated(mesh)
  return state_lib.Initial(model, optimizer, plan.data.image_size, plan.seed, whole, ema)


def _new_state(
  plan: config_lib.Plan, mesh: Mesh, initial: state_lib.Initial, taken: Taken | None = None
) -> tuple[state_lib.TrainState, Report | None]:
  """From run.init_from, with what became of it, or from scratch."""
  if taken is None and plan.run.init_from:
    taken = init_from(plan, mesh)
  state = initial.state()
  if taken is None:
    return state, None
  chosen, report = taken
  kept = {path: x for path, x in weights.flat(state.variables).items() if path not in chosen}
  variables = traverse_util.unflatten_dict(kept | sharding.put_whole(chosen, mesh), sep='/')
  # A copy, since the step frees params and ema one by one.
  ema = None if state.ema is None else jax.tree.map(jnp.copy, variables)
  return state.replace(**variables, ema=ema), report


def init_from(plan: config_lib.Plan, mesh: Mesh) -> Taken:
  """What the run takes of run.init_from, a file or another run's folder; see `transfer`.

  Raises:
    UserError: it is neither, holds other weights, or another process finds others.
  """
  path = plan.run.init_from
  try:
    place = files.absolute(path)
    there, is_file = files.exists(place), files.is_file(place)
  except OSError as error:
    raise UserError(f'run.init_from {path} cannot be read: {error.strerror}; mend that') from error
  if not there:
    raise UserError(
      f"run.init_from {path}: there is no such file or folder; give a run's folder, or weights as "
      '.safetensors or .pth'
    )
  source = weights.read(path, plan.model.name) if is_file else _of_run(path, mesh)
  if (other := sharding.process_that_differs(source.digest)) is not None:
    raise UserError(
      f'process {other} finds another file than process 0 at run.init_from {path}; give all hosts '
      'the same one'
    )
  chosen, report = transfer(source, plan.model, plan.dataset.class_names)
  _check_frozen(plan, report)
  return chosen, report


def _check_frozen(plan: config_lib.Plan, report: Report) -> None:
  """UserError where a part is frozen that the source has not as it is, and would not learn it."""
  changed = (*report.initialised, *report.cut)
  lost = [name for name in plan.step.frozen if any(p.split('/')[1] == name for p in changed)]
  if lost:
    raise UserError(
      f'optimizer.frozen would keep {lost[0]} from learning, of which {report.where} has not all; '
      f'leave its part out, or start from a run of {plan.model.name}'
    )


def _of_run(path: str, mesh: Mesh) -> weights.Source:
  loaded = run.load_run(path, mesh=mesh)
  arrays = {name: np.asarray(x) for name, x in weights.flat(loaded.variables).items()}
  where = f'step {loaded.step} of {path}'
  return weights.Source(where, loaded.plan.model, loaded.class_names, arrays)


def save_start(config: ml_collections.ConfigDict, folder: str) -> Report:
  """Makes a run's folder that holds the weights of run.init_from as its step 0.

  It can be evaluated, used and trained as any other.

  Args:
    config: as a file in `configs/` returns it, with run.init_from.
    folder: new or empty.

  Raises:
    UserError: a mistake in the config or the data, weights that do not fit, a folder with a run.
  """
  plan, workdir = config_lib.resolve(config), Workdir(folder)
  if not workdir.is_new:
    raise UserError(f'{folder} holds a run already; take another --workdir, or delete it')
  model, optimizer = models.create_model(**vars(plan.model)), optim.make(plan.optim)
  mesh = sharding.make_mesh()
  state, report = _new_state(plan, mesh, make_initial(plan, model, optimizer, mesh))
  with (
    workdir.open_for_training(config.to_dict(), dataclasses.asdict(plan.dataset)),
    contextlib.closing(Checkpoints(workdir.checkpoints)) as checkpoints,
  ):
    checkpoints.save(0, state, wait=True)
  return report
