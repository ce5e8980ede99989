"""The command on a folder in which everything is odd: names, links, pipes, bombs, damage."""

import os
import pathlib
import socket

import pytest

from tests.data import odd_pictures
from tests.test_main import lines, main

CLASSES = ['Cat', 'cat', 'it\'s "q" %s', 'new\nline', 'ü', os.fsdecode(b'\xff\xfe'), 'thumbs']
BAD = {
  'pipe.jpg': 'not a file but a pipe or device',
  'socket.jpg': 'No such device or address',
  'loop.jpg': 'Too many levels of symbolic links',
  'empty \\udcff\\n.jpg': 'an empty file',
  'bomb.png': '20000 x 20000 pixels are more than 178956970',
  'scans.png': 'a JPEG of 1000 scans, each over 8000 x 8000 pixels, would take minutes',
}


@pytest.fixture
def odd_folder(tmp_path, monkeypatch) -> str:
  """Every kind of whole picture in classes of odd names, and six bad files in each split."""
  root = pathlib.Path(tmp_path, 'a\n"b"')
  kinds = [kind.data for kind in odd_pictures.kinds().values()]
  for split in ('train', 'val'):
    for i, data in enumerate(kinds):
      folder = root / split / CLASSES[i % len(CLASSES)]
      folder.mkdir(parents=True, exist_ok=True)
      (folder / f'{i} x.JPG').write_bytes(data)
    folder = root / split / 'new\nline'
    os.mkfifo(folder / 'pipe.jpg')
    (folder / 'loop.jpg').symlink_to('loop.jpg')
    (folder / os.fsdecode(b'empty \xff\n.jpg')).touch()
    (folder / 'bomb.png').write_bytes(odd_pictures.jpeg_of_size(20_000, 20_000))
    (folder / 'scans.png').write_bytes(odd_pictures.jpeg_of_scans(8000, 1000))
    (folder / 'again').symlink_to('.')
    with monkeypatch.context() as patch, socket.socket(socket.AF_UNIX) as there:
      patch.chdir(folder)  # a socket's name is short
      there.bind('socket.jpg')
  return str(root)


@pytest.mark.slow
@pytest.mark.fault(
  'picture',
  'all of that in one folder, through the command',
  'trains, evaluates, resumes; all named',
)
@pytest.mark.parametrize('workers', [0, 1])
def test_a_run_on_an_odd_folder(odd_folder, tmp_path, workers):
  workdir = tmp_path / 'run'
  flags = (
    '--config', 'configs/image_folder.py', '--workdir', workdir,
    f'--config.data.data_dir={odd_folder}', '--config.batch_size=8',
    '--config.eval_batch_size=8', '--config.data.image_size=32', '--config.data.eval_resize=36',
    '--config.epochs=2', f'--config.run.workers={workers}',
  )  # fmt: skip
  _, err = main(*flags)
  for outcome in ('replaced by the next', 'left out of the evaluation'):
    for name, reason in BAD.items():
      assert any(
        f'/new\\nline/{name} (example ' in line and f'): {reason}; {outcome}' in line
        for line in err.splitlines()
      ), (name, outcome)
  assert "'Cat', 'cat' are 2 classes" in err
  assert 'class folders are not followed' in err
  assert 'Warning' not in err
  whole = len(odd_pictures.kinds())
  evaluation = [record for record in lines(workdir) if record['split'] == 'val'][-1]
  assert evaluation['examples'] == whole
  main('--mode=eval', '--workdir', workdir)
  again = [record for record in lines(workdir) if record['split'] == 'val'][-1]
  assert again['loss'] == pytest.approx(evaluation['loss'])
  _, err = main(*flags, '--config.data.max_unreadable=5', '--workdir', tmp_path / 'other', status=2)
  [said] = [line for line in err.splitlines() if line.startswith('error: ')]
  assert '6 pictures cannot be read and data.max_unreadable is 5; the last is ' in said
