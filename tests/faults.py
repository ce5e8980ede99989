"""The table of faults: what was injected, how it must end, and whether it did.

A test with `@pytest.mark.fault(kind, injected, ends)` is one row. `make faults` runs them all at
their full size and prints the table; without `--faults` they run like other tests, the long ones
shortened.
"""

import pytest

from afi_flax.analysis import tables

KINDS = {
  'kill': 'killed anywhere',
  'machine': 'another shape of machine',
  'checkpoint': 'bad checkpoints',
  'disk': 'the disk',
  'numbers': 'numbers that are not finite',
  'picture': 'bad pictures',
  'config': 'bad configs',
  'worker': 'worker processes',
  'host': 'a lost host',
  'workdir': 'two runs, one workdir',
  'determinism': 'determinism',
}


def pytest_addoption(parser):
  parser.addoption('--faults', action='store_true', help='Full size, and the table of faults.')


def pytest_collection_modifyitems(items):
  """Writes down the row of a test, so that it comes back from xdist's workers, too."""
  for item in items:
    for mark in item.iter_markers('fault'):
      kind, injected, ends = mark.args
      if kind not in KINDS:
        raise pytest.UsageError(f'{item.nodeid}: no kind of fault {kind!r}; add it to KINDS')
      item.user_properties.append(('fault', (kind, injected, ends)))


def pytest_terminal_summary(terminalreporter, config):
  if not config.getoption('--faults'):
    return
  reports = [
    report
    for outcome in ('passed', 'failed', 'skipped', 'error')
    for report in terminalreporter.getreports(outcome)
    if any(name == 'fault' for name, _ in getattr(report, 'user_properties', ()))
  ]
  terminalreporter.write_line('')
  terminalreporter.write_line(table(reports))


def table(reports: list[pytest.TestReport]) -> str:
  """A row for each fault, in the order of KINDS: how often it was injected, and how that went."""
  found: dict[tuple, list] = {}
  for report in reports:
    fault = next(tuple(value) for name, value in report.user_properties if name == 'fault')
    found.setdefault(fault, []).append(report)
  order = list(KINDS)
  rows = []
  for fault in sorted(found, key=lambda fault: order.index(fault[0])):
    kind, injected, ends = fault
    rows.append(
      {
        '': KINDS[kind] if not rows or rows[-1]['kind'] != kind else '',
        'kind': kind,
        'fault': injected,
        'how it ends': ends,
        'seen': _seen(found[fault]),
        's': round(sum(report.duration for report in found[fault])),
      }
    )
  shown = [{key: value for key, value in row.items() if key != 'kind'} for row in rows]
  return tables.text(shown) if shown else 'no test of a fault was run'


def _seen(reports: list[pytest.TestReport]) -> str:
  """'yes', 'yes, 3 cases', 'NO, 1 of 3', 'skipped'."""
  ran = [report for report in reports if not report.skipped and report.when == 'call']
  failed = [report for report in reports if report.failed]
  if failed:
    return f'NO, {len(failed)} of {max(len(ran), len(failed))}'
  if not ran:
    return 'skipped'
  return 'yes' if len(ran) == 1 else f'yes, {len(ran)} cases'
