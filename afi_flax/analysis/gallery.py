"""Figures, captions and numbers of examined networks: a part of the page for each question.

Of one run or of two, as {label: Examination} with the baseline first and the run last. Rows of CSV
files have a column `run` with the label; shares and probabilities are in 0..1.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from afi_flax.analysis import (
  accuracy_figures,
  contact_sheets,
  figures,
  page,
  quality,
  style,
  tables,
)
from afi_flax.analysis.contact_sheets import Caption, Explained
from afi_flax.analysis.examine import Examination

Runs = Mapping[str, Examination]

PAPERS_STAGE = 2  # Figure 4 is of the Conv3 stage, the second
_LISTED = 50  # rows of a table on the page
_SHEET = 30  # pictures of a contact sheet: whole rows


@dataclasses.dataclass(frozen=True)
class Part:
  """A section of the page, and CSV files that hold its numbers: {name: rows}."""

  section: page.Section
  csv: dict[str, Sequence[tables.Row]]

  def files(self) -> dict[str, bytes]:
    """All files of this part by their names."""
    pictures = {picture.file: picture.png for picture in self.section.pictures}
    # A name whose bytes are no UTF-8, as that of a class folder may be, has these bytes there.
    encoded = {
      n: tables.as_csv(rows).encode(errors='surrogateescape') for n, rows in self.csv.items()
    }
    return pictures | encoded


def summary(runs: Runs, about: Mapping[str, Mapping[str, Any]]) -> Part:
  """What is compared, and how good it is.

  Args:
    runs: by label.
    about: for each label, facts that go first: {'run': 'runs/a', 'step': 100, ...}.
  """
  rows = [
    {'run': label, **about[label], 'split': run.split, 'examples': run.examples}
    | {'top1': run.top1, 'top5': run.top5, 'nll_nats': run.nll, 'ece': run.reliability.ece}
    | {'train_top1': run.train_top1}
    for label, run in runs.items()
  ]
  facts = [(name, {k: about[k][name] for k in runs}) for name in next(iter(about.values()))]
  facts += [(name, {k: words(r) for k, r in runs.items()}) for name, words in _figures(runs)]
  shown = [{'': name, **values} for name, values in facts]
  text = (
    'Of two runs, the baseline comes first. Every figure is a PNG file in the folder of this page, '
    'and its numbers are a CSV file there. In brackets: what so many examples say of all others of '
    'their kind, with 95% confidence; how runs with other seeds differ is not in it.'
  )
  table = page.Table('The main figures', shown, 'summary.csv', folded=False)
  return Part(page.Section('Summary', text, tables=(table,)), {'summary.csv': rows})


def in_words(runs: Runs) -> str:
  """The main figures as a table for a terminal."""
  return tables.text(
    [{'': name} | {k: words(r) for k, r in runs.items()} for name, words in _figures(runs)]
  )


def _figures(runs: Runs) -> list[tuple[str, Callable[[Examination], str]]]:
  """What the main figures are called, and how one is said."""
  several = len(next(iter(runs.values())).class_names) > 5  # else all are among the first five
  return [
    ('evaluated on', lambda r: f'{r.split}, {r.examples:,} examples'),
    ('top-1', lambda r: _share(r.top1, r.examples)),
    *([('top-5', lambda r: f'{r.top5:.2%}')] if several else []),
    ('NLL', lambda r: f'{r.nll:.3f} nats'),
    ('ECE', lambda r: f'{r.reliability.ece:.2%}'),
    ('training top-1', lambda r: _share(r.train_top1, r.train_examples)),
    ('gap', lambda r: '–' if r.train_top1 is None else accuracy_figures.gap_in_words(r)),
  ]


def _share(share: float | None, examples: int) -> str:
  if share is None:
    return '–'
  low, high = quality.interval(share, examples)
  return f'{share:.2%} ({100 * low:.1f} to {100 * high:.1f})'


def grad_cam(
  explained: Sequence[Explained],
  captions: Sequence[Caption],
  class_names: Sequence[str],
  method: str,
  target: str,
  chosen: str,
) -> Part:
  """Figure 2 of the paper.

  Args:
    explained: of each run.
    captions: of each picture.
    class_names: in the order of the logits.
    method: 'Grad-CAM, stage 3'.
    target: the class that is explained, in words: 'the class that the network predicts'.
    chosen: how the pictures were chosen, a sentence.
  """
  height, width = explained[-1].cams.heat.shape[1:]
  text = (
    f'Which places of a picture spoke for {target}: {method} '
    f'({height} x {width} cells, interpolated). Bright places raise that class; dark ones do not '
    'matter to it or speak against it; a line says where no place speaks for it. Each heat map is '
    'scaled to its own largest value, so brightness is not comparable between maps. Under each: '
    f'the predicted class, its probability, and whether it is right. {chosen}'
  )
  rows = [
    {
      'picture': caption.name, 'true': ' or '.join(caption.true), 'run': each.label,
      'predicted': class_names[(best := int(each.cams.probabilities[k].argmax()))],
      'probability': float(each.cams.probabilities[k, best]),
    }
    for k, caption in enumerate(captions)
    for each in explained
  ]  # fmt: skip
  fig = contact_sheets.grad_cam(explained, captions, class_names, method)
  picture = _picture('grad_cam.png', fig, f'Pictures beside their {method}')
  shown = [row | {'probability': f'{row["probability"]:.1%}'} for row in rows]
  table = page.Table('Predictions', shown, 'grad_cam.csv')
  return Part(
    page.Section('Grad-CAM: what the network looks at', text, (picture,), (table,)),
    {'grad_cam.csv': rows},
  )


def reuse(runs: Runs) -> Part | None:
  """What AFI reuses; None where no block has a choice."""
  rows, pictures = [], []
  for label, run in runs.items():
    for block, each in run.reuse.items():
      rows += [
        {
          'run': label, 'block': block, 'source': source, 'mean': mean, 'spread': spread,
          'entropy': _number(each.entropy),
        }
        for source, mean, spread in zip(each.sources, each.mean, each.spread, strict=True)
      ]  # fmt: skip
    if any(len(each.sources) > 1 for each in run.reuse.values()):
      name = 'reuse.png' if label == list(runs)[-1] else 'reuse_baseline.png'
      alt = f'Mean fusion weights of every block and source of {label}'
      pictures.append(_picture(name, figures.reuse(label, run), alt))
  if not pictures:
    return None
  text = (
    'In every block after the first of a stage, AFI puts a weighted sum of what earlier blocks of '
    'that stage computed (the sources) in the place of channels of its own. Left: the weights s~, '
    'averaged over pictures and channels; a row adds up to 1, and the colour says whether a source '
    'has more or less than its even share. Middle: the standard deviation, over '
    "classes, of the classes' means: 0 where the same is reused whatever is seen. Right: the "
    'entropy of s~ divided by that of equal weights, averaged over channels and pictures: 1 where '
    'all sources weigh the same, 0 where each channel takes one alone. A block with one source has '
    'nothing to choose, and is hatched. With few pictures a class, the spread is partly chance: '
    'compare only what was measured on as many.'
  )
  shown = [
    {
      'run': row['run'], 'block': row['block'], 'source': row['source'],
      'mean': f'{row["mean"]:.4f}', 'spread': f'{row["spread"]:.4f}',
      'entropy': f'{row["entropy"]:.4f}' if row['entropy'] != '' else '–',
    }
    for row in rows
  ]  # fmt: skip
  table = page.Table('Weights', shown, 'reuse.csv')
  section = page.Section('Fusion weights: what AFI reuses', text, tuple(pictures), (table,))
  return Part(section, {'reuse.csv': rows})


def selectivity(runs: Runs) -> Part | None:
  """Figure 4 of the paper and the same of the other stages; None where there is nothing to see."""
  stages = figures.by_stage(itertools.chain(*(run.selectivity for run in runs.values())))
  if not stages:
    return None
  rows = [
    {'run': label, 'block': block, 'channel': channel, 'selectivity': _number(value)}
    for label, run in runs.items()
    for block, values in run.selectivity.items()
    for channel, value in enumerate(values)
  ]
  first = PAPERS_STAGE if PAPERS_STAGE in stages else min(stages)
  pictures = [
    _picture(
      'selectivity.png' if stage == first else f'selectivity_stage{stage}.png',
      figures.selectivity(runs, stage),
      f'Histograms of the class selectivity index in stage {stage}',
    )
    for stage in sorted(stages, key=lambda stage: (stage != first, stage))
  ]
  alt = 'Mean class selectivity index of every block'
  by_depth = _picture('selectivity_by_depth.png', figures.selectivity_by_depth(runs), alt)
  text = (
    'The class selectivity index of a channel is (mu_max - mu_rest) / (mu_max + mu_rest): mu_max '
    'is its mean activation on the class that excites it most, mu_rest that on all other classes. '
    '0: alike for all classes; 1: for one class only. In an AFI network it is that of the output '
    'of AFI, in a plain one that of the channels whose place AFI takes. Lines are means over '
    'channels; dead channels, which are zero on all pictures, do not count. By depth, the bars '
    'hold the middle half of the channels. With few pictures a class, the largest of the means is '
    'partly chance and the index too high: compare only what was measured on as many.'
  )
  table = page.Table('Means of the blocks', _block_means(runs), 'selectivity.csv')
  section = page.Section(
    'Class selectivity', text, (pictures[0], by_depth, *pictures[1:]), (table,)
  )
  return Part(section, {'selectivity.csv': rows})


def _block_means(runs: Runs) -> list[tables.Row]:
  return [
    {
      'run': label, 'block': block, 'channels': values.size, 'dead': int(np.isnan(values).sum()),
      'mean': '–' if np.isnan(values).all() else f'{np.nanmean(values):.4f}',
    }
    for label, run in runs.items()
    for block, values in run.selectivity.items()
  ]  # fmt: skip


def gap(runs: Runs) -> Part | None:
  """Training minus evaluation accuracy; None where no training accuracy is known."""
  if all(run.train_top1 is None for run in runs.values()):
    return None
  text = (
    'Top-1 accuracy on training pictures (a sample, without augmentation) minus that on the '
    'evaluated ones. Of two networks of equal accuracy, the one with the smaller gap has learned '
    'less by heart.'
  )
  picture = _picture('gap.png', accuracy_figures.gap(runs), 'Training and evaluation accuracy')
  rows = [
    {
      'run': label, 'top1': run.top1, 'examples': run.examples, 'train_top1': run.train_top1,
      'train_examples': run.train_examples, 'gap': run.train_top1 - run.top1,
      **dict(zip(('low', 'high'), accuracy_figures.gap_interval(run), strict=True)),
    }
    for label, run in runs.items()
    if run.train_top1 is not None
  ]  # fmt: skip
  return Part(page.Section('Generalisation gap', text, (picture,)), {'gap.csv': rows})


def confusion(runs: Runs) -> Part:
  """What is taken for what."""
  rows = [
    {
      'run': label, 'true': run.class_names[true], 'predicted': run.class_names[predicted],
      'count': count, 'share': count / int(run.confusion[true].sum()),
    }
    for label, run in runs.items()
    for (true, predicted), count in accuracy_figures.confused_pairs(run)
  ]  # fmt: skip
  few = len(next(iter(runs.values())).class_names) <= accuracy_figures.FEW_CLASSES
  together = 'classes that are taken for each other stand together'
  text = (
    'A row is a true class, a column what it is taken for; the diagonal is right. '
    + ('Numbers are examples.' if few else f'It is that of {list(runs)[-1]}; {together}.')
    + ' Colours are shares of the true class. The table and its file have what is wrong; what is '
    'right is in per_class.csv.'
  )
  alt = 'Confusion matrix' if few else 'Confusion matrix and the most confused pairs'
  picture = _picture('confusion.png', accuracy_figures.confusion(runs), alt)
  listed = [
    row | {'share': f'{row["share"]:.1%}'}
    for label in runs
    for row in itertools.islice((r for r in rows if r['run'] == label), _LISTED)
  ]
  table = page.Table(f'The {_LISTED} most confused pairs of a run', listed, 'confusion.csv')
  section = page.Section('Confusions', text, (picture,), (table,) if rows else ())
  return Part(section, {'confusion.csv': rows})


def per_class(runs: Runs) -> Part:
  """Accuracy of each class."""
  rows = []
  for label, run in runs.items():
    predicted = run.confusion.sum(axis=0)
    for k, accuracy in enumerate(accuracy_figures.class_accuracies(run)):
      right = int(run.confusion[k, k])
      rows.append(
        {
          'run': label, 'class': run.class_names[k], 'examples': int(run.confusion[k].sum()),
          'right': right, 'accuracy': _number(accuracy), 'predicted': int(predicted[k]),
          'precision': right / int(predicted[k]) if predicted[k] else '',
        }
      )  # fmt: skip
  text = (
    'The share of each class that is recognised. In the table, precision is the share of what is '
    'taken for the class that is of it.'
  )
  picture = _picture('per_class.png', accuracy_figures.per_class(runs), 'Accuracy of each class')
  shown = [
    row | {key: f'{row[key]:.1%}' if row[key] != '' else '–' for key in ('accuracy', 'precision')}
    for row in rows
  ]
  table = page.Table('All classes', shown, 'per_class.csv')
  section = page.Section('Accuracy of each class', text, (picture,), (table,))
  return Part(section, {'per_class.csv': rows})


def reliability(runs: Runs) -> Part:
  """Whether it is right as often as it says."""
  rows = [
    {
      'run': label, 'from': low, 'to': high, 'predictions': int(count),
      'confidence': _number(confidence) if count else '',
      'accuracy': _number(accuracy) if count else '',
    }
    for label, run in runs.items()
    for low, high, count, confidence, accuracy in zip(
      run.reliability.edges, run.reliability.edges[1:], run.reliability.count,
      run.reliability.confidence, run.reliability.accuracy, strict=False,
    )
  ]  # fmt: skip
  text = (
    'Predictions are sorted into bins by their confidence, the probability of the predicted class. '
    'A bar is the accuracy of a bin: on the dotted line, it is right as often as it says; hatched '
    'is what is between the two. ECE, the expected calibration error, is their mean distance over '
    'all predictions; NLL the mean negative log-probability of the true class. Below: how many '
    'predictions each bin has.'
  )
  alt = 'Accuracy over confidence'
  picture = _picture('reliability.png', accuracy_figures.reliability(runs), alt)
  shown = [
    row
    | {
      k: f'{row[k]:.1%}' if row[k] != '' else '–' for k in ('from', 'to', 'confidence', 'accuracy')
    }
    for row in rows
  ]
  table = page.Table('Bins', shown, 'reliability.csv')
  section = page.Section('Calibration', text, (picture,), (table,))
  return Part(section, {'reliability.csv': rows})


def mistakes(
  label: str, run: Examination, images: Sequence[np.ndarray], names: Sequence[str]
) -> Part:
  """What it was surest of and wrong.

  Args:
    label: of the run.
    run: has at least one mistake.
    images: u8 [S,S,3] of each of its mistakes.
    names: of them.
  """
  captions = [
    (run.class_names[m.true], run.class_names[m.predicted], m.probability) for m in run.mistakes
  ]
  total = round(run.examples * (1 - run.top1))
  words = f'The {len(captions[:_SHEET])} most confident of {total:,} mistakes, {label}'
  fig = contact_sheets.mistakes(images[:_SHEET], captions[:_SHEET], words)
  rows = [
    {
      'run': label, 'example': mistake.example, 'picture': name, 'true': true,
      'predicted': predicted, 'probability': probability,
    }
    for mistake, name, (true, predicted, probability) in zip(
      run.mistakes, names, captions, strict=True
    )
  ]  # fmt: skip
  text = (
    f'The pictures of {run.split} that {label} was surest of, and wrong: what it said, with its '
    'probability, and the label. This is where errors of the labels show.'
  )
  shown = [row | {'probability': f'{row["probability"]:.1%}'} for row in rows]
  table = page.Table('Mistakes', shown, 'mistakes.csv')
  picture = _picture('mistakes.png', fig, 'Pictures with their wrong predictions')
  section = page.Section('Confident mistakes', text, (picture,), (table,))
  return Part(section, {'mistakes.csv': rows})


def _picture(name: str, fig: Figure, alt: str) -> page.Picture:
  return page.Picture(name, style.png(fig), alt)


def _number(value: float) -> float | str:
  """'' for NaN, as a CSV file has it."""
  return '' if math.isnan(value) else float(value)
