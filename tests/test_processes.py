"""Several processes: how they start, agree and end; and that they are one run."""

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

from afi_flax import processes
from afi_flax.errors import AbsentError, FailedError, UserError
from afi_flax.place import Place
from afi_flax.workdir import Workdir
from benchmarks.processes import free_port


def test_a_process_alone():
  with processes.together(None, {}):
    pass


def roll_call(*callers, timeout=5.0, count=None, names=()):
  """What each caller, (index, agreed) or (index, agreed, count), gets of the roll call."""
  port = free_port()
  results = [None] * len(callers)

  def call(i, index, agreed, own_count=None):
    group = processes._Group(
      Place(index, own_count or count or len(callers), '127.0.0.1', port, names)
    )
    try:
      with group.failing_together():
        results[i] = (group.answer_roll if index else group.call_roll)(agreed, timeout)
    except UserError as error:
      results[i] = error

  threads = [threading.Thread(target=call, args=(i, *c)) for i, c in enumerate(callers)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
  return results


@pytest.fixture(autouse=True)
def no_exit(monkeypatch):
  """A failure of a process that a test plays must not end the tests."""
  monkeypatch.setattr(processes, 'leave', lambda status: None)
  monkeypatch.setattr(processes.os, 'write', lambda *_: None)


def test_all_come_up():
  results = roll_call((0, {'a': '1'}), (1, {'a': '1'}), (2, {'a': '1'}))
  assert results[0] == results[1] == results[2]
  table = processes._table(Place(0, 3, 'h'), results[0]).splitlines()
  assert table[1].split() == ['process', 'host', 'address']
  assert [line.split()[0] for line in table[2:]] == ['0', '1', '2']
  assert all(socket.gethostname() in line and '127.0.0.1:' in line for line in table[2:])


def test_the_absent_are_named():
  results = roll_call((0, {}), (2, {}), count=4, names=('a', 'b', 'c', 'd'), timeout=1.0)
  says = 'process 1 (b), process 3 (d) of 4 did not come up within 1 s'
  for error in results:
    assert isinstance(error, AbsentError)  # whose status says that it may come yet
    assert str(error).startswith(says)


def test_the_first_is_absent():
  (error,) = roll_call((1, {}), count=2, timeout=1.0)
  assert isinstance(error, AbsentError)
  assert str(error).startswith('process 0 at 127.0.0.1:')
  assert 'did not come up within 1 s' in str(error)


def test_the_first_ends_before_all_are_there():
  with socket.create_server(('127.0.0.1', 0)) as server:
    threading.Thread(target=lambda: server.accept()[0].close(), daemon=True).start()
    group = processes._Group(Place(1, 2, '127.0.0.1', server.getsockname()[1]))
    with pytest.raises(FailedError, match='ended while the processes were starting'):
      group.answer_roll({}, 5.0)


@pytest.mark.parametrize(
  ('second', 'third', 'says'),
  [
    ((1, {'k': '2'}), (2, {'k': '1'}), r'process 1 .* and process 0 differ in k \(2 and 1\)'),
    ((1, {'k': '1'}), (1, {'k': '1'}), 'both .* say that they are process 1'),
    ((1, {'k': '1'}, 4), (2, {'k': '1'}), 'there are 4 processes, process 0 that there are 3'),
  ],
)
def test_all_hear_of_a_mistake(second, third, says):
  results = roll_call((0, {'k': '1'}), second, third)
  assert {type(error) for error in results} == {UserError}
  assert len({str(error) for error in results}) == 1
  with pytest.raises(UserError, match=says):
    raise results[0]


def test_the_port_is_taken():
  with socket.create_server(('', 0)) as taken:
    group = processes._Group(Place(0, 2, '127.0.0.1', taken.getsockname()[1]))
    with pytest.raises(UserError, match=r'cannot listen on port .* in use'):
      group.call_roll({}, 1.0)


def test_the_port_of_jax_is_taken(monkeypatch):
  def initialize(address, *_, **__):
    raise jax.errors.JaxRuntimeError(f'UNKNOWN: no RPC server\non {address}')

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  says = r'coordinator at \[::1\]:1235: UNKNOWN: no RPC server on \[::1\]:1235; end what uses'
  with pytest.raises(UserError, match=says):
    processes._start_jax(Place(0, 2, '::1', 1234), 1.0)


def test_a_firewall_lets_only_the_roll_call_through():
  port = free_port()
  says = f"JAX's coordinator at 127.0.0.1:{port + 1} cannot be reached: Connection refused"
  with pytest.raises(UserError, match=says):
    processes._Group(Place(1, 2, '127.0.0.1', port)).await_jax(0.0)


def test_one_that_is_silent_is_told_from_one_that_is_gone(monkeypatch):
  """It stands for a process that hangs, or whose host has lost its network."""
  monkeypatch.setattr(processes, '_SILENCE', 0.2)
  ended = []
  monkeypatch.setattr(processes, 'leave', ended.append)
  said = []
  monkeypatch.setattr(processes.os, 'write', lambda _, text: said.append(text.decode()))
  for alive in (True, False):
    here, there = socket.socketpair()
    group = processes._Group(Place(0, 2, 'h', 1))
    peer = processes._Peer(here, 'process 1 (b)')
    there.sendall(b'{"alive": true}\n')
    if not alive:
      there.close()
    group._hear_out(peer)
    there.close()
    peer.close()
  assert ended == [1, 1]
  assert said[0].startswith('error: process 1 (b) has not been heard for 0.2 s, so it hangs or')
  assert said[1].startswith('error: process 1 (b) ended without saying why')


def test_strangers_are_turned_away():
  """Something that scans ports does not count as a process."""
  port = free_port()
  threading.Thread(target=_scan, args=(port,), daemon=True).start()
  group = processes._Group(Place(0, 2, '127.0.0.1', port))
  says = 'process 1 of 2 did not come up'
  with pytest.raises(AbsentError, match=says), group.failing_together():
    group.call_roll({}, 1.0)


def _scan(port):
  for _ in range(50):
    with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port)) as connection:
      connection.sendall(b'GET / HTTP/1.1\r\n\r\n')
      return
    time.sleep(0.02)


# What follows starts processes. Each joins by SLURM's variables or by flags, as in real life.

FAILING = """
import sys, time
import jax
from afi_flax import commands, processes
from afi_flax.errors import UserError
from afi_flax.place import find_place
index, count, port, how = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]

def main(_):
  place = find_place(f'127.0.0.1:{port}', count, index)
  with processes.together(place, {}, 60.0):
    if index == 1:
      if how == 'mistake':
        raise UserError('no such folder')
      if how == 'error':
        raise RuntimeError('boom')
      print('up', flush=True)
    time.sleep(120)

sys.argv[1:] = []
commands.run(main)
"""


def start_failing(how, count, port=None):
  port = str(port or free_port())
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  return [
    subprocess.Popen(
      [sys.executable, '-c', FAILING, str(i), str(count), port, how],
      env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    for i in range(count)
  ]  # fmt: skip


def said(err):
  """The line with the reason; JAX's own log may go on after it."""
  (reason,) = (line for line in err.splitlines() if line.startswith('error: '))
  return reason


@pytest.mark.slow
def test_a_mistake_on_one_process_ends_all():
  running = start_failing('mistake', 3)
  errs = [process.communicate(timeout=60)[1] for process in running]
  assert [process.returncode for process in running] == [2, 2, 2], errs
  host = socket.gethostname()
  assert said(errs[1]) == 'error: no such folder'
  for i in (0, 2):
    assert said(errs[i]) == f'error: process 1 ({host}): no such folder'
    assert 'Traceback' not in errs[i]


@pytest.mark.slow
def test_a_taken_port_of_jax_ends_all():
  port = free_port()
  with socket.create_server(('', port + 1)):
    errs = [p.communicate(timeout=60)[1] for p in start_failing('', 2, port)]
  for err in errs:
    assert f'process 0 cannot listen on port {port + 1} of ' in said(err)


@pytest.mark.slow
@pytest.mark.fault(
  'host',
  'an exception in one of two processes',
  'the other ends with status 1, saying which and why',
)
def test_a_failure_of_one_process_ends_all():
  running = start_failing('error', 2)
  errs = [process.communicate(timeout=60)[1] for process in running]
  assert [process.returncode for process in running] == [1, 1], errs
  assert 'process 1' in said(errs[0])
  assert 'RuntimeError: boom; see its output' in said(errs[0])
  assert 'Traceback' in errs[1]


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
@pytest.mark.fault(
  'host',
  'SIGKILL of one of three processes',
  'the others end with status 1, naming it',
)
def test_a_process_that_is_killed_ends_all(victim):
  running = start_failing('killed', 3)
  assert running[1].stdout.readline() == 'up\n'
  running[victim].kill()
  errs = [process.communicate(timeout=60)[1] for process in running]
  for i, process in enumerate(running):
    if i != victim:
      assert process.returncode == 1, errs[i]
      assert f'error: process {victim}' in said(errs[i])
      assert 'ended without saying why' in said(errs[i])


# The command itself, which also writes down the ids of the examples that it trains on.
RECORDING = """
import json, sys
from afi_flax import commands, main, sharding
folder = sys.argv.pop(1)
put = sharding.put_batch

def put_and_record(batch, mesh):
  if 'mask' not in batch:
    import jax
    with open(f'{folder}/ids.{jax.process_index()}.jsonl', 'a') as file:
      file.write(json.dumps(batch['example'].tolist()) + '\\\\n')
  return put(batch, mesh)

sharding.put_batch = put_and_record
if __name__ == '__main__':
  commands.run(main.main)
""".replace('\\\\', '\\')


def train(folder, workdir, steps, count=1, devices=1, slurm=False):
  """Trains on `count` processes of `devices` each; ids [steps, B] and losses [steps]."""
  folder.mkdir()
  flags = [
    '--config', 'configs/digits_afi_resnet20.py', '--workdir', workdir,
    '--config.model.name=resnet20', '--config.run.log_every_steps=1',
    '--config.eval_batch_size=100', f'--config.run.max_steps={steps}',
  ]  # fmt: skip
  env = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir,
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
  }
  port, running = free_port(), []
  for i in range(count):
    where, says = [], {}
    if count > 1 and slurm:
      says = {
        'SLURM_JOB_ID': str(port), 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_PROCID': str(i),
        'SLURM_STEP_NUM_TASKS': str(count), 'SLURM_STEP_TASKS_PER_NODE': str(count),
      }  # fmt: skip
    elif count > 1:
      where = [f'--coordinator=127.0.0.1:{port}', f'--processes={count}', f'--process={i}']
    command = [sys.executable, '-c', RECORDING, folder, *flags, *where]
    running.append(
      subprocess.Popen(
        list(map(str, command)), env=env | says, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
      )
    )
  errs = [process.communicate(timeout=500)[1].decode() for process in running]
  for process, err in zip(running, errs, strict=True):
    assert process.returncode == 0, err[-3000:]
  if count > 1:
    assert f'{count} processes, as said by {"SLURM" if slurm else "flags"}' in errs[0]
  shares = [
    [json.loads(line) for line in (folder / f'ids.{i}.jsonl').read_text().splitlines()]
    for i in range(count)
  ]
  ids = [
    list(itertools.chain(*parts)) for parts in zip(*shares, strict=False)
  ]  # prefetched ones may differ
  records = [r for r in Workdir(workdir).read_metrics() if r['split'] == 'train']
  return ids, {r['step']: r['loss'] for r in records}


# The command, with less patience for a file system that is slow to show what another host wrote.
IMPATIENT = """
from afi_flax import commands, main, workdir
workdir._PATIENCE = 2.0
if __name__ == '__main__':
  commands.run(main.main)
"""


def mistaken(flags_of_each):
  """Runs the command with each of the flags, as processes of one run; what each says in the end."""
  port, running = free_port(), []
  for i, flags in enumerate(flags_of_each):
    where = (f'--coordinator=127.0.0.1:{port}', f'--processes={len(flags_of_each)}')
    command = [sys.executable, '-c', IMPATIENT, *map(str, flags), *where, f'--process={i}']
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    running.append(
      subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
      )
    )
  errs = [process.communicate(timeout=200)[1] for process in running]
  assert {process.returncode for process in running} == {2}, errs
  return errs


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_ends_all(tmp_path):
  """Each has a folder of that name, as two hosts without a common file system would."""
  flags_of_each = []
  for i in range(2):
    flags = [
      '--config', 'configs/digits_afi_resnet20.py', '--workdir', tmp_path / str(i) / 'run',
      '--config.model.name=resnet20', '--config.run.max_steps=1', '--config.eval_batch_size=100',
    ]  # fmt: skip
    flags_of_each.append(flags)
  errs = mistaken(flags_of_each)
  says = f'workdir {tmp_path}/1/run on {socket.gethostname()} is not the one that process 0 writes'
  for err in errs:
    assert says in said(err)
    assert 'gs://BUCKET/FOLDER' in said(err)
    assert 'Traceback' not in err
  assert not (tmp_path / '1' / 'run' / 'checkpoints').exists()


@pytest.mark.slow
def test_hosts_with_other_data_end_all(tmp_path):
  """One copy of an image folder lacks a picture."""
  flags_of_each = []
  for i in range(2):
    for name in range(2 * 12 - i):
      path = tmp_path / str(i) / ('train' if name < 12 else 'val') / 'ab'[name % 2] / f'{name}.png'
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.new('RGB', (16, 16), (10 * name, 0, 0)).save(path)
    flags = [
      '--config', 'configs/image_folder.py', '--workdir', tmp_path / 'run',
      '--config.data.data_dir', tmp_path / str(i), '--config.batch_size=4',
      '--config.data.image_size=16', '--config.data.eval_resize=16',
    ]  # fmt: skip
    flags_of_each.append(flags)
  errs = mistaken(flags_of_each)
  for err in errs:
    assert 'process 1 finds other data than process 0' in said(err)
    assert 'Traceback' not in err
  assert not (tmp_path / 'run').exists(), 'nothing is written for a run that cannot start'


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """Ids and losses of six steps on one process with one device."""
  folder = tmp_path_factory.mktemp('alone')
  return train(folder / 'ids', folder / 'run', 6)


@pytest.mark.slow
@pytest.mark.parametrize('count', [2, 4])
@pytest.mark.fault(
  'determinism',
  '1, 2 and 4 processes',
  'the same examples; losses equal to 1e-3',
)
def test_several_processes_are_one_run(alone, tmp_path, count):
  ids, losses = train(tmp_path / 'ids', tmp_path / 'run', 6, count=count, slurm=count == 2)
  assert ids[:6] == alone[0][:6]
  assert list(losses) == list(alone[1]) == [1, 2, 3, 4, 5, 6]
  np.testing.assert_allclose(list(losses.values()), list(alone[1].values()), rtol=1e-3)
