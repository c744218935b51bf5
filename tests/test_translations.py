"""The Chinese texts say what the English ones say, as far as that can be seen without knowing Chinese."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import workflows
from support.markdown import differences

ROOT = Path(__file__).parents[1]
HELP = ROOT / "web/docs"
PAGES = sorted(path.stem for path in HELP.glob("*.md"))
PAGE = """# Load

Loads 2 files, and `reads` them. See [Apply](Apply.md).

![Load](images/load.png)

- Keep `scale` at 0.9.

| input | what it is |
| --- | --- |
| `scale` | Strength. |

```sh
make demo
```
"""
CHINESE = """# 加载

加载 2 个文件，并 `reads`。参见[应用](../Apply/zh.md)。

![加载](images/load.png)

- 把 `scale` 设为 0.9。

| 输入 | 说明 |
| --- | --- |
| `scale` | 强度。 |

```sh
make demo
```
"""
CHANGES = {
    "a number": ("0.9", "0.8"),
    "a sentence": ("Strength.", "Strength. It has a range."),
    "code": ("`scale` at", "`start` at"),
    "an address": ("(Apply.md)", "(Sampler.md)"),
    "a picture": ("load.png", "save.png"),
    "an item": ("\n| input", "- And another.\n\n| input"),
    "the level of a heading": ("# Load", "## Load"),
    "a row": ("| `scale` | Strength. |", "| `scale` | Strength. |\n| `end` | Of it. |"),
    "a column": ("| Strength. |", "| Strength. | |"),
    "the text of a fenced command": ("make demo", "make test"),
    "a last paragraph": ("```\n", "```\n\nMore"),
}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def has_chinese(text: str) -> bool:
    return any("\u4e00" <= letter <= "\u9fff" for letter in text)


def assert_equal(english: str, chinese: str) -> None:
    lines = differences(english, chinese)
    assert lines == [], "\n".join(lines)


def test_equal_pages_do_not_differ():
    assert differences(PAGE, CHINESE) == []


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_one_side_is_found(change):
    changed = CHANGES[change][1].join(PAGE.rsplit(CHANGES[change][0], 1))
    assert changed != PAGE
    assert differences(changed, CHINESE) != []
    assert differences(CHINESE, changed) != []


@pytest.mark.parametrize("name", PAGES)
def test_chinese_help_page_equals_the_english_one(name):
    chinese = read(f"web/docs/{name}/zh.md")
    assert has_chinese(chinese)
    assert_equal(read(f"web/docs/{name}.md"), chinese)


def test_every_chinese_help_page_has_an_english_one():
    assert sorted(path.parent.name for path in HELP.glob("*/*.md")) == PAGES


def test_chinese_readme_equals_the_english_one():
    english, chinese = read("README.md"), read("README.zh.md")
    assert "(README.zh.md)" in english.split("\n## ")[0]
    assert "(README.md)" in chinese.split("\n## ")[0]
    assert_equal(english, chinese)


@pytest.mark.parametrize("path", sorted(workflows.SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_chinese_half_of_a_note_equals_the_english_one(path):
    english, chinese = workflows.note(path)
    assert has_chinese(chinese)
    assert not has_chinese(english)
    assert_equal(english, chinese)


def texts(content: dict, *above: str) -> dict[tuple[str, ...], str]:
    """The texts of nested dictionaries, by path."""
    found: dict[tuple[str, ...], str] = {}
    for key, value in content.items():
        found |= texts(value, *above, key) if isinstance(value, dict) else {(*above, key): value}
    return found


def test_chinese_descriptions_of_nodes_equal_the_english_ones():
    english, chinese = (texts(json.loads(read(f"locales/{language}/nodeDefs.json"))) for language in ("en", "zh"))
    assert english.keys() == chinese.keys()
    lines = [(*path, line) for path, text in english.items() for line in differences(text, chinese[path])]
    assert lines == []
