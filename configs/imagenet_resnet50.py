r"""ResNet-50 on ImageNet: the plain network of Table 5.

Expect 75.3% top-1, 92.2% top-5 (paper), 25,557,032 parameters; `:se` (SE-ResNet-50,
Squeeze-and-Excitation on every block) 76.71%, 93.38%, 28,071,976 parameters.
The paper's recipe has batch 64, which these figures are of; the learning rate follows
`--config.batch_size`, and a large one wants a warm-up.
The command below is sized for a TPU v5e 2x4 (8 chips): 4.8 of 16 GiB a chip (`:se` 4.9) and, at
best, 1.9 hours (`:se` 2.1): the step's memory traffic at full bandwidth, from `python -m
afi_flax.fit`, not measured. That is 17,000 pictures/s: some 28 cores decode as many, at 616 a
CPU-second.
`:a3` is another recipe, A3 of "ResNet strikes back": 100 epochs on 160 pixels at batch 2,048,
with LAMB, binary cross-entropy, RandAugment, mixup and cutmix; not yet trained here. On the same
slice 4.6 GiB (`:a3,se` 4.8) and, at best, 1.1 hours (`:a3,se` 1.3). Its authors' plain ResNet-50
reaches 78.1% top-1.
Variants: `:a3`, `:se`, `:smoke` (four steps on fake pictures of 64 pixels), joined by commas.

    python -m afi_flax.prepare --dataset imagenet2012 --archives FOLDER
    python -m afi_flax.main --config configs/imagenet_resnet50.py \
      --workdir runs/imagenet_resnet50 \
      --config.model.dtype=bfloat16 --config.batch_size=1024 \
      --config.schedule.warmup_epochs=5.0 --config.run.workers=32
"""

from configs import common


def get_config(arg: str = ''):
  return common.variant(common.imagenet('resnet50'), arg)
