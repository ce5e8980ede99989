"""Rows of a table: aligned text for a terminal, JSON and CSV for machines."""

import csv
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import IO, Any

from afi_flax.errors import UserError

Row = Mapping[str, Any]


def text(rows: Sequence[Row]) -> str:
  """Aligned columns under the keys of the first row.

  Whole numbers get thousands separators, None a dash; a row of '' values makes an empty line.

  >>> print(text([{'network': 'resnet32', 'parameters': 472756}]))
  network   parameters
  resnet32     472,756
  """
  cells = [[_cell(row[key]) for key in rows[0]] for row in rows]
  right = [any(_is_number(row[key]) for row in rows) for key in rows[0]]
  lines = [list(rows[0]), *cells]
  widths = [max(len(line[i]) for line in lines) for i in range(len(right))]
  return '\n'.join(
    '  '.join(
      cell.rjust(width) if is_right else cell.ljust(width)
      for cell, width, is_right in zip(line, widths, right, strict=True)
    ).rstrip()
    for line in lines
  )


def check_writable(path: str) -> None:
  """Finds out, before the work, whether a file can be written; what it holds stays.

  Raises:
    UserError: it cannot, and why.
  """
  is_new = not os.path.exists(path)
  _open(path, 'a').close()
  if is_new:
    os.remove(path)


def write_json(rows: Sequence[Row], path: str) -> None:
  """A list with one object a row."""
  with _open(path, 'w') as file:
    json.dump([dict(row) for row in rows], file, indent=1)
    file.write('\n')


def read_rows(path: str) -> list[dict[str, Any]]:
  """What `write_json` wrote, [] where there is no file; UserError where it holds something else."""
  if not os.path.exists(path):
    return []
  try:
    with open(path) as file:
      rows = json.load(file)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
      raise ValueError('not a list of objects')
  except (OSError, ValueError) as error:
    raise UserError(f'{path} cannot be read: {error}; give another file') from error
  return rows


def replace_row(row: Row, path: str, keys: Sequence[str]) -> None:
  """Adds a row to such a file, in the place of those that have the same values under `keys`."""
  others = [old for old in read_rows(path) if any(old.get(key) != row[key] for key in keys)]
  write_json([*others, row], path)


def write_csv(rows: Sequence[Row], path: str) -> None:
  """A header with the keys of all rows, and one line a row; nothing for a key it does not have."""
  with _open(path, 'w', newline='') as file:
    file.write(as_csv(rows))


def as_csv(rows: Sequence[Row]) -> str:
  """What `write_csv` writes."""
  keys = list(dict.fromkeys(key for row in rows for key in row))
  file = io.StringIO(newline='')
  writer = csv.DictWriter(file, keys, lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  return file.getvalue()


def _open(path: str, mode: str, **arguments) -> IO[str]:
  try:
    return open(path, mode, **arguments)
  except OSError as error:
    raise UserError(f'cannot write {path}: {error.strerror}') from error


def _cell(value: Any) -> str:
  if value is None:
    return '-'
  return f'{value:,}' if isinstance(value, int) else str(value)


def _is_number(value: Any) -> bool:
  """Whether a cell is a number, or one that was formatted before, with a sign, unit or percent."""
  if isinstance(value, str):
    return re.fullmatch(r'[+-]?[\d,]+(\.\d+)?[%KMG]?', value) is not None
  return isinstance(value, int | float)
