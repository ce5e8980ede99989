"""The tables of `python -m afi_flax.cost`: rows for machines, and the same as text."""

import sys
from collections.abc import Sequence

from flax import linen as nn

from afi_flax.analysis import cost, paper, tables
from afi_flax.errors import UserError
from afi_flax.models import create_model, image_size, list_models

_MIB = 2**20
_LEGEND = (
  'MACs: multiply-accumulates for one picture. FLOPs: in the convention of the AFI paper, for 32\n'
  'pictures. activations: what comes out of convolutions, MiB for one picture in float32.'
)

Report = tuple[list[tables.Row], str]  # rows, text


def network(name: str, model: nn.Module, size: int) -> Report:
  """One network, a row for each stage and one for the whole: the paper's Table 3.

  Raises:
    UserError: pictures of `size` pixels are too small for it.
  """
  layers = _count(name, model, size)
  whole = cost.Stage('total', (size, size), '', cost.total(layers))
  rows, shown = [], []
  for stage in [*cost.stages(layers), whole]:
    output = ' x '.join(map(str, stage.size)) if stage is not whole else ''
    described = {'stage': stage.name, 'output': output, 'layers': stage.layers}
    rows.append(described | vars(stage.cost))
    shown.append(described | _for_people(stage.cost))
  return rows, f'{name}, {size} x {size} pixels\n\n{tables.text(shown)}\n\n{_LEGEND}'


def zoo(pattern: str, size: int = 0, num_classes: int = 0) -> Report:
  """All networks that match, a row each; one alone in detail.

  Args:
    pattern: a name or a shell pattern.
    size: of the pictures; 0: what each network is made for.
    num_classes: 0: 100 for networks for 32-pixel pictures, 1000 for others.

  Raises:
    UserError: no network matches, or pictures are too small for one.
  """
  names = list_models(pattern)
  if not names and set('*?[') & set(pattern):
    raise UserError(f'no model matches {pattern!r}; afi_flax.models.list_models() has them all')
  models = [_make(name, num_classes) for name in names or [pattern]]
  sizes = [size or image_size(name) for name in names]
  if len(names) == 1:
    return network(names[0], models[0], sizes[0])
  rows, shown = [], []
  for name, model, pixels in zip(names, models, sizes, strict=True):
    if sys.stderr.isatty():
      print(f'\r{len(rows) + 1} of {len(names)}', end='', file=sys.stderr, flush=True)
    whole = cost.total(_count(name, model, pixels))
    described = {'network': name, 'pixels': pixels, 'classes': model.num_classes}
    rows.append(described | vars(whole))
    shown.append(described | _for_people(whole))
  if sys.stderr.isatty():
    print(end='\r\033[K', file=sys.stderr, flush=True)
  return rows, f'{tables.text(shown)}\n\n{_LEGEND}'


def paper_tables(with_memory: bool = True) -> Report:
  """Tables 4, 5, 2 and 6, with a mark and a reason where we and the paper disagree."""
  rows = [paper.compare(row) for row in paper.ROWS]
  reasons = list(dict.fromkeys(reason for row in paper.ROWS for reason in row.reasons))
  parts = []
  for number, title in ((4, 'CIFAR-100'), (5, 'ImageNet'), (2, 'AFI-MobileNetV2, CIFAR-100')):
    shown = [
      _beside(printed, ours, reasons)
      for printed, ours in zip(paper.ROWS, rows, strict=True)
      if printed.table == number
    ]
    parts.append(f'Table {number}: {title}\n\n{tables.text(shown)}')
  if with_memory:
    print('compiling the four programs of Table 6: about a minute', file=sys.stderr, flush=True)
    peaks = paper.compare_memory()
    rows += peaks
    reasons.append(paper.MEMORY_REASON)
    shown = [_memory_beside(row, len(reasons)) for row in peaks]
    parts.append(f'Table 6: peak memory at batch 64, MiB\n\n{tables.text(shown)}')
  notes = [f'[{i}] {reason}' for i, reason in enumerate(reasons, start=1)]
  legend = (
    'top-1: of the paper, in percent. =: ours is what the paper prints, to its last digit; else\n'
    'by how much ours differs. GFLOPs: for 32 pictures, in the convention of the paper.'
  )
  return rows, '\n\n'.join([*parts, legend, '\n'.join(notes)])


def _count(name: str, model: nn.Module, size: int) -> list[cost.Layer]:
  layers = cost.count(model, size)
  if any(0 in layer.size for layer in layers):
    raise UserError(f'image_size {size} leaves nothing of the last map of {name!r}; use 32 or more')
  return layers


def _make(name: str, num_classes: int) -> nn.Module:
  return create_model(name, num_classes or (100 if image_size(name) == 32 else 1000))


def _for_people(c: cost.Cost) -> dict[str, object]:
  return {
    'parameters': c.parameters,
    'MACs (M)': f'{c.macs / 1e6:,.2f}',
    'FLOPs x 32 (G)': f'{cost.PAPER_PICTURES * c.paper_flops / 1e9:,.2f}',
    'activations': f'{4 * c.activations / _MIB:,.2f}',
  }


def _beside(printed: paper.Row, ours: tables.Row, reasons: Sequence[str]) -> tables.Row:
  return {
    'network': printed.model,
    'top-1': printed.top1,
    'parameters': ours['parameters'],
    'paper': printed.parameters or None,
    'differs': _difference(ours, 'parameters'),
    'GFLOPs': f'{ours["gflops"]:.2f}',
    'paper ': printed.gflops or None,
    'differs ': _difference(ours, 'gflops'),
    'why': ' '.join(f'[{reasons.index(reason) + 1}]' for reason in printed.reasons),
  }


def _memory_beside(row: tables.Row, note: int) -> tables.Row:
  agrees = row['ratio'] == row['ratio_paper']
  return {
    'network': row['network'],
    'task': row['task'],
    'MiB': row['mib'],
    'paper': row['mib_paper'],
    'to plain': f'{row["ratio"]:.3f}',
    'paper ': f'{row["ratio_paper"]:.3f}',
    'why': '' if agrees else f'[{note}]',
  }


def _difference(row: tables.Row, key: str) -> str:
  if row[f'{key}_agree'] is None:
    return ''
  return '=' if row[f'{key}_agree'] else f'{row[key] / row[f"{key}_paper"] - 1:+.2%}'
