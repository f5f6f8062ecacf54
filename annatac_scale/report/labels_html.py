"""The report of a labels data set as one HTML file that needs no other: tables, and pictures within."""

import base64
from html import escape
from pathlib import Path

from annatac_scale.report.labels import LabelsReport, TextTable
from annatac_scale.report.labels_pictures import draw_pictures
from annatac_scale.store.files import write_whole

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
div { overflow-x: auto } img { max-width: 100% }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums }
th, td { padding: 2px 10px; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th.text, td.text { text-align: left }
"""


def write_page(report: LabelsReport, path: Path) -> None:
    """Write the page, whole or not at all."""
    write_whole(path, page(report).encode())


def page(report: LabelsReport) -> str:
    """The page. Equal data sets give equal pages; all that comes from files is escaped."""
    title, *facts = report.facts()
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        "<ul>",
        *(f"<li>{escape(fact)}</li>" for fact in facts),
        "</ul>",
        *(_picture(what, data) for what, data in draw_pictures(report.summary).items()),
        *map(_table, [report.label_table(), report.sample_table(), *report.set_tables()]),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _picture(what: str, data: bytes) -> str:
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return f'<h2>{escape(what)}</h2>\n<div><img alt="{escape(what)}" src="{source}"></div>'


def _table(table: TextTable) -> str:
    rows = [_row(row, table.n_texts, "td" if number else "th") for number, row in enumerate(table.rows)]
    return "\n".join([f"<h2>{escape(table.title)}</h2>", "<div><table>", *rows, "</table></div>"])


def _row(cells: list[str], n_texts: int, tag: str) -> str:
    kinds = [' class="text"' if number < n_texts else "" for number in range(len(cells))]
    fields = [f"<{tag}{kind}>{escape(text)}</{tag}>" for kind, text in zip(kinds, cells, strict=True)]
    return f"<tr>{''.join(fields)}</tr>"
