r"""MobileNetV2 on CIFAR-100: the plain network of Table 4.

Expect 75.20% top-1 (paper), 2,412,212 parameters.
Variants: `:se` (Squeeze-and-Excitation on every block), `:smoke` (four steps on fake pictures).

    python -m afi_flax.prepare --dataset cifar100
    python -m afi_flax.main --config configs/cifar100_mobilenetv2.py \
      --workdir runs/cifar100_mobilenetv2
"""

from configs import common


def get_config(arg: str = ''):
  return common.variant(common.cifar('cifar100', 'mobilenetv2_cifar'), arg)
