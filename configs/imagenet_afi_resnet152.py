r"""AFI-ResNet-152 on ImageNet: Table 5.

Expect 78.24% top-1, 93.98% top-5 (paper), 54,667,560 parameters; the paper has no AFI-B row.
The paper's recipe has batch 64, which these figures are of; the learning rate follows
`--config.batch_size`, and a large one wants a warm-up.
The command below is sized for a TPU v5e 2x4 (8 chips): 10.2 of 16 GiB a chip and, at best, 4.7
hours: the step's memory traffic at full bandwidth, from `python -m afi_flax.fit`, not measured.
That is 6,800 pictures/s: some 11 cores decode as many, at 616 a CPU-second.
`:a3` is another recipe, A3 of "ResNet strikes back": 100 epochs on 160 pixels at batch 2,048,
with LAMB, binary cross-entropy, RandAugment, mixup and cutmix; not yet trained here. On the same
slice 10.8 GiB and, at best, 2.9 hours. No accuracy is published for this network.
Variants: `:a3`, `:b`, `:stages=1+2`, one of `:se`, `:ge`, `:cbam`, `:eca` (an attention on AFI's
result), `:smoke` (four steps on fake pictures of 64 pixels), joined by commas.

    python -m afi_flax.prepare --dataset imagenet2012 --archives FOLDER
    python -m afi_flax.main --config configs/imagenet_afi_resnet152.py \
      --workdir runs/imagenet_afi_resnet152 \
      --config.model.dtype=bfloat16 --config.batch_size=1024 \
      --config.schedule.warmup_epochs=5.0 --config.run.workers=16
"""

from configs import common


def get_config(arg: str = ''):
  return common.variant(common.imagenet('afi_resnet152'), arg)
