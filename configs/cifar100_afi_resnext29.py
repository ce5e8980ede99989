r"""AFI-ResNeXt-29 (32x4d) on CIFAR-100: Table 4.

Expect 79.37% top-1 (paper), 4,262,564 parameters; `:b` (AFI-B) 79.85%, 5,232,036 parameters.
Variants: `:b`, `:stages=1+2`, one of `:se`, `:ge`, `:cbam`, `:eca` (an attention on AFI's result),
`:smoke` (four steps on fake pictures), joined by commas.

    python -m afi_flax.prepare --dataset cifar100
    python -m afi_flax.main --config configs/cifar100_afi_resnext29.py \
      --workdir runs/cifar100_afi_resnext29
"""

from configs import common


def get_config(arg: str = ''):
  return common.variant(common.cifar('cifar100', 'afi_resnext29_32x4d'), arg)
