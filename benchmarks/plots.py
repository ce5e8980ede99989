"""What the benchmarks that draw share: the flag, the colours, the looks."""

from absl import flags

PLOT = flags.DEFINE_string('plot', '', 'Where to draw the figures: a PNG file.')

COLOURS = ('#4C78A8', '#E4572E', '#54A24B', '#B279A2')  # as in the learning curves
_GREY = '#8A8F98'


def style(axes, title: str) -> None:
  """The looks of the learning curves."""
  axes.set_title(title, loc='left', fontsize=10, color='#333333')
  axes.tick_params(labelsize=8, color=_GREY, labelcolor='#333333')
  axes.spines[['top', 'right']].set_visible(False)
  axes.spines[['left', 'bottom']].set_color(_GREY)
  axes.grid(axis='y', color='#EAECEF', linewidth=0.8)
  axes.set_axisbelow(True)
