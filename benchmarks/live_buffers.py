"""Where a step's memory goes: what is live at its peak, and the peak of each block.

  python -m benchmarks.live_buffers --json results/memory/live_buffers.json \
    --plot results/memory/live_buffers.png

Compiles the training and the inference step of ResNet-50 and AFI-ResNet-50 for the CPU, 64 pictures
of 224 pixels, and reads what XLA's compiler writes down about its arena: which temporary array lies
where, from which instruction to which. In training, what is live at the peak is what is kept for
the gradient: it is listed for one block, in units of w H W B floats (the size of a plain block's
X_k), and summed by stage. For inference, the table has the most that is in use while each block's
instructions run.
"""

import collections
import dataclasses
import itertools
import pathlib
import re
import tempfile

import jax

from afi_flax import commands
from afi_flax.analysis import memory, tables
from benchmarks import common, plots

_NETWORKS = ('resnet50', 'afi_resnet50')
_BLOCK = 'stage1_block2'  # the first block with AFI, whose arrays are listed
_UNIT = 64 * 56 * 56 * 64 * 4  # bytes of its w H W B floats
_PART = re.compile(r'(stem|stage\d+_block\d+|head)/(.+)')
_WORDS = {'conv_general_dilated': 'convolution', 'sub': 'x - mean', 'max': 'ReLU'}


@dataclasses.dataclass(frozen=True)
class Buffer:
  """A temporary array in XLA's arena.

  Attributes:
    part: the block that computes it: 'stem', 'stage1_block2', 'head'; '': none, or several.
    what: the layer and the operation in it: 'conv1/bn/sub'.
    size: bytes.
    offset: bytes from the arena's beginning.
    start: the instruction that writes it.
    end: the last one that reads it.
  """

  part: str
  what: str
  size: int
  offset: int
  start: int
  end: int


@dataclasses.dataclass(frozen=True)
class Arena:
  """All temporary arrays of a compiled program.

  Attributes:
    size: bytes.
    buffers: the arrays.
    parts: of every instruction in the order in which they run, the block that it belongs to.
  """

  size: int
  buffers: tuple[Buffer, ...]
  parts: tuple[str, ...]

  def live(self, instruction: int) -> list[Buffer]:
    """What is in the arena while an instruction runs, the largest first."""
    live = [b for b in self.buffers if b.start <= instruction <= b.end]
    return sorted(live, key=lambda b: (-b.size, b.part, b.what))

  def in_use(self, instruction: int) -> int:
    """Bytes then. Arrays that lie in one place, as a sum in place of its summand, count once."""
    total = reached = 0
    for b in sorted(self.live(instruction), key=lambda b: b.offset):
      total += max(0, b.offset + b.size - max(reached, b.offset))
      reached = max(reached, b.offset + b.size)
    return total

  def usage(self) -> list[int]:
    """Bytes in use while each instruction runs."""
    return [self.in_use(i) for i in range(len(self.parts))]


def read_arena(lowered: jax.stages.Lowered) -> Arena:
  """Compiles for the CPU and reads how XLA laid its temporary arrays out."""
  with tempfile.TemporaryDirectory() as folder:
    lowered.compile({'xla_dump_to': folder, 'xla_dump_hlo_as_text': True})

    def read(ending):
      (path,) = pathlib.Path(folder).glob(f'*cpu_after_optimizations{ending}')
      return path.read_text()

    return parse(read('.txt'), read('-live-range.txt'), read('-buffer-assignment.txt'))


def parse(program: str, live_ranges: str, assignment: str) -> Arena:
  """An arena from XLA's own text: the program, the life of its arrays, and their places."""
  order = re.findall(r'^ {4}\d+:(\S+)$', live_ranges, re.M)
  lives = {
    name.removesuffix('{}'): (int(start), int(end))
    for name, start, end in re.findall(r'^ {4}(\S+):(\d+)-(\d+)$', live_ranges, re.M)
  }
  found = re.search(
    r'^allocation \d+: size (\d+),.* preallocated-temp:\n((?: value: .*\n)*)', assignment, re.M
  )
  size, places = found.groups() if found else ('0', '')  # a small program may need no arena
  origins = _origins(program)
  buffers = []
  for name, length, offset in re.findall(r'<\d+ (\S+) @\d+> \(size=(\d+),offset=(\d+)\)', places):
    name = name.removesuffix('{}')
    if name in lives:
      origin = origins.get(name.partition('{')[0], '')
      buffers.append(Buffer(*_part(origin), int(length), int(offset), *lives[name]))
  parts = itertools.accumulate(
    (_part(origins.get(name, ''))[0] for name in order), lambda before, part: part or before
  )
  return Arena(int(size), tuple(buffers), tuple(parts))


def _origins(program: str) -> dict[str, str]:
  """{instruction: the path in the network that it comes from}, as XLA kept it.

  What has no path of its own has that of the last instruction fused into it, or of its operand.
  """
  inside, origins = {}, {}
  computation = ''
  for line in program.splitlines():
    if head := re.match(r'(?:ENTRY )?%?([\w.\-]+) \(.*\{$', line):
      computation = head[1]
    elif made := re.match(r'  (?:ROOT )?%?([\w.\-]+) = .*? [\w\-]+\((?:%?([\w.\-]+))?', line):
      name, operand = made.groups()
      path = re.search(r'op_name="([^"]*)"', line)
      called = re.search(r'calls=%?([\w.\-]+)', line)
      if path:
        origins[name] = inside[computation] = path[1]
      elif called and called[1] in inside:
        origins[name] = inside[called[1]]
      elif operand in origins:
        origins[name] = origins[operand]
  return origins


def _part(path: str) -> tuple[str, str]:
  """('stage1_block2', 'conv1/bn/sub') of 'jit(step)/jvp(ResNet)/stage1_block2/conv1/bn/sub'."""
  found = _PART.search(re.sub(r'jit\(\w+\)/', '', path))
  return found.groups() if found else ('', path.rpartition('/')[2])


def kept(arena: Arena) -> list[Buffer]:
  """What is live when most of the arena is in use."""
  usage = arena.usage()
  return arena.live(usage.index(max(usage)))


def by_stage(buffers: list[Buffer]) -> dict[str, int]:
  """Bytes of the arrays that each stage computes; 'other': of none."""
  sizes = collections.Counter()
  for b in buffers:
    sizes[b.part.partition('_')[0] or 'other'] += b.size
  return {name: sizes[name] for name in sorted(sizes, key=_position)}


def by_operation(buffers: list[Buffer], part: str) -> dict[str, float]:
  """{layer: operation: size} of what a block keeps, in units of w H W B floats, from 0.01 up."""
  sizes = {}
  for b in buffers:
    if b.part == part and b.size >= 0.01 * _UNIT:
      *layer, operation = b.what.split('/')
      layer = '/'.join(name for name in layer if name not in ('conv', 'bn'))
      name = f'{layer}: {_WORDS.get(operation, operation)}' if layer else 'output'
      sizes[name] = sizes.get(name, 0) + b.size / _UNIT
  return dict(sorted(sizes.items()))


def peak_by_part(arena: Arena) -> dict[str, int]:
  """The most bytes in use while each block's instructions run, in the order of the network."""
  peaks = {}
  for part, used in zip(arena.parts, arena.usage(), strict=True):
    peaks[part] = max(used, peaks.get(part, 0))
  return {name: peaks[name] for name in sorted(peaks, key=_position) if name}


def _position(part: str) -> tuple:
  """Sorts parts in the order of the network."""
  ends = ('stem', '', 'head', 'other')
  return ends.index(part if part in ends else ''), part


def compare(title: str, columns: dict[str, dict[str, float]], form: str, total: bool) -> str:
  """A table of {network: {row: value}} with the second network's ratio to the first."""
  names = list(columns)
  rows = list(dict.fromkeys(itertools.chain.from_iterable(columns.values())))
  if total:
    rows.append('sum')
    columns = {name: {**values, 'sum': sum(values.values())} for name, values in columns.items()}
  cells = []
  for row in rows:
    first, second = (columns[name].get(row, 0) for name in names)
    ratio = f'{second / first:.3f}' if first else ''
    shown = {names[0]: form.format(first), names[1]: form.format(second)}
    cells.append({'': row} | shown | {'ratio': ratio})
  return f'{title}\n\n{tables.text(cells)}\n'


def draw(path: str, stages: dict[str, dict[str, int]], parts: dict[str, dict[str, int]]) -> None:
  """Bars of what each stage keeps in training, and lines of the peaks of inference by block."""
  from matplotlib import figure

  fig = figure.Figure(figsize=(12, 4.2), dpi=150, layout='constrained', facecolor='white')
  left, right = fig.subplots(1, 2, width_ratios=(1.2, 1.3))
  plots.style(left, 'training: live at the peak, by the stage that computes it (MiB)')
  plots.style(right, 'inference: most in use while a block runs (MiB)')
  for i, (name, values) in enumerate(stages.items()):
    heights = [size / memory.MIB for size in values.values()]
    places = [k + 0.42 * i - 0.21 for k in range(len(heights))]
    bars = left.bar(places, heights, width=0.4, color=plots.COLOURS[i], label=name)
    left.bar_label(bars, fmt='{:,.0f}', fontsize=6.5, padding=2, color=plots.COLOURS[i])
    left.set_xticks(range(len(values)), list(values))
  for i, (name, values) in enumerate(parts.items()):
    heights = [size / memory.MIB for size in values.values()]
    line = ('-', '--')[i]  # the second one lies on the first
    right.plot(heights, line, color=plots.COLOURS[i], marker='o', markersize=3.5, label=name)
    short = [part.removeprefix('stage').replace('_block', '.') for part in values]
    right.set_xticks(range(len(values)), short)
  right.set_xlabel('stage.block', fontsize=9, color='#333333')
  right.set_ylim(bottom=0)
  for axes in (left, right):
    axes.legend(frameon=False, fontsize=8)
  title = "Where a step's memory goes: batch 64 of 224 pixels, float32, XLA on the CPU"
  fig.suptitle(title, fontsize=11, fontweight='bold')
  fig.savefig(path)


def main(_) -> None:
  jax.config.update('jax_enable_compilation_cache', False)  # what is cached writes nothing down
  device = jax.devices('cpu')[0]
  training, inference = {}, {}
  for name in _NETWORKS:
    plan = common.imagenet_plan(name)
    print(f'{name}: compiling the training and the inference step', flush=True)
    training[name] = kept(read_arena(common.train_program(plan, device).lower()))
    inference[name] = read_arena(common.eval_program(plan, device).lower())
  operations = {name: by_operation(buffers, _BLOCK) for name, buffers in training.items()}
  stages = {name: by_stage(buffers) for name, buffers in training.items()}
  parts = {name: peak_by_part(arena) for name, arena in inference.items()}
  live = {
    name: [b for b in kept(arena) if b.size >= memory.MIB] for name, arena in inference.items()
  }

  print()
  print(
    compare(
      f'Training: what {_BLOCK} keeps, in units of w H W B floats', operations, '{:.2f}', True
    )
  )
  print(
    compare(
      'Training: live at the peak, by the stage that computes it, MiB',
      _mib(stages),
      '{:,.0f}',
      True,
    )
  )
  print(compare('Inference: most in use while a block runs, MiB', _mib(parts), '{:,.0f}', False))
  for name, buffers in live.items():
    rows = [{'': f'{b.part} {b.what}', 'MiB': f'{b.size / memory.MIB:,.0f}'} for b in buffers]
    print(f'Inference: live at the peak of {name}\n\n{tables.text(rows)}\n')
  if plots.PLOT.value:
    draw(plots.PLOT.value, stages, parts)
  if common.JSON.value:
    common.write_json(
      common.JSON.value,
      batch_size=64,
      image_size=224,
      training_kept_by_block={_BLOCK: operations},
      training_live_mib=_mib(stages),
      inference_peak_mib=_mib(parts),
      inference_live={name: [dataclasses.asdict(b) for b in bs] for name, bs in live.items()},
    )


def _mib(sizes: dict[str, dict[str, int]]) -> dict[str, dict[str, float]]:
  return {
    name: {row: round(size / memory.MIB, 1) for row, size in values.items()}
    for name, values in sizes.items()
  }


if __name__ == '__main__':
  commands.run(main)
