"""How good a classifier is: confusion, reliability and mistakes, counted batch by batch.

Calibration as in Guo et al., "On Calibration of Modern Neural Networks" (2017): predictions are put
into equal bins of their probability, and in each the mean probability is held against the accuracy.
"""

import dataclasses
import heapq
import math

import numpy as np

from afi_flax.errors import UserError

BINS = 15  # as in Guo et al.
MISTAKES = 32
_Z = 1.96  # standard deviations, for 95% of a normal distribution


@dataclasses.dataclass(frozen=True)
class Mistake:
  """An example that the network takes for another class.

  Attributes:
    example: its index in the split.
    true: its class.
    predicted: the class with the highest probability.
    probability: of the predicted class.
  """

  example: int
  true: int
  predicted: int
  probability: float


@dataclasses.dataclass(frozen=True)
class Reliability:
  """A reliability diagram: a bin has the predictions with edges[i] < probability <= edges[i+1].

  Attributes:
    edges: f64 [bins + 1].
    confidence: f64 [bins], the mean probability of the predicted class; NaN where a bin is empty.
    accuracy: f64 [bins], the fraction that is right; NaN where a bin is empty.
    count: i64 [bins], predictions.
    ece: expected calibration error, the mean of |accuracy - confidence| over all predictions.
  """

  edges: np.ndarray
  confidence: np.ndarray
  accuracy: np.ndarray
  count: np.ndarray
  ece: float


def interval(share: float, n: int) -> tuple[float, float]:
  """What a share of n examples says of all others of their kind: the 95% interval of Wilson (1927).

  Unlike a standard error, it is no point where all of a few are right.
  """
  centre = share + _Z**2 / (2 * n)
  half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
  return max(0.0, (centre - half) / (1 + _Z**2 / n)), min(1.0, (centre + half) / (1 + _Z**2 / n))


def difference_interval(a: float, n: int, b: float, m: int) -> tuple[float, float]:
  """Of a - b, shares of n and m other examples: the 95% interval of Newcombe (1998, method 10)."""
  (a_low, a_high), (b_low, b_high) = interval(a, n), interval(b, m)
  return a - b - math.hypot(a - a_low, b_high - b), a - b + math.hypot(a_high - a, b - b_low)


class Tally:
  """Counts predictions; its size does not depend on how many.

  Attributes:
    confusion: i64 [K,K], true x predicted.
  """

  def __init__(self, num_classes: int, bins: int = BINS):
    self.confusion = np.zeros([num_classes, num_classes], np.int64)
    self._edges = np.linspace(0, 1, bins + 1)
    self._confidence, self._hits = np.zeros(bins), np.zeros(bins)
    self._count = np.zeros(bins, np.int64)
    self._top5, self._loss = 0, 0.0
    self._mistakes: list[tuple[float, int, int, int]] = []

  def add(
    self,
    example: np.ndarray,
    label: np.ndarray,
    predicted: np.ndarray,
    probability: np.ndarray,
    rank: np.ndarray,
    loss: np.ndarray,
  ) -> None:
    """Counts b predictions.

    Args:
      example: i32 [b], index in the split.
      label: i32 [b].
      predicted: i32 [b], the class with the highest probability.
      probability: f32 [b], of that class.
      rank: i32 [b], how many classes come before the label's.
      loss: f32 [b], -log of the label's probability.

    Raises:
      UserError: a probability that is not finite.
    """
    probability = probability.astype(np.float64)
    if not (finite := np.isfinite(probability)).all():
      raise UserError(
        f'the network gives {probability[~finite][0]} as the probability of example '
        f'{example[~finite][0]}: the run has diverged; take an earlier checkpoint'
      )
    np.add.at(self.confusion, (label, predicted), 1)
    right = predicted == label
    into = np.searchsorted(self._edges, probability).clip(1, len(self._count)) - 1
    np.add.at(self._count, into, 1)
    np.add.at(self._confidence, into, probability)
    np.add.at(self._hits, into, right)
    self._top5 += int((rank < min(5, len(self.confusion))).sum())
    self._loss += float(loss.sum(dtype=np.float64))
    wrong = (x[~right].tolist() for x in (-probability, example, label, predicted))
    self._mistakes = heapq.nsmallest(MISTAKES, [*self._mistakes, *zip(*wrong, strict=True)])

  @property
  def examples(self) -> int:
    """How many were counted."""
    return int(self._count.sum())

  @property
  def top1(self) -> float:
    """Fraction whose predicted class is right."""
    return float(self.confusion.trace() / self.examples)

  @property
  def top5(self) -> float:
    """Fraction whose class is among the first min(5, K)."""
    return self._top5 / self.examples

  @property
  def nll(self) -> float:
    """Mean negative log-likelihood, nats."""
    return self._loss / self.examples

  @property
  def mistakes(self) -> tuple[Mistake, ...]:
    """The most confident ones first; equal ones by their example."""
    return tuple(
      Mistake(example, true, predicted, -minus)
      for minus, example, true, predicted in self._mistakes
    )

  def reliability(self) -> Reliability:
    """Of all that was counted."""
    with np.errstate(invalid='ignore'):  # 0 / 0 of an empty bin
      confidence, accuracy = self._confidence / self._count, self._hits / self._count
    gap = np.abs(self._hits - self._confidence).sum()
    ece = float(gap / self.examples)
    return Reliability(self._edges, confidence, accuracy, self._count.copy(), ece)
