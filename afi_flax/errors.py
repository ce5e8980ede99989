"""The one exception for a user's mistake, and how unknown names are answered."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
  """A mistake that the user can mend: one line with the value, the limit and the cure.

  Every command prints it as `error: ...` without a stack trace and exits with its status.
  """

  status = 2


class FailedError(UserError):
  """What failed from outside in the middle of the work, such as a full disk: one line, likewise.

  Trying again may help, so its exit status is not a mistake's, which launchers do not try again.
  """

  status = 74  # EX_IOERR


class AbsentError(UserError):
  """A process of the run did not come up in time; its host may only be late."""

  status = 69  # EX_UNAVAILABLE


def shown(name: str) -> str:
  r"""A name as one line that prints anywhere: 'a\nb' has no line break, and bytes of no text \udc..

  >>> shown('line\nbreak')
  'line\\nbreak'
  """
  return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in name)


def unknown(kind: str, name: str, options: Iterable[str], cure: str = '') -> UserError:
  """The error for a name that is not in a table: the nearest ones, or all where there are few."""
  options = sorted(options)
  nearest = difflib.get_close_matches(name, options, n=3, cutoff=0.6)
  listed = options if len(options) <= 12 else nearest or options[:12]
  guess = f'; did you mean {nearest[0]!r}?' if nearest else '.'
  known = f'{"Some are" if len(listed) < len(options) else "Known"}: {", ".join(listed)}.'
  return UserError(' '.join(filter(None, (f'unknown {kind} {name!r}{guess}', known, cure))))


class StoppedError(Exception):
  """Not a mistake: a signal ended the run, whose state is saved for the same command to go on."""

  status = 75  # EX_TEMPFAIL: try again
