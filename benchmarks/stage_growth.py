"""What a stage costs as it grows from 4 to 64 blocks: plain, AFI, and with concatenation.

  python -m benchmarks.stage_growth --json results/memory/stage_growth.json \
    --plot results/memory/stage_growth.png

All three are stages of basic blocks of width w = 32 on the same input. Block k >= 2 of the two that
reuse features computes w/2 channels X_k itself; AFI adds w/2 channels R_k, a sum over X_1 .. X_k-1,
so that its second convolution sees w channels; with concatenation, as in DenseNet, it sees all of
X_k, X_1 .. X_k-1, that is, k w/2 channels. Measured are the peak memory that XLA lays out for the
gradient of the stage, its parameters, the time of a gradient, and that of compiling it. The
exponent is the slope of a straight line through the logarithms: 1 grows linearly with the blocks, 2
with their square; the last column has the slope of the last two lengths alone.

Times are medians of calls in turns; on a machine that others use too, only their ratios mean
something.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import linen as nn

from afi_flax import commands, steps
from afi_flax.analysis import memory, tables
from afi_flax.errors import UserError
from afi_flax.models.fusion import REMATS, Features, Fusion, run_stage
from afi_flax.models.layers import ConvBN
from afi_flax.models.resnet import BasicBlock
from benchmarks import common, plots

Array = jax.Array

_BLOCKS = flags.DEFINE_list('blocks', '4,8,16,32,64', 'Lengths of the stage.')
_REMAT = flags.DEFINE_enum('remat', 'none', REMATS, 'What is computed again for the gradient.')
_SIZE = 16  # pixels
_BATCH = 16
_ROUNDS = 5
_WIDTH = 32
KINDS = ('plain', 'AFI', 'concatenation')
MEASURES = ('peak MiB', 'parameters', 'ms a gradient', 'compile s')


class ConcatBlock(nn.Module):
  """A basic block whose second convolution takes every earlier feature of the stage as it is.

  Attributes:
    width: channels of the output; half as many are its own feature.
  """

  width: int

  @nn.compact
  def __call__(self, x: Array, features: Features, train: bool) -> tuple[Array, Array]:
    """[B,H,W,width] -> output [B,H,W,width] and X_k [B,H,W,width/2]."""
    made = ConvBN(self.width // 2, name='conv1')(x, train)
    y = jnp.concatenate([made, *features.maps], axis=-1)
    y = ConvBN(self.width, activation='', name='conv2')(y, train)
    return nn.relu(x + y), made


class Stage(nn.Module):
  """A stage by itself.

  Attributes:
    kind: one of KINDS.
    num_blocks: its length.
    remat: what is computed again for the gradient, see `fusion.run_stage`.
    width: w.
  """

  kind: str
  num_blocks: int
  remat: str = 'none'
  width: int = _WIDTH

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B,H,W,width] -> the same shape; batch norm uses the batch's statistics."""

    def make_block(k, fusion):
      name = f'block{k + 1}'
      if fusion and self.kind == 'concatenation':
        return ConcatBlock(self.width, name=name)
      return BasicBlock(self.width, fusion=fusion, name=name)

    fusion = None if self.kind == 'plain' else Fusion('half')
    return run_stage(make_block, self.num_blocks, x, self.width, fusion, True, self.remat)


def make_gradient(kind: str, num_blocks: int, remat: str, x: Array) -> tuple[Callable, dict]:
  """The gradient of a made-up loss by the stage's parameters, jitted, and their shapes."""
  stage = Stage(kind, num_blocks, remat)

  def loss(params, x):
    y, _ = stage.apply({'params': params}, x, mutable='batch_stats')
    return (y**2).mean()

  variables = jax.eval_shape(stage.init, jax.random.key(0), x)
  options = steps.compiler_options(False, jax.devices()[0])
  gradient = jax.jit(jax.grad(loss), compiler_options=options)
  return gradient, variables['params']


def measure(
  lengths: list[int], remat: str, x: Array, rounds: int
) -> dict[tuple[str, int], dict[str, float]]:
  """{(kind, blocks): {measure: value}} of every kind and length."""
  figures, calls = {}, {}
  for num_blocks in lengths:
    for kind in KINDS:
      gradient, shapes = make_gradient(kind, num_blocks, remat, x)
      start = time.perf_counter()
      compiled = gradient.lower(shapes, x).compile()
      seconds = time.perf_counter() - start
      print(f'{kind}, {num_blocks} blocks: compiled in {seconds:.1f} s', flush=True)
      figures[kind, num_blocks] = {
        'peak MiB': memory.peak_bytes(compiled) / memory.MIB,
        'parameters': sum(p.size for p in jax.tree.leaves(shapes)),
        'compile s': seconds,
      }
      # Any weights do for a measurement; small ones keep activations finite in a long stage.
      params = jax.tree.map(lambda p: jnp.full(p.shape, 0.01, p.dtype), shapes)
      calls[kind, num_blocks] = lambda compiled=compiled, params=params: compiled(params, x)
  for key, seconds in common.median_seconds(calls, rounds).items():
    figures[key]['ms a gradient'] = seconds * 1000
  return figures


def exponent(lengths: list[int], values: list[float]) -> float:
  """p of the power law value = c * length^p that fits best, in logarithms."""
  return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def show(lengths: list[int], figures: dict[tuple[str, int], dict[str, float]]) -> str:
  """A table for each measure: a row for each kind, a column for each length, and the exponent."""
  shown = []
  for name in MEASURES:
    rows = []
    for kind in KINDS:
      values = [figures[kind, n][name] for n in lengths]
      form = '{:,.1f}' if max(values) < 1000 else '{:,.0f}'
      slopes = (exponent(lengths, values), exponent(lengths[-2:], values[-2:]))
      columns = {f'{n} blocks': form.format(v) for n, v in zip(lengths, values, strict=True)}
      ends = {'exponent': f'{slopes[0]:.2f}', 'at the end': f'{slopes[1]:.2f}'}
      rows.append({name: kind} | columns | ends)
    shown.append(tables.text(rows))
  return '\n\n'.join(shown)


def draw(path: str, lengths: list[int], figures: dict[tuple[str, int], dict[str, float]]) -> None:
  """Memory and time over the number of blocks, with logarithmic axes."""
  from matplotlib import figure, ticker

  fig = figure.Figure(figsize=(10.5, 4.4), dpi=150, layout='constrained', facecolor='white')
  panels = {
    'peak MiB': 'peak memory of a gradient (MiB)',
    'ms a gradient': 'time of a gradient (ms)',
  }
  for axes, (name, title) in zip(fig.subplots(1, 2), panels.items(), strict=True):
    plots.style(axes, title)
    lines = {kind: [figures[kind, n][name] for n in lengths] for kind in KINDS}
    label_at = 0.0  # labels rise with the lines' ends, each clear of the one below
    for kind in sorted(KINDS, key=lambda kind: lines[kind][-1]):
      values, colour = lines[kind], plots.COLOURS[KINDS.index(kind)]
      axes.loglog(lengths, values, color=colour, marker='o', markersize=3.5, linewidth=1.6)
      label_at = max(values[-1], 1.2 * label_at)
      slope = exponent(lengths[-2:], values[-2:])
      axes.text(
        1.08 * lengths[-1], label_at, f'{kind}, slope {slope:.2f}', color=colour, fontsize=8,
        va='center',
      )  # fmt: skip
    axes.set_xticks(lengths, map(str, lengths))
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter('{x:g}')
    axes.set_xlabel('blocks of the stage', fontsize=9, color='#333333')
  title = 'A stage as it grows: plain, AFI, and concatenation (slopes of the last two points)'
  fig.suptitle(title, fontsize=11, fontweight='bold')
  fig.savefig(path)


def main(_) -> None:
  try:
    lengths = [int(n) for n in _BLOCKS.value]
  except ValueError:
    lengths = []
  if len(lengths) < 2 or lengths != sorted(set(lengths)) or lengths[0] < 1:
    raise UserError(f'--blocks {",".join(_BLOCKS.value)} must be two or more numbers that rise')
  x = jax.random.normal(jax.random.key(0), [_BATCH, _SIZE, _SIZE, _WIDTH])
  figures = measure(lengths, _REMAT.value, x, _ROUNDS)
  print(
    f'\nThe gradient of a stage of width {_WIDTH}, batch {_BATCH} of {_SIZE} pixels, '
    f'remat {_REMAT.value}, on {jax.devices()[0].device_kind}; medians of {_ROUNDS}\n\n'
    f'{show(lengths, figures)}'
  )
  if plots.PLOT.value:
    draw(plots.PLOT.value, lengths, figures)
  if common.JSON.value:
    common.write_json(
      common.JSON.value,
      width=_WIDTH,
      remat=_REMAT.value,
      batch_size=_BATCH,
      image_size=_SIZE,
      rounds=_ROUNDS,
      figures=[{'kind': kind, 'blocks': n, **values} for (kind, n), values in figures.items()],
    )


if __name__ == '__main__':
  commands.run(main)
