r"""Weights of torchvision, timm or an export of ours, as a run's folder, without training.

  python -m afi_flax.import_weights --weights resnet50.pth --model resnet50
  python -m afi_flax.import_weights --weights resnet50.pth --model resnet50 --workdir runs/theirs
  python -m afi_flax.main --mode=eval --workdir runs/theirs

--weights is a .safetensors, or a .pth, which needs `pip install -e '.[torch]'`. Without --workdir
only the report is printed: what is taken, what of the network is initialised anew, what of the
file is left. With it, the folder holds the network as step 0: it can be evaluated, used for
predictions and trained as any other. --model alone means ImageNet: its classes, 224 pixels cut from
a short side of 256. Another data set, size or normalisation is a config's; where the data have
another number of classes, the classifier is new:

  python -m afi_flax.import_weights --weights model.safetensors --workdir runs/theirs \
    --config configs/imagenet_resnet50.py --config.data.data_dir=FOLDER

A .safetensors that `afi_flax.export --format safetensors` wrote says which network it holds, and
needs neither where its data need no folder (CIFAR, ImageNet).
"""

from absl import flags
from ml_collections import config_flags

from afi_flax import checkpoint, commands, start
from afi_flax.errors import UserError
from afi_flax.interop import importing, weights
from afi_flax.interop.transfer import transfer

_WEIGHTS = flags.DEFINE_string('weights', None, 'The file: .safetensors, or .pth of PyTorch.')
_MODEL = flags.DEFINE_string('model', None, 'The network, such as resnet50 or afi_resnet50.')
_CLASSES = flags.DEFINE_integer(
  'num_classes', 0, "Of the network, without --workdir; 0: the file's.", lower_bound=0
)
_CONFIG = config_flags.DEFINE_config_file('config', None, "The run's; it names the network, too.")
_WORKDIR = flags.DEFINE_string('workdir', None, "The run's folder, a new one.")


def main(_) -> None:
  if not _WEIGHTS.value:
    raise UserError('no --weights; give a file, such as --weights resnet50.safetensors')
  if _MODEL.value and _CONFIG.value:
    raise UserError('give one of --model and --config; --config.model.name=NAME sets the network')
  if _CONFIG.value and not _WORKDIR.value:
    raise UserError('--config is for a --workdir; --model NAME prints the report')
  if _CLASSES.value and _WORKDIR.value:
    raise UserError('--num_classes goes without --workdir, where the classes are those of the data')
  config = _CONFIG.value
  if config is None:
    source = weights.read(_WEIGHTS.value, _MODEL.value)
    if not _WORKDIR.value:
      print(transfer(source, importing.target(source, _MODEL.value, _CLASSES.value))[1])
      return
    config = importing.config(source, _MODEL.value)
  checkpoint.quiet_orbax()
  config.run.init_from = _WEIGHTS.value
  print(start.save_start(config, _WORKDIR.value))
  print(
    f'{_WORKDIR.value} holds it as step 0; evaluate it by '
    f'python -m afi_flax.main --mode=eval --workdir {_WORKDIR.value}'
  )


if __name__ == '__main__':
  commands.run(main)
