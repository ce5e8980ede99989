"""The arrows between the rooms: what each file may import."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / 'afi_flax'

LOW = {'errors', 'random_draws', 'background'}
PARTS = LOW | {'preprocess', 'losses', 'metrics', 'optim', 'sharding', 'models', 'config'}
MIDDLE = PARTS | {'steps', 'data', 'checkpoint', 'state', 'report', 'workdir'}
TOP = MIDDLE | {
  'speed', 'on_device', 'feed', 'run', 'evaluate', 'train', 'analysis', 'interop', 'commands',
  'place', 'processes', 'start',
}  # fmt: skip
ALLOWED = {
  'errors': set(),
  'random_draws': set(),
  'keys': {'random_draws'},
  'background': set(),
  'models': {'errors', 'models'},
  'data': {'errors', 'random_draws', 'data'},
  'config_keys': {'errors'},
  'config': {'errors', 'config_keys', 'data', 'models'},
  'preprocess': LOW,
  'losses': LOW,
  'metrics': LOW,
  'sharding': LOW,
  'optim': LOW | {'config', 'models'},
  'state': PARTS | {'keys'},
  'steps': PARTS | {'state'},
  'files': {'errors'},
  'bucket': {'errors', 'files'},
  'checkpoint': {'errors', 'files'},
  'commands': {'errors'},
  'place': {'errors'},
  'processes': {'errors', 'place', 'commands'},
  'workdir': {'errors', 'config', 'bucket', 'files'},
  'curves': {'errors'},
  'event_file': {'errors'},
  'report': {'errors', 'workdir', 'curves', 'event_file'},
  'run': MIDDLE,
  'start': MIDDLE | {'files', 'run', 'interop'},
  'on_device': MIDDLE | {'analysis'},
  'feed': MIDDLE | {'analysis', 'on_device', 'speed'},
  'evaluate': MIDDLE | {'run', 'analysis', 'on_device'},
  'analysis': MIDDLE | {'files', 'run', 'analysis'},
  'speed': {'config', 'analysis'},
  'nonfinite': {'errors', 'config', 'sharding', 'workdir'},
  'interop': TOP - {'start', 'train'} | {'files'},
  'train': MIDDLE | {'start', 'evaluate', 'feed', 'speed', 'nonfinite'},
}
# What each room may import from outside, where that is limited; the standard library always.
OUTSIDE = {
  'models': {'jax', 'flax'},
  'errors': set(),
  'random_draws': {'numpy'},
  'data': {
    'numpy', 'absl', 'cv2', 'PIL', 'simplejpeg', 'sklearn', 'tensorflow_datasets',
  },
}  # fmt: skip
# What only an extra installs, and one file imports, inside a function.
EXTRAS = {'interop/savedmodel.py': {'tensorflow'}, 'interop/state_dicts.py': {'torch'}}


def imports(path):
  """(module, names) of all imports, those inside functions too."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name, ()
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      yield node.module, tuple(a.name for a in node.names)


def room(path):
  return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def own_rooms(module, names):
  parts = module.split('.')
  return {parts[1]} if len(parts) > 1 else set(names)


@pytest.mark.parametrize(
  'path', sorted(PACKAGE.rglob('*.py')), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_arrows(path):
  here = room(path)
  for module, names in imports(path):
    top = module.split('.')[0]
    if top == 'afi_flax':
      wanted = own_rooms(module, names)
      assert wanted <= ALLOWED.get(here, TOP), f'{here} must not import {wanted}'
    elif here in OUTSIDE and top not in sys.stdlib_module_names:
      assert top in OUTSIDE[here], f'{here} must not import {top}'
    if top not in EXTRAS.get(str(path.relative_to(PACKAGE)), ()):
      assert top not in ('tensorflow', 'torch'), 'never at run time'


def test_only_sharding_names_a_device_axis():
  for path in PACKAGE.rglob('*.py'):
    if path.name != 'sharding.py':
      for name in ('PartitionSpec', 'axis_name', 'pmean', 'psum', 'Mesh('):
        assert name not in path.read_text(), (path, name)


def test_configs_import_little():
  for path in (PACKAGE.parent / 'configs').glob('*.py'):
    for module, names in imports(path):
      assert (module, names) in (
        ('ml_collections', ()),
        ('configs', ('common',)),
        ('afi_flax.config', ('parse_variant',)),
      ), path


def test_data_starts_without_jax():
  """Worker processes import the data room, and must start in well under jax's two seconds."""
  code = (
    'import sys, afi_flax.data.pipeline; print("jax" in sys.modules, "tensorflow" in sys.modules)'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout.split() == ['False', 'False']


# What runs code that it is given, or may: of the standard library and of what the package imports.
RUNS_CODE = {
  'eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen', 'runpy.run_path',
  'pickle.load', 'pickle.loads', 'pickle.Unpickler', 'cloudpickle.load', 'cloudpickle.loads',
  'marshal.load', 'marshal.loads', 'shelve.open', 'joblib.load', 'torch.load', 'yaml.load',
  'pandas.read_pickle', 'importlib.import_module',
}  # fmt: skip
# A socket between a process and the worker that it has started.
PERMITTED = {('data/workers.py', 'pickle.loads')}


def builds_tensors_only(call):
  """Whether it says weights_only=True in so many words."""
  return any(
    word.arg == 'weights_only' and ast.unparse(word.value) == 'True' for word in call.keywords
  )


def runs_code(tree):
  """Calls of a module that may run what they are given."""
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom):  # or a bare name would hide what it is
      yield from (name for a in node.names if (name := f'{node.module}.{a.name}') in RUNS_CODE)
    if not isinstance(node, ast.Call):
      continue
    name = ast.unparse(node.func)
    if name in RUNS_CODE and not (name == 'torch.load' and builds_tensors_only(node)):
      yield name
    for word in node.keywords:
      if word.arg in ('allow_pickle', 'shell') and ast.unparse(word.value) != 'False':
        yield f'{name}({word.arg}=)'


def test_nothing_that_is_read_is_run():
  """Configs are Python and run, by ml_collections; data, runs and weights must not be."""
  found = {
    (str(path.relative_to(PACKAGE)), call)
    for path in PACKAGE.rglob('*.py')
    for call in runs_code(ast.parse(path.read_text()))
  }
  assert found == PERMITTED


@pytest.mark.parametrize(
  'code',
  [
    'eval(text)',
    'import pickle\npickle.loads(data)',
    'from pickle import loads',
    'np.load(file, allow_pickle=True)',
    'torch.load(file)',
    'torch.load(file, weights_only=flag)',
    'subprocess.run(text, shell=True)',
  ],
)
def test_what_runs_code_is_found(code):
  assert list(runs_code(ast.parse(code)))
