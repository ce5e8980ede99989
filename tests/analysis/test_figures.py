import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from afi_flax.analysis import figures, style
from tests.analysis.examinations import examination, two_runs


def words(axes):
  return [text.get_text() for text in axes.texts]


def decoded(fig):
  return np.asarray(Image.open(io.BytesIO(style.png(fig))).convert('L'))


def test_selectivity_has_a_histogram_a_block_and_says_means_and_dead_channels():
  runs = two_runs()
  fig = figures.selectivity(runs, stage=2)
  assert [axes.get_title(loc='left') for axes in fig.axes] == ['block 2', 'block 3', 'block 4']
  for axes, block in zip(
    fig.axes, ('stage2_block2', 'stage2_block3', 'stage2_block4'), strict=True
  ):
    means = [np.nanmean(run.selectivity[block]) for run in runs.values()]
    assert words(axes) == [f'mean {mean:.3f}, 1 of 16 dead' for mean in means]
    lines = [line.get_xdata()[0] for line in axes.lines]
    np.testing.assert_allclose(lines, means)
    drawn = [patch.get_data().values for patch in axes.patches if patch.get_fill()]
    for values, run in zip(drawn, runs.values(), strict=True):
      living = run.selectivity[block][1:]
      np.testing.assert_allclose(values, np.histogram(living, 10, (0, 1))[0] / 15 * 100)
  assert [text.get_text() for text in fig.legends[0].texts] == list(runs)


def test_a_run_without_a_block_and_one_whose_channels_are_all_dead():
  run = examination(selectivity={'stage1_block2': np.full(4, np.nan)})
  other = examination(selectivity={'stage1_block3': np.array([0.5, 0.25])})
  fig = figures.selectivity({'dead': run, 'other': other}, stage=1)
  assert [words(axes) for axes in fig.axes] == [['all 4 dead'], ['mean 0.375']]
  (axes,) = figures.selectivity_by_depth({'dead': run, 'other': other}).axes
  assert [list(line.get_ydata()) for line in axes.lines if line.get_marker() == 'o'] == [[0.375]]


def test_many_blocks_fill_a_grid_without_empty_axes():
  fig = figures.selectivity({'run': examination(blocks=18)}, stage=1)
  assert len(fig.axes) == 17
  assert all(axes.has_data() for axes in fig.axes)
  labelled = [axes.xaxis.get_tick_params()['labelbottom'] for axes in fig.axes]
  assert sum(labelled) == 3, 'under each column'


def test_selectivity_by_depth_has_all_stages():
  runs = two_runs()
  (axes,) = figures.selectivity_by_depth(runs).axes
  assert words(axes) == ['stage 1', 'stage 2']
  drawn = np.concatenate([line.get_ydata() for line in axes.lines if line.get_marker() == 'o'])
  means = [np.nanmean(v) for run in runs.values() for v in run.selectivity.values()]
  np.testing.assert_allclose(drawn, means)


def test_reuse_has_a_map_a_stage_with_its_numbers():
  run = examination(blocks=4)
  fig = figures.reuse('afi', run)
  mean, spread, even = fig.axes[:3]
  three = run.reuse['stage1_block4']
  assert words(mean) == [
    f'{value:.2f}' for block in (2, 3, 4) for value in run.reuse[f'stage1_block{block}'].mean
  ]
  table = mean.images[0].get_array()
  assert table.shape == (3, 3)
  np.testing.assert_allclose(2.0 ** table[2], 3 * three.mean)
  np.testing.assert_allclose(spread.images[0].get_array()[2], three.spread)
  assert table.mask[0].all(), 'one source: nothing to choose'
  assert table.mask[1].tolist() == [False, False, True]
  assert words(even) == ['one source', '0.900', '0.900']
  assert [label.get_text() for label in mean.get_xticklabels()] == ['1', '2', '3']
  assert all(axes.has_data() for axes in fig.axes)


def test_blocks_of_one_source_only():
  fig = figures.reuse('afi', examination(blocks=2))
  assert words(fig.axes[2]) == ['one source']


@pytest.mark.parametrize('name', ['a $ and $x_1\n\udcff 犬と猫', 'x' * 300])
def test_odd_labels_are_drawn_as_they_are(name):
  assert decoded(figures.selectivity_by_depth({name: examination(blocks=2)})).min() < 100


@pytest.mark.slow
def test_all_are_pictures_of_their_size():
  runs = two_runs(blocks=18)
  for fig in (
    figures.selectivity(runs, 1),
    figures.selectivity_by_depth(runs),
    figures.reuse('afi', runs['afi']),
    figures.reuse('afi', examination(blocks=36)),
  ):
    pixels = decoded(fig)
    size = np.array(fig.get_size_inches()) * style.DPI
    np.testing.assert_allclose(pixels.shape[::-1], size, atol=1)
    assert pixels.min() < 100


def test_what_is_compared_may_be_of_other_stages():
  run = dataclasses.replace(examination(), selectivity={'stage3_block2': np.array([0.1, 0.2])})
  assert figures.by_stage([*run.selectivity, 'stage1_block10', 'stage1_block9']) == {
    1: ['stage1_block9', 'stage1_block10'],
    3: ['stage3_block2'],
  }
