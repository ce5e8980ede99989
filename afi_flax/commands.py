"""How every command starts and ends: flags, one-line errors, exit status."""

import contextlib
import glob
import itertools
import os
import pathlib
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable

from absl import app, flags, logging

from afi_flax.errors import StoppedError, UserError, unknown

INTERRUPTED = 130  # exit status after a second Ctrl-C
_PATIENCE = 2.0  # seconds that threads have to end with the process


def run(main: Callable[[list[str]], None]) -> None:
  """Runs a command to the end of the process; a user's mistake ends it in one line."""
  try:
    app.run(main, flags_parser=_parse)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    _end(error.status)
  except KeyboardInterrupt:
    print('interrupted: what was not saved is lost', file=sys.stderr)
    _end(INTERRUPTED)
  except StoppedError as stopped:
    print(stopped, file=sys.stderr)
    _end(stopped.status)
  except SystemExit as done:
    _end(done.code)
  except Exception:  # a mistake of ours, after which threads may wait for what will not come
    traceback.print_exc()
    _end(1)


def keep_compiled_programs() -> None:
  """Lets the next start take what this one compiles, from where JAX was told to or our folder."""
  import jax  # slow, and not every command needs it

  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    jax.config.update('jax_compilation_cache_dir', os.path.expanduser('~/.cache/afi_flax/compiled'))


def _end(status: int | str | None) -> None:
  """Ends the process, also where threads do not end, for which Python would wait.

  Those of a save that failed to begin, Orbax lets wait for many minutes; a picture may be read from
  a disk that hangs; a step may still be compiled.
  """
  until = time.monotonic() + _PATIENCE
  for thread in threading.enumerate():
    if not thread.daemon and thread is not threading.current_thread():
      # Not its own join: that of Orbax's threads raises what they raised, and when time is over.
      threading.Thread.join(thread, max(0.0, until - time.monotonic()))
      if thread.is_alive():
        leave(status if isinstance(status, int) else int(bool(status)))
  sys.exit(status)


def leave(status: int) -> None:
  """Ends the process at once: neither threads nor what JAX does at the exit are waited for."""
  with contextlib.suppress(OSError, ValueError):
    sys.stdout.flush()
    sys.stderr.flush()
  os._exit(status)


def _parse(argv: list[str]) -> list[str]:
  """Parses the flags, those of the config file included, whose libraries raise many things."""
  if _asks_for_help(argv):
    app.usage(shorthelp='--helpfull' not in argv, writeto_stdout=True, exitcode=0)
  _make_importable(argv)
  try:
    rest = flags.FLAGS(_spread(argv))
    if 'config' in flags.FLAGS and flags.FLAGS['config'].value is not None:
      flags.FLAGS['config'].value.to_dict()  # raises here if the file could not be read
  except flags.Error as error:
    if "flag 'config." in str(error) and not _config_file(argv):
      raise UserError(f"{error} without --config; give the run's whole command again") from error
    raise _config_flag(error) or UserError(f'{error}; see --help') from error
  except (AttributeError, KeyError) as error:  # of ml_collections: the config has no such key
    if "no attribute 'get_config'" in str(error):
      raise UserError(f'{_config_file(argv)} has no get_config(): it is no config') from error
    raise _unknown_key(argv, error) or error from error
  except TypeError as error:  # of ml_collections: a value was given as a group of keys, say
    if not any('--config.' in arg for arg in argv):
      raise
    raise UserError(f'a --config.KEY=VALUE does not go with the config: {error}') from error
  except OSError as error:
    raise _no_config(argv) or error from error
  logging.set_verbosity(logging.WARNING)  # JAX and TFDS tell of each of their steps
  if len(rest) > 1:
    raise UserError(f'{rest[1]!r} is not a flag; flags begin with --, see --help')
  return rest


def _spread(argv: list[str]) -> list[str]:
  """Lets a flag that may be given several times take several values, as a shell's a*.png are.

  --images a b c becomes --images=a --images=b --images=c.
  """
  spread, several = [], None
  for arg in argv:
    if arg.startswith('-') and arg != '-':
      given, equals, _ = arg.partition('=')
      name = given.lstrip('-')
      is_multi = name in flags.FLAGS and isinstance(flags.FLAGS[name], flags.MultiFlag)
      several = given if is_multi else None
      if several and not equals:
        continue
    elif several:
      arg = f'{several}={arg}'
    spread.append(arg)
  return spread


def _asks_for_help(argv: list[str]) -> bool:
  return any(arg.lstrip('-') in ('help', 'helpshort', 'helpfull', '?') for arg in argv[1:])


def _config_flag(error: flags.Error) -> UserError | None:
  """What is wrong with a flag that sets a key of the config, or that was meant to."""
  from flax.traverse_util import flatten_dict  # some commands do without Flax, which is slow

  config = 'config' in flags.FLAGS and flags.FLAGS['config'].value
  keys = flatten_dict(config.to_dict(), sep='.') if config else {}
  if isinstance(error, flags.UnrecognizedFlagError):
    given = error.flagname
    meant = [key for key in keys if f'.{key}'.endswith(f'.{given}')]
    names = ' or '.join(f'--config.{key}' for key in meant)
    return UserError(f'unknown flag --{given}; did you mean {names}?') if meant else None
  bad = re.match(r'flag --config\.([\w.]+)=(.*?): ', str(error))
  if not bad or bad[1] not in keys:
    return None
  now = keys[bad[1]]
  kind = {bool: 'True or False', int: 'a whole number', float: 'a number'}.get(type(now), 'text')
  return UserError(f'{bad[1]} {bad[2]!r} must be {kind}, such as {now!r}')


def _unknown_key(argv: list[str], error: Exception) -> UserError | None:
  """The key in full, with the nearest one that ml_collections names in its error."""
  quoted = re.findall(r"""["']([\w.]+)["']""", str(error).replace('\\', ''))
  for key in re.findall(r'--?config\.([\w.]+)', ' '.join(argv)):
    parts = key.split('.')
    if quoted and quoted[0] in parts:
      nearest = (*quoted, quoted[0])[1]
      right = '.'.join(nearest if part == quoted[0] else part for part in parts)
      guess = f'; did you mean {right!r}?' if right != key else '.'
      return UserError(f'unknown config key {key!r}{guess} All are in configs/common.py.')
  return None


def _config_file(argv: list[str]) -> str | None:
  """What --config names, without the variant."""
  for given, value in itertools.pairwise([*argv, '']):
    if given.lstrip('-').split('=')[0] == 'config':
      return (given.partition('=')[2] or value).partition(':')[0]
  return None


def _make_importable(argv: list[str]) -> None:
  """Lets a config import `configs.common` from beside it, wherever the command is run."""
  if path := _config_file(argv):
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(path))))


def _no_config(argv: list[str]) -> UserError | None:
  path = _config_file(argv)
  if path is None or os.path.isfile(path):
    return None
  beside = glob.glob(os.path.join(os.path.dirname(path) or '.', '*.py'))
  beside = [name for name in beside if 'def get_config' in pathlib.Path(name).read_text()]
  if not beside:
    return UserError(f'no config file {path!r}; they are in configs/ of the repository')
  return unknown('config file', path, beside)
