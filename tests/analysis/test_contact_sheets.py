import numpy as np
import pytest

from afi_flax.analysis import contact_sheets, style
from afi_flax.analysis.contact_sheets import Caption, Explained
from afi_flax.analysis.grad_cam import Cams

CLASSES = ('cat', 'dog', 'a_class_whose_name_is_longer_than_a_picture')


def explained(label, count, seed=0):
  rng = np.random.default_rng(seed)
  probabilities = rng.dirichlet(np.ones(3), count).astype(np.float32)
  cams = Cams(
    rng.random((count, 4, 4), np.float32),
    probabilities.argmax(axis=1).astype(np.int32),
    probabilities,
  )
  return Explained(label, rng.integers(0, 256, (count, 16, 16, 3), np.uint8), cams)


def words(fig):
  return [text.get_text() for axes in fig.axes for text in axes.texts]


def test_the_heat_is_where_it_belongs():
  heat = np.zeros((4, 4), np.float32)
  heat[0, 3] = 1
  image = np.full((32, 32, 3), 128, np.uint8)
  drawn = contact_sheets.overlay(image, heat).astype(int).sum(axis=2)
  half = len(drawn) // 2
  assert drawn.shape[0] >= 300
  assert drawn[:half, half:].mean() > drawn[:half, :half].mean() + 40
  assert drawn[half:].max() - drawn[half:].min() < 60, 'nothing there'
  assert np.abs(np.diff(drawn, axis=1)).max() < 20, 'smooth'


def test_no_heat_is_the_picture_in_the_dark():
  image = np.full((320, 320, 3), 200, np.uint8)
  drawn = contact_sheets.overlay(image, np.zeros((2, 2), np.float32))
  assert drawn.std(axis=(0, 1)).max() == 0
  assert drawn.mean() < 100


@pytest.mark.parametrize('runs', [1, 2])
def test_all_words_are_inside_the_figure(runs):
  several = [explained('afi', 2, k) for k in range(runs)]
  captions = [Caption(('cat',), 'test[:300] example 202'), Caption(('dog',), 'b.jpg')]
  fig = contact_sheets.grad_cam(several, captions, CLASSES, 'Grad-CAM, stage 3')
  fig.canvas.draw()
  for text in (text for axes in fig.axes for text in axes.texts):
    box = text.get_window_extent()
    assert fig.bbox.x0 <= box.x0, text
    assert box.x1 <= fig.bbox.x1, text
  assert 'example 202' in words(fig), 'the number tells it apart'


def test_a_row_a_picture_with_what_each_network_says():
  both = [explained('plain', 3, 0), explained('afi', 3, 1)]
  captions = [Caption(('cat',), 'a.jpg'), Caption((), 'x/y/b.jpg'), Caption(('dog',), 'c.jpg')]
  fig = contact_sheets.grad_cam(both, captions, CLASSES, 'Grad-CAM, stage 3')
  pictures = [axes for axes in fig.axes[:-1]]
  assert len(pictures) == 9
  assert [axes.get_title() for axes in pictures[:3]] == ['picture', 'plain', 'afi']
  shown = words(fig)
  assert shown[:2] == ['true: cat', 'a.jpg']
  assert 'b.jpg' in shown
  for each in both:
    for k, caption in enumerate(captions):
      best = int(each.cams.probabilities[k].argmax())
      mark = {(): '', (CLASSES[best],): '✓ '}.get(caption.true, '✗ ')
      name = style.short(CLASSES[best], 16)
      assert f'{mark}{name} {each.cams.probabilities[k, best]:.0%}' in shown


def test_a_map_without_heat_says_so():
  one = explained('run', 2)
  one.cams.heat[1] = 0
  fig = contact_sheets.grad_cam([one], [Caption((), 'a'), Caption((), 'b')], CLASSES, 'm')
  assert words(fig).count('no place speaks for it') == 1


def test_many_pictures_stand_in_two_groups():
  one = explained('run', 7)
  fig = contact_sheets.grad_cam([one], [Caption((), str(k)) for k in range(7)], CLASSES, 'm')
  boxes = [axes.get_position().extents for axes in fig.axes]
  assert len(boxes) == 15
  for k, (left, low, right, high) in enumerate(boxes):
    assert 0 <= left < right <= 1
    assert 0 <= low < high <= 1
    for x0, y0, x1, y1 in boxes[:k]:
      assert right <= x0 or x1 <= left or high <= y0 or y1 <= low, 'none covers another'


def test_mistakes_have_both_classes():
  images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
  captions = [('cat', 'dog', 0.87), ('dog', CLASSES[2], 0.9999999)]
  fig = contact_sheets.mistakes(images, captions, 'title')
  assert [words(fig)[k] for k in (0, 1, 3)] == ['✗ dog 87%', 'true: cat', 'true: dog']
  assert words(fig)[2].endswith(' 99.9%'), 'nothing is certain'
  assert style.png(fig).startswith(b'\x89PNG')
