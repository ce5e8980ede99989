"""A stand-in for Cloud Storage: whole objects over HTTP, as its JSON API has them.

Objects can be put, got (ranges too), listed, copied and deleted, each with a generation on which a
request may depend. There is no append, no lock, no rename and no folder. What speaks to it here:
gcsfs and google-cloud-storage (STORAGE_EMULATOR_HOST) and TensorStore (TENSORSTORE_GCS_HTTP_URL).
https://cloud.google.com/storage/docs/json_api/v1
"""

import base64
import contextlib
import dataclasses
import datetime
import hashlib
import http.server
import itertools
import json
import re
import threading
import urllib.parse
from collections.abc import Callable

import google_crc32c


@dataclasses.dataclass(frozen=True)
class Object:
  """What lies under one name; `updated` is when it was put."""

  data: bytes
  generation: int
  updated: datetime.datetime


class ObjectStore:
  """Buckets that lie in memory, and a server on this machine.

  Attributes:
    objects: by 'bucket/name'; tests may look at them and change them.
    refuse: (method, 'bucket/name', or 'bucket' alone) -> an HTTP status with which the request
      fails, or 0.
    lose_answers: as many puts from now on are done and not answered.
    writes: names in the order in which they were put.
  """

  def __init__(self, *buckets: str):
    self.buckets = set(buckets)
    self.objects: dict[str, Object] = {}
    self.refuse: Callable[[str, str], int] = lambda method, name: 0
    self.lose_answers = 0
    self.writes: list[str] = []
    self.sessions: dict[str, tuple[str, dict, bytes]] = {}  # resumable uploads
    self.changing = threading.Lock()
    self._generations = itertools.count(1_700_000_000_000_000)

  @contextlib.contextmanager
  def serving(self):
    """While entered it is served; gives the environment that names it."""
    handler = type('Handler', (_Handler,), {'store': self})
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
      server.daemon_threads = True
      thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
      thread.start()
      url = f'http://127.0.0.1:{server.server_port}'
      try:
        yield {
          'STORAGE_EMULATOR_HOST': url,
          'TENSORSTORE_GCS_HTTP_URL': url,
          'GCE_METADATA_HOST': '127.0.0.1:1',  # nobody there to ask for credentials
          'GCE_METADATA_ROOT': '127.0.0.1:1',
          'NO_GCE_CHECK': 'true',
          'GOOGLE_CLOUD_PROJECT': 'test',
        }
      finally:
        server.shutdown()
        thread.join()

  def put(self, name: str, data: bytes, age: float = 0.0) -> Object:
    """Puts an object, as if it had been done `age` seconds ago."""
    now = datetime.datetime.now(datetime.UTC)
    new = Object(data, next(self._generations), now - datetime.timedelta(seconds=age))
    self.objects[name] = new
    self.writes.append(name)
    return new

  def names(self, prefix: str) -> list[str]:
    """The names that begin so, without that prefix."""
    return sorted(n.removeprefix(prefix) for n in list(self.objects) if n.startswith(prefix))


class _Error(Exception):
  def __init__(self, status: int):
    self.status = status


class _Handler(http.server.BaseHTTPRequestHandler):
  store: ObjectStore
  protocol_version = 'HTTP/1.1'
  disable_nagle_algorithm = True

  def log_message(self, *_):
    pass

  def handle(self):
    with contextlib.suppress(ConnectionError):  # TensorStore hangs up as it likes
      super().handle()

  def _handle(self):
    url = urllib.parse.urlsplit(self.path)
    self.query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    self.body = self._read_body()
    path = re.sub('^/(download|upload|resumable)?/?storage/v1/b/?', '', url.path)
    bucket, *rest = [urllib.parse.unquote(part) for part in path.split('/')]
    try:
      name = f'{bucket}/{rest[1] if len(rest) > 1 else self.query.get("name", "")}'
      name = name if rest else bucket
      self._may(name)
      if bucket not in self.store.buckets:
        raise _Error(404)
      with self.store.changing:
        self._answer(url.path, bucket, rest, name)
    except _Error as error:
      if error.status == 304:  # a body would be taken for the next answer
        self._reply(304)
      else:
        self._reply_json({'error': {'code': error.status, 'message': 'refused'}}, error.status)
    except ConnectionError:
      self.close_connection = True

  do_GET = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815

  def _answer(self, path: str, bucket: str, rest: list[str], name: str) -> None:
    if not rest:
      self._reply_json({'kind': 'storage#bucket', 'name': bucket, 'id': bucket})
    elif 'upload_id' in self.query:
      self._continue_upload()
    elif path.startswith('/upload'):
      self._upload(bucket)
    elif len(rest) == 1 and self.command == 'GET':
      self._list(bucket)
    elif len(rest) > 2 and rest[2] in ('rewriteTo', 'copyTo') and self.command == 'POST':
      self._copy(name, f'{rest[4]}/{rest[6]}', rest[2])
    elif len(rest) == 2 and self.command == 'GET':
      self._get(name, media=self.query.get('alt') == 'media')
    elif len(rest) == 2 and self.command == 'DELETE':
      self._check(name)
      if self.store.objects.pop(name, None) is None:
        raise _Error(404)
      self._reply(204)
    else:
      raise _Error(501)  # moveTo and compose, say, which are not to be relied on

  def _may(self, name: str) -> None:
    if status := self.store.refuse(self.command, name):
      raise _Error(status)

  def _check(self, name: str) -> None:
    """ifGenerationMatch: 0 means that there must be none."""
    there = self.store.objects.get(name)
    wanted = self.query.get('ifGenerationMatch')
    if wanted is not None and int(wanted) != (there.generation if there else 0):
      raise _Error(412)

  def _put(self, name: str, data: bytes) -> None:
    self._may(name)  # now that it is known
    self._check(name)
    self.store.put(name, data)
    if self.store.lose_answers:
      self.store.lose_answers -= 1
      raise ConnectionResetError
    self._reply_json(self._describe(name))

  def _upload(self, bucket: str) -> None:
    kind = self.query['uploadType']
    if kind == 'media':
      self._put(f'{bucket}/{self.query["name"]}', self.body)
    elif kind == 'multipart':
      boundary = re.search('boundary="?([^";]+)', self.headers['Content-Type'])[1].encode()
      first, second = self.body.split(b'--' + boundary)[1:3]
      metadata = json.loads(re.split(b'\r?\n\r?\n', first, maxsplit=1)[1])
      data = re.split(b'\r?\n\r?\n', second, maxsplit=1)[1]
      self._put(f'{bucket}/{metadata["name"]}', re.sub(b'\r?\n$', b'', data))
    else:
      said = json.loads(self.body or b'{}')
      name = f'{bucket}/{said.get("name") or self.query["name"]}'
      self._check(name)
      number = str(len(self.store.sessions))
      self.store.sessions[number] = (name, self.query, b'')
      url = f'http://{self.headers["Host"]}/upload/storage/v1/b/{bucket}/o?upload_id={number}'
      self._reply(200, headers={'Location': url})

  def _continue_upload(self) -> None:
    """A part of a resumable upload: bytes 0-99/*, the last one with the size: bytes 0-99/100."""
    number = self.query['upload_id']
    name, self.query, data = self.store.sessions[number]
    data += self.body
    total = self.headers.get('Content-Range', '/*').rpartition('/')[2]
    self.store.sessions[number] = (name, self.query, data)
    if total == '*' or len(data) < int(total):
      self._reply(308, headers={'Range': f'bytes=0-{len(data) - 1}'} if data else {})
    else:
      self._put(name, data)

  def _copy(self, source: str, target: str, how: str) -> None:
    self._check(target)
    if source not in self.store.objects:
      raise _Error(404)
    self.store.put(target, self.store.objects[source].data)
    described = self._describe(target)
    if how == 'rewriteTo':
      size = described['size']
      described = {'done': True, 'resource': described, 'objectSize': size,
        'totalBytesRewritten': size}  # fmt: skip
    self._reply_json(described)

  def _get(self, name: str, media: bool) -> None:
    found = self.store.objects.get(name)
    if found is None:
      raise _Error(404)
    if self.query.get('ifGenerationNotMatch') == str(found.generation):
      raise _Error(304)
    if not media:
      self._reply_json(self._describe(name))
      return
    self._check(name)
    described = self._describe(name)
    headers = {
      'x-goog-generation': described['generation'],
      'x-goog-hash': f'crc32c={described["crc32c"]},md5={described["md5Hash"]}',
      'x-goog-stored-content-length': described['size'],
      'Content-Type': 'application/octet-stream',
    }
    size = len(found.data)
    if wanted := re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range', '')):
      start, end = wanted.groups()
      first = int(start) if start else max(size - int(end), 0)
      last = min(int(end), size - 1) if start and end else size - 1
      if first >= size:
        raise _Error(416)
      headers['Content-Range'] = f'bytes {first}-{last}/{size}'
      self._reply(206, found.data[first : last + 1], headers)
    else:
      self._reply(200, found.data, headers)

  def _list(self, bucket: str) -> None:
    prefix, delimiter = self.query.get('prefix', ''), self.query.get('delimiter')
    limit = int(self.query.get('maxResults', 1000))
    after = self.query.get('pageToken', '')
    keys = {}  # of what is listed: a folder, or the object itself
    for name in self.store.names(f'{bucket}/'):
      if name.startswith(prefix):
        inner, found, _ = name.removeprefix(prefix).partition(delimiter or '\0')
        keys[f'{prefix}{inner}{delimiter}' if found else name] = bool(found)
    start, end = self.query.get('startOffset', ''), self.query.get('endOffset')
    within = [k for k in keys if k > after and k >= start and (not end or k < end)]
    page = within[:limit]
    listed = {
      'kind': 'storage#objects',
      'items': [self._describe(f'{bucket}/{key}') for key in page if not keys[key]],
      'prefixes': [key for key in page if keys[key]],
      'nextPageToken': page[-1] if len(within) > limit else '',
    }
    self._reply_json({key: value for key, value in listed.items() if value})

  def _describe(self, name: str) -> dict:
    found = self.store.objects[name]
    bucket, _, key = name.partition('/')
    time = found.updated.strftime('%Y-%m-%dT%H:%M:%S.%fZ')
    crc = google_crc32c.value(found.data).to_bytes(4, 'big')
    return {
      'kind': 'storage#object', 'bucket': bucket, 'name': key, 'id': f'{name}/{found.generation}',
      'generation': str(found.generation), 'metageneration': '1', 'size': str(len(found.data)),
      'timeCreated': time, 'updated': time, 'contentType': 'application/octet-stream',
      'crc32c': base64.b64encode(crc).decode(),
      'md5Hash': base64.b64encode(hashlib.md5(found.data).digest()).decode(),
    }  # fmt: skip

  def _read_body(self) -> bytes:
    if self.headers.get('Transfer-Encoding') != 'chunked':
      return self.rfile.read(int(self.headers.get('Content-Length') or 0))
    data = b''
    while size := int(self.rfile.readline(), 16):
      data += self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()
    return data

  def _reply_json(self, value: dict, status: int = 200) -> None:
    self._reply(status, json.dumps(value).encode(), {'Content-Type': 'application/json'})

  def _reply(self, status: int, body: bytes = b'', headers: dict | None = None) -> None:
    self.send_response(status)
    for key, value in (headers or {}).items():
      self.send_header(key, value)
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)
