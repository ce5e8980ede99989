import numpy as np
import pytest

from afi_flax.analysis import accuracy_figures, style
from tests.analysis.examinations import examination, two_runs


def ticks(axis):
  return [label.get_text() for label in axis.get_ticklabels()]


def test_gap_leaves_out_what_is_not_known():
  runs = {'a': examination(top1=0.5, train_top1=0.75), 'b': examination(train_top1=None)}
  (axes,) = accuracy_figures.gap(runs).axes
  assert ticks(axes.yaxis) == ['a']
  assert [text.get_text() for text in axes.texts] == [
    '50.00%, training 75.00%: +25.00 points (+14.1 to +35.4)'
  ]
  assert [list(line.get_xdata()) for line in axes.lines] == [[50, 75], [75], [50]]


def test_few_classes_have_their_numbers_in_the_matrix():
  runs = two_runs()
  panels = accuracy_figures.confusion(runs).axes
  for axes, run in zip(panels, runs.values(), strict=False):
    rows, columns = np.nonzero(run.confusion)
    assert [text.get_text() for text in axes.texts] == [
      str(n) for n in run.confusion[rows, columns]
    ]
    assert ticks(axes.yaxis) == list(run.class_names)


def test_many_classes_have_their_most_confused_pairs_named():
  runs = two_runs(classes=30)
  matrix, bars = accuracy_figures.confusion(runs).axes[:2]
  pairs = accuracy_figures.confused_pairs(runs['afi'], 20)
  assert ticks(bars.yaxis) == [f'class{true} → class{said}' for (true, said), _ in pairs]
  widths = [patch.get_width() for patch in bars.patches]
  expected = [run.confusion[pair] for run in runs.values() for pair, _ in pairs]
  np.testing.assert_array_equal(widths, expected)
  assert matrix.images[0].get_array().shape == (30, 30)


def test_confused_pairs_are_the_largest_off_the_diagonal():
  confusion = np.array([[9, 2, 0], [5, 1, 2], [0, 0, 7]])
  run = examination(classes=3, confusion=confusion)
  assert accuracy_figures.confused_pairs(run) == [((1, 0), 5), ((0, 1), 2), ((1, 2), 2)]
  assert accuracy_figures.confused_pairs(run, 1) == [((1, 0), 5)]


def test_classes_without_examples_have_no_accuracy():
  run = examination(classes=3, confusion=np.array([[3, 1, 0], [0, 0, 0], [0, 2, 0]]))
  np.testing.assert_array_equal(accuracy_figures.class_accuracies(run), [0.75, np.nan, 0])
  (axes,) = accuracy_figures.per_class({'run': run}).axes
  assert ticks(axes.yaxis) == ['class0', 'class2']


def test_like_classes_stand_together():
  rng = np.random.default_rng(0)
  group = rng.permutation(np.arange(24) % 3)
  confusion = 10 * (group[:, None] == group) + rng.integers(0, 2, (24, 24))
  order = accuracy_figures.order_of_likeness(confusion)
  assert sorted(order) == list(range(24))
  assert (np.diff(group[order]) != 0).sum() == 2


@pytest.mark.parametrize('confusion', [np.diag([5, 6, 0]), np.zeros((3, 3), int)])
def test_an_order_without_confusions(confusion):
  assert sorted(accuracy_figures.order_of_likeness(confusion)) == [0, 1, 2]


def test_of_many_classes_the_extremes_are_named():
  runs = two_runs(classes=40)
  curves, worst, best = accuracy_figures.per_class(runs).axes
  accuracy = accuracy_figures.class_accuracies(runs['afi'])
  named = [int(name.removeprefix('class')) for name in ticks(worst.yaxis)]
  assert accuracy[named].max() <= np.sort(accuracy)[12]
  named = [int(name.removeprefix('class')) for name in ticks(best.yaxis)]
  assert accuracy[named].min() >= np.sort(accuracy)[-13]
  np.testing.assert_allclose(curves.lines[1].get_ydata(), 100 * np.sort(accuracy))


def test_reliability_says_ece_and_nll():
  runs = two_runs()
  panels = accuracy_figures.reliability(runs).axes
  assert panels[0].get_title(loc='left') == 'plain\nECE 7.89%, NLL 1.234 nats'
  bars = [patch.get_height() for patch in panels[0].patches]
  np.testing.assert_allclose(bars, [40, 45, 60, 95, -10, 5, 10, -5], atol=1e-9)
  np.testing.assert_array_equal(
    panels[2].patches[0].get_data().values, runs['plain'].reliability.count
  )
  assert all(axes.has_data() for axes in panels)


@pytest.mark.slow
@pytest.mark.parametrize('classes', [2, 20, 100])
@pytest.mark.parametrize('name', ['gap', 'confusion', 'per_class', 'reliability'])
def test_all_are_drawn(name, classes):
  names = tuple(f'${k}$ of a class with an exceedingly long name' for k in range(classes))
  runs = two_runs(classes=classes, class_names=names)
  fig = getattr(accuracy_figures, name)(runs)
  assert style.png(fig).startswith(b'\x89PNG')
  assert all(axes.has_data() for axes in fig.axes)
