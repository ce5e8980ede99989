"""What `benchmarks.startup` times, in a process of its own, which says on stderr how far it is.

  python -m benchmarks.start ours --config configs/NAME.py --workdir FOLDER    the command
  python -m benchmarks.start jax configs/NAME.py[:VARIANT]                     jax alone

The second one imports jax and compiles the very same training step, and does nothing else that is
not needed for that.
"""

import runpy
import sys


def mark(what: str) -> None:
  """Says that this is over."""
  print(f'mark {what}', file=sys.stderr, flush=True)


def ours() -> None:
  """The command, `python -m afi_flax.main`, with the flags that are left."""
  import jax  # noqa: F401 - what the command imports first, too

  mark('jax')
  from afi_flax import commands, main

  mark('imports')
  commands.run(main.main)


def bare(recipe: str) -> None:
  """From the import of jax to the compiled training step of a config."""
  import jax

  device = jax.devices()[0]
  mark('jax')
  from afi_flax import config
  from benchmarks import common

  path, _, variant = recipe.partition(':')
  plan = config.resolve(runpy.run_path(path)['get_config'](variant))
  program = common.train_program(plan, device)
  mark('program')
  lowered = program.lower()
  mark('trace')
  lowered.compile()
  mark('compile')


if __name__ == '__main__':
  if sys.argv.pop(1) == 'ours':
    ours()
  else:
    bare(sys.argv[1])
