import subprocess
import sys


def run(*arguments: str) -> subprocess.CompletedProcess:
  command = [sys.executable, '-m', 'afi_flax.prepare', *arguments]
  return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_needs_nothing_says_so_and_exits_0():
  result = run('--dataset', 'digits')
  assert (result.returncode, result.stdout) == (0, 'digits needs no preparing\n')


def test_a_mistake_is_one_line_and_exits_2(tmp_path):
  result = run('--dataset=cifar100', f'--data_dir={tmp_path}', f'--archives={tmp_path}')
  assert result.returncode == 2
  assert result.stdout == ''
  assert result.stderr.startswith(f'error: {tmp_path} has no cifar-100-binary.tar.gz; fetch ')
  assert result.stderr.count('\n') == 1


def test_a_wrong_archive_is_one_line_without_progress_bars_and_log_lines(tmp_path):
  (tmp_path / 'cifar-100-binary.tar.gz').write_bytes(b'another file')
  result = run('--dataset=cifar100', f'--data_dir={tmp_path}/out', f'--archives={tmp_path}')
  assert (result.returncode, result.stdout) == (2, '')
  assert result.stderr.startswith('error: cifar-100-binary.tar.gz is damaged or cut short')
  assert result.stderr.count('\n') == 1
