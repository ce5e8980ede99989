"""What a training step costs as work grows: with depth, with the batch, with the devices.

  python -m benchmarks.growth --json results/growth_cpu.json --plot results/growth_cpu.png

Depth: ResNet-20 to 110 with the paper's CIFAR recipe, batch 64 of 32 pixels, plain and AFI: time of
a step, XLA's peak memory, and seconds to trace and compile it. A stage of n blocks with AFI reads
earlier maps n (n - 1) / 2 times, and n - 1 of its blocks have half a first convolution and weights
to compute. So what AFI adds to its plain network's time is fitted by least squares as

  reads * (ms a read) + fused blocks * (ms a fused block),

over the networks, where both are sums over the stages; the second is negative where the narrower
convolution saves more than the weights cost.

Batch: the first network, plain and AFI, with 16 to 256 pictures. Devices: not measured here but
read from results/tpu_fit.json, which has what libtpu's compiler says of ImageNet networks on more
and more chips with as many pictures on each.

Steps take turns, and their times are medians over the rounds; each is compiled once, AFI's right
after its plain network's (`benchmarks.compile_time` has medians).
"""

import collections
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from afi_flax import commands, config, models
from afi_flax.analysis import memory, tables
from afi_flax.errors import UserError
from benchmarks import common, plots, remat
from configs import common as recipes

BACKBONES = ('resnet20', 'resnet32', 'resnet44', 'resnet56', 'resnet110')
BATCH_SIZES = (16, 32, 64, 128, 256)
_FORMS = ('{}', 'afi_{}')
_TPU = pathlib.Path(__file__).parent.parent / 'results' / 'tpu_fit.json'

Key = tuple[str, int]  # a network and its batch size


class Fit(NamedTuple):
  """AFI's extra time."""

  ms_per_read: float
  ms_per_fused_block: float
  r_squared: float  # 1: the fit explains all of what differs between the networks
  worst_ms: float  # the largest distance of a network from the fit
  plain_ms_per_block: float  # of the plain networks, to compare: the slope of their times


def blocks(backbone: str) -> tuple[int, ...]:
  """n of each stage."""
  return tuple(models.BACKBONES[backbone].blocks)


def reads(stages: Iterable[int]) -> int:
  """How often blocks with AFI read an earlier map, in stages of so many blocks."""
  return sum(n * (n - 1) // 2 for n in stages)


def fused(stages: Iterable[int]) -> int:
  """How many blocks have AFI: all of a stage but the first."""
  return sum(n - 1 for n in stages)


def fit(rows: Sequence[tables.Row]) -> Fit:
  """Of rows as `by_depth` makes them; least squares."""
  plain, afi = rows[::2], rows[1::2]
  extra = np.array([b['ms'] - a['ms'] for a, b in zip(plain, afi, strict=True)])
  counts = np.array([[row['reads'], row['fused_blocks']] for row in afi], float)
  solution, *_ = np.linalg.lstsq(counts, extra)
  left = extra - counts @ solution
  slope, _ = np.polyfit([sum(row['blocks']) for row in plain], [row['ms'] for row in plain], 1)
  return Fit(
    ms_per_read=float(solution[0]),
    ms_per_fused_block=float(solution[1]),
    r_squared=float(1 - left @ left / ((extra - extra.mean()) ** 2).sum()),
    worst_ms=float(abs(left).max()),
    plain_ms_per_block=float(slope),
  )


def measure(keys: Sequence[Key], rounds: int) -> dict[Key, dict[str, float]]:
  """{(network, batch size): ms, mib, compile_s}; compiled once, timed in so many rounds."""
  runs = {}
  for name, batch_size in keys:
    jax.clear_caches()
    recipe = recipes.cifar('cifar100', name)
    recipe.batch_size, recipe.model.dtype = batch_size, common.DTYPE.value
    run = runs[name, batch_size] = remat.Training(config.resolve(recipe))
    print(f'compiled {name}, batch {batch_size}, in {run.compile_seconds:.1f} s', flush=True)
  seconds = common.median_seconds(runs, rounds)
  return {
    key: {
      'ms': round(1000 * seconds[key], 3),
      'mib': round(run.peak / memory.MIB, 1),
      'compile_s': round(run.compile_seconds, 2),
    }
    for key, run in runs.items()
  }


def by_depth(found: dict[Key, dict[str, float]]) -> list[dict[str, Any]]:
  """A row a network, AFI's after its plain one's; of what `measure` found of one batch size."""
  rows = []
  for (name, batch_size), values in found.items():
    stages = blocks(name.removeprefix('afi_'))
    afi = name.startswith('afi_')
    plain = found[name.removeprefix('afi_'), batch_size]
    rows.append(
      {
        'network': name,
        'batch_size': batch_size,
        'blocks': stages,
        'reads': afi * reads(stages),
        'fused_blocks': afi * fused(stages),
        **values,
        **{f'{key}_to_plain': round(values[key] / plain[key], 3) for key in values},
      }
    )
  return rows


def by_batch(found: dict[Key, dict[str, float]]) -> list[dict[str, Any]]:
  """A row for every batch size of a network, with what a picture takes."""
  return [
    {
      'network': name,
      'batch_size': size,
      **values,
      'ms_per_picture': round(values['ms'] / size, 4),
      'mib_per_picture': round(values['mib'] / size, 3),
    }
    for (name, size), values in found.items()
  ]


def by_devices(rows: Iterable[tables.Row]) -> list[dict[str, Any]]:
  """Those rows of `afi_flax.fit` that differ only in the number of chips, two of them or more.

  Pictures a chip, and what the config sets besides, are the same.
  """
  groups = collections.defaultdict(dict)
  for row in rows:
    sizes = ('batch_size', 'eval_batch_size')
    others = {key: value for key, value in row['overrides'].items() if key not in sizes}
    same = row['config'], row['batch_per_chip'], json.dumps(others, sort_keys=True)
    groups[same][row['chips']] = {
      'network': row['network'],
      'chips': row['chips'],
      'batch_per_chip': row['batch_per_chip'],
      'mib_per_chip': row['peak_mib'],
      'all_reduce_mib_per_chip': row['all_reduce_mib'],
    }
  return [one[chips] for one in groups.values() if len(one) > 1 for chips in sorted(one)]


def show(depth: Sequence[tables.Row], batch: Sequence[tables.Row], chips, found: Fit) -> str:
  """Three tables, and the fit in words."""

  def both(row, key, digits):
    ratio = f' ({row[f"{key}_to_plain"]:.2f})' if row['fused_blocks'] else ''
    return f'{row[key]:,.{digits}f}{ratio}'

  first = [
    {
      'network': row['network'],
      'blocks': ' '.join(map(str, row['blocks'])),
      'reads': row['reads'],
      'ms a step (to plain)': both(row, 'ms', 1),
      'MiB (to plain)': both(row, 'mib', 0),
      'compile s (to plain)': both(row, 'compile_s', 1),
    }
    for row in depth
  ]
  second = [
    {
      'network': row['network'],
      'batch': row['batch_size'],
      'ms a step': f'{row["ms"]:.1f}',
      'ms a picture': f'{row["ms_per_picture"]:.3f}',
      'MiB': f'{row["mib"]:,.0f}',
      'MiB a picture': f'{row["mib_per_picture"]:.2f}',
    }
    for row in batch
  ]
  parts = [tables.text(first), describe(found), tables.text(second)]
  return '\n\n'.join([*parts, tables.text(chips)] if chips else parts)


def describe(found: Fit) -> str:
  """The fit in words."""
  return (
    f'AFI adds {found.ms_per_read:.4f} ms a read of an earlier map and '
    f'{found.ms_per_fused_block:+.3f} ms a block that has AFI (R^2 {found.r_squared:.3f}, at most '
    f'{found.worst_ms:.1f} ms off); a plain block takes {found.plain_ms_per_block:.2f} ms'
  )


def draw(path: str, depth, batch, chips, found: Fit) -> None:
  """A panel for each of depth, batch and devices."""
  from matplotlib import figure

  fig = figure.Figure(figsize=(13, 4.2), dpi=150, layout='constrained', facecolor='white')
  panels = fig.subplots(1, 3)
  _draw_depth(panels[0], depth, found)
  _draw_batch(panels[1], batch)
  _draw_chips(panels[2], chips)
  fig.suptitle('A training step as work grows', fontsize=11, fontweight='bold')
  fig.savefig(path)


def _draw_depth(axes, rows, found: Fit) -> None:
  plots.style(axes, f'ms a step against depth, batch {rows[0]["batch_size"]}')
  plain, afi = rows[::2], rows[1::2]
  x = [2 * sum(row['blocks']) + 2 for row in plain]
  for line, colour, label in zip((plain, afi), plots.COLOURS, ('plain', 'AFI'), strict=False):
    axes.plot(x, [row['ms'] for row in line], color=colour, marker='o', markersize=3.5, label=label)
  fitted = [
    a['ms'] + b['reads'] * found.ms_per_read + b['fused_blocks'] * found.ms_per_fused_block
    for a, b in zip(plain, afi, strict=True)
  ]
  label = f'plain + the fit: {1000 * found.ms_per_read:.0f} µs a read'
  axes.plot(x, fitted, color=plots.COLOURS[1], linestyle=':', label=label)
  axes.set_ylim(bottom=0)
  _finish(axes, x, 'layers of the ResNet')


def _draw_batch(axes, rows) -> None:
  (first, *_) = sorted({row['batch_size'] for row in rows})
  plots.style(axes, f'a picture, as a share of the plain network at {first}')
  base = next(row for row in rows if row['batch_size'] == first)
  for name, colour in zip(
    dict.fromkeys(row['network'] for row in rows), plots.COLOURS, strict=False
  ):
    own = [row for row in rows if row['network'] == name]
    for key, style, what in (('ms', '-', 'time'), ('mib', '--', 'memory')):
      y = [row[f'{key}_per_picture'] / base[f'{key}_per_picture'] for row in own]
      sizes = [row['batch_size'] for row in own]
      axes.plot(
        sizes, y, color=colour, linestyle=style, marker='o', markersize=3.5, label=f'{name}, {what}'
      )
  axes.set_xscale('log', base=2)
  axes.set_ylim(bottom=0)
  _finish(axes, sorted({row['batch_size'] for row in rows}), 'pictures in a batch')


def _draw_chips(axes, rows) -> None:
  plots.style(axes, 'MiB a chip against chips (TPU v5e, compiled)')
  for name, colour in zip(
    dict.fromkeys(row['network'] for row in rows), plots.COLOURS, strict=False
  ):
    own = [row for row in rows if row['network'] == name]
    for key, style, what in (
      ('mib_per_chip', '-', 'memory'),
      ('all_reduce_mib_per_chip', '--', 'summed'),
    ):
      axes.plot(
        [row['chips'] for row in own], [row[key] for row in own], color=colour, linestyle=style,
        marker='o', markersize=3.5, label=f'{name}, {what}',
      )  # fmt: skip
  axes.set_xscale('log', base=2)
  axes.set_yscale('log')
  _finish(axes, sorted({row['chips'] for row in rows}), 'chips')


def _finish(axes, ticks: Sequence[int], label: str) -> None:
  axes.set_xticks(ticks, map(str, ticks))
  axes.minorticks_off()
  axes.set_xlabel(label, fontsize=9, color='#333333')
  axes.legend(frameon=False, fontsize=7, handlelength=3.5)


def main(_) -> None:
  backbones, rounds = common.BACKBONES.value or BACKBONES, common.ROUNDS.value
  usual = common.BATCH_SIZE.value or 64
  if len(set(backbones)) < 3 or not set(backbones) <= set(BACKBONES):
    raise UserError(
      f'--backbones {",".join(backbones)} must be three or more of {", ".join(BACKBONES)}: two '
      'numbers are fitted to them'
    )
  for path in (common.JSON.value, plots.PLOT.value):
    if path:
      tables.check_writable(path)
  jax.config.update('jax_enable_compilation_cache', False)
  names = [form.format(backbone) for backbone in backbones for form in _FORMS]
  depth = by_depth(measure([(name, usual) for name in names], rounds))
  growing = [(name, size) for name in names[:2] for size in BATCH_SIZES]
  batch = by_batch(measure(growing, rounds))
  chips, found = by_devices(tables.read_rows(str(_TPU))), fit(depth)
  device = jax.devices()[0].device_kind
  print(f'\n{common.DTYPE.value} on {device}; medians of {rounds}\n')
  print(show(depth, batch, chips, found))
  if plots.PLOT.value:
    draw(plots.PLOT.value, depth, batch, chips, found)
  if common.JSON.value:
    common.write_json(
      common.JSON.value,
      device=device,
      dtype=common.DTYPE.value,
      rounds=rounds,
      depth=depth,
      fit=found._asdict(),
      batch=batch,
      devices=chips,
    )


if __name__ == '__main__':
  commands.run(main)
