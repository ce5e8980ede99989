"""Files of a run, on a disk or in a bucket of Cloud Storage, which keeps whole objects.

In a bucket nothing can be appended or renamed, and a folder is what the names of objects share. An
error is an OSError there too.
"""

import contextlib
import errno
import functools
import importlib.util
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from etils import epath

from afi_flax.errors import UserError

Path = pathlib.Path | epath.Path  # on a disk, in a bucket

_SCHEME = 'gs://'
# Else etils, which Orbax uses, takes TensorFlow for gs:// where that is installed.
os.environ['EPATH_USE_TF'] = 'false'
# Else gcsfs, which etils uses, asks by gRPC before every request what kind of bucket it speaks to.
os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')


def in_bucket(path: str | os.PathLike) -> bool:
  """Whether it lies in a bucket."""
  return os.fspath(path).startswith(_SCHEME)


def absolute(folder: str | os.PathLike) -> Path:
  """The folder as an absolute path.

  Raises:
    UserError: it names no bucket that can be used.
  """
  text = os.fspath(folder)
  if not re.match(r'\w+:/', text):
    return pathlib.Path(text).expanduser().absolute()
  bucket, _, name = text.removeprefix(_SCHEME).strip('/').partition('/')
  if not in_bucket(text) or not bucket or not name:
    raise UserError(f'{text!r} must be a folder, or one in a bucket: gs://BUCKET/FOLDER')
  if importlib.util.find_spec('gcsfs') is None:
    raise UserError(f"{text} needs what `pip install -e '.[gcs]'` installs")
  import fsspec

  # TensorStore writes behind its back, and so do other processes.
  fsspec.config.conf.setdefault('gs', {})['use_listings_cache'] = False
  return epath.Path(f'{_SCHEME}{bucket}/{name}')


def exists(path: Path) -> bool:
  """Whether there is such a file, or anything in such a folder."""
  if not in_bucket(path):
    return path.exists()
  with os_errors(path):
    return blob(path).exists() or bool(names(path))


def is_file(path: Path) -> bool:
  """Whether it is a file that can be read; a folder is none."""
  if not in_bucket(path):
    return path.is_file()
  with os_errors(path):
    return blob(path).exists()


def read(path: Path) -> bytes:
  """The whole file."""
  if not in_bucket(path):
    return path.read_bytes()
  with os_errors(path):
    return blob(path).download_as_bytes()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
  """The file, to be read in parts."""
  if not in_bucket(path):
    with path.open('rb') as file:
      yield file
    return
  with os_errors(path), blob(path).open('rb') as file:
    yield file


def write(path: Path, content: bytes | str, patience: float = 60.0) -> None:
  """Writes the whole file; in a bucket this is tried for `patience` seconds."""
  data = content.encode() if isinstance(content, str) else content
  if not in_bucket(path):
    path.write_bytes(data)
    return
  from google.cloud.storage.retry import DEFAULT_RETRY

  with os_errors(path):
    blob(path).upload_from_string(
      data, timeout=patience, retry=DEFAULT_RETRY.with_timeout(patience)
    )


def names(folder: Path) -> list[str]:
  """All files below a folder, relative to it, in order."""
  if not in_bucket(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file())
  with os_errors(folder):
    prefix = f'{blob(folder).name}/'
    objects = list(blob(folder).bucket.list_blobs(prefix=prefix))
  found = (each.name.removeprefix(prefix) for each in objects)
  return sorted(name for name in found if name and not name.endswith('/'))


def check_ours(folder: pathlib.Path, manifest: str, command: str) -> None:
  """UserError where a command must not write a folder on a disk, since it holds others' files.

  Args:
    folder: may not be there yet.
    manifest: as `listed` takes it.
    command: that wrote it, in one word.
  """
  if not os.path.exists(folder):
    return
  if not os.path.isdir(folder):
    raise UserError(f'{folder} is a file; give another --out')
  own = listed(folder, manifest)
  if foreign := [name for name in names(folder) if name not in own]:
    raise UserError(
      f'{folder} holds {foreign[0]!r}, which no {command} wrote; give another --out, or move that '
      'away'
    )


def listed(folder: pathlib.Path, manifest: str) -> list[str]:
  """The files of a folder by its manifest, JSON with their names as 'files'; [] without one."""
  try:
    return list(json.loads((folder / manifest).read_text())['files'])
  except (OSError, ValueError, KeyError, TypeError):
    return []


def move(source: Path, target: Path, seal: str) -> None:
  """Moves a folder.

  Args:
    source: a folder.
    target: is not there yet; in a folder that may not be there yet.
    seal: a file without which the folder counts for nothing. In a bucket, a move that is broken off
      leaves the source whole or without it.
  """
  if not in_bucket(source):
    target.parent.mkdir(exist_ok=True)
    source.rename(target)
    return
  moved = names(source)
  with os_errors(source):
    for name in moved:
      old, new = blob(source / name), blob(target / name)
      token, _, _ = new.rewrite(old)
      while token:  # a large one goes in parts
        token, _, _ = new.rewrite(old, token=token)
    for name in sorted(moved, key=lambda name: name != seal):
      blob(source / name).delete()


def blob(path: epath.Path) -> Any:
  """The object of google-cloud-storage, to be used within `os_errors`."""
  bucket, _, name = os.fspath(path).removeprefix(_SCHEME).partition('/')
  return _client().bucket(bucket).blob(name)


@contextlib.contextmanager
def os_errors(path: epath.Path) -> Iterator[None]:
  """Inside it, what Google's libraries raise is an OSError, as it would be for a file."""
  from google.api_core import exceptions
  from google.auth.exceptions import GoogleAuthError
  from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

  broken = (exceptions.GoogleAPIError, GoogleAuthError, DataCorruption, InvalidResponse, OSError)
  try:
    yield
  except exceptions.PreconditionFailed as error:
    raise FileExistsError(errno.EEXIST, 'the object has changed', str(path)) from error
  except exceptions.NotFound as error:
    raise FileNotFoundError(errno.ENOENT, 'there is no such object or bucket', str(path)) from error
  except (FileExistsError, FileNotFoundError, PermissionError):
    raise
  except broken as error:
    why = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
    number = errno.EACCES if isinstance(error, exceptions.Forbidden) else errno.EIO
    raise OSError(number, why, str(path)) from error


@functools.cache
def _client() -> Any:
  from google.cloud import storage

  return storage.Client()
