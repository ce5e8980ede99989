"""Waiting for the training step's program, which is compiled in the background."""

import threading
from concurrent import futures

import pytest

from afi_flax import background, feed, report
from afi_flax.errors import UserError

QUIET = report.Console(enabled=False)


def test_a_wait_ends_when_it_is_given_up():
  """The compilation never ends; the signal comes while it is waited for."""
  asked = iter((False, True))
  assert feed._wait(futures.Future(), QUIET, lambda: next(asked)) is None
  assert next(asked, None) is None, 'asked until it was given up'


def test_a_wait_ends_with_the_program():
  go = threading.Event()

  def compile_():
    go.wait()
    return feed.Compiled('program', 'Compiled.')

  compiling = background.begin(compile_)

  def give_up():  # asked while it compiles
    go.set()
    return False

  assert feed._wait(compiling, QUIET, give_up) == 'program'


def test_what_compiling_raises_comes_out_of_the_wait():
  def too_large():
    raise UserError('the step needs more memory')

  with pytest.raises(UserError, match='more memory'):
    feed._wait(background.begin(too_large), QUIET, lambda: False)
