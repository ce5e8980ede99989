"""A page of figures, captions and tables in one HTML file, which needs nothing from outside.

Pictures are inline PNGs and there is no script: it opens anywhere, on a phone and on paper too.
"""

import base64
import dataclasses
import html
import re
import struct
from collections.abc import Sequence

from afi_flax.analysis import style, tables
from afi_flax.errors import shown

_CSS = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 62rem; padding: 1.2rem; color: #222; background: #fff;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem; padding-top: .8rem; border-top: 1px solid #d8dce1; }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
.made { color: #5c636b; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; list-style: none; margin: .8rem 0;
  padding: 0; }
a { color: #2f5f95; }
.wide { overflow-x: auto; }
figure { margin: .9rem 0 1.2rem; }
figure img { display: block; width: 100%; max-width: var(--width); height: auto; }
figcaption { color: #5c636b; font-size: .85rem; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #5c636b; padding: .2rem 0; }
th, td { padding: .16rem .8rem .16rem 0; text-align: left; border-bottom: 1px solid #eceef1;
  vertical-align: top; overflow-wrap: anywhere; max-width: 26rem; }
th { border-bottom-color: #b9bfc7; font-weight: 600; }
.number { text-align: right; }
summary { cursor: pointer; color: #2f5f95; margin: .4rem 0; }
details .wide { max-height: 30rem; overflow: auto; }
@media (max-width: 40rem) {
  body { padding: .8rem; }
  figure img { min-width: min(var(--width), 36rem); }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  h2, summary, section > p { break-after: avoid; }
  figure, tr, p { break-inside: avoid; }
  figure img { max-height: 23cm; width: auto; max-width: 100%; }
  .wide { overflow: visible; }
}
"""


@dataclasses.dataclass(frozen=True)
class Picture:
  """A figure of the page.

  Attributes:
    file: its name beside the page.
    png: the file.
    alt: what it shows, for those who do not see it.
  """

  file: str
  png: bytes
  alt: str


@dataclasses.dataclass(frozen=True)
class Table:
  """The numbers of a figure.

  Attributes:
    title: in words.
    rows: as `tables.text` takes them.
    file: that has them too, or more of them; '': none.
    folded: shown only when it is asked for.
  """

  title: str
  rows: Sequence[tables.Row]
  file: str = ''
  folded: bool = True


@dataclasses.dataclass(frozen=True)
class Section:
  """A heading, what to look for, figures and their numbers.

  Attributes:
    title: of the section.
    text: how its figures are read, one sentence or a few.
    pictures: in the order of the page.
    tables: under them.
  """

  title: str
  text: str
  pictures: tuple[Picture, ...] = ()
  tables: tuple[Table, ...] = ()


def render(title: str, made: str, sections: Sequence[Section]) -> str:
  """The page.

  Args:
    title: of the page.
    made: from what, and when.
    sections: the first one needs no link to it.

  Returns:
    HTML 5. All that is given is text: none of it is taken for HTML.
  """
  named = [(section, f's{k}') for k, section in enumerate(sections)]
  links = ''.join(f'<li><a href="#{at}">{_text(s.title)}</a></li>' for s, at in named)
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{_text(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n'
    f'<h1>{_text(title)}</h1>\n<p class="made">{_text(made)}</p>\n'
    f'<nav><ul>{links}</ul></nav>\n' + '\n'.join(_section(s, at) for s, at in named)
    + '\n</body>\n</html>\n'
  )  # fmt: skip


def _section(section: Section, at: str) -> str:
  parts = [
    f'<section id="{at}">',
    f'<h2>{_text(section.title)}</h2>',
    f'<p>{_text(section.text)}</p>',
  ]
  parts += map(_figure, section.pictures)
  parts += map(_table, section.tables)
  return '\n'.join([*parts, '</section>'])


def _figure(picture: Picture) -> str:
  width, height = struct.unpack('>II', picture.png[16:24])  # of the PNG's first chunk
  source = base64.b64encode(picture.png).decode()
  return (
    f'<figure><div class="wide"><img style="--width:{round(width * 96 / style.DPI)}px" '
    f'width="{width}" height="{height}" alt="{_text(picture.alt)}" '
    f'src="data:image/png;base64,{source}"></div>'
    f'<figcaption>{_text(picture.file)}</figcaption></figure>'
  )


def _table(table: Table) -> str:
  keys = list(table.rows[0])
  head = ''.join(f'<th scope="col"{_class(table.rows, key)}>{_text(key)}</th>' for key in keys)
  rows = ''.join(
    '<tr>'
    + ''.join(f'<td{_class(table.rows, k)}>{_text(_cell(row[k]))}</td>' for k in keys)
    + '</tr>\n'
    for row in table.rows
  )
  whole = (
    f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n'
    f'<tbody>\n{rows}</tbody></table></div>'
  )
  words = _text(table.title + (f' ({table.file})' if table.file else ''))
  if table.folded:
    return f'<details><summary>{words}</summary>\n{whole}\n</details>'
  return f'<p class="made">{words}</p>\n{whole}'


def _class(rows: Sequence[tables.Row], key: str) -> str:
  cells = [_cell(row[key]) for row in rows]
  is_number = all(re.fullmatch(r'[-+−]?[\d,.]*\d.{0,8}|–|', cell) for cell in cells)
  return ' class="number"' if is_number else ''


def _cell(value) -> str:
  if value is None:
    return '–'
  return f'{value:,}' if isinstance(value, int) else str(value)


def _text(words: str) -> str:
  return html.escape(shown(words))
