r"""AFI-ResNet-110 on CIFAR-100: Table 4 and, with one stage, Table 1.

Expect 74.03% top-1 (paper), 1,334,820 parameters; `:b` (AFI-B) 75.69%, 2,570,516 parameters;
`:stages=1`, `:stages=2`, `:stages=3` (AFI in one stage only) 75.03%, 74.13%, 74.02%, and 1,717,252,
1,659,860, 1,430,836 parameters.
Variants: `:b`, `:stages=1+2`, one of `:se`, `:ge`, `:cbam`, `:eca` (an attention on AFI's result),
`:smoke` (four steps on fake pictures), joined by commas.

    python -m afi_flax.prepare --dataset cifar100
    python -m afi_flax.main --config configs/cifar100_afi_resnet110.py \
      --workdir runs/cifar100_afi_resnet110
"""

from configs import common


def get_config(arg: str = ''):
  return common.variant(common.cifar('cifar100', 'afi_resnet110'), arg)
