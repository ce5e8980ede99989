"""Pictures that a person names, to be predicted: files, folders, patterns, lists of paths."""

import dataclasses
import errno
import glob
import os
from collections.abc import Iterable, Iterator

from absl import logging

from afi_flax.data import folders
from afi_flax.errors import UserError, shown


@dataclasses.dataclass(frozen=True)
class Files:
  """Files of pictures, read one by one as `sources.Encoded` is; none has a label, so all have 0."""

  paths: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.paths)

  def read(self, i: int) -> tuple[bytes, int]:
    """Bytes of picture i and 0; OSError where the file cannot be read, or is none."""
    if '\0' in self.paths[i]:
      raise OSError(errno.EINVAL, 'a path with a zero byte; give one path a line')
    return folders.read_file(self.paths[i]), 0

  def name(self, i: int) -> str:
    """The file of picture i, as one line of text."""
    return shown(self.paths[i])


@dataclasses.dataclass(frozen=True)
class Listed:
  """Paths of pictures, listed anew whenever they are iterated over; from `find`.

  So that no list of them is kept, however many they are.

  Attributes:
    names: what was given.
    count: how many pictures there are.
    longest: characters of the longest path.
  """

  names: tuple[str, ...]
  count: int
  longest: int

  def __len__(self) -> int:
    return self.count

  def __iter__(self) -> Iterator[str]:
    for name in self.names:
      yield from _paths(name)


def find(names: Iterable[str]) -> Listed:
  """Looks for the pictures that are meant.

  Args:
    names: in the order in which their pictures will come. A file is taken whatever its name is. Of
      a folder, its files with a picture's suffix, in all folders below it: sorted, those of a
      folder before those of its sub-folders; links to files count, links to folders are not
      followed. A pattern (*, ?, [...] and ** for any folders) stands for what it matches, sorted.

  Raises:
    UserError: a name that is nothing, or has no pictures; a folder that cannot be listed.
  """
  names = tuple(os.path.expanduser(name) for name in names)
  count = longest = 0
  for name in names:
    before = count
    for path in _paths(name, warn=True):
      count += 1
      longest = max(longest, len(path))
    if count == before:
      raise _nothing(name)
  return Listed(names, count, longest)


def from_lines(lines: Iterable[bytes]) -> Iterator[str]:
  """Paths, one a line, as they come; empty lines are left out."""
  for line in lines:
    if path := os.fsdecode(line.rstrip(b'\r\n')):
      yield path


def _paths(name: str, warn: bool = False) -> Iterator[str]:
  """Pictures of one name; of those there are at most one folder's, or one pattern's, in memory."""
  if os.path.isdir(name):
    yield from _in_folder(name, warn)
  elif os.path.exists(name):
    yield name
  elif glob.has_magic(name):
    for match in sorted(glob.glob(name, recursive=True)):
      if not os.path.isdir(match):
        yield match
      elif '**' not in name:  # which matches what is in the folders, too
        yield from _in_folder(match, warn)
  elif '://' in name:
    raise UserError(
      f'{name!r} is not on a file system; copy it, or mount the bucket, and give that'
    )
  else:
    raise UserError(
      f"no such file, folder or pattern: '{shown(name)}'; paths are relative to {os.getcwd()}"
    )


def _in_folder(folder: str, warn: bool) -> Iterator[str]:
  others = []
  for parent, sub_folders, files in folders.walk(folder):
    if warn:
      others += (name for name in files if not folders.is_picture(name))
      for path in (os.path.join(parent, name) for name in sub_folders):
        if os.path.islink(path):
          logging.warning('%s is a link to a folder, not followed; give it by itself', shown(path))
    yield from (os.path.join(parent, name) for name in sorted(files) if folders.is_picture(name))
  folders.warn_of_others(folder, others)


def _nothing(name: str) -> UserError:
  """For what is there but has no pictures, or a pattern that matches nothing."""
  if not os.path.isdir(name):
    matches = glob.glob(name, recursive=True)
    folders_are = 'folder' if len(matches) == 1 else 'folders'
    found = f'{len(matches)} {folders_are} without pictures' if matches else 'nothing'
    return UserError(
      f"the pattern '{shown(name)}' matches {found}; paths are relative to {os.getcwd()}"
    )
  found = folders.by_suffix(f for _, _, files in folders.walk(name) for f in files)
  cure = f"; '{shown(os.path.join(name, '*'))}' takes files whatever their names" if found else ''
  return UserError(
    f'{shown(name)} has no files with the suffix of a picture ({", ".join(folders.SUFFIXES)}), '
    f'only {found or "nothing at all"}{cure}'
  )
