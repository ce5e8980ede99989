import itertools

import numpy as np
import pytest
from matplotlib import figure

from afi_flax import curves


def record(step, split='train', loss=1.234, top1=0.5, **changes):
  return {'step': step, 'split': split, 'loss': loss, 'top1': top1} | changes


@pytest.fixture
def drawn(monkeypatch):
  """The figures that were saved."""
  figures = []
  save = figure.Figure.savefig

  def savefig(self, *arguments, **keywords):
    figures.append(self)
    save(self, *arguments, **keywords)

  monkeypatch.setattr(figure.Figure, 'savefig', savefig)
  return figures


def texts(axes):
  return [text.get_text() for text in axes.texts]


def test_axes_labels_and_drops(tmp_path, drawn):
  path = tmp_path / 'curves.png'
  path.write_bytes(b'an older picture')
  records = []
  for step in range(100, 1000, 100):
    rate = 0.1 if step <= 500 else 0.01
    records.append(record(step, loss=5 - step / 250, top1=step / 1250, learning_rate=rate))
  for step, loss, top1 in ((300, 3.0, 0.2), (600, 1.5, 0.61), (900, 1.7, 0.6)):
    records.append(record(step, 'test', loss=loss, top1=top1))
  curves.draw(records, path, steps_per_epoch=300.0, title='five $ and $ a name')

  assert path.read_bytes().startswith(b'\x89PNG')
  assert list(tmp_path.iterdir()) == [path]
  (fig,) = drawn
  assert fig.get_suptitle() == 'five $ and $ a name'
  loss, top1 = fig.axes
  assert texts(loss) == ['train 1.400', 'test 1.700\nbest 1.500, epoch 2', 'lr 0.01']
  assert texts(top1) == ['train 72.0%', 'test 60.0%\nbest 61.0%, epoch 2']
  train, test = [line for line in top1.lines if len(line.get_xdata()) in (9, 3)]
  np.testing.assert_allclose(train.get_xdata(), np.arange(1, 10) / 3)
  np.testing.assert_allclose(test.get_ydata(), [20, 61, 60])
  assert [line.get_xdata() for line in loss.lines if line.get_linestyle() == '--'] == [
    [500 / 300] * 2
  ]


def test_labels_do_not_cover_each_other(tmp_path, drawn):
  records = [
    record(step, split, loss=1.0 + step / 1e6)
    for step in (100, 200, 300)
    for split in ('train', 'test', 'train[98%:]', 'other')
  ]
  curves.draw(records, tmp_path / 'curves.png', 100.0)
  for axes in drawn[0].axes:
    boxes = sorted(text.get_window_extent().extents[[1, 3]].tolist() for text in axes.texts)
    assert len(boxes) == 4
    assert all(low[1] <= high[0] + 0.5 for low, high in itertools.pairwise(boxes))


def test_a_long_training_curve_is_smoothed_and_an_evaluated_one_is_not(tmp_path, drawn):
  rng = np.random.default_rng(0)
  noise = rng.normal(size=3000)
  records = [record(step, loss=3 + noise[step]) for step in range(3000)]
  records += [record(step, 'test', loss=3 + noise[step]) for step in range(0, 3000, 10)]
  curves.draw(records, tmp_path / 'curves.png', 100.0)
  raw, smooth, test, _ = (np.asarray(line.get_ydata()) for line in drawn[0].axes[0].lines)
  np.testing.assert_allclose(raw, 3 + noise)
  np.testing.assert_allclose(smooth[1500], raw[1485:1516].mean())
  assert smooth.std() < raw.std() / 4
  np.testing.assert_allclose(test, raw[::10])


def test_a_few_huge_losses_do_not_flatten_the_rest(tmp_path, drawn):
  records = [record(step, loss=1e6 if step == 3 else 2.0) for step in range(1, 101)]
  curves.draw(records, tmp_path / 'curves.png', 100.0)
  assert drawn[0].axes[0].get_ylim() == (0, 4)


@pytest.mark.parametrize('split', ['train', 'test'])
def test_one_point(tmp_path, drawn, split):
  curves.draw([record(100, split)], tmp_path / 'curves.png', 100.0)
  assert drawn[0].axes[0].lines[0].get_marker() == 'o'


def test_nothing_is_drawn_of_nothing(tmp_path):
  curves.draw([], tmp_path / 'curves.png', 100.0)
  assert not list(tmp_path.iterdir())


def test_a_cosine_has_no_drops(tmp_path, drawn):
  rates = 0.05 + 0.05 * np.cos(np.pi * np.arange(1, 101) / 100)
  records = [record(k, learning_rate=rate) for k, rate in enumerate(rates, start=1)]
  curves.draw(records, tmp_path / 'curves.png', 10.0)
  assert texts(drawn[0].axes[0]) == ['train 1.234']
