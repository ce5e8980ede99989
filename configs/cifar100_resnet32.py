r"""ResNet-32 on CIFAR-100: the plain network of Table 4.

Expect 71.16% top-1 (paper), 472,756 parameters.
Variants: `:se` (Squeeze-and-Excitation on every block), `:smoke` (four steps on fake pictures).

    python -m afi_flax.prepare --dataset cifar100
    python -m afi_flax.main --config configs/cifar100_resnet32.py \
      --workdir runs/cifar100_resnet32
"""

from configs import common


def get_config(arg: str = ''):
  return common.variant(common.cifar('cifar100', 'resnet32'), arg)
