r"""ResNet-50, trained before, fine-tuned on a folder of your own pictures.

The folder has `train/` and `val/`, each with one folder of pictures a class:

    python -m afi_flax.main --config configs/finetune_image_folder.py \
      --config.data.data_dir=FOLDER --config.run.init_from=RUN --workdir runs/mine

or only class folders, of which a part is then held out:

    python -m afi_flax.main --config configs/finetune_image_folder.py \
      --config.data.data_dir=FOLDER --config.data.train_split='train[:80%]' \
      --config.data.eval_split='train[80%:]' --config.run.init_from=RUN --workdir runs/mine

RUN is what it starts from, and `--config.model.name=afi_resnet50` another network than ResNet-50.
Earlier blocks learn more slowly, each at 0.9 times the rate of the next one
(`--config.optimizer.layer_decay`), and `--config.optimizer.frozen=stem` keeps a part as it is;
repeat it for several: stem, stage1, ...

What to expect: from weights trained on ImageNet, some tens of pictures a class do for classes that
are easy to tell apart. Many pictures want a larger `--config.batch_size` (the learning rate
follows) and fewer `--config.epochs`.
Variants: `:head` (only the classifier learns: for very few pictures, or a first look; of weights of
the same network, since what a plain one lacks of an AFI network would not learn either), one of
`:se`, `:ge`, `:cbam`, `:eca` (an attention on every block), `:smoke` (four steps on fake pictures),
joined by commas.
"""

from configs import common


def get_config(arg: str = ''):
  config = common.imagenet('resnet50')
  config.data.dataset = 'image_folder'
  config.data.eval_split = 'val'
  config.batch_size = 16  # so that a small folder makes many steps
  config.epochs = 20.0
  config.loss.label_smoothing = 0.1
  config.schedule.name = 'cosine'
  config.schedule.base_lr = 0.01
  config.schedule.base_batch_size = 64
  config.schedule.boundaries = ()
  config.schedule.warmup_epochs = 1.0
  config.optimizer.nesterov = True
  config.optimizer.layer_decay = 0.9
  config.run.log_every_steps = 10
  return common.variant(config, arg, {'head': _head_only})


def _head_only(config):
  config.optimizer.layer_decay = 1.0
  config.optimizer.frozen = ('body',)
