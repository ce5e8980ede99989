"""Prints what the tests of parity measured."""


def pytest_terminal_summary(terminalreporter):
  """A row for every network: the largest absolute differences of its logits."""
  reports = [r for key in ('passed', 'failed') for r in terminalreporter.getreports(key)]
  rows = [value for r in reports for key, value in r.user_properties if key == 'parity']
  if rows:
    terminalreporter.section('largest absolute difference of the logits from PyTorch')
    terminalreporter.line(' | '.join(rows[0]))
  for row in rows:
    cells = [f'{x:.1e}' if isinstance(x, float) else x for x in row.values()]
    terminalreporter.line(' | '.join(cells))
