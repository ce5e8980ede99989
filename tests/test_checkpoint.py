"""What is saved comes back, or the next older one does and somebody is told."""

import json
import logging
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from afi_flax import checkpoint
from afi_flax.checkpoint import Checkpoints
from afi_flax.errors import UserError


@flax.struct.dataclass
class State:
  step: Any
  params: Any
  batch_stats: Any
  opt_state: Any
  ema: Any


def replicated(devices=1):
  mesh = jax.make_mesh(
    (devices,), ('data',), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
  )
  return NamedSharding(mesh, PartitionSpec())


def make_state(step=0, sharding=None, features=4):
  """Every leaf differs from step to step."""
  rng = np.random.default_rng(step)
  params = {
    'conv': {'kernel': rng.normal(size=(3, 3, 2, features)).astype('float32')},
    'bn': {'scale': rng.normal(size=features).astype('float32')},
  }
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.sgd(optax.constant_schedule(0.1), momentum=0.9)
  )
  opt_state = jax.tree.map(lambda x: x + step, optimizer.init(params))
  stats = {'bn': {'mean': rng.normal(size=features).astype('bfloat16')}}
  state = State(np.int32(step), params, stats, opt_state, ema=None)
  return jax.device_put(state, sharding or replicated())


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


ABSTRACT = abstract(make_state())


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture
def folder(tmp_path):
  (tmp_path / 'run').mkdir()
  return tmp_path / 'run' / 'checkpoints'


@pytest.fixture
def opened(folder):
  """Opens the folder's checkpoints; all are closed at the end."""
  all_of_them = []

  def open_(keep=3, **options):
    all_of_them.append(Checkpoints(folder, keep, **options))
    return all_of_them[-1]

  yield open_
  for checkpoints in all_of_them:
    checkpoints.close()


def fill(checkpoints, *steps):
  for step in steps:
    checkpoints.save(step, make_state(step), wait=True)
  return checkpoints


def array_file(step_folder):
  """The largest of the files that hold array values."""
  return max(step_folder.glob('state/**/d/*'), key=lambda path: path.stat().st_size)


def flip_byte(step_folder):
  path = array_file(step_folder)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  return path.name


def truncate(step_folder):
  path = array_file(step_folder)
  os.truncate(path, path.stat().st_size // 2)
  return path.name


def remove_a_file(step_folder):
  path = array_file(step_folder)
  path.unlink()
  return path.name


def scramble_metadata(step_folder):
  (step_folder / 'state' / '_METADATA').write_text('{"tree_metadata": ')
  return '_METADATA'


def scramble_metadata_and_sums(step_folder):
  """As if it had been written like this: only Orbax can notice."""
  scramble_metadata(step_folder)
  path = step_folder / 'sums.0-of-1.json'
  record = json.loads(path.read_text())
  record['sha256']['state/_METADATA'] = checkpoint._sha256(step_folder / 'state' / '_METADATA')
  path.write_text(json.dumps(record))
  return 'metadata cannot be read'


def half_copy(step_folder):
  """A copy that was broken off before it came to the sums and to some of the files."""
  (step_folder / 'sums.0-of-1.json').unlink()
  shutil.rmtree(step_folder / 'state')
  return 'older ones first'


def unseal(step_folder):
  (step_folder / 'sums.0-of-1.json').unlink()
  return '0 of 1 sums files'


DAMAGES = [
  flip_byte,
  truncate,
  remove_a_file,
  scramble_metadata,
  scramble_metadata_and_sums,
  half_copy,
]


@pytest.mark.parametrize(('before', 'after'), [(1, 1), (1, 8), (8, 1), (8, 8)])
def test_round_trip(folder, before, after):
  state = make_state(7, replicated(before))
  writer = Checkpoints(folder, keep=1)
  writer.save(7, state)
  writer.close()
  reader = Checkpoints(folder, keep=1)
  wanted = abstract(make_state(0, replicated(after)))
  restored, step = reader.restore(wanted)
  reader.close()
  assert step == 7
  assert_equal(restored, state)
  assert isinstance(restored, State)
  assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, wanted)


def test_sharded_leaves(folder, opened):
  mesh = replicated(8).mesh
  split = NamedSharding(mesh, PartitionSpec('data'))
  state = {'x': jax.device_put(jnp.arange(16.0), split)}
  opened().save(1, state, wait=True)
  restored, _ = opened().restore(abstract(state))
  assert restored['x'].sharding == split
  assert_equal(restored, state)


def test_numbers_are_stored_as_jax_makes_them(opened):
  checkpoints = opened()
  checkpoints.save(1, {'count': 3, 'rate': np.float64(0.5)}, wait=True)
  on_device = {'count': jnp.int32(3), 'rate': jnp.float32(0.5)}
  restored, _ = checkpoints.restore(abstract(jax.device_put(on_device, replicated())))
  assert_equal(restored, on_device)


def test_the_state_may_be_donated_while_it_is_saved(opened):
  state = jax.device_put({'x': np.random.default_rng(0).normal(size=2**20)}, replicated())
  expected = np.array(state['x'])
  wanted = abstract(state)
  step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
  checkpoints = opened()
  checkpoints.save(1, state)
  for _ in range(3):
    state = step(state)
  restored, _ = checkpoints.restore(wanted)
  np.testing.assert_array_equal(restored['x'], expected)


def test_nothing_is_cut_for_several_devices_that_hold_the_same(opened, monkeypatch):
  """Training would wait for it: a slice a device of each array, one after another."""
  cuts, cut = [], jax.lax.slice_in_dim
  monkeypatch.setattr(jax.lax, 'slice_in_dim', lambda *a, **k: cuts.append(a) or cut(*a, **k))
  state = make_state(1, replicated(8), features=8)
  opened().save(1, state, wait=True)
  assert not cuts
  assert_equal(opened().restore(abstract(state))[0], state)


def test_poll_seals_what_has_been_committed(folder, opened):
  checkpoints = opened()
  checkpoints.poll()
  checkpoints.save(1, make_state(1))
  sums = folder / '1' / 'sums.0-of-1.json'
  assert not sums.exists()
  deadline = time.monotonic() + 30
  while not sums.exists() and time.monotonic() < deadline:
    checkpoints.poll()
  recorded = json.loads(sums.read_text())
  assert (recorded['process'], recorded['processes']) == (0, 1)
  files = {str(p.relative_to(folder / '1')) for p in (folder / '1').rglob('*') if p.is_file()}
  assert set(recorded['sha256']) == files - {sums.name}


def test_keeps_the_newest(folder, opened):
  checkpoints = fill(opened(keep=2), 1, 2, 3, 4)
  assert checkpoints.steps() == [3, 4]
  assert checkpoints.restore(ABSTRACT)[1] == 4
  assert fill(opened(keep=2), 5).steps() == [4, 5]


def test_keeps_the_newest_on_schedule(opened):
  """Which stops may push out of the newest, but which alone a run rolls back to."""
  checkpoints = fill(opened(keep=1, on_schedule=lambda step: step % 4 == 0), 4, 5, 6)
  assert checkpoints.steps() == [4, 6]
  assert checkpoints.restore(ABSTRACT, on_schedule=True)[1] == 4
  assert fill(checkpoints, 8).steps() == [8]


def test_a_good_step_is_not_written_again(folder, opened):
  fill(opened(), 1)
  inode = array_file(folder / '1').stat().st_ino
  fill(opened(), 1)
  assert array_file(folder / '1').stat().st_ino == inode
  assert not (folder.parent / 'unreadable').exists()


@pytest.mark.parametrize('damage', [flip_byte, unseal])
def test_a_step_that_is_not_good_is_set_aside_and_written_again(folder, opened, damage):
  fill(opened(), 1)
  damage(folder / '1')
  checkpoints = fill(opened(), 1)
  assert_equal(checkpoints.restore(ABSTRACT)[0], make_state(1))
  assert (folder.parent / 'unreadable' / '1').is_dir()


def test_an_older_step_than_the_newest_is_refused(opened):
  with pytest.raises(ValueError, match='step 2 is older than step 5'):
    fill(opened(), 5, 2)


@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.fault(
  'checkpoint', 'the newest one damaged', 'said loudly; the newest good one is taken'
)
def test_falls_back_to_the_next_older_good_one(folder, opened, caplog, damage):
  fill(opened(), 1, 2, 3)
  names = [damage(folder / '3'), damage(folder / '2')]
  checkpoints = opened()
  state, step = checkpoints.restore(ABSTRACT)
  assert step == 1
  assert_equal(state, make_state(1))
  for n, name in zip((3, 2), names, strict=True):
    assert any(f'checkpoint {n} ' in line and name in line for line in caplog.messages)
  assert checkpoints.steps() == [1, 2, 3]


@pytest.mark.parametrize('damage', [flip_byte, scramble_metadata_and_sums, half_copy])
@pytest.mark.fault(
  'checkpoint',
  'one that cannot be read, then many more saves',
  'moved to unreadable/ whole, never deleted',
)
def test_never_deletes_what_it_could_not_read(folder, opened, damage):
  fill(opened(), 1, 2, 3)
  damage(folder / '3')
  size = sum(path.stat().st_size for path in (folder / '3').rglob('*'))
  checkpoints = opened(keep=1)
  _, step = checkpoints.restore(ABSTRACT)
  checkpoints.set_aside(newer_than=step)
  fill(checkpoints, 3, 4, 5)
  assert checkpoints.steps() == [5]
  aside = folder.parent / 'unreadable' / '3'
  assert sum(path.stat().st_size for path in aside.rglob('*')) == size


def test_set_aside_moves_newer_and_damaged_steps_with_their_sums(folder, opened):
  fill(opened(), 1, 2, 3)
  flip_byte(folder / '1')
  unseal(folder / '2')
  unseal(folder / '3')
  checkpoints = opened()
  assert checkpoints.restore(ABSTRACT)[1] == 3  # 1 is damaged, 3 the newest of the unsealed
  checkpoints.set_aside(newer_than=2)
  assert checkpoints.steps() == [2]
  unreadable = folder.parent / 'unreadable'
  assert sorted(p.name for p in unreadable.iterdir()) == ['1', '3']
  assert (unreadable / '1' / 'sums.0-of-1.json').exists()
  fill(checkpoints, 3).set_aside(newer_than=2)
  assert sorted(p.name for p in unreadable.iterdir()) == ['1', '3', '3-1']
  assert (unreadable / '3-1' / 'sums.0-of-1.json').exists()


def test_set_aside_with_nothing_to_do(folder, opened):
  checkpoints = opened()
  checkpoints.set_aside(newer_than=0)
  assert checkpoints.steps() == []
  assert fill(checkpoints, 1).restore(ABSTRACT)[1] == 1


@pytest.mark.fault(
  'checkpoint',
  'killed before its sums were written',
  'an older good one first; else it, with a warning',
)
def test_an_unsealed_step_only_where_no_good_one_is(folder, opened, caplog):
  fill(opened(), 1, 2)
  unseal(folder / '2')
  assert opened().restore(ABSTRACT)[1] == 1
  assert '2 is not verifiable' in caplog.text
  unseal(folder / '1')
  caplog.clear()
  state, step = opened().restore(ABSTRACT)
  assert step == 2
  assert_equal(state, make_state(2))
  assert '2 is restored unverified' in caplog.text


@pytest.mark.parametrize('damage', [scramble_metadata, half_copy])
def test_an_unsealed_step_that_cannot_be_read_gives_way_to_one_that_can(folder, opened, damage):
  fill(opened(), 1, 2)
  damage(folder / '2')
  for path in folder.glob('*/sums*'):
    path.unlink()
  state, step = opened().restore(ABSTRACT)
  assert step == 1
  assert_equal(state, make_state(1))


def test_a_step_with_the_sums_of_one_of_two_processes_is_unsealed(folder, opened):
  fill(opened(), 1, 2)
  path = folder / '2' / 'sums.0-of-1.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'processes': 2}))
  path.rename(path.with_name('sums.0-of-2.json'))
  assert opened().restore(ABSTRACT)[1] == 1


@pytest.mark.parametrize('content', ['', '{"process": 0', '[]', '{"sha256": 3}'])
@pytest.mark.fault(
  'checkpoint',
  'its file of sums is damaged',
  'an older good one is taken',
)
def test_a_step_whose_sums_cannot_be_read_is_unsealed(folder, opened, content):
  fill(opened(), 1, 2)
  (folder / '2' / 'sums.0-of-1.json').write_text(content)
  assert opened().restore(ABSTRACT)[1] == 1


def test_a_given_step(folder, opened):
  checkpoints = fill(opened(), 1, 2, 3)
  state, step = checkpoints.restore(ABSTRACT, step=2)
  assert step == 2
  assert_equal(state, make_state(2))
  with pytest.raises(UserError, match=r'no checkpoint of step 4 .* there are 1, 2, 3'):
    checkpoints.restore(ABSTRACT, step=4)
  name = flip_byte(folder / '2')
  with pytest.raises(UserError, match=rf'2 .* is damaged: .*{name}.*; besides it there are 1, 3'):
    checkpoints.restore(ABSTRACT, step=2)
  unseal(folder / '3')
  assert checkpoints.restore(ABSTRACT, step=3)[1] == 3


def test_none_is_none_and_leaves_no_folder(folder, opened):
  checkpoints = opened()
  assert checkpoints.restore(ABSTRACT) is None
  with pytest.raises(UserError, match='there is none'):
    checkpoints.restore(ABSTRACT, step=1)
  assert not folder.exists()


@pytest.mark.parametrize('damage', [flip_byte, scramble_metadata_and_sums, half_copy])
@pytest.mark.fault(
  'checkpoint',
  'all of them damaged',
  'an error that names them; never from scratch in silence',
)
def test_all_damaged_is_an_error(folder, opened, damage):
  fill(opened(), 1, 2)
  damage(folder / '1')
  damage(folder / '2')
  with pytest.raises(UserError, match=r'every checkpoint in .* is damaged \(1, 2; 2: ') as error:
    opened().restore(ABSTRACT)
  assert '\n' not in str(error.value)
  assert opened().steps() == [1, 2]


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      lambda state: make_state(features=8),
      r'params/bn/scale is float32\[4\] there and float32\[8\] here',
    ),
    (
      lambda state: state.replace(params={'bn': state.params['bn']}),
      r'params/conv/kernel is float32\[3,3,2,4\] there and absent here',
    ),
    (
      lambda state: state.replace(ema=state.params),
      r'ema/bn/scale is absent there and float32\[4\] here',
    ),
    (
      lambda state: state.replace(step=jnp.float32(0)),
      r'step is int32\[\] there and float32\[\] here',
    ),
  ],
)
def test_another_model_is_an_error_and_never_passed_over(folder, opened, change, message):
  other = jax.device_put(change(make_state()), replicated())
  checkpoints = opened()
  checkpoints.save(1, other)
  fill(checkpoints, 2)
  for step in (None, 2):
    with pytest.raises(UserError, match=f'checkpoint 2 .* another model: {message}; give'):
      opened().restore(abstract(other), step)


def test_another_model_is_told_from_damage(folder, opened):
  fill(opened(), 1, 2)
  name = flip_byte(folder / '2')
  with pytest.raises(UserError, match=rf'2 .* damaged: .*{name}'):
    opened().restore(abstract(make_state(features=8)), step=2)
  with pytest.raises(UserError, match=r'1 .* another model'):
    opened().restore(abstract(make_state(features=8)))


def test_restoring_changes_nothing_on_disk(folder, opened):
  fill(opened(), 1, 2)
  flip_byte(folder / '2')
  (folder / '3.orbax-checkpoint-tmp').mkdir()  # a running run is about to write this one
  before = {p: p.stat().st_mtime_ns for p in folder.parent.rglob('*')}
  reader = opened(keep=1)
  reader.restore(ABSTRACT)
  reader.close()
  assert {p: p.stat().st_mtime_ns for p in folder.parent.rglob('*')} == before


def test_close_ends_all_threads_and_may_be_repeated(folder):
  before = set(threading.enumerate())
  checkpoints = Checkpoints(folder, keep=1)
  checkpoints.save(1, make_state(1))
  checkpoints.close()
  checkpoints.close()
  # (The pool of asyncio, which Orbax keeps for the whole process, may have grown.)
  left = {t for t in set(threading.enumerate()) - before if not t.name.startswith('asyncio_')}
  assert not left
  assert (folder / '1' / 'sums.0-of-1.json').exists()


@pytest.fixture
def small_disk():
  """No file may grow beyond 64 KiB; call it to lift that."""
  _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
  yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
  resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def poll_for_long(checkpoints):
  deadline = time.monotonic() + 30
  while time.monotonic() < deadline:
    checkpoints.poll()


@pytest.mark.parametrize(
  'notice',
  [
    poll_for_long,
    Checkpoints.close,
    lambda checkpoints: checkpoints.restore(ABSTRACT),
    lambda checkpoints: checkpoints.save(3, make_state(3)),
    lambda checkpoints: checkpoints.set_aside(1),
  ],
  ids=['poll', 'close', 'restore', 'save', 'set_aside'],
)
@pytest.mark.fault(
  'disk',
  'a file cannot grow (RLIMIT_FSIZE) in a save',
  'said at the next call, once; the older one stays good',
)
def test_a_failed_save_is_told_and_the_older_one_stays(folder, opened, small_disk, notice):
  checkpoints = fill(opened(keep=1), 1)
  checkpoints.save(2, {'x': np.random.default_rng(0).normal(size=2**16)})
  message = r'checkpoint 2 could not be written to .*: .*File too large; make room'
  with pytest.raises(UserError, match=message) as error:
    notice(checkpoints)
  assert '\n' not in str(error.value)
  small_disk()
  checkpoints.close()  # says it once
  again = opened(keep=1)
  state, step = again.restore(ABSTRACT)
  assert step == 1
  assert_equal(state, make_state(1))
  again.set_aside(newer_than=1)
  assert fill(again, 4).steps() == [4]
  assert sorted(p.name for p in folder.iterdir()) == ['4']  # the leftovers are gone


KILLED = """
import os, pathlib, signal, sys
import jax, numpy as np
from afi_flax.checkpoint import Checkpoints
folder = pathlib.Path(sys.argv[1])
state = lambda n: {'x': jax.device_put(np.random.default_rng(n).normal(size=2**21))}
checkpoints = Checkpoints(folder, keep=2)
checkpoints.save(1, state(1), wait=True)
checkpoints.save(2, state(2))
while not any(path.name.startswith('2') for path in folder.iterdir()):
  pass
os.kill(os.getpid(), signal.SIGKILL)
"""


def run_python(code, *args):
  root = pathlib.Path(checkpoint.__file__).parents[1]
  environment = os.environ | {'PYTHONPATH': str(root), 'JAX_PLATFORMS': 'cpu'}
  return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], env=environment)


@pytest.mark.fault(
  'kill',
  'SIGKILL in the middle of a save',
  'the older checkpoint is good; that step is saved again',
)
def test_kill_in_the_middle_of_a_save(folder, opened):
  assert run_python(KILLED, folder).wait(timeout=300) == -signal.SIGKILL
  assert [p.name for p in folder.glob('2*')] == ['2.orbax-checkpoint-tmp']
  checkpoints = opened()

  def state(n):
    return {'x': np.random.default_rng(n).normal(size=2**21).astype('float32')}

  wanted = abstract(jax.device_put(state(1), replicated()))
  restored, step = checkpoints.restore(wanted)
  assert step == 1
  assert_equal(restored, state(1))
  checkpoints.set_aside(newer_than=1)
  checkpoints.save(2, jax.device_put(state(2), replicated()), wait=True)
  assert sorted(p.name for p in folder.iterdir()) == ['1', '2']
  assert_equal(checkpoints.restore(wanted)[0], state(2))


def test_quiet_orbax(folder, caplog):
  absl_logger = logging.getLogger('absl')
  filters, level = list(absl_logger.filters), absl_logger.level
  try:
    absl_logger.setLevel(logging.INFO)
    checkpoint.quiet_orbax()
    checkpoints = fill(Checkpoints(folder, 1), 1)
    flip_byte(folder / '1')
    with pytest.raises(UserError):
      checkpoints.restore(ABSTRACT)
    checkpoints.close()
  finally:
    absl_logger.setLevel(level)
    absl_logger.filters[:] = filters
  assert len(caplog.messages) == 1
  assert 'checkpoint 1 in' in caplog.text


TWO_PROCESSES = """
import pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from afi_flax.checkpoint import Checkpoints
process, port, run = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
jax.config.update('jax_num_cpu_devices', 2)
jax.distributed.initialize(f'127.0.0.1:{port}', num_processes=2, process_id=process)
mesh = jax.make_mesh((4,), ('data',), (jax.sharding.AxisType.Auto,))
split, all = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (['data'], []))
make = jax.jit(
  lambda n: {'split': jnp.arange(8.0) + n, 'all': jnp.full([3], n)},
  out_shardings={'split': split, 'all': all},
)
abstract = jax.tree.map(
  lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make(0.0)
)
last, best = Checkpoints(run / 'checkpoints', keep=2), Checkpoints(run / 'best', keep=1)
last.set_aside(0)
for step in (1, 2, 3):
  last.save(step, make(float(step)))
  best.save(step, make(float(step)))
last.close(), best.close()
for step in (3, 2):
  # Damage in a file whose sum process 1 recorded and verifies; process 0 must follow.
  last = Checkpoints(run / 'checkpoints', keep=2)
  state, restored = last.restore(abstract)
  assert restored == step, (restored, step)
  sums = sorted((run / 'checkpoints' / '3').glob('sums*'))  # now both have closed it
  assert [p.name for p in sums] == ['sums.0-of-2.json', 'sums.1-of-2.json'], sums
  np.testing.assert_array_equal(state['all'], np.full([3], step))
  for shard in state['split'].addressable_shards:
    np.testing.assert_array_equal(shard.data, np.arange(8.0)[shard.index] + step)
  if step == 3:
    if process == 1:
      victim = sorted(p for p in (run / 'checkpoints' / '3').rglob('*') if p.is_file())[1]
      victim.write_bytes(b'x')
    last.poll()
    jax.experimental.multihost_utils.sync_global_devices('damaged')
  else:
    last.set_aside(restored)
    assert last.steps() == [2], last.steps()
    assert (run / 'unreadable' / '3').is_dir()
    last.save(3, make(3.0), wait=True)
  last.close()
print('all good', process)
"""


@pytest.mark.slow
@pytest.mark.fault(
  'checkpoint',
  'damage that one of two processes finds',
  'both take the older one',
)
def test_two_processes_decide_alike(tmp_path):
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  processes = [run_python(TWO_PROCESSES, i, port, tmp_path) for i in (0, 1)]
  try:  # where one has failed, the other waits for it
    assert [p.wait(timeout=300) for p in processes] == [0, 0]
  finally:
    for p in processes:
      p.kill()
      p.wait()


def test_a_field_that_came_later_is_none(tmp_path):
  """What was written without it can be read where it is off, and not where it is on."""

  @flax.struct.dataclass
  class Old:
    step: jax.Array
    params: dict

  @flax.struct.dataclass
  class New:
    step: jax.Array
    params: dict
    ema: dict | None = None

  params = {'kernel': jnp.arange(6.0).reshape(2, 3)}
  written = Checkpoints(tmp_path / 'checkpoints')
  written.save(1, Old(jnp.int32(1), params), wait=True)
  off = New(jnp.int32(0), jax.tree.map(jnp.zeros_like, params))
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), off)
  restored, step = written.restore(abstract)
  assert (type(restored), step, int(restored.step), restored.ema) == (New, 1, 1, None)
  np.testing.assert_array_equal(restored.params['kernel'], params['kernel'])
  with pytest.raises(UserError, match='ema/kernel is absent there'):
    written.restore(abstract.replace(ema=abstract.params))
  written.close()
