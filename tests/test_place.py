"""How a process finds out which one of its run it is."""

import http.server
import threading

import pytest

from afi_flax.errors import UserError
from afi_flax.place import expand_nodes, find_place
from benchmarks.processes import free_port

SLURM = {
  'SLURM_JOB_ID': '5000', 'SLURM_STEP_ID': '0', 'SLURM_STEP_NODELIST': 'gpu[08-10],login',
  'SLURM_STEP_NUM_TASKS': '4', 'SLURM_PROCID': '2', 'SLURM_LOCALID': '0',
  'SLURM_STEP_TASKS_PER_NODE': '1(x4)', 'CUDA_VISIBLE_DEVICES': '0,1',
}  # fmt: skip


def test_a_process_alone():
  assert find_place(environ={}) is None
  assert find_place(environ=SLURM | {
    'SLURM_STEP_NODELIST': 'gpu08', 'SLURM_STEP_NUM_TASKS': '1', 'SLURM_PROCID': '0',
    'SLURM_STEP_TASKS_PER_NODE': '1',
  }) is None  # fmt: skip


def test_flags_say_more_than_the_surroundings():
  place = find_place('first:1234', 3, 2, environ=SLURM)
  assert (place.index, place.count, place.host, place.port) == (2, 3, 'first', 1234)
  assert find_place('[::1]:1234', 2, 1, environ={}).host == '::1'


@pytest.mark.parametrize(
  ('flags', 'says'),
  [
    (('here:1', 1, 0), 'need both --processes and --coordinator'),
    ((None, 2, 0), 'need both --processes and --coordinator'),
    ((None, 1, 1), 'need both --processes and --coordinator'),
    (('here', 2, 0), "--coordinator 'here' must be HOST:PORT"),
    (('here:65535', 2, 0), "'here:65535' must be HOST:PORT, with PORT from 1 to 65534"),
    (('here:1', 2, 2), '--process 2 must be from 0 to 1'),
  ],
)
def test_flags_that_do_not_go_together(flags, says):
  with pytest.raises(UserError, match=says):
    find_place(*flags, environ={})


def test_slurm():
  place = find_place(environ=SLURM)
  assert place.names == ('gpu08', 'gpu09', 'gpu10', 'login')
  assert (place.index, place.count, place.host, place.told_by) == (2, 4, 'gpu08', 'SLURM')
  assert place.local_devices is None
  other_job = find_place(environ=SLURM | {'SLURM_JOB_ID': '5001'})
  assert 1024 < place.port < place.port + 1 < other_job.port < 65535, 'JAX takes the next port'


def test_slurm_with_a_task_for_every_gpu():
  two_each = SLURM | {
    'SLURM_STEP_NUM_TASKS': '7', 'SLURM_STEP_TASKS_PER_NODE': '2(x3),1', 'SLURM_LOCALID': '1',
    'SLURM_PROCID': '3',
  }  # fmt: skip
  place = find_place(environ=two_each)
  assert place.names == ('gpu08', 'gpu08', 'gpu09', 'gpu09', 'gpu10', 'gpu10', 'login')
  assert place.local_devices == (1,)
  bound = find_place(environ=two_each | {'CUDA_VISIBLE_DEVICES': '1'})
  assert bound.local_devices is None, 'SLURM has given it its own already'


@pytest.mark.parametrize(
  ('text', 'nodes'),
  [
    ('a', ['a']),
    ('a,b-1', ['a', 'b-1']),
    ('n[1-3]', ['n1', 'n2', 'n3']),
    ('n[08-10,12].x,b', ['n08.x', 'n09.x', 'n10.x', 'n12.x', 'b']),
    ('r[1-2]n[1-2]', ['r1n1', 'r1n2', 'r2n1', 'r2n2']),
  ],
)
def test_lists_of_nodes(text, nodes):
  assert expand_nodes(text) == nodes


def test_gke():
  slice_ = {'TPU_WORKER_HOSTNAMES': 'a,b', 'TPU_WORKER_ID': '1'}
  place = find_place(environ=slice_)
  assert (place.index, place.count, place.host, place.names) == (1, 2, 'a', ('a', 'b'))
  slices = {
    'MEGASCALE_NUM_SLICES': '3', 'MEGASCALE_SLICE_ID': '2',
    'MEGASCALE_COORDINATOR_ADDRESS': 'first:80',
  }  # fmt: skip
  place = find_place(environ=slice_ | slices)
  assert (place.index, place.count, place.host, place.names) == (5, 6, 'first', ())


def test_jobset():
  place = find_place(
    environ={
      'JOBSET_NAME': 'afi', 'JOBSET_JOB': 'host', 'JOBSET_HOSTS': '2', 'JOB_COMPLETION_INDEX': '1',
    }
  )  # fmt: skip
  assert (place.index, place.count) == (1, 2)
  assert place.host == 'afi-host-0-0.afi'
  assert place.name(1) == 'process 1 (afi-host-0-1.afi)'


def test_surroundings_that_contradict_themselves():
  with pytest.raises(UserError, match=r'which process this is \(slurm: .*give --coordinator'):
    find_place(environ={'SLURM_STEP_NODELIST': 'a', 'SLURM_PROCID': 'x'})


@pytest.mark.parametrize('endpoints', ['10.0.0.1,10.0.0.2', 'a:0:10.0.0.1,b:1:10.0.0.2'])
def test_cloud_tpu(endpoints):
  values = {'agent-worker-number': '1', 'worker-network-endpoints': endpoints}

  class Metadata(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      assert self.headers['Metadata-Flavor'] == 'Google'
      self.send_response(200)
      self.end_headers()
      self.wfile.write(values[self.path.removeprefix(
        '/computeMetadata/v1/instance/attributes/'
      )].encode())  # fmt: skip

    def log_message(self, *args):
      pass

  with http.server.HTTPServer(('127.0.0.1', 0), Metadata) as server:
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    place = find_place(environ={'GCE_METADATA_IP': f'127.0.0.1:{server.server_port}'})
    server.shutdown()
  assert (place.index, place.count, place.told_by) == (1, 2, 'Cloud TPU')
  assert place.names == ('10.0.0.1', '10.0.0.2')


def test_no_metadata_server():
  assert find_place(environ={'GCE_METADATA_IP': f'127.0.0.1:{free_port()}'}) is None
