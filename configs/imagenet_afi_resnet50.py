r"""AFI-ResNet-50 on ImageNet: Table 5.

Expect 76.19% top-1, 92.88% top-5 (paper), 23,849,256 parameters; `:b` (AFI-B) 77.02%, 93.55%,
33,854,504 parameters.
The paper's recipe has batch 64, which these figures are of; the learning rate follows
`--config.batch_size`, and a large one wants a warm-up.
The command below is sized for a TPU v5e 2x4 (8 chips): 5.2 of 16 GiB a chip (`:b` 5.4) and, at
best, 2.1 hours (`:b` 2.2): the step's memory traffic at full bandwidth, from `python -m
afi_flax.fit`, not measured. That is 15,000 pictures/s: some 25 cores decode as many, at 616 a
CPU-second.
`:a3` is another recipe, A3 of "ResNet strikes back": 100 epochs on 160 pixels at batch 2,048,
with LAMB, binary cross-entropy, RandAugment, mixup and cutmix; not yet trained here. On the same
slice 5.4 GiB (`:a3,b` 5.7) and, at best, 1.2 hours (`:a3,b` 1.3). Its authors' plain ResNet-50
reaches 78.1% top-1; of this network no accuracy with it is published.
Variants: `:a3`, `:b`, `:stages=1+2`, one of `:se`, `:ge`, `:cbam`, `:eca` (an attention on AFI's
result), `:smoke` (four steps on fake pictures of 64 pixels), joined by commas.

    python -m afi_flax.prepare --dataset imagenet2012 --archives FOLDER
    python -m afi_flax.main --config configs/imagenet_afi_resnet50.py \
      --workdir runs/imagenet_afi_resnet50 \
      --config.model.dtype=bfloat16 --config.batch_size=1024 \
      --config.schedule.warmup_epochs=5.0 --config.run.workers=32
"""

from configs import common


def get_config(arg: str = ''):
  return common.variant(common.imagenet('afi_resnet50'), arg)
