"""Words of earlier versions that must not return, see the table in CONTRIBUTING.md.

``ANYWHERE`` has words and names without another use here; no tracked text may have them, prose and test names included.

``AS_NAMES`` has good English words, which prose may use: a mask is *given*, a file is *kept*, a picture *looks* right,
a timestep is *drawn* from a distribution. As names of functions, classes, variables, parameters or attributes they say
nothing, so Python code must not define them. They count as whole names alone: a test may be ``test_order_is_kept``.

``draw`` is forbidden as a name in the package, where FLUX generates; the toy world and scripts draw with a pen.

Not checked: *cast*, since tensors are cast to another dtype; *views*, since tensors have them; *part* and *start* in
lower case; *say*, *make*, *there* and the like, which only a reader can judge.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXEMPT = {"tests/test_words.py", "CONTRIBUTING.md"}
"""The lists of the words themselves."""
TEXTS = {".py", ".md", ".json", ".yml", ".yaml", ".toml", ".txt", ".cff", ".sh", ".svg"}

ANYWHERE = re.compile(
    r"\blent\b|\bvisit(s|ed|ing|ors?)?\b|visitors?\b|\barrangements?\b|\bmake_room\b|\bsteps?[ _]back\b|\bbegin_with\b"
    r"|\bwarmth\b|\btelling\b|\b(spare|pinned)_part\b|\bstep_back\b|\b(drawing|learning|folded)attention\b|\bheadscale\b"
    r"|\bgo(es)?_home\b|\blikest\b|\bclass recorded\b|\brecorded\(",
    re.IGNORECASE,
)
AS_NAMES = {
    *("begun", "drawn", "given", "ground", "held", "kept", "look", "places", "said", "squares", "told", "towers"),
    *("work", "working", "Begun", "Computed", "Fit", "Held", "Part", "Start", "DESKTOP", "VIEW", "WORK"),
}
IN_THE_PACKAGE = {"draw"}


def tracked() -> list[str]:
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip("not a git repository")
    names = (name for name in run.stdout.split("\0") if Path(name).suffix in TEXTS and (ROOT / name).is_file())
    return [name for name in names if name not in EXEMPT and not name.startswith("tests/reference/")]


def defined_names(source: str) -> Iterator[tuple[int, str]]:
    """The line and the name of everything that a Python file defines or assigns."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname


def old_words(text: str) -> list[str]:
    lines = enumerate(text.splitlines(), 1)
    return [f"{number}: {found[0]}" for number, line in lines if (found := ANYWHERE.search(line))]


def old_names(name: str, source: str) -> list[str]:
    forbidden = AS_NAMES | (IN_THE_PACKAGE if name.startswith("instantcharacter/") else set())
    return [f"{line}: {word}" for line, word in defined_names(source) if word.lstrip("_") in forbidden]


def test_no_tracked_text_has_an_old_word():
    found = {name: old_words((ROOT / name).read_text(encoding="utf-8")) for name in tracked()}
    assert {name: words for name, words in found.items() if words} == {}


def test_no_code_defines_an_old_name():
    sources = {name: (ROOT / name).read_text(encoding="utf-8") for name in tracked() if name.endswith(".py")}
    found = {name: old_names(name, source) for name, source in sources.items()}
    assert {name: words for name, words in found.items() if words} == {}


@pytest.mark.parametrize(
    "text",
    [
        "with lent(module):",
        "A Visitor.",
        "visiting",
        "self.arrangement",
        "def step_back():",
        "Recorded(step)",
        "WARMTH = 1",
    ],
)
def test_old_words_are_found(text):
    assert old_words(text)


@pytest.mark.parametrize(
    "text", ["equivalent", "prerecorded vectors", "recorded.adapter()", "to begin with", "rearrangement"]
)
def test_other_words_are_no_old_words(text):
    assert old_words(text) == []


@pytest.mark.parametrize(
    "source",
    ["kept = 1", "def said(): ...", "class Part: ...", "def f(told): ...", "self.held = 1", "import a as places"],
)
def test_old_names_are_found(source):
    assert old_names("toy/models.py", source)


def test_draw_is_a_name_outside_of_the_package_alone():
    assert old_names("toy/world/figure.py", "def draw(): ...") == []
    assert old_names("instantcharacter/flux/pipeline.py", "def draw(): ...")


@pytest.mark.parametrize("source", ["pen.draw()", "def test_order_is_kept(): ...", "part = 1", "# what is said"])
def test_other_names_are_no_old_names(source):
    assert old_names("tests/test_words.py", source) == []


PLACEHOLDER = re.compile(r"^([A-Z][A-Z_]{3,}|.*\b(TODO|TBD|FIXME|XXX)\b.*)$", re.MULTILINE)
"""What was to be filled in later: a word in capitals alone on its line, or a note that says so."""


def test_documents_have_nothing_left_to_fill_in():
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in tracked() if name.endswith(".md")}
    assert {name: found for name, text in texts.items() if (found := PLACEHOLDER.findall(text))} == {}


@pytest.mark.parametrize("text", ["a\n\nBAD_INPUTS\n\nb", "TODO: measure", "| step | TBD |"])
def test_placeholders_are_found(text):
    assert PLACEHOLDER.search(text)
