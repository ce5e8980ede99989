"""What is done in the background while a run starts."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar('T')


def begin(function: Callable[[], T]) -> Future[T]:
  """Calls a function in a thread of its own, which ends with it; what it raises, `result` does."""
  executor = ThreadPoolExecutor(1, 'background')
  try:
    return executor.submit(function)
  finally:
    executor.shutdown(wait=False)
