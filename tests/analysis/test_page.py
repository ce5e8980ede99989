import base64
import html.parser
import io

from PIL import Image

from afi_flax.analysis import page

EVIL = '<script src="http://x/y.js">"\'&amp;\n'


class Parsed(html.parser.HTMLParser):
  """Tags, and the text between them, of a page whose tags must close."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.open, self.texts = [], [], []
    self.feed(text)
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in ('meta', 'img'):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if data.strip():
      self.texts.append(data)

  def all(self, tag):
    return [attrs for name, attrs in self.tags if name == tag]


def png():
  file = io.BytesIO()
  Image.new('RGB', (300, 150)).save(file, 'png')
  return file.getvalue()


def rendered(text=EVIL):
  rows = [{text: text, 'n': 1234, 'share': '12.5%'}, {text: 'b', 'n': None, 'share': '–'}]
  section = page.Section(
    text,
    text,
    (page.Picture(text, png(), text),),
    (page.Table(text, rows, text), page.Table(text, rows, folded=False)),
  )
  return page.render(text, text, [section])


def test_text_is_never_taken_for_html():
  text = rendered()
  parsed = Parsed(text)
  assert not parsed.all('script')
  assert {tag for tag, _ in parsed.tags} <= {
    'html', 'head', 'meta', 'title', 'style', 'body', 'h1', 'h2', 'p', 'nav', 'ul', 'li', 'a',
    'section', 'figure', 'figcaption', 'img', 'div', 'details', 'summary', 'table', 'thead',
    'tbody', 'tr', 'th', 'td',
  }  # fmt: skip
  shown = EVIL.replace('\n', '\\n')
  assert sum(each == shown for each in parsed.texts) >= 8, 'as it was given, on one line'
  assert parsed.all('img')[0]['alt'] == shown


def test_a_name_that_is_no_text_can_be_written():
  assert '\\udcff' in rendered('\udcff').encode().decode()


def test_nothing_comes_from_outside():
  text = rendered('a')
  parsed = Parsed(text)
  assert not parsed.all('link')
  assert 'url(' not in text
  assert '@import' not in text
  for attrs in parsed.all('img'):
    kind, _, data = attrs['src'].partition(',')
    assert kind == 'data:image/png;base64'
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (300, 150)
    assert (attrs['width'], attrs['height']) == ('300', '150')
  assert all(attrs['href'].startswith('#') for attrs in parsed.all('a'))


def test_tables_have_their_numbers():
  parsed = Parsed(rendered('a'))
  assert parsed.texts.count('1,234') == 2
  classes = [attrs.get('class') for attrs in parsed.all('th')]
  assert classes == [None, 'number', 'number'] * 2
