r"""AFI-ResNet-18 on a folder of your own pictures, from scratch.

The folder has `train/` and `val/`, each with one folder of pictures a class; or only class folders,
of which a part is then held out by `--config.data.train_split='train[:80%]'` and
`--config.data.eval_split='train[80%:]'`. Any network: `--config.model.name=afi_resnet50`. What to
expect depends on the pictures: tens of thousands are needed to do well from scratch.
Variants: `:b`, `:stages=1+2`, one of `:se`, `:ge`, `:cbam`, `:eca` (an attention on AFI's result),
`:smoke` (four steps on fake pictures), joined by commas.

    python -m afi_flax.main --config configs/image_folder.py \
      --config.data.data_dir=FOLDER --workdir runs/mine
"""

from configs import common


def get_config(arg: str = ''):
  config = common.imagenet('afi_resnet18')
  config.data.dataset = 'image_folder'
  config.data.eval_split = 'val'
  config.run.log_every_steps = 10
  return common.variant(config, arg)
