r"""AFI-ResNet-32 on CIFAR-100: Table 4 and, with one stage, Table 1.

Expect 71.09% top-1 (paper), 378,228 parameters; `:b` (AFI-B) 72.57%, 668,980 parameters;
`:stages=1`, `:stages=2`, `:stages=3` (AFI in one stage only) 71.38%, 70.63%, 70.75%, and 468,212,
454,708, 400,820 parameters.
Variants: `:b`, `:stages=1+2`, one of `:se`, `:ge`, `:cbam`, `:eca` (an attention on AFI's result),
`:smoke` (four steps on fake pictures), joined by commas.

    python -m afi_flax.prepare --dataset cifar100
    python -m afi_flax.main --config configs/cifar100_afi_resnet32.py \
      --workdir runs/cifar100_afi_resnet32
"""

from configs import common


def get_config(arg: str = ''):
  return common.variant(common.cifar('cifar100', 'afi_resnet32'), arg)
