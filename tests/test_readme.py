"""Figures of README and docs stand in the result files that are cited beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_CITED = re.compile(r"\]\((?:\.\./)?(eval/results/[^)]+)\)")
_MARKUP = re.compile(r"\]\([^)]*\)|`[^`]*`")
# Not H100, P99, v1: a figure has no letter before it.
_FIGURE = re.compile(r"(?<![\w.,-])\d+(?:,\d{3})*(?:\.\d+)?")


def _statements(markdown: str) -> Iterator[str]:
    """Rows of tables, and sentences of paragraphs."""
    for block in re.split(r"\n\s*\n", markdown):
        if block.startswith("|"):
            yield from block.splitlines()
        else:
            yield from re.split(r"(?<=[.:])\s+(?=[A-Z*`])", " ".join(block.split()))


def _figures(text: str) -> list[str]:
    return [figure.replace(",", "") for figure in _FIGURE.findall(_MARKUP.sub("]", text))]


def _stands_in(figure: str, results: str) -> bool:
    """Whether the results have the figure, or a number that it is rounded from; one digit alone is no rounding."""
    numbers = {Decimal(number.replace(",", "")) for number in _FIGURE.findall(results)}
    value = Decimal(figure)
    if value in numbers:
        return True
    digits = figure.replace(".", "").lstrip("0")
    return len(digits) > 1 and any(value == n.quantize(value, ROUND_HALF_UP) for n in numbers if n < 10**12)


def _cited() -> list[tuple[str, str]]:
    """Each figure of a document with the file that is cited beside it."""
    documents = [_ROOT / "README.md", *sorted((_ROOT / "docs").glob("*.md"))]
    statements = [line for document in documents for line in _statements(document.read_text())]
    return [(figure, path) for line in statements for path in _CITED.findall(line) for figure in _figures(line)]


def _claims() -> list[str]:
    table = (_ROOT / "README.md").read_text().split("## Claims")[1].split("\n## ")[0]
    return [line for line in table.splitlines() if line.startswith("|")][2:]


@pytest.mark.parametrize(("figure", "path"), _cited())
def test_a_figure_stands_in_the_file_cited_beside_it(figure: str, path: str) -> None:
    """As it is, or as the value that it is rounded from."""
    assert _stands_in(figure, (_ROOT / path).read_text())


@pytest.mark.parametrize("claim", _claims())
def test_a_claim_has_a_figure_and_cites_a_file_of_results(claim: str) -> None:
    """A claim without a figure, or without its file, is none."""
    assert _figures(claim.split("|")[2])
    assert [path for path in _CITED.findall(claim) if (_ROOT / path).is_file()]


@pytest.mark.parametrize(
    ("figure", "stands"),
    [("2.35", True), ("2.4", True), ("2.36", False), ("2.3", False), ("5000", True), ("2", False), ("35", False)],
)
def test_only_a_figure_of_the_file_stands_in_it(figure: str, stands: bool) -> None:
    """A last digit that differs, a whole number near one, or a part of a number, does not stand there."""
    assert _stands_in(figure, "| ours | 2.35 | 5,000 rows on an H100 |") is stands
