r"""AFI-ResNet-32 on CIFAR-10, with the recipe of CIFAR-100.

The paper has no CIFAR-10 row. Expect about 92.5% top-1, what a plain ResNet-32 is known for.
Variants: `:b`, `:stages=1+2`, one of `:se`, `:ge`, `:cbam`, `:eca` (an attention on AFI's result),
`:smoke` (four steps on fake pictures), joined by commas.

    python -m afi_flax.prepare --dataset cifar10
    python -m afi_flax.main --config configs/cifar10_afi_resnet32.py \
      --workdir runs/cifar10_afi_resnet32
"""

from configs import common


def get_config(arg: str = ''):
  return common.variant(common.cifar('cifar10', 'afi_resnet32'), arg)
