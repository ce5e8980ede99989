"""What all commands share of their flags."""

import subprocess
import sys

import pytest
from absl import flags

from afi_flax import commands


@pytest.fixture
def defined(monkeypatch):
  """A command's flags: one that takes several values, and two that take one."""
  values = flags.FlagValues()
  flags.DEFINE_multi_string('images', [], 'Several.', flag_values=values)
  flags.DEFINE_string('out', None, 'One.', flag_values=values)
  flags.DEFINE_bool('loud', False, 'None.', flag_values=values)
  monkeypatch.setattr(flags, 'FLAGS', values)
  return values


@pytest.mark.parametrize(
  ('given', 'images', 'rest'),
  [
    ('--images a b c --out d', ['a', 'b', 'c'], []),
    ('--images=a b --out=d --images c', ['a', 'b', 'c'], []),
    ('-images - --out d', ['-'], []),
    ('--images a --loud --out d b', ['a'], ['b']),
    ('--out d --images', [], []),
    ('a --images b --out d', ['b'], ['a']),
  ],
)
def test_a_flag_that_may_be_repeated_takes_several_values(defined, given, images, rest):
  spread = commands._spread(['command', *given.split()])
  assert defined(spread) == ['command', *rest]
  assert defined.images == images
  assert defined.out == 'd'


@pytest.mark.slow
@pytest.mark.parametrize(
  ('ending', 'status'),
  [('pass', 0), ("raise UserError('no')", 2), ('sys.exit(5)', 5), ('raise ValueError', 1)],
)
def test_a_thread_that_hangs_does_not_keep_the_process(ending, status):
  code = (
    'import sys, threading\n'
    'from afi_flax import commands\n'
    'from afi_flax.errors import UserError\n'
    'class Waiting(threading.Thread):\n'
    '  def join(self, timeout=None):\n'  # as that of Orbax's threads does
    '    raise TimeoutError\n'
    'def main(_):\n'
    '  Waiting(target=threading.Event().wait).start()\n'
    f'  {ending}\n'
    'commands.run(main)\n'
  )
  done = subprocess.run([sys.executable, '-c', code], timeout=100, capture_output=True, check=False)
  assert done.returncode == status, done.stderr
