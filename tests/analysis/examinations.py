"""Examinations as they come from a network, made up."""

import numpy as np

from afi_flax.analysis.examine import Examination, Mistake, Reliability, Reuse


def examination(seed=0, classes=6, afi=True, per_class=20, blocks=4, channels=16, **changes):
  """Of a network of two stages, which is right about half of the time."""
  rng = np.random.default_rng(seed)
  names = changes.get('class_names', tuple(f'class{k}' for k in range(classes)))
  chances = rng.dirichlet(np.full(classes, 0.3), classes) / 2 + np.eye(classes) / 2
  confusion = np.stack([rng.multinomial(per_class, row) for row in chances])
  wrong = confusion - np.diag(np.diag(confusion))
  pairs = list(zip(*np.nonzero(wrong), strict=True))[:4]
  fields = {
    'split': 'test',
    'class_names': names,
    'examples': int(confusion.sum()),
    'top1': float(np.trace(confusion) / confusion.sum()),
    'top5': 0.95,
    'nll': 1.234,
    'confusion': confusion,
    'reliability': reliability(int(confusion.sum())),
    'mistakes': tuple(
      Mistake(k, int(true), int(said), 0.9 - k / 10) for k, (true, said) in enumerate(pairs)
    ),
    'selectivity': selectivity(rng, blocks, channels),
    'reuse': reuse(rng, blocks) if afi else {},
    'train_top1': 0.75,
    'train_examples': 200,
  }
  return Examination(**fields | changes)


def reliability(examples):
  """Of five bins, the first of them empty."""
  count = np.array([0, *np.diff(np.linspace(0, examples, 5).astype(int))])
  confidence = np.array([np.nan, 0.3, 0.5, 0.7, 0.9])
  accuracy = np.array([np.nan, 0.4, 0.45, 0.6, 0.95])
  return Reliability(np.linspace(0, 1, 6), confidence, accuracy, count, 0.0789)


def selectivity(rng, blocks, channels):
  """Of blocks 2 to `blocks` of two stages; in each the first channel is dead."""
  found = {}
  for stage in (1, 2):
    for block in range(2, blocks + 1):
      found[f'stage{stage}_block{block}'] = rng.beta(2, 4, channels)
      found[f'stage{stage}_block{block}'][0] = np.nan
  return found


def reuse(rng, blocks):
  """Of the same blocks."""
  found = {}
  for stage in (1, 2):
    for block in range(2, blocks + 1):
      n = block - 1
      sources = tuple(f'stage{stage}_block{k + 1}' for k in range(n))
      entropy = float('nan') if n == 1 else 0.9
      found[f'stage{stage}_block{block}'] = Reuse(
        sources, rng.dirichlet(np.full(n, 9.0)), 0.1 * rng.random(n) * (n > 1), entropy
      )
  return found


def two_runs(**changes):
  """A plain baseline and an AFI run."""
  return {'plain': examination(1, afi=False, **changes), 'afi': examination(2, **changes)}
