"""What can be compared of a Markdown text and its translation without knowing the language: the blocks in their order,
and the code, addresses, numbers and sentences of each."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

CODE = re.compile(r"`([^`]+)`")
TARGET = re.compile(r"(?<=\])(?:\(|\[|: )([^])\s]+)[])]?")
EMPHASIS = re.compile(r"\*+")
NUMBER = re.compile(r"(?<![A-Za-z0-9_.-])\d+(?:[.,:×-]\d+)*|[¼½¾]")
SENTENCE = re.compile(r"[.?!][”\")*]*(?=\s|$)|[。？！]")
BLOCK = re.compile(r"(\s*)(#{1,6}|[-*]|\d+\.|>)\s+(.*)")


class Block(NamedTuple):
    """A heading, a paragraph, an item of a list, a cell of a table, or a fenced piece of code.

    Attributes:
        line: where it begins, from 1.
        kind: what it is: with the level of headings and lists, the column and the number of columns of cells.
        text: its text; lines that Markdown joins are joined.
    """

    line: int
    kind: str
    text: str


def blocks(text: str) -> list[Block]:
    """The blocks of a Markdown text."""
    found: list[Block] = []
    fenced = joins = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip().startswith("```"):
            fenced, joins = not fenced, False
            if fenced:
                found.append(Block(number, "code", line.strip()))
        elif fenced or (joins and line.strip() and not BLOCK.match(line)):
            separator = "\n" if fenced else " "
            found[-1] = found[-1]._replace(text=found[-1].text + separator + line.strip())
        elif line.startswith("|"):
            cells = line.strip().strip("|").split("|")
            if not re.fullmatch(r"[|\s:-]+", line):
                found += [Block(number, f"cell {i} of {len(cells)}", cell) for i, cell in enumerate(cells, 1)]
        elif match := BLOCK.match(line):
            found.append(Block(number, match[1] + match[2], match[3]))
            joins = not match[2].startswith("#")
        else:
            joins = bool(line.strip())
            found += [Block(number, "paragraph", line)] if joins else []
    return found


def facts(block: Block) -> dict[str, list[str]]:
    """What a translation of a block shares with it. Within a block the order is free: that of words differs, too."""
    if block.kind == "code":
        return {"code": block.text.splitlines()}
    words = CODE.sub("", TARGET.sub("", block.text))
    return {
        "code": sorted(CODE.findall(block.text)),
        "addresses": sorted(map(same_address, TARGET.findall(block.text))),
        "emphasis": sorted(EMPHASIS.findall(words)),
        "numbers": sorted(NUMBER.findall(words)),
        "sentences": ["." for _ in SENTENCE.findall(EMPHASIS.sub("", words))],
    }


def same_address(address: str) -> str:
    """An address as both languages have it: a page stands for its translation, and headings have other words."""
    address = re.sub(r"(?:\.\./)?(\w+)/zh\.md", r"\1.md", address.replace("README.zh.md", "README.md"))
    return re.sub(r"#.*", "#", address) if "://" not in address else address


def differences(text: str, translation: str) -> list[str]:
    """Where a translation lags: a line for each difference, or one for the first block that only one of them has."""
    ours, theirs = blocks(text), blocks(translation)
    pairs = list(zip(ours, theirs))
    for a, b in pairs:
        if a.kind != b.kind:
            return [f"lines {a.line} and {b.line}: {a.kind} and {b.kind}: {a.text[:99]!r} and {b.text[:99]!r}"]
    found = [
        f"lines {a.line} and {b.line}: {fact}: {missing(value, facts(b)[fact])} and {missing(facts(b)[fact], value)}"
        for a, b in pairs
        for fact, value in facts(a).items()
        if value != facts(b)[fact]
    ]
    return found if len(ours) == len(theirs) else [*found, f"{len(ours)} and {len(theirs)} blocks"]


def missing(values: list[str], others: list[str]) -> list[str]:
    """The values that the others lack."""
    return list((Counter(values) - Counter(others)).elements())
