"""Which process of a run this is, and where the first one is.

Flags say so, or what Cloud TPU, GKE, a JobSet or SLURM tells each of its processes.
"""

import dataclasses
import glob
import importlib.util
import itertools
import os
import re
import urllib.request
from collections.abc import Mapping

from afi_flax.errors import UserError

# Where process 0 calls the roll, unless the flags or SLURM's job say another; JAX takes the next.
PORT = 8482


@dataclasses.dataclass(frozen=True)
class Place:
  """Where this process stands among those of its run.

  Attributes:
    index: from 0.
    count: of all processes.
    host: name or address of process 0.
    port: where process 0 calls the roll. JAX's own coordinator listens on the next one.
    names: hosts of all processes in their order, where they are known; else ().
    told_by: who said so.
    local_devices: accelerators of the host that are this process's; None: all.
  """

  index: int
  count: int
  host: str
  port: int = PORT
  names: tuple[str, ...] = ()
  told_by: str = 'flags'
  local_devices: tuple[int, ...] | None = None

  def name(self, index: int) -> str:
    """'process 3 (host-3)', or without the host where it is not known."""
    return f'process {index}' + (f' ({self.names[index]})' if self.names else '')

  def address(self, port: int) -> str:
    """'host:port' of process 0."""
    return f'{bracketed(self.host)}:{port}'


def find_place(
  coordinator: str | None = None,
  count: int = 1,
  index: int = 0,
  environ: Mapping[str, str] = os.environ,
) -> Place | None:
  """This process's place, by flags where they are given, else by its surroundings.

  Args:
    coordinator: HOST:PORT of process 0, where PORT + 1 is free too.
    count: how many processes there are.
    index: which one this is.
    environ: the environment's variables.

  Returns:
    None where the process is alone.

  Raises:
    UserError: the flags do not go together, or the surroundings contradict themselves.
  """
  if (count > 1) != bool(coordinator) or (index and not coordinator):
    raise UserError('several processes need both --processes and --coordinator HOST:PORT')
  if coordinator:
    host, _, port = coordinator.rpartition(':')
    if not host or not port.isdecimal() or not 0 < int(port) < 65535:
      raise UserError(f'--coordinator {coordinator!r} must be HOST:PORT, with PORT from 1 to 65534')
    if not 0 <= index < count:
      raise UserError(f'--process {index} must be from 0 to {count - 1}, as --processes is {count}')
    return Place(index, count, host.strip('[]'), int(port))
  for ask in (_gke_tpu, _jobset, _slurm, _cloud_tpu_vm):
    try:
      place = ask(environ)
    except (KeyError, ValueError, IndexError) as error:
      raise UserError(
        f'the environment does not say which process this is ({ask.__name__[1:]}: {error!r}); '
        'give --coordinator, --processes and --process'
      ) from error
    if place:
      return place if place.count > 1 else None
  return None


def _gke_tpu(environ: Mapping[str, str]) -> Place | None:
  """What GKE tells the pods of a TPU slice, or of several slices."""
  if 'TPU_WORKER_HOSTNAMES' not in environ or 'TPU_WORKER_ID' not in environ:
    return None
  names = tuple(environ['TPU_WORKER_HOSTNAMES'].split(','))
  slices = int(environ.get('MEGASCALE_NUM_SLICES', 1))
  index = int(environ['TPU_WORKER_ID']) + int(environ.get('MEGASCALE_SLICE_ID', 0)) * len(names)
  first = environ['MEGASCALE_COORDINATOR_ADDRESS'].split(':')[0] if slices > 1 else names[0]
  known = names if slices == 1 else ()  # those of the other slices are not
  return Place(index, len(names) * slices, first, names=known, told_by='GKE')


def _jobset(environ: Mapping[str, str]) -> Place | None:
  """What the manifest of launch/gke.sh passes on of a JobSet of one replicated job."""
  if 'JOBSET_NAME' not in environ:
    return None
  jobset, job = environ['JOBSET_NAME'], environ['JOBSET_JOB']
  count, index = int(environ['JOBSET_HOSTS']), int(environ['JOB_COMPLETION_INDEX'])
  names = tuple(f'{jobset}-{job}-0-{i}.{jobset}' for i in range(count))
  return Place(index, count, names[0], names=names, told_by='JobSet')


def _slurm(environ: Mapping[str, str]) -> Place | None:
  """What srun tells each task of a step."""
  if 'SLURM_STEP_NODELIST' not in environ or 'SLURM_PROCID' not in environ:
    return None
  nodes = expand_nodes(environ['SLURM_STEP_NODELIST'])
  tasks = _tasks_per_node(environ.get('SLURM_STEP_TASKS_PER_NODE', ''), len(nodes))
  names = tuple(
    itertools.chain.from_iterable([node] * n for node, n in zip(nodes, tasks, strict=True))
  )
  local = None
  if max(tasks) > 1 and ',' in environ.get('CUDA_VISIBLE_DEVICES', ''):
    local = (int(environ['SLURM_LOCALID']),)  # else SLURM gave each task devices of its own
  job = int(environ['SLURM_JOB_ID']) + int(environ.get('SLURM_STEP_ID', 0))
  return Place(
    index=int(environ['SLURM_PROCID']),
    count=int(environ.get('SLURM_STEP_NUM_TASKS', len(names))),
    host=nodes[0],
    port=61440 + job % 2048 * 2,  # jobs that share a node take different pairs
    names=names,
    told_by='SLURM',
    local_devices=local,
  )


def expand_nodes(text: str) -> list[str]:
  """SLURM's list of nodes: 'gpu[08-10,12],login' -> gpu08, gpu09, gpu10, gpu12, login."""
  nodes = []
  for item in re.findall(r'(?:[^,\[]|\[[^\]]*\])+', text):
    parts = re.split(r'\[([^\]]*)\]', item)  # fixed, range, fixed, range, ..., fixed
    choices = [_numbers(part) if i % 2 else [part] for i, part in enumerate(parts)]
    nodes += [''.join(choice) for choice in itertools.product(*choices)]
  return nodes


def _numbers(ranges: str) -> list[str]:
  """'08-10,12' -> 08, 09, 10, 12."""
  numbers = []
  for part in ranges.split(','):
    first, _, last = part.partition('-')
    steps = range(int(first), int(last or first) + 1)
    numbers += [str(n).zfill(len(first)) for n in steps]
  return numbers


def _tasks_per_node(text: str, nodes: int) -> list[int]:
  """SLURM's '2(x3),1' -> 2, 2, 2, 1; one each where it does not say."""
  tasks = []
  for number, times in re.findall(r'(\d+)(?:\(x(\d+)\))?', text):
    tasks += [int(number)] * int(times or 1)
  return tasks or [1] * nodes


def _cloud_tpu_vm(environ: Mapping[str, str]) -> Place | None:
  """What Google's metadata server tells a host with TPU chips."""
  chips = glob.glob('/dev/accel[0-9]*') + glob.glob('/dev/vfio/[0-9]*')
  has_tpu = chips and importlib.util.find_spec('libtpu') and 'TPU_SKIP_MDS_QUERY' not in environ
  if not has_tpu and 'GCE_METADATA_IP' not in environ:
    return None
  server = environ.get('GCE_METADATA_IP', 'metadata.google.internal')
  index = _metadata(server, 'agent-worker-number')
  endpoints = _metadata(server, 'worker-network-endpoints')
  if index is None or endpoints is None:
    return None
  # Each is an address, or as it used to be, name:id:address.
  names = tuple(endpoint.split(':')[-1] for endpoint in endpoints.split(','))
  return Place(int(index), len(names), names[0], names=names, told_by='Cloud TPU')


def _metadata(server: str, key: str) -> str | None:
  """An attribute of this virtual machine; None where there is no such server or attribute."""
  request = urllib.request.Request(
    f'http://{server}/computeMetadata/v1/instance/attributes/{key}',
    headers={'Metadata-Flavor': 'Google'},
  )
  direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
  try:
    with direct.open(request, timeout=5) as answer:
      return answer.read().decode().strip()
  except OSError:  # URLError is one
    return None


def bracketed(host: str) -> str:
  """A host as it stands before ':port'; IPv6 addresses need brackets there."""
  return f'[{host}]' if ':' in host else host
