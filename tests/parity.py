"""Prints what the tests of parity measured."""

_MEASURED = {
  'parity': 'largest absolute difference of the logits from PyTorch',
  'imported': 'largest absolute difference of the logits after an import, running statistics',
}


def summarise(terminalreporter):
  """A row for every network: the largest absolute differences of its logits."""
  reports = [r for key in ('passed', 'failed') for r in terminalreporter.getreports(key)]
  for measured, title in _MEASURED.items():
    rows = [value for r in reports for key, value in r.user_properties if key == measured]
    if rows:
      terminalreporter.section(title)
      terminalreporter.line(' | '.join(rows[0]))
    for row in rows:
      cells = [f'{x:.1e}' if isinstance(x, float) else x for x in row.values()]
      terminalreporter.line(' | '.join(cells))
