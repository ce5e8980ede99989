r"""AFI-MobileNetV2 on CIFAR-100: Table 4 and, with an attention, Table 2.

Expect 75.94% top-1 (paper), 2,248,868 parameters; `:b` (AFI-B) 77.08%, 2,835,428 parameters;
with an attention on AFI's result: `:se` 76.15%, 2,343,908 parameters; `:ge` 76.22%, 2,248,868;
`:cbam` 76.51%, 2,344,888; `:eca` 76.76%, 2,248,912.
Variants: `:b`, `:stages=2+3` (some of 2 to 6: stages 1 and 7 have one block, so nothing to reuse),
one of `:se`, `:ge`, `:cbam`, `:eca`, `:smoke` (four steps on fake pictures), joined by commas.

    python -m afi_flax.prepare --dataset cifar100
    python -m afi_flax.main --config configs/cifar100_afi_mobilenetv2.py \
      --workdir runs/cifar100_afi_mobilenetv2
"""

from configs import common


def get_config(arg: str = ''):
  return common.variant(common.cifar('cifar100', 'afi_mobilenetv2_cifar'), arg)
