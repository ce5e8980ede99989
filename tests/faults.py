"""The table of faults: what was injected, how it must end, and whether it did.

A test with `@pytest.mark.fault(kind, injected, ends)` is one row. `make faults` runs them all at
their full size, prints the table and, with `--faults_json FILE`, writes its rows, in the place of
those that the file has of the same faults. Without `--faults` they run like other tests, the long
ones shortened. A test that injects a fault many times says so: `record_property('tries', 100)`.
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
  parser.addoption('--faults_json', help='Where to write the rows of that table.')


def pytest_collection_modifyitems(items):
  """Writes down the row of a test, so that it comes back from xdist's workers, too."""
  for item in items:
    for mark in item.iter_markers('fault'):
      kind, injected, ends = mark.args
      if kind not in KINDS:
        raise pytest.UsageError(f'{item.nodeid}: no kind of fault {kind!r}; add it to KINDS')
      item.user_properties.append(('fault', (kind, injected, ends)))


def summarise(terminalreporter, config):
  if not config.getoption('--faults'):
    return
  reports = [
    report
    for outcome in ('passed', 'failed', 'skipped', 'error')
    for report in terminalreporter.getreports(outcome)
    if any(name == 'fault' for name, _ in getattr(report, 'user_properties', ()))
  ]
  found = rows(reports)
  terminalreporter.write_line('')
  terminalreporter.write_line(tables.text(found) if found else 'no test of a fault was run')
  if path := config.getoption('--faults_json'):
    tables.write_json(merged(tables.read_rows(path), found), path)


def merged(old: list[dict], new: list[dict]) -> list[dict]:
  """All rows, in the order of KINDS, the new ones in the place of old ones of the same faults."""
  both = {(row['fault'], row['injected']): row for row in (*old, *new)}
  order = list(KINDS.values())
  return sorted(both.values(), key=lambda row: order.index(row['fault']))


def rows(reports: list[pytest.TestReport]) -> list[dict]:
  """A row for each fault, in the order of KINDS.

  Its keys: `fault`, the kind; `injected`; `tries`, how often; `lost`, 'nothing' where all ended as
  they must; `outcome`, how they must end, and which did not or were not tried.
  """
  found: dict[tuple, list] = {}
  for report in reports:
    (fault,) = (tuple(value) for name, value in report.user_properties if name == 'fault')
    found.setdefault(fault, []).append(report)
  order = list(KINDS)
  return [
    _row(*fault, found[fault]) for fault in sorted(found, key=lambda fault: order.index(fault[0]))
  ]


def _row(kind: str, injected: str, ends: str, reports: list[pytest.TestReport]) -> dict:
  failed = [report for report in reports if report.failed]
  skipped = [report for report in reports if report.skipped]
  passed = [report for report in reports if report.passed and report.when == 'call']
  ran = [report for report in (*passed, *failed) if report.when == 'call']
  exceptions = [f'{len(failed)} DID NOT'] if failed else []
  exceptions += [f'{len(skipped)} not tried here'] if skipped else []
  return {
    'fault': KINDS[kind],
    'injected': injected,
    'tries': sum(dict(report.user_properties).get('tries', 1) for report in ran),
    'lost': 'nothing' if passed and not failed else '?',
    'outcome': f'{ends} ({", ".join(exceptions)})' if exceptions else ends,
  }
