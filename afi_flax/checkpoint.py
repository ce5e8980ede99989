"""Checkpoints: Orbax writes and restores them, SHA-256 sums tell damaged ones from good ones.

Orbax (0.12) does not checksum what it writes: a flipped byte in an array file restores as a wrong
weight, without an error. So after each commit every process writes the sums of its share of the
step's files into the step's folder, and they are verified before a restore. A step is

  good       all its sums are there and match,
  unsealed   it was committed, but the run was killed before its sums were complete,
  damaged    a file does not match its sum, is missing, or Orbax cannot read the step.

On disk: FOLDER/STEP/ is Orbax's, but for FOLDER/STEP/sums.P-of-N.json of process P of N. In a
bucket, where nothing can be renamed, a step is committed once Orbax has put a file there that says
so.
"""

import dataclasses
import hashlib
import json
import os
import re
import sys
from asyncio.log import logger as asyncio_logger
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from afi_flax import files
from afi_flax.errors import FailedError, UserError

PyTree = Any

_SUMS = re.compile(r'sums\.\d+-of-\d+\.json')
_ITEM = 'state'  # the checkpoint's only item, for Orbax
_COMMITTED = 'commit_success.txt'  # Orbax's; in a bucket it is what commits a step


class Checkpoints:
  """The checkpoints in one folder, the newest `keep` of which Orbax keeps (None: all).

  Besides, the newest stays of those on schedule, which a run can roll back to: others come from
  stops, and which there are must not make a difference.

  With several processes, every method is called by all of them, in the same order. Nothing on disk
  changes before the first `save` or `set_aside`, so evaluation may look into a running run.

  ```
  checkpoints = Checkpoints(workdir.checkpoints, keep=2)
  if restored := checkpoints.restore(abstract_state):
    state, step = restored
    checkpoints.set_aside(newer_than=step)
  for ...:
    checkpoints.poll()
    if due: checkpoints.save(step, state)
  checkpoints.close()
  ```

  Attributes:
    damaged: the steps that `restore` has found to be so.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    keep: int | None = None,
    on_schedule: Callable[[int], bool] = lambda step: False,
  ):
    self._folder = files.absolute(folder)
    self._in_bucket = files.in_bucket(self._folder)
    self._preserved = _Preserved(keep, on_schedule)
    if self._in_bucket:
      self._check_access()
    self._manager = self._open()
    self._saving: int | None = None  # the step that Orbax has been given and that has no sums yet
    self._failed = False  # a save has
    self.damaged: set[int] = set()

  def steps(self) -> list[int]:
    """The steps that are committed, good or not, oldest first."""
    found = []
    try:
      if self._in_bucket:
        parts = [name.split('/') for name in files.names(self._folder)]
        found = [int(n) for n, *rest in parts if n.isdecimal() and rest == [_COMMITTED]]
      elif self._folder.is_dir():
        found = [int(p.name) for p in self._folder.iterdir() if p.name.isdecimal() and p.is_dir()]
    except OSError as error:
      raise FailedError(
        f'checkpoints in {self._folder} cannot be listed: {_first_line(error)}; mend that'
      ) from error
    return _first_process_says(sorted(found))

  def save(self, step: int, state: PyTree, wait: bool = False) -> None:
    """Starts to write `state` as `step`; returns once `state` may be donated or changed.

    A good checkpoint of `step` is left as it is; one that is not good is set aside.

    Args:
      step: newer than every other step that is there (else call `set_aside` first).
      state: tree of jax.Array; numbers and numpy arrays are stored as what JAX makes of them.
      wait: return only when the checkpoint is complete, with its sums.

    Raises:
      FailedError: this save, or the one before it, failed.
    """
    self._finish()
    steps = self.steps()
    if steps and step < steps[-1]:
      raise ValueError(f'step {step} is older than step {steps[-1]}; call set_aside({step}) first')
    if step in steps:
      if not (self._why_unsealed(step) or self._why_damaged(step)):
        return
      self._set_aside([step])
    try:
      if not self._in_bucket:
        self._folder.mkdir(exist_ok=True)  # not its parent: a run's folder that is gone stays gone
      # `force`, because Orbax otherwise skips in silence what it thinks needs no saving.
      arrays = jax.tree.map(_as_array, _set_fields(state))
      self._manager.save(step, args=_composite(ocp.args.PyTreeSave(arrays)), force=True)
    except Exception as error:
      raise self._save_error(step, error) from error
    self._saving = step
    if wait:
      self._finish()

  def poll(self) -> None:
    """Seals a save that has been committed since; cheap, to be called once a step.

    Raises:
      FailedError: the save failed.
    """
    if self._saving is not None and not self._manager.is_saving_in_progress():
      self._finish()

  def restore(
    self, abstract_state: PyTree, step: int | None = None, on_schedule: bool = False
  ) -> tuple[PyTree, int] | None:
    """Restores the newest good checkpoint, or that of `step`.

    Damaged checkpoints are logged and passed over. An unsealed one is taken only where there is no
    good one, or where it was asked for.

    Args:
      abstract_state: tree of jax.ShapeDtypeStruct with shardings, of the state's own types.
      step: restore this one or fail.
      on_schedule: only look at those.

    Returns:
      (state, step), or None if there is no such checkpoint at all.

    Raises:
      UserError: no checkpoint of `step`; it, or every one, is damaged; it is of another model.
    """
    self._finish()
    steps = [n for n in self.steps() if not on_schedule or self._preserved.on_schedule(n)]
    if step is not None and step not in steps:
      raise UserError(
        f'no checkpoint of step {step} in {self._folder}; there {_are(steps)}: give one of those'
      )
    candidates = steps[::-1] if step is None else [step]
    damage: dict[int, str] = {}
    for sealed, n in self._sealed_first(candidates):
      why = self._why_damaged(n)
      if why is None:
        if not sealed:
          logging.warning('checkpoint %d is restored unverified: it has no complete sums', n)
        state, why = self._read(n, abstract_state)
        if why is None:
          return state, n
      logging.error('checkpoint %d in %s is damaged: %s', n, self._folder, why)
      damage[n] = why
      self.damaged.add(n)
    if step is not None:
      others = [n for n in steps if n != step]
      raise UserError(
        f'checkpoint {step} in {self._folder} is damaged: {damage[step]}; '
        f'besides it there {_are(others)}'
      )
    if damage:
      newest = max(damage)
      raise UserError(
        f'every checkpoint in {self._folder} is damaged ({_some(sorted(damage))}; '
        f'{newest}: {damage[newest]}); copy a good one there, from best/ or unreadable/ '
        'beside it if they have one, or train in another --workdir'
      )
    return None

  def set_aside(self, newer_than: int, others: Collection[int] = ()) -> None:
    """Makes room for training on from step `newer_than`; deletes nothing that can be read.

    Newer steps, those that `restore` found damaged, and others that are not wanted, move to
    FOLDER/../unreadable/STEP[-n], sums included. Leftovers of a save that was killed are removed.
    Not for evaluation.
    """
    self._finish()
    unwanted = self.damaged.union(others)
    self._set_aside([n for n in self.steps() if n > newer_than or n in unwanted])

  def wait(self) -> None:
    """Waits for the save in progress, if there is one, and seals it.

    Raises:
      FailedError: it failed.
    """
    self._finish()

  def close(self) -> None:
    """Waits for the save in progress, seals it and stops Orbax's threads.

    Raises:
      FailedError: the save failed.
    """
    try:
      self._finish()
    finally:
      try:
        self._manager.close()
      except Exception:
        if not self._failed:  # else it is the failure that `save` or `_finish` has raised
          raise

  def _open(self, remove_leftovers: bool = False) -> ocp.CheckpointManager:
    # One device gives what all have, and its process writes it: else Orbax cuts every array into a
    # slice for each device, one after another, while training waits (8 CPU devices: ten times as
    # long; of accelerators it has not been measured).
    types = ocp.type_handlers.create_type_handler_registry(
      (jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False)),
      (np.ndarray, ocp.type_handlers.NumpyHandler()),
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=types)
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add(_ITEM, ocp.args.PyTreeSave, handler)
    registry.add(_ITEM, ocp.args.PyTreeRestore, handler)
    options = ocp.CheckpointManagerOptions(
      preservation_policy=self._preserved,
      create=False,  # evaluation must not make folders; `save` does
      cleanup_tmp_directories=remove_leftovers,
      # Two of these may save at once: their barriers must not meet.
      multiprocessing_options=ocp.options.MultiprocessingOptions(
        barrier_sync_key_prefix=self._folder.name
      ),
      lightweight_initialize=True,
    )
    return ocp.CheckpointManager(self._folder, options=options, handler_registry=registry)

  def _check_access(self) -> None:
    """Orbax looks at the bucket itself, too, but only when it saves."""
    try:
      with files.os_errors(self._folder):
        files.blob(self._folder).bucket.reload()
    except OSError as error:
      raise UserError(
        f'{self._folder} may not be used: {_first_line(error)}; the account needs the roles '
        'storage.objectUser and storage.legacyBucketReader'
      ) from error

  def _finish(self) -> None:
    """Waits for the save in progress, if there is one, and writes its sums."""
    step, self._saving = self._saving, None
    if step is None:
      return
    try:
      self._manager.wait_until_finished()
      self._seal(step)
    except Exception as error:
      raise self._save_error(step, error) from error

  def _save_error(self, step: int, error: Exception) -> FailedError:
    self._failed = True
    return FailedError(
      f'checkpoint {step} could not be written to {self._folder}: {_first_line(error)}; '
      f'{"mend that" if self._in_bucket else "make room or mend the disk"} and start the same '
      'command again, or take another --workdir'
    )

  def _seal(self, step: int) -> None:
    """Writes the sums of this process's share of the step's files."""
    process, processes = jax.process_index(), jax.process_count()
    folder = self._folder / str(step)
    names = [name for name in files.names(folder) if not _SUMS.fullmatch(name)]
    sums = {name: _sha256(folder / name) for name in names[process::processes]}
    record = {'process': process, 'processes': processes, 'sha256': sums}
    # Need not be atomic: a torn file is not JSON, and then the step counts as unsealed.
    path = folder / f'sums.{process}-of-{processes}.json'
    files.write(path, json.dumps(record, indent=1) + '\n')

  def _sums(self, step: int) -> tuple[dict[str, str], str | None]:
    """The recorded sums by file, and why they are not complete, if so."""
    folder = self._folder / str(step)
    sums, present, processes = {}, 0, 1
    for path in (folder / n for n in files.names(folder) if _SUMS.fullmatch(n)):
      try:
        record = json.loads(files.read(path))
        sums.update(record['sha256'])
        present, processes = present + 1, record['processes']
      except (OSError, ValueError, KeyError, TypeError) as error:
        return sums, f'{path.name} cannot be read: {_first_line(error)}'
    return sums, None if present == processes else f'{present} of {processes} sums files are there'

  def _why_unsealed(self, step: int) -> str | None:
    return _agree(self._sums(step)[1])

  def _why_damaged(self, step: int) -> str | None:
    """What does not match its sum; every process verifies its share of what is recorded."""
    folder = self._folder / str(step)
    sums, _ = self._sums(step)
    wrong = []
    for name in sorted(sums)[jax.process_index() :: jax.process_count()]:
      try:
        if _sha256(folder / name) != sums[name]:
          wrong.append(f'{name} does not match its SHA-256 sum')
      except FileNotFoundError:
        wrong.append(f'{name} is missing')
      except OSError as error:
        wrong.append(f'{name} cannot be read: {_first_line(error)}')
    more = f' (and {len(wrong) - 1} more files)' if len(wrong) > 1 else ''
    return _agree(wrong[0] + more if wrong else None)

  def _sealed_first(self, steps: list[int]) -> Iterator[tuple[bool, int]]:
    """(sealed, step): the sealed steps in the given order, then the others."""
    unsealed = []
    for step in steps:
      if why := self._why_unsealed(step):
        unsealed.append(step)
        if len(steps) > 1:
          logging.warning('checkpoint %d is not verifiable (%s): older ones first', step, why)
      else:
        yield True, step
    for step in unsealed:
      yield False, step

  def _read(self, step: int, abstract_state: PyTree) -> tuple[PyTree, str | None]:
    """(state, None), or (None, why Orbax cannot read it); UserError if of another model."""
    stored = state = why = None
    try:
      stored = self._manager.item_metadata(step).get(_ITEM)
      why = f'{_ITEM}/_METADATA is missing' if stored is None else None
    except Exception as error:  # Orbax documents none, and damage may raise anything
      why = f'its metadata cannot be read: {_first_line(error)}'
    if why := _agree(why):
      return None, why
    if difference := _first_difference(stored.tree, abstract_state):
      raise UserError(
        f'checkpoint {step} in {self._folder} is of another model: {difference}; '
        'give the config that it was trained with, or another --workdir'
      )
    try:
      wanted = _set_fields(abstract_state)
      where = ocp.checkpoint_utils.construct_restore_args(wanted)
      args = _composite(ocp.args.PyTreeRestore(wanted, restore_args=where))
      state = self._manager.restore(step, args=args)[_ITEM]
      if dataclasses.is_dataclass(abstract_state):
        state = dataclasses.replace(abstract_state, **state)
    except Exception as error:
      why = f'Orbax cannot read it: {_first_line(error)}'
    return state, _agree(why)

  def _set_aside(self, steps: list[int]) -> None:
    if jax.process_index() == 0:
      for step in steps:
        source, target = self._folder / str(step), self._folder.parent / 'unreadable' / str(step)
        n = 1
        while files.exists(target):
          n, target = n + 1, target.with_name(f'{step}-{n}')
        try:
          files.move(source, target, seal=_COMMITTED)
        except OSError as error:
          raise FailedError(
            f'checkpoint {step} cannot be moved out of the way to {target}: '
            f'{_first_line(error)}; move or delete {source} by hand'
          ) from error
        logging.warning('checkpoint %d moved to %s', step, target)
    # Orbax keeps a list of the steps: a new manager reads it anew, once all have been moved.
    self._manager.close()
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('checkpoints set aside')
    self._manager = self._open(remove_leftovers=True)
    self.damaged.clear()


@dataclasses.dataclass(frozen=True)
class _Preserved:
  """Orbax asks it which checkpoints to keep: its preservation policy."""

  keep: int | None
  on_schedule: Callable[[int], bool]

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """Of each, oldest first, whether it stays."""
    steps = [checkpoint.step for checkpoint in checkpoints]
    kept = {*steps[-self.keep :]} if self.keep else {*steps}
    kept.update([step for step in steps if self.on_schedule(step)][-1:])
    return [step in kept for step in steps]


def quiet_orbax() -> None:
  """Takes Orbax's progress lines, dozens a save, and its stack traces out of the log.

  Its warnings and errors stay, each as one line; what failed is raised here as well. Of a save that
  fails, only the first error is: of each other array asyncio and TensorStore would print a stack
  trace, hundreds in all, after which nobody finds the reason.
  """

  def keep(record):
    if '/orbax/' not in record.pathname:
      return True
    record.exc_info = None
    return record.levelno >= logging.converter.STANDARD_WARNING

  logging.get_absl_logger().addFilter(keep)
  asyncio_logger.addFilter(lambda record: 'never retrieved' not in record.getMessage())
  show = sys.unraisablehook

  def show_others(unraisable):
    if str(unraisable.exc_value) != 'Event loop is closed':
      show(unraisable)

  sys.unraisablehook = show_others


def _composite(args: ocp.args.CheckpointArgs) -> ocp.args.Composite:
  """Named: what an unnamed item is, Orbax would guess from the first step that it reads."""
  return ocp.args.Composite(**{_ITEM: args})


def _set_fields(state: PyTree) -> PyTree:
  """A dataclass as a dict, without what is None: older checkpoints lack a field that is new."""
  if not dataclasses.is_dataclass(state):
    return state
  values = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
  return {name: value for name, value in values.items() if value is not None}


def _as_array(leaf: Any) -> jax.Array | np.ndarray:
  if isinstance(leaf, jax.Array):
    return leaf
  leaf = np.asarray(leaf)
  return leaf.astype(jax.dtypes.canonicalize_dtype(leaf.dtype))


def _sha256(path: files.Path) -> str:
  with files.reading(path) as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _first_difference(stored: PyTree, abstract_state: PyTree) -> str | None:
  """Names the first leaf, in the order of `abstract_state`, whose shape or dtype differs."""
  there, here = _leaves(stored), _leaves(abstract_state)
  for name in here | there:
    if there.get(name) != here.get(name):
      return f'{name} is {there.get(name, "absent")} there and {here.get(name, "absent")} here'
  return None


def _leaves(tree: PyTree) -> dict[str, str]:
  """The leaves' dtype and shape by their path: {'params/conv/kernel': 'float32[3,3,16,16]'}."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): (
      f'{np.dtype(leaf.dtype)}[{",".join(map(str, leaf.shape))}]'
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _agree(why: str | None) -> str | None:
  """`why` if given, else any other process's: all processes take the same decision."""
  if jax.process_count() == 1:
    return why
  objections = multihost_utils.process_allgather(np.array(why is not None))
  if why is None and objections.any():
    return f'found by process {int(objections.argmax())}, see its log'
  return why


def _first_process_says(steps: list[int]) -> list[int]:
  """The first process's list: listings of a shared folder may differ for a while."""
  if jax.process_count() == 1:
    return steps
  count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
  padded = np.zeros(count, np.int32)
  padded[: len(steps)] = steps[:count]
  return multihost_utils.broadcast_one_to_all(padded).tolist()


def _first_line(error: BaseException) -> str:
  """The error as one line of bounded length; TensorStore's say at both ends what is wrong."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  text = re.sub(r' \[(\w+=|source locations).*', '', lines[0]) if lines else type(error).__name__
  return text if len(text) <= 200 else f'{text[:60]}...{text[-140:]}'


def _some(steps: list[int]) -> str:
  newest = ', '.join(map(str, steps[-8:]))
  return newest if len(steps) <= 8 else f'{len(steps)} steps up to {newest}'


def _are(steps: list[int]) -> str:
  return f'are {_some(steps)}' if len(steps) > 1 else f'is {steps[0]}' if steps else 'is none'
