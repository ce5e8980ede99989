"""The one exception for a user's mistake, and how unknown names are answered."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
  """A mistake that the user can mend: one line with the value, the limit and the cure.

  Every command prints it as `error: ...` without a stack trace and exits with status 2.
  """


def unknown(kind: str, name: str, options: Iterable[str], cure: str = '') -> UserError:
  """The error for a name that is not in a table: the nearest ones, or all where there are few."""
  options = sorted(options)
  nearest = difflib.get_close_matches(name, options, n=3, cutoff=0.6)
  shown = options if len(options) <= 12 else nearest or options[:12]
  text = f'unknown {kind} {name!r}'
  if nearest:
    text += f'; did you mean {nearest[0]!r}?'
  text += f' {"Nearest" if len(shown) < len(options) else "Known"}: {", ".join(shown)}.'
  return UserError(text + (f' {cure}' if cure else ''))
