"""The class selectivity index of channels, at the places that the AFI paper compares in Figure 4.

Sources: Morcos et al., "On the importance of single directions for generalization" (2018), and the
AFI paper. In blocks 2 to n of a stage: in an AFI block the AFI output R_k; in a plain block what
stands at its place, channels w/2 to w of the first convolution after BN and ReLU.

```
mu_k  = mean over the pictures of class k of the channel's mean over all pixels
index = (mu_max - mu_rest) / (mu_max + mu_rest)
```
mu_max is the largest class mean and mu_rest, as Morcos et al. define it, the mean of all other
classes' means: each class counts once, however many pictures it has. 0: the channel is the same for
all classes; 1: it answers to one alone.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from afi_flax.models.fusion import AFI

_BLOCK = re.compile(r'stage(\d+)_block(\d+)')


def is_needed(module: nn.Module, method: str) -> bool:
  """A filter for `capture_intermediates`: the calls that `places` looks at."""
  if method != '__call__':
    return False
  is_block = len(module.path) == 1 and _BLOCK.fullmatch(module.path[0])
  return bool(is_block) or isinstance(module, AFI)


def places(intermediates: Mapping[str, Any]) -> dict[str, jax.Array]:
  """The maps of Figure 4, of a forward pass.

  Args:
    intermediates: what `apply(..., capture_intermediates=is_needed, mutable='intermediates')`
      returns beside the logits.

  Returns:
    {block: [B,H,W,C]} of blocks 2 to n of every stage, in the network's order. {} for a network
    that is not made of such blocks.
  """
  found = {}
  for name in in_order(name for name in intermediates if _BLOCK.fullmatch(name)):
    captured = intermediates[name]
    _, first_convolution = captured['__call__'][0]
    if _numbers(name)[1] == 1:
      continue
    if 'fuse' in captured:
      found[name] = captured['fuse']['afi']['__call__'][0]
    else:
      found[name] = first_convolution[..., first_convolution.shape[-1] // 2 :]
  return found


def in_order(blocks: Iterable[str]) -> list[str]:
  """Names of blocks in the network's order: stage1_block10 after stage1_block2."""
  return sorted(blocks, key=_numbers)


def _numbers(name: str) -> list[int]:
  return [int(number) for number in _BLOCK.fullmatch(name).groups()]


def index(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """The class selectivity index of each channel.

  >>> index(np.array([[6.0, 0, 2, 1], [1, 0, 1, 0], [0, 0, 0, 0]]), np.array([2, 1, 0]))
  array([0.5, nan, 0. , 1. ])

  Args:
    sums: f64 [K,C], over the pictures of each class, of the channels' means over all pixels; >= 0.
    counts: i64 [K], pictures of each class. A class without any takes no part.

  Returns:
    f64 [C] in 0..1. NaN for a dead channel, which no class brings above 0, and for all channels
    where fewer than two classes have pictures: then there is no rest.
  """
  there = counts > 0
  means = sums[there] / counts[there, None]
  if len(means) < 2:
    return np.full(sums.shape[1], np.nan)
  largest = means.max(axis=0)
  rest = (means.sum(axis=0) - largest) / (len(means) - 1)
  with np.errstate(invalid='ignore'):  # 0 / 0 of a dead channel
    return (largest - rest) / (largest + rest)
