import itertools
import os
import threading
import time

import numpy as np
import pytest
from PIL import Image

from afi_flax import random_draws
from afi_flax.data import augment, pipeline, sources
from afi_flax.errors import UserError

SEED = 5


def small_arrays(n=23, side=16) -> sources.Arrays:
  rng = np.random.default_rng(0)
  images = rng.integers(1, 256, (n, side, side, 3), dtype=np.uint8)
  return sources.Arrays(images, np.arange(n, dtype=np.int32) % 10)


@pytest.fixture
def pictures(picture_folder):
  return sources.open_split('image_folder', str(picture_folder), 'train')


@pytest.fixture(params=['in memory', 'encoded'])
def source_and_options(request):
  if request.param == 'in memory':
    return small_arrays(), {'augment': 'pad_crop_flip', 'image_size': 16}
  pictures = request.getfixturevalue('pictures')
  return pictures, {'augment': 'random_resized_crop_flip', 'image_size': 24}


def train(source, options, n=6, **more) -> list[pipeline.Batch]:
  settings = {'seed': SEED, 'data_step': 0, 'batch_size': 8} | options | more
  batches = pipeline.train_batches(source, **settings)
  try:
    return list(itertools.islice(batches, n))
  finally:
    batches.close()


def assert_equal(a: list[pipeline.Batch], b: list[pipeline.Batch]) -> None:
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    assert x.keys() == y.keys()
    for key in x:
      assert x[key].dtype == y[key].dtype
      np.testing.assert_array_equal(x[key], y[key], err_msg=key)


def joined(shares: list[list[pipeline.Batch]]) -> list[pipeline.Batch]:
  """The global batches from each process's."""
  return [
    {key: np.concatenate([share[key] for share in step]) for key in step[0]}
    for step in zip(*shares, strict=True)
  ]


# ---- training


def test_batches_have_the_agreed_keys_shapes_and_types(source_and_options):
  source, options = source_and_options
  [batch] = train(source, options, 1)
  size = options['image_size']
  assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
    'image': ((8, size, size, 3), np.uint8),
    'label': ((8,), np.int32),
    'example': ((8,), np.int32),
    'epoch': ((8,), np.int32),
  }


def test_the_stream_is_each_epochs_permutation_and_batches_straddle_epochs(source_and_options):
  source, options = source_and_options
  n = len(source)
  batches = train(source, options, 10)
  example = np.concatenate([batch['example'] for batch in batches])
  epoch = np.concatenate([batch['epoch'] for batch in batches])
  np.testing.assert_array_equal(epoch, np.arange(80) // n)
  for e in range(80 // n):
    order = random_draws.permutation(n, SEED, e)
    np.testing.assert_array_equal(example[epoch == e], order)
    assert sorted(example[epoch == e]) == list(range(n))


def test_pictures_and_labels_are_those_of_the_examples(source_and_options):
  source, options = source_and_options
  for batch in train(source, options, 4):
    rows = zip(batch['image'], batch['label'], batch['example'], batch['epoch'], strict=True)
    for image, label, example, epoch in rows:
      if isinstance(source, sources.Arrays):
        one = slice(example, example + 1)
        drawn = np.array([epoch], np.int32), np.array([example], np.int32)
        want = augment.arrays(options['augment'], source.images[one], SEED, *drawn)[0]
        assert label == source.labels[example]
      else:
        data, wanted_label = source.read(example)
        drawn = SEED, int(epoch), int(example)
        want = augment.encoded(options['augment'], data, options['image_size'], *drawn)
        assert label == wanted_label
      np.testing.assert_array_equal(image, want)


@pytest.mark.parametrize('processes', [2, 4])
def test_processes_share_the_same_global_batches(source_and_options, processes):
  source, options = source_and_options
  shares = [
    train(source, options, process_index=p, process_count=processes) for p in range(processes)
  ]
  assert shares[0][0]['label'].shape == (8 // processes,)
  assert_equal(joined(shares), train(source, options))


def test_seeking_equals_reading_on(source_and_options):
  source, options = source_and_options
  assert_equal(train(source, options, 2, data_step=4), train(source, options)[4:])


def test_a_deep_position_starts_at_once(source_and_options):
  source, options = source_and_options
  train(source, options, 1)  # imports
  begin = time.perf_counter()
  [batch] = train(source, options, 1, data_step=40_000_000)
  assert time.perf_counter() - begin < 1
  assert batch['epoch'][0] == 40_000_000 * 8 // len(source)


def test_batches_larger_than_the_data_set(source_and_options):
  source, options = source_and_options
  [batch] = train(source, options, 1, batch_size=64)
  assert_equal([batch], joined([[b] for b in train(source, options, 8)]))


def test_seeds_change_the_order(source_and_options):
  source, options = source_and_options
  [a], [b] = train(source, options, 1), train(source, options, 1, seed=SEED + 1)
  assert a['example'].tolist() != b['example'].tolist()


def test_workers_change_nothing(pictures):
  """Two workers, one of two processes, from the middle: bit for bit what threads read."""
  options = {'augment': 'random_resized_crop_flip', 'image_size': 24, 'data_step': 3}
  shares = [
    train(pictures, options, 5, workers=workers, process_index=p, process_count=2)
    for p, workers in enumerate([2, 0])
  ]
  assert_equal(joined(shares), train(pictures, options, 5))


@pytest.mark.fault('picture', 'PNGs that are called .jpg', 'decoded right, without a warning')
def test_the_content_and_not_the_name_tells_the_format(picture_folder, caplog):
  picture = Image.fromarray(np.full((30, 40, 3), (200, 100, 50), np.uint8))
  for path in picture_folder.glob('train/*/*.jpg'):
    picture.save(path, 'PNG')
  source = sources.open_split('image_folder', str(picture_folder), 'train')
  [batch] = train(source, {'augment': 'random_resized_crop_flip', 'image_size': 8}, 1)
  assert (batch['image'] == (200, 100, 50)).all()
  assert not caplog.records


def test_without_antialiasing_only_the_pixels_differ(pictures):
  options = {'augment': 'random_resized_crop_flip', 'image_size': 8}
  [smooth], [rough] = train(pictures, options, 1), train(pictures, options, 1, antialias=False)
  assert smooth['example'].tolist() == rough['example'].tolist()
  data, _ = pictures.read(rough['example'][0])
  drawn = SEED, int(rough['epoch'][0]), int(rough['example'][0])
  want = augment.encoded(options['augment'], data, 8, *drawn, antialias=False)
  np.testing.assert_array_equal(rough['image'][0], want)
  assert (smooth['image'] != rough['image']).any()


# ---- evaluation


def evaluate(source, options, **more) -> list[pipeline.Batch]:
  return list(pipeline.eval_batches(source, **({'batch_size': 8} | options | more)))


def eval_options(options) -> dict:
  return {'image_size': options['image_size']}


@pytest.mark.parametrize('batch_size', [4, 12, 20, 100])
@pytest.mark.parametrize('processes', [1, 2, 4])
def test_evaluation_has_every_example_once_in_batches_of_one_shape(
  source_and_options, batch_size, processes
):
  source, options = source_and_options
  options = eval_options(options) | {'batch_size': batch_size, 'process_count': processes}
  shares = [evaluate(source, options, process_index=p) for p in range(processes)]
  share = batch_size // processes
  for batches in shares:
    assert len(batches) == -(-len(source) // batch_size)
    for batch in batches:
      assert set(batch) == {'image', 'label', 'example', 'mask'}
      assert batch['image'].shape == (share, *[options['image_size']] * 2, 3)
      assert batch['image'].dtype == np.uint8
      assert (batch['mask'].shape, batch['mask'].dtype) == ((share,), np.float32)
      assert (batch['label'].dtype, batch['example'].dtype) == (np.int32, np.int32)
  batches = joined(shares)
  example, mask, label = (
    np.concatenate([batch[key] for batch in batches]) for key in ('example', 'mask', 'label')
  )
  np.testing.assert_array_equal(example[mask == 1], np.arange(len(source)))
  assert (example[mask == 0] == -1).all()
  assert (label[mask == 0] == 0).all()
  assert mask.sum() == len(source)


def test_evaluation_pictures_do_not_depend_on_the_batch_size(source_and_options):
  source, options = source_and_options
  by_one = evaluate(source, eval_options(options), batch_size=1)
  by_five = evaluate(source, eval_options(options), batch_size=5)
  for key in ('image', 'label', 'example'):
    together = np.concatenate([batch[key] for batch in by_five])[: len(source)]
    np.testing.assert_array_equal(np.concatenate([batch[key] for batch in by_one]), together)


def test_evaluation_resizes_before_it_crops(pictures):
  [plain] = evaluate(pictures, {'image_size': 20}, batch_size=21)
  [larger] = evaluate(pictures, {'image_size': 20, 'resize': 28}, batch_size=21)
  assert (plain['image'] != larger['image']).any()
  assert larger['image'].shape == (21, 20, 20, 3)


# ---- unreadable pictures


@pytest.fixture
def damaged(picture_folder):
  """The folder of 21 pictures, of which three cannot be read; and their examples."""
  files = sorted(picture_folder.glob('train/*/*.jpg'))
  files[2].write_bytes(b'')
  files[9].write_bytes(files[9].read_bytes()[:300])
  files[20].write_text('not a picture')
  source = sources.open_split('image_folder', str(picture_folder), 'train')
  broken = {str(files[i]) for i in (2, 9, 20)}
  return source, {i for i in range(21) if source.name(i) in broken}


def warnings_in(caplog) -> list[str]:
  return [r.getMessage() for r in caplog.records if 'cannot read' in r.getMessage()]


def test_in_training_the_next_readable_picture_stands_in(damaged, caplog):
  source, bad = damaged
  options = {'augment': 'random_resized_crop_flip', 'image_size': 24}
  batches = train(source, options, 8)  # three epochs
  assert all(set(batch) == {'image', 'label', 'example', 'epoch'} for batch in batches)
  example = np.concatenate([batch['example'] for batch in batches])[:21]
  want = random_draws.permutation(21, SEED, 0)
  while (unread := np.isin(want, list(bad))).any():
    want[unread] = (want[unread] + 1) % 21
  np.testing.assert_array_equal(example, want)
  label = np.concatenate([batch['label'] for batch in batches])[:21]
  assert label.tolist() == [source.read(i)[1] for i in want]
  messages = warnings_in(caplog)
  assert len(messages) == 3  # each once, though each was met three times
  assert {int(m.split('(example ')[1].split(')')[0]) for m in messages} == bad
  assert all(source.name(i) in ' '.join(messages) for i in bad)
  assert all(m.endswith('; replaced by the next') for m in messages)


def test_in_evaluation_unreadable_pictures_are_masked(damaged, caplog):
  source, bad = damaged
  batches = evaluate(source, {'image_size': 24})
  example = np.concatenate([batch['example'] for batch in batches])
  mask = np.concatenate([batch['mask'] for batch in batches])
  assert example[:21].tolist() == list(range(21))
  assert set(np.flatnonzero(mask[:21] == 0).tolist()) == bad
  assert mask.sum() == 18
  messages = warnings_in(caplog)
  assert len(messages) == 3
  assert all(m.endswith('; left out of the evaluation') for m in messages)


@pytest.mark.parametrize('workers', [0, 1])
def test_the_warning_gives_the_reason_also_from_workers(damaged, caplog, workers):
  source, bad = damaged
  [missing] = [i for i in bad if source.read(i)[0] == b'']
  os.remove(source.name(missing))
  evaluate(source, {'image_size': 24}, workers=workers)
  want = f'cannot read {source.name(missing)} (example {missing}): No such file or directory; '
  messages = warnings_in(caplog)
  assert want + 'left out of the evaluation' in messages
  assert sum('): not a picture of a known format; ' in m for m in messages) == 1


@pytest.mark.fault(
  'picture',
  'more of them than data.max_unreadable',
  'ends with their number, the last and the cure',
)
@pytest.mark.parametrize('read', [train, evaluate])
def test_past_the_limit_is_an_error(damaged, read):
  source, _ = damaged
  options = {'image_size': 24} | ({'augment': 'none'} if read is train else {})
  assert len(read(source, options | {'max_unreadable': 3})) >= 3
  with pytest.raises(UserError) as e:
    read(source, options | {'max_unreadable': 2})
  assert '3 pictures cannot be read and data.max_unreadable is 2; the last is /' in str(e.value)
  assert '\n' not in str(e.value)
  with pytest.raises(UserError, match=r'^1 picture cannot be read and data.max_unreadable is 0;'):
    read(source, options | {'max_unreadable': 0})


@pytest.mark.fault(
  'picture', 'nothing but empty files', 'ends with the first, the reason and the cure'
)
def test_nothing_but_unreadable_pictures_is_an_error(picture_folder):
  for file in picture_folder.glob('train/*/*.jpg'):
    file.write_bytes(b'')
  source = sources.open_split('image_folder', str(picture_folder), 'train')
  with pytest.raises(
    UserError,
    match=r'^16 pictures in a row cannot be read, /.* the first \(an empty file\); repair or',
  ):
    train(source, {'augment': 'none', 'image_size': 24})


# ---- arguments


@pytest.mark.parametrize(
  ('encoded', 'options', 'message'),
  [
    (
      True,
      {'augment': 'pad_crop'},
      "data.augment 'pad_crop' does not go with encoded pictures",
    ),
    (False, {'augment': 'random_resized_crop_flip'}, 'does not go with a set decoded in memory'),
    (False, {'image_size': 24}, '^data.image_size 24: the pictures are 16 x 16; use 16'),
    (False, {'batch_size': 10, 'process_count': 4}, 'batch size 10 is not divisible by 4'),
    (False, {'batch_size': 0}, 'batch size 0'),
  ],
)
def test_wrong_arguments_of_training_fail_at_once(pictures, encoded, options, message):
  source = pictures if encoded else small_arrays()
  settings = {'seed': 0, 'data_step': 0, 'batch_size': 8, 'augment': 'none', 'image_size': 16}
  with pytest.raises(UserError, match=message):
    pipeline.train_batches(source, **(settings | options))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'resize': 12}, '^data.eval_resize 12 is less than data.image_size 16'),
    ({'resize': 20}, '^data.eval_resize 20: pictures in memory are not resized; use 16'),
    ({'image_size': 8}, '^data.image_size 8: the pictures are 16 x 16; use 16'),
    ({'batch_size': 9, 'process_count': 2}, 'batch size 9 is not divisible by 2 processes'),
  ],
)
def test_wrong_arguments_of_evaluation_fail_at_once(options, message):
  with pytest.raises(UserError, match=message):
    pipeline.eval_batches(small_arrays(), **({'batch_size': 8, 'image_size': 16} | options))


# ---- prefetch


def prefetch_threads() -> list[threading.Thread]:
  return [thread for thread in threading.enumerate() if thread.name == 'prefetch']


def test_prefetch_keeps_the_order_and_ends_its_thread():
  assert list(pipeline.prefetch(iter(range(20)), lambda x: x * x)) == [x * x for x in range(20)]
  assert not prefetch_threads()


def test_prefetch_reads_ahead_by_depth_and_no_further():
  read = []
  batches = pipeline.prefetch((read.append(i) or i for i in itertools.count()), lambda x: x, 3)
  assert next(batches) == 0
  for _ in range(100):
    if len(read) >= 5:
      break
    time.sleep(0.01)
  time.sleep(0.05)
  assert len(read) == 5  # one taken, three that wait, one in hand
  batches.close()
  assert not prefetch_threads()


@pytest.mark.parametrize('fails', ['batches', 'put'])
def test_prefetch_raises_what_its_thread_raised_in_its_place(fails):
  def numbers():
    yield from (1, 2)
    if fails == 'batches':
      raise UserError('bad data')
    yield 3

  def put(x):
    if fails == 'put' and x == 3:
      raise UserError('bad data')
    return x

  batches = pipeline.prefetch(numbers(), put)
  assert [next(batches), next(batches)] == [1, 2]
  with pytest.raises(UserError, match='bad data'):
    next(batches)
  assert not prefetch_threads()


def test_closing_prefetch_closes_what_it_reads():
  closed = threading.Event()

  def numbers():
    try:
      yield from itertools.count()
    finally:
      closed.set()

  batches = pipeline.prefetch(numbers(), lambda x: x)
  next(batches)
  batches.close()
  assert closed.is_set()
  assert not prefetch_threads()
