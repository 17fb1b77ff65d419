"""The look of report.html: one page without a single request, light and dark, from phone to desktop."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

STYLE = """
:root{color-scheme:light dark;--bg:#f6f8fa;--card:#fff;--ink:#1f2328;--muted:#59636e;--line:#d9dee4;--c0:#2f6fdb;
--c1:#c2410c;--c2:#15803d;--c3:#8b3fc7;--c4:#a16207;--c5:#be185d;--bad:#c62828;--good:#1a7f37;--warn:#9a6700}
@media(prefers-color-scheme:dark){:root{--bg:#0d1117;--card:#161b22;--ink:#e6edf3;--muted:#9aa5b1;--line:#30363d;
--c0:#6ea8fe;--c1:#f59e5b;--c2:#4cc26b;--c3:#c792f5;--c4:#e3b341;--c5:#f77fb3;--bad:#ff7b72;--good:#4cc26b;--warn:#e3b341}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main,header,footer{max-width:1120px;margin:0 auto;padding:0 20px}
header{padding-top:32px}
.brand{color:var(--muted);font-size:13px;letter-spacing:.04em}
h1{font-size:30px;line-height:1.2;margin:4px 0 6px;overflow-wrap:anywhere}
h1 small{font-weight:400;color:var(--muted);font-size:18px}
h2{font-size:19px;margin:36px 0 12px}
.pill{display:inline-block;border:1px solid currentColor;border-radius:99px;padding:1px 10px;font-size:13px;
font-weight:600}
.good{color:var(--good)}.warn{color:var(--warn)}.bad{color:var(--bad)}
.card,figure{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px;margin:0}
.lead{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:20px 0 12px}
.lead div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 16px}
.lead b{display:block;white-space:nowrap;font-size:25px;line-height:1.2;font-variant-numeric:tabular-nums}
.lead span{color:var(--muted);font-size:13px}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(215px,1fr));gap:12px 24px;margin:0}
dt{color:var(--muted);font-size:13px}
dd{margin:0;overflow-wrap:anywhere}
.tables,.charts{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr));align-items:start}
.prompts{display:grid;gap:16px;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr))}
.prompt{display:grid;grid-template-columns:auto 1fr;gap:6px 14px;align-content:start}
.prompt .asked{overflow-wrap:anywhere;align-self:center}
.prompt .asked:first-child{grid-column:1/-1}
.prompt .wanted span,.prompt .dim{color:var(--muted)}
.prompt .wanted{font-size:13px;margin-top:2px}
.prompt .thumbnails{display:flex;flex-wrap:wrap;gap:6px;max-width:210px}
.prompt img{display:block;width:96px;height:96px;object-fit:contain;border-radius:6px;border:1px solid var(--line);
background:#fff;image-rendering:pixelated}
.prompt table{grid-column:1/-1;align-self:start;display:block;max-height:290px;overflow-y:auto}
.prompt tbody,.prompt thead{display:table;width:100%;table-layout:fixed}
.prompt th:first-child,.prompt td:first-child{width:116px;color:var(--muted)}
.prompt th,.prompt td{text-align:left;vertical-align:top;white-space:normal;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding-bottom:6px}
th,td{padding:5px 10px 5px 0;text-align:right;border-top:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}
thead th{color:var(--muted);font-size:13px;font-weight:400;border:0}
td.big{font-weight:600}
td.dim,.note{color:var(--muted)}
.note{font-size:13px;margin:8px 0 0}
figure.picture{padding:12px;overflow-x:auto;margin-bottom:16px}
figure.picture img{display:block;width:100%;height:auto;background:#fff;border-radius:6px;min-width:560px;margin:0 auto}
figcaption{display:flex;flex-wrap:wrap;gap:2px 12px;align-items:baseline;margin-bottom:10px}
.chip{font-size:13px;color:var(--muted)}
.chip b{color:var(--ink);font-weight:600}
.chip::before{content:"";display:inline-block;width:10px;height:3px;border-radius:2px;margin-right:5px;vertical-align:middle;
background:currentColor}
.chip.c0::before{background:var(--c0)}.chip.c1::before{background:var(--c1)}.chip.c2::before{background:var(--c2)}
.chip.c3::before{background:var(--c3)}.chip.c4::before{background:var(--c4)}.chip.c5::before{background:var(--c5)}
.plot{position:relative;height:190px;padding:4px 8px 22px 52px}
.big-chart .plot{height:270px}
.plot svg{display:block;width:100%;height:100%;overflow:visible}
.ys,.xs{position:absolute;font-size:12px;color:var(--muted);font-variant-numeric:tabular-nums}
.ys{left:0;width:46px;top:4px;bottom:22px}.xs{left:52px;right:8px;bottom:0;height:18px}
.ys span,.xs span{position:absolute;white-space:nowrap}
.ys span{right:0;transform:translateY(-50%)}.xs span{transform:translateX(-50%)}
svg *{vector-effect:non-scaling-stroke}
polyline,path{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
path{stroke-width:6}
polygon{opacity:.2;stroke:none}
.grid{stroke:var(--line);stroke-width:1}
.mark{stroke:var(--muted);stroke-width:1;stroke-dasharray:3 3}
.base{stroke-dasharray:6 5;stroke-width:1.5;opacity:.8}
.c0{stroke:var(--c0);fill:var(--c0)}.c1{stroke:var(--c1);fill:var(--c1)}.c2{stroke:var(--c2);fill:var(--c2)}
.c3{stroke:var(--c3);fill:var(--c3)}.c4{stroke:var(--c4);fill:var(--c4)}.c5{stroke:var(--c5);fill:var(--c5)}
polyline,path,.base{fill:none!important}polygon{stroke:none!important}
details{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 16px;margin-bottom:16px}
summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;font:13px/1.45 ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;margin:12px 0 0}
footer{color:var(--muted);font-size:13px;padding-top:24px;padding-bottom:40px}
@media(max-width:520px){main,header,footer{padding-left:12px;padding-right:12px}
h1{font-size:24px}.lead b{font-size:21px}.lead div{padding:10px}
.lead{grid-template-columns:repeat(auto-fit,minmax(104px,1fr))}
.plot{padding-left:46px}
.ys{width:40px}.xs{left:46px}}
@media print{figure,.card,details{break-inside:avoid}.prompt table{max-height:none}}
"""


def page(title: str, header: str, body: Iterable[str], footer: str) -> str:
    """The whole document. Its policy forbids every request, so it looks the same offline."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><header>{header}</header>\n<main>{chr(10).join(body)}</main>\n<footer>{footer}</footer></body></html>\n"
    )


def section(title: str, *content: str) -> str:
    """A heading and what is below it; nothing where there is nothing below it."""
    inside = "".join(content)
    return f"<section><h2>{escape(title)}</h2>{inside}</section>" if inside else ""


def picture(path: Path, alt: str) -> str:
    """A PNG inside the document; nothing where there is none. On a phone it scrolls rather than shrinks too far."""
    if not path.is_file():
        return ""
    content = path.read_bytes()
    width = int.from_bytes(content[16:20], "big") // 2  # of the PNG header; pictures are drawn at twice their size
    data = base64.b64encode(content).decode()
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}" style="max-width:{width}px">'
    return f'<figure class="picture">{image}</figure>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Terms and what they are."""
    rows = "".join(f"<div><dt>{escape(term)}</dt><dd>{escape(text)}</dd></div>" for term, text in pairs if text)
    return f'<div class="card"><dl>{rows}</dl></div>'


def tiles(pairs: Iterable[tuple[str, str]]) -> str:
    """Large figures with a small name."""
    figures = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in pairs)
    return f'<div class="lead">{figures}</div>'


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> str:
    """A table whose second column is the one that matters."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join("<tr>" + "".join(_cell(place, cell) for place, cell in enumerate(row)) + "</tr>" for row in rows)
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<div class="card"><div class="scroll"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{below}</div>"
    )


def folded(title: str, text: str) -> str:
    """Preformatted text behind a click."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def _cell(place: int, text: str) -> str:
    kind = ("", ' class="big"')[place == 1] if place < 2 else ' class="dim"'
    return f"<td{kind}>{escape(text)}</td>"
