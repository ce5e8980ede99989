"""What the configs share: every key with its meaning, and the paper's two recipes."""

import ml_collections

from afi_flax.config import parse_variant

CIFAR_STATISTICS = {
  'cifar10': ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
  'cifar100': ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
ATTENTIONS = ('se', 'ge', 'cbam', 'eca')  # on AFI's result, or on a plain block's output


def base() -> ml_collections.ConfigDict:
  """All keys there are. Each config sets what its experiment is about."""
  config = ml_collections.ConfigDict()
  config.seed = 0  # of the weights, the order of examples and all draws

  config.model = ml_collections.ConfigDict()
  config.model.name = ''  # one of afi_flax.models.list_models()
  config.model.stages = ()  # the stages that carry AFI, from 1; (): all
  config.model.dtype = 'float32'  # of the computation; bfloat16 on TPUs and GPUs
  config.model.se_bias = False  # biases in Squeeze-and-Excitation, as timm's networks have them
  config.model.remat = 'none'  # or fusion, block: less memory in training, more computation
  config.model.drop_path = 0.0  # stochastic depth: of the last block, rising linearly from 0

  config.batch_norm = ml_collections.ConfigDict()
  config.batch_norm.scope = 'global'  # statistics of the whole batch, of a 'device', of '4' devices

  config.data = ml_collections.ConfigDict()
  config.data.dataset = ''  # digits, cifar10, cifar100, imagenet2012, image_folder, fake_...
  config.data.eval_dataset = ''  # '': dataset; or imagenet_v2, imagenet2012_real, image_folder, ...
  config.data.data_dir = ''  # where its files are; '': TFDS's own default
  config.data.train_split = 'train'  # a part of it, for a hold-out: train[:98%]
  config.data.eval_split = 'test'  # what is evaluated: test, validation, train[98%:]
  config.data.image_size = 32  # pixels
  config.data.eval_image_size = 0  # pixels of the pictures that are evaluated; 0: image_size
  config.data.eval_resize = 0  # of the short side before the centre crop; 0: eval_image_size
  config.data.augment = 'none'  # none, pad_crop, pad_crop_flip, random_resized_crop_flip
  config.data.antialias = True  # of random_resized_crop_flip; False: faster, training only
  config.data.auto_augment = ''  # RandAugment as timm writes it: rand-m6-mstd0.5-inc1
  config.data.color_jitter = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue (0.5)
  config.data.lighting = 0.0  # deviation of PCA lighting; 0.1 in AlexNet
  config.data.mixup = 0.0  # alpha; 0: off; of both mixup and cutmix each batch gets one
  config.data.cutmix = 0.0  # alpha; 0: off
  config.data.erasing = 0.0  # probability that a rectangle of a picture is erased
  config.data.mean = (0.5, 0.5, 0.5)  # of the channels, in 0..1
  config.data.std = (0.25, 0.25, 0.25)  # likewise
  config.data.on_device = False  # True: a set that fits is kept on the devices and augmented there
  config.data.max_unreadable = 100  # pictures that may fail to decode before the run ends

  config.batch_size = 64  # over all devices and processes
  config.micro_batches = 1  # a batch is computed in so many parts, one after another: less memory
  config.eval_batch_size = 256  # any number: the last batch is padded and masked
  config.epochs = 1.0  # passes over the training split, which need not be whole
  config.ema_decay = 0.0  # of a mean of weights and statistics, which is evaluated; 0: off

  config.loss = ml_collections.ConfigDict()
  config.loss.name = 'cross_entropy'  # or bce: binary cross-entropy for each class, averaged
  config.loss.label_smoothing = 0.0  # of the target, spread evenly over all classes
  config.loss.target_threshold = 0.0  # of bce: mixed targets above it become 1, others 0; 0: off

  config.schedule = ml_collections.ConfigDict()
  config.schedule.name = 'step'  # step, cosine
  config.schedule.base_lr = 0.1  # at base_batch_size; grows in proportion to batch_size
  config.schedule.base_batch_size = 64  # which base_lr is for
  config.schedule.boundaries = ()  # where a step schedule drops, as fractions of the run
  config.schedule.factor = 0.1  # what it multiplies the rate by at each
  config.schedule.warmup_epochs = 0.0  # linear, from 0

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.name = 'sgd'  # sgd, lars, adamw, lamb
  config.optimizer.momentum = 0.9  # of adamw and lamb the first beta; the second is 0.999
  config.optimizer.nesterov = False  # of sgd: looks ahead by the momentum
  config.optimizer.weight_decay = 1e-4  # sgd, lars: added to the gradient; else to the update
  config.optimizer.decay_vectors = True  # on biases and scales too
  config.optimizer.clip_norm = 0.0  # of the gradient, before the decay is added; 0: off
  config.optimizer.layer_decay = 1.0  # the rate of a block n blocks below the head is times this^n
  # Parts that do not train: 'stem', 'stage1', ...; 'body': all but the head. Nothing of them moves:
  # not their weights, by decay or else, and not their batch norms' running statistics, which these
  # use in training too; no branch of theirs is dropped.
  config.optimizer.frozen = ()

  # What may differ when a run is resumed, since its result does not depend on it where all is
  # well; but for init_from.
  config.run = ml_collections.ConfigDict()
  config.run.resume = ''  # another run's folder to go on from, when this one's is new
  # Whose weights are where this one starts: another run's folder, or a file of timm, torchvision or
  # ours (.safetensors; .pth with PyTorch). A plain network's can start one with AFI.
  config.run.init_from = ''
  config.run.workers = 0  # processes that decode pictures; 0: threads
  config.run.max_steps = 0  # ends early, with the schedule of the whole run; 0: off
  config.run.log_every_steps = 100  # the means since the last line
  config.run.eval_every_epochs = 1.0  # any number above 0; and at the end
  config.run.save_every_steps = 1000  # besides, at every evaluation and stop
  config.run.keep = 2  # newest checkpoints; the best is kept besides
  config.run.on_nonfinite = 'raise'  # or skip the batch; or rollback to a checkpoint and past it
  config.run.max_nonfinite = 10  # batches that may be skipped, or rolled back from
  config.run.deterministic = False  # True: a GPU, too, repeats a run to the bit; it is slower
  config.run.profile_steps = 0  # steps to trace for XProf, from the tenth on
  return config


def cifar(dataset: str, model: str) -> ml_collections.ConfigDict:
  """The paper's CIFAR recipe: batch 64, 300 epochs, 0.1 divided by 10 at 50% and 75%."""
  config = base()
  config.model.name = model
  config.data.dataset = dataset
  config.data.augment = 'pad_crop_flip'
  config.data.mean, config.data.std = CIFAR_STATISTICS[dataset]
  config.epochs = 300.0
  config.schedule.boundaries = (0.5, 0.75)
  return config


def imagenet(model: str) -> ml_collections.ConfigDict:
  """The paper's ImageNet recipe: batch 64, 90 epochs, 0.1 x batch / 256 divided by 10 thrice."""
  config = base()
  config.model.name = model
  config.data.dataset = 'imagenet2012'
  config.data.eval_split = 'validation'
  config.data.image_size = 224
  config.data.eval_resize = 256
  config.data.augment = 'random_resized_crop_flip'
  config.data.mean, config.data.std = IMAGENET_STATISTICS
  config.epochs = 90.0
  config.schedule.base_batch_size = 256
  config.schedule.boundaries = (30 / 90, 60 / 90, 80 / 90)
  return config


def strikes_back(config: ml_collections.ConfigDict) -> None:
  """The recipe A3 of Wightman et al., "ResNet strikes back" (2021), for an ImageNet config.

  100 epochs on 160 pixels, evaluated on 224; their plain ResNet-50 reaches 78.1% top-1. What they
  resized by bicubic interpolation is bilinear here.
  """
  config.data.image_size = 160
  config.data.eval_image_size = 224
  config.data.eval_resize = 235  # 224 / 0.95
  config.data.auto_augment = 'rand-m6-mstd0.5-inc1'
  config.data.mixup = 0.1
  config.data.cutmix = 1.0
  config.loss.name = 'bce'
  config.loss.target_threshold = 0.2  # both classes of a mixed picture become 1
  config.batch_size = 2048
  config.epochs = 100.0
  config.schedule.name = 'cosine'
  config.schedule.base_lr = 0.008
  config.schedule.base_batch_size = 2048
  config.schedule.boundaries = ()
  config.schedule.warmup_epochs = 5.0
  config.optimizer.name = 'lamb'
  config.optimizer.weight_decay = 0.02
  config.optimizer.decay_vectors = False
  config.optimizer.clip_norm = 1.0  # timm's own for LAMB


def variant(
  config: ml_collections.ConfigDict, arg: str, recipes: dict | None = None
) -> ml_collections.ConfigDict:
  """Applies what stands behind the colon.

  AFI networks have `b` (AFI-B), `stages=1+2` (AFI in these only) and one of `se`, `ge`, `cbam` and
  `eca` (an attention on the result of AFI), in any combination: `b,eca,stages=2`. Plain networks
  have one of them on every block's output. On ImageNet, `a3` is another recipe,
  `strikes_back`. `smoke` takes four steps of the same network on fake pictures, to see that all is
  in place.

  Args:
    config: is changed.
    arg: names, joined by commas.
    recipes: more names, and the function that changes the config for each.
  """
  name = config.model.name
  recipes = recipes or {}
  if config.data.dataset == 'imagenet2012':
    recipes = {'a3': strikes_back, **recipes}
  off = dict.fromkeys(recipes, False)
  if name.startswith('afi_'):
    chosen = parse_variant(arg, ATTENTIONS, smoke=False, b=False, stages=(), **off)
    config.model.name = '_'.join([name, *(n for n in ('b', *ATTENTIONS) if chosen[n])])
    config.model.stages = chosen.stages
  else:
    chosen = parse_variant(arg, ATTENTIONS, smoke=False, **off)
    config.model.name = '_'.join([*(n for n in ATTENTIONS if chosen[n]), name])
  for name, change in recipes.items():
    if chosen[name]:
      change(config)
  if chosen.smoke:
    _smoke(config)
  return config


def _smoke(config: ml_collections.ConfigDict) -> None:
  if config.data.eval_resize:
    config.data.dataset = 'fake_imagenet'
    config.data.eval_split = 'validation'
    config.data.image_size, config.data.eval_resize = 64, 72
    config.data.eval_image_size = 68 if config.data.eval_image_size else 0
  else:
    config.data.dataset = 'fake_cifar'
    config.data.eval_split = 'test'
    config.data.image_size = 32
  config.data.train_split = 'train[:64]'
  config.data.eval_split += '[:32]'
  config.batch_size = 16
  config.eval_batch_size = 16
  config.epochs = 1.0
  config.schedule.warmup_epochs = 0.0
  config.optimizer.layer_decay, config.optimizer.frozen = 1.0, ()  # there is nothing to keep
  config.run.log_every_steps = 1
