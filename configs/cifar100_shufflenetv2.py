r"""ShuffleNetV2 1x on CIFAR-100: the plain network of Table 4.

Expect 70.71% top-1 (paper), 1,356,104 parameters (the paper prints 0.94M).
Variants: `:se` (Squeeze-and-Excitation on every block), `:smoke` (four steps on fake pictures).

    python -m afi_flax.prepare --dataset cifar100
    python -m afi_flax.main --config configs/cifar100_shufflenetv2.py \
      --workdir runs/cifar100_shufflenetv2
"""

from configs import common


def get_config(arg: str = ''):
  return common.variant(common.cifar('cifar100', 'shufflenetv2_x1_0_cifar'), arg)
