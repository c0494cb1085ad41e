"""Draws docs/processes.svg, the processes of an engine and what they send: ``python docs/draw_processes.py``."""

from __future__ import annotations

from html import escape
from pathlib import Path

_WIDTH, _HEIGHT = 860, 330
_BOX_WIDTH, _BOX_HEIGHT = 180, 80
_LINE = 17

# Name, what is in it, left, top.
_PROCESSES = (
    ("driver", ("rows, plan, journal", "no torch, no SGLang"), 30, 60),
    ("template", ("SGLang, imported once", "one thread"), 30, 210),
    ("engine", ("SGLang's tokenizer manager", "chats to prompts"), 330, 60),
    ("scheduler", ("model, KV, pins, steps",), 650, 60),
    ("detokenizer", ("ids to texts",), 650, 210),
)
# From, to, as points; what goes along; where it is written; whether it is a fork.
_ARROWS = (
    ((210, 85), (330, 85), "runs of a plan", (270, 78), False),
    ((330, 120), (210, 120), "answers", (270, 113), False),
    ((510, 85), (650, 85), "runs of a plan", (580, 78), False),
    ((740, 140), (740, 210), "finished ids", (785, 180), False),
    ((650, 255), (420, 140), "texts", (515, 212), False),
    ((120, 140), (120, 210), "starts", (145, 180), True),
    ((210, 235), (390, 140), "forks", (285, 185), True),
    ((510, 120), (650, 120), "forks", (580, 113), True),
    ((495, 140), (650, 225), "forks", (600, 183), True),
)


def _text(x: float, y: float, text: str, *, anchor: str = "middle", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def _box(name: str, inside: tuple[str, ...], left: int, top: int) -> list[str]:
    middle = left + _BOX_WIDTH / 2
    box = f'<rect x="{left}" y="{top}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="6" fill="#eef" stroke="#335"/>'
    lines = [_text(middle, top + 42 + _LINE * i, line) for i, line in enumerate(inside)]
    return [box, _text(middle, top + 22, name, bold=True), *lines]


def _arrow(start: tuple[int, int], end: tuple[int, int], is_fork: bool) -> str:
    dashes = ' stroke-dasharray="5 4"' if is_fork else ""
    (x1, y1), (x2, y2) = start, end
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#335" marker-end="url(#tip)"{dashes}/>'


def draw() -> str:
    """The picture, as SVG."""
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<defs>{tip}<path d="M0 0L8 4L0 8z" fill="#335"/></marker></defs>',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        '<rect x="15" y="25" width="510" height="280" rx="10" fill="none" stroke="#999" stroke-dasharray="2 4"/>',
        _text(25, 44, "on a server these three are one process, the HTTP server's", anchor="start"),
    ]
    for start, end, label, (x, y), is_fork in _ARROWS:
        parts += [_arrow(start, end, is_fork), _text(x, y, label)]
    for process in _PROCESSES:
        parts += _box(*process)
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_name("processes.svg").write_text(draw())
