r"""ResNet-152 on ImageNet: the plain network of Table 5.

Expect 77.0% top-1, 93.3% top-5 (paper), 60,192,808 parameters; `:se` (SE-ResNet-152,
Squeeze-and-Excitation on every block) 78.43%, 94.27%, 66,770,984 parameters.
The paper's recipe has batch 64, which these figures are of; the learning rate follows
`--config.batch_size`, and a large one wants a warm-up.
The command below is sized for a TPU v5e 2x4 (8 chips): 9.7 of 16 GiB a chip (`:se` 9.9) and, at
best, 4.6 hours (`:se` 5.1): the step's memory traffic at full bandwidth, from `python -m
afi_flax.fit`, not measured. That is 7,000 pictures/s: some 12 cores decode as many, at 616 a
CPU-second.
`:a3` is another recipe, A3 of "ResNet strikes back": 100 epochs on 160 pixels at batch 2,048,
with LAMB, binary cross-entropy, RandAugment, mixup and cutmix; not yet trained here. On the same
slice 9.8 GiB (`:a3,se` 10.2) and, at best, 2.6 hours (`:a3,se` 3.1). Its authors trained
ResNet-50 only; no accuracy is published for this network.
Variants: `:a3`, `:se`, `:smoke` (four steps on fake pictures of 64 pixels), joined by commas.

    python -m afi_flax.prepare --dataset imagenet2012 --archives FOLDER
    python -m afi_flax.main --config configs/imagenet_resnet152.py \
      --workdir runs/imagenet_resnet152 \
      --config.model.dtype=bfloat16 --config.batch_size=1024 \
      --config.schedule.warmup_epochs=5.0 --config.run.workers=16
"""

from configs import common


def get_config(arg: str = ''):
  return common.variant(common.imagenet('resnet152'), arg)
