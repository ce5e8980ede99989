"""The model card of an export: Markdown with a YAML header, in the manner of Hugging Face's.

Source of the header's keys: https://huggingface.co/docs/hub/model-cards.
"""

import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import yaml

from afi_flax import config
from afi_flax.analysis import cost
from afi_flax.interop.network import Network
from afi_flax.models import create_model

Record = dict[str, Any]  # a line of metrics.jsonl
CODE_LICENSE = 'Apache-2.0'
_NOTE = (
  'In training and evaluation pictures were decoded and resized by another library than here; both '
  'smooth where they shrink, and their pixels differ by a level or so of 255 on average.'
)


def text(network: Network, module: ModuleType, checkpoint: str, records: Sequence[Record]) -> str:
  """The whole card.

  Args:
    network: what was exported.
    module: of the format: `NAME`, `ABOUT`, `PACKAGES` and `loading`.
    checkpoint: 'best' is said to be picked by its accuracy.
    records: all that the run's metrics hold.
  """
  step = network.run.step
  found = {r['split']: r for r in records if r['split'] != 'train' and r['step'] == step}
  parts = [
    f'---\n{_header(network, list(found.values()))}---',
    _title(network, module),
    '## Use\n\n```python\n' + _code(network, module) + '```\n\n' + _NOTE,
    '## Accuracy\n\n' + _accuracy(list(found.values()), step, checkpoint == 'best'),
    '## Cost\n\n' + _cost(network),
    '## Data\n\n' + _data(network),
    '## Training\n\n' + _recipe(network),
    '## Versions and licence\n\n' + _versions(module.PACKAGES),
  ]
  return '\n\n'.join(parts) + '\n'


def _header(network: Network, found: Sequence[Record]) -> str:
  plan = network.run.plan
  header = {
    'library_name': 'afi_flax',
    'pipeline_tag': 'image-classification',
    'tags': ['image-classification', 'jax', 'flax', plan.model.name],
    'datasets': [plan.dataset.name],
    'metrics': ['accuracy'],
  }
  results = [
    {
      'task': {'type': 'image-classification'},
      'dataset': {'name': plan.data.eval_dataset, 'type': plan.data.eval_dataset}
      | {'split': record['split']},
      'metrics': [
        {'type': 'accuracy', 'name': f'top-{k} accuracy', 'value': round(record[f'top{k}'], 6)}
        for k in (1, 5)
      ],
    }
    for record in found
  ]
  if results:
    header['model-index'] = [{'name': plan.model.name, 'results': results}]
  return yaml.safe_dump(header, sort_keys=False, allow_unicode=True)


def _title(network: Network, module: ModuleType) -> str:
  run = network.run
  of, picture = run.plan.optim.total_steps, network.input
  takes = (
    'bytes, 0..255; it normalises them itself'
    if network.preprocessing
    else 'float32, `(bytes / 255 - mean) / std`'
  )
  cut = run.preprocessing
  return f"""\
# {run.plan.model.name}, {run.plan.dataset.name}

An image classifier trained by `afi_flax`, at step {run.step:,} of {of:,}.
`{module.NAME}` is {module.ABOUT}.

| | |
| --- | --- |
| input `images` | [b, {', '.join(map(str, picture.shape))}], RGB, {takes} |
| output `logits` | float32 [b, {len(run.class_names)}], in the order of `class_names.json` |
| pictures | short side resized to {cut.resize} pixels (bilinear), {cut.image_size} x \
{cut.image_size} cut from the centre |
| mean, of channels in 0..1 | {_numbers(cut.mean)} |
| standard deviation | {_numbers(cut.std)} |"""


def _code(network: Network, module: ModuleType) -> str:
  """Python that runs in the folder, where a picture is."""
  cut = network.run.preprocessing
  images = 'np.asarray(picture)[None]'
  if not network.preprocessing:
    images = f'(({images} / 255 - {list(cut.mean)}) / {list(cut.std)}).astype(np.float32)'
  return f"""\
import json
import pathlib

import numpy as np
from PIL import Image

picture = Image.open('picture.jpg').convert('RGB')
side = min(picture.size) * {cut.image_size} / {cut.resize}
x, y = ((length - side) / 2 for length in picture.size)
box = (x, y, x + side, y + side)
picture = picture.resize(({cut.image_size}, {cut.image_size}), Image.Resampling.BILINEAR, box)
images = {images}  # [1, {cut.image_size}, {cut.image_size}, 3]

{module.loading(network)}
names = json.loads(pathlib.Path('class_names.json').read_text())
odds = np.exp(logits[0] - logits[0].max())
for k in odds.argsort()[::-1][:5]:
  print(f'{{odds[k] / odds.sum():6.1%}}  {{names[k]}}')
"""


def _accuracy(found: Sequence[Record], step: int, is_best: bool) -> str:
  if not found:
    return (
      f'Not known: the run was not evaluated at step {step:,}. '
      f'`python -m afi_flax.main --mode=eval --workdir=RUN --checkpoint={step}` does it.'
    )
  rows = [
    f'| {r["split"]} | {r["examples"]:,} | {r["top1"]:.2%} | {r["top5"]:.2%} | {r["loss"]:.4f} |'
    for r in found
  ]
  table = '| split | pictures | top-1 | top-5 | loss (nats) |\n| --- | --- | --- | --- | --- |\n'
  note = (
    '\n\nThis checkpoint was chosen from all of its run by its accuracy on these very pictures, '
    'which makes it optimistic.'
  )
  return table + '\n'.join(rows) + (note if is_best else '')


def _cost(network: Network) -> str:
  plan = network.run.plan
  size = network.run.preprocessing.image_size
  whole = cost.total(cost.count(create_model(**vars(plan.model)), size))
  paper = cost.PAPER_PICTURES * whole.paper_flops / 1e9
  return f"""\
| | |
| --- | --- |
| parameters | {whole.parameters:,} |
| multiply-accumulates, one picture of {size} pixels | {whole.macs / 1e6:,.2f} M |
| FLOPs as the AFI paper counts them, {cost.PAPER_PICTURES} pictures | {paper:,.2f} G |"""


def _data(network: Network) -> str:
  plan = network.run.plan
  data, dataset = plan.data, plan.dataset
  other = f' of {data.eval_dataset}' if data.eval_dataset != data.dataset else ''
  return (
    f'{dataset.name}, {len(dataset.class_names):,} classes. Trained on `{data.train_split}`, '
    f'{dataset.num_train:,} pictures; evaluated on `{data.eval_split}`{other}, '
    f'{dataset.num_eval:,} pictures.'
  )


def _recipe(network: Network) -> str:
  rows = [f'| {key} | {value} |' for key, value in _recipe_rows(network) if value]
  return f"""\
| | |
| --- | --- |
{chr(10).join(rows)}

<details><summary>The whole config</summary>

```json
{json.dumps(network.config, indent=1)}
```

</details>"""


def _recipe_rows(network: Network) -> list[tuple[str, str]]:
  """What was done, in words; '' for what was not."""
  plan, given = network.run.plan, network.config['optimizer']
  data, optim, step = plan.data, plan.optim, plan.step.regularisation
  epochs = optim.total_steps / plan.steps_per_epoch
  rate = f'{optim.peak_lr:g}, {optim.schedule}'
  if optim.boundaries:
    rate += f', times {optim.factor:g} after steps {", ".join(f"{n:,}" for n in optim.boundaries)}'
  if optim.warmup_steps:
    rate += f', after a linear rise over {optim.warmup_steps:,} steps'
  decay = f', weight decay {optim.weight_decay:g}' if optim.weight_decay else ''
  decay += '' if optim.decay_vectors or not decay else ' (not on biases and scales)'
  clip = f', gradient clipped to {optim.clip_norm:g}' if optim.clip_norm else ''
  momentum = 'Nesterov momentum' if optim.nesterov else 'momentum'
  if given['layer_decay'] != 1:
    rate += f', times {given["layer_decay"]:g} for every block further below the head'
  parts = plan.step.micro_batches
  loss = step.loss + (f', label smoothing {step.label_smoothing:g}' if step.label_smoothing else '')
  more = {
    'auto_augment': data.auto_augment,
    'color_jitter': _numbers(data.color_jitter) if any(data.color_jitter) else '',
    'lighting': data.lighting,
    'mixup': step.mixup,
    'cutmix': step.cutmix,
    'erasing': step.erasing,
  }
  augmentation = [data.augment, *(f'{name} {value}' for name, value in more.items() if value)]
  stages = plan.model.stages
  return [
    ('length', f'{epochs:.4g} epochs, {optim.total_steps:,} steps of {plan.batch_size} pictures'),
    ('batch', f'computed in {parts} parts, one after another' if parts > 1 else ''),
    ('pictures', f'{data.image_size} pixels'),
    ('augmentation', ', '.join(augmentation)),
    ('optimiser', f'{optim.name}, {momentum} {optim.momentum:g}{decay}{clip}'),
    ('learning rate', rate),
    ('loss', loss),
    ('AFI in stages', _numbers(stages) if stages else ''),
    ('stochastic depth', f'{step.drop_path:g}' if step.drop_path else ''),
    ('starts from', _start(plan.run)),
    ('frozen', ', '.join(given['frozen'])),
    ('weights', f'moving average, decay {step.ema_decay:g}' if step.ema_decay else ''),
    ('computed in', plan.model.dtype),
    ('seed', str(plan.seed)),
  ]


def _start(run: config.Run) -> str:
  """By the name of the file or folder alone: its path is of one machine."""
  name = pathlib.PurePath(run.resume or run.init_from).name
  return name and f'{"the last checkpoint" if run.resume else "the weights"} of {name}'


def _versions(packages: Sequence[str]) -> str:
  versions = [('Python', platform.python_version())]
  versions += [(name, importlib.metadata.version(name)) for name in packages]
  made_with = ', '.join(f'{name} {version}' for name, version in versions)
  return (
    f'Exported with {made_with}.\n\n'
    f'The code, `afi_flax`, is under {CODE_LICENSE}. What the weights may be used for depends on '
    'the licence of the data, too.'
  )


def _numbers(values: Sequence[float]) -> str:
  return ', '.join(f'{value:g}' for value in values)
