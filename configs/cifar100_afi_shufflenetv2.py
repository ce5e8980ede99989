r"""AFI-ShuffleNetV2 1x on CIFAR-100: Table 4.

Expect 72.06% top-1 (paper), 1,254,314 parameters (the paper prints 0.95M); `:b` (AFI-B) 72.24%,
1,403,142 parameters (the paper prints 1.29M).
Variants: `:b`, `:stages=1+2`, one of `:se`, `:ge`, `:cbam`, `:eca` (an attention on AFI's result),
`:smoke` (four steps on fake pictures), joined by commas.

    python -m afi_flax.prepare --dataset cifar100
    python -m afi_flax.main --config configs/cifar100_afi_shufflenetv2.py \
      --workdir runs/cifar100_afi_shufflenetv2
"""

from configs import common


def get_config(arg: str = ''):
  return common.variant(common.cifar('cifar100', 'afi_shufflenetv2_x1_0_cifar'), arg)
