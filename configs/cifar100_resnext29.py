r"""ResNeXt-29 (32x4d) on CIFAR-100: the plain network of Table 4.

Expect 78.44% top-1 (paper), 4,866,468 parameters.
Variants: `:se` (Squeeze-and-Excitation on every block), `:smoke` (four steps on fake pictures).

    python -m afi_flax.prepare --dataset cifar100
    python -m afi_flax.main --config configs/cifar100_resnext29.py \
      --workdir runs/cifar100_resnext29
"""

from configs import common


def get_config(arg: str = ''):
  return common.variant(common.cifar('cifar100', 'resnext29_32x4d'), arg)
