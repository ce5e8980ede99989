r"""AFI-ResNet-20 on the handwritten digits that scikit-learn carries: the quickstart.

Not a network of the paper: 1,797 real pictures, no download. Expect 99% top-1 on the held-out fifth
after a minute on two CPU cores.
Variants: `:b`, `:stages=1+2`, one of `:se`, `:ge`, `:cbam`, `:eca` (an attention on AFI's result),
`:smoke` (four steps on fake pictures), joined by commas.

    python -m afi_flax.main --config configs/digits_afi_resnet20.py \
      --workdir runs/digits_afi_resnet20
"""

from configs import common


def get_config(arg: str = ''):
  config = common.base()
  config.model.name = 'afi_resnet20'
  config.data.dataset = 'digits'
  config.data.image_size = 16
  config.data.augment = 'pad_crop'
  config.batch_size = 32
  config.epochs = 20.0
  config.schedule.name = 'cosine'
  config.schedule.base_lr = 0.05
  config.schedule.base_batch_size = 32
  config.schedule.warmup_epochs = 1.0
  config.optimizer.weight_decay = 5e-4
  config.run.log_every_steps = 45  # an epoch
  config.run.eval_every_epochs = 2.0
  return common.variant(config, arg)
