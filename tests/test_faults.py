"""The table that `make faults` prints says no more than the tests have shown."""

import types

from tests import faults


def report(injected, outcome, tries=None):
  properties = [('fault', ('kill', injected, 'equal'))]
  properties += [('tries', tries)] if tries else []
  return types.SimpleNamespace(
    user_properties=properties, when='call', passed=outcome == 'passed',
    failed=outcome == 'failed', skipped=outcome == 'skipped',
  )  # fmt: skip


def test_rows():
  all_held, one_did_not, untried = faults.rows(
    [
      report('a', 'passed', tries=100), report('a', 'passed'),
      report('b', 'passed'), report('b', 'failed'), report('c', 'skipped'),
    ]
  )  # fmt: skip
  assert all_held == {
    'fault': 'killed anywhere', 'injected': 'a', 'tries': 101, 'lost': 'nothing',
    'outcome': 'equal',
  }  # fmt: skip
  assert (one_did_not['lost'], one_did_not['outcome']) == ('?', 'equal (1 DID NOT)')
  assert (untried['tries'], untried['lost']) == (0, '?')


def test_rows_of_two_runs():
  first = faults.rows([report('a', 'failed'), report('b', 'passed')])
  second = faults.rows([report('a', 'passed')])
  assert faults.merged(first, second) == [second[0], first[1]]
