from __future__ import annotations

import pytest
from PIL import Image

from instantcharacter.cli import demo
from instantcharacter.cli.main import main
from instantcharacter.files import catalog


def test_demo_without_the_toy_models_names_the_repository(monkeypatch, tmp_path, error_line):
    monkeypatch.setattr(catalog, "TOY_FOLDER", tmp_path / "assets/toy")
    assert main(["demo", f"--output={tmp_path}/demo.png"]) == 2
    assert error_line().endswith("the toy models come with the pack's repository; clone it")


@pytest.mark.parametrize("rows", [1, 3])
def test_sheet_has_a_column_for_the_reference_and_each_prompt(rows):
    reference, picture = (Image.new("RGB", (demo.SIDE, demo.SIDE), color) for color in ("red", "blue"))
    page = demo.sheet(reference, [("title", [picture] * len(demo.PROMPTS))] * rows)
    colors = {color: count for count, color in page.getcolors(maxcolors=page.width * page.height)}
    assert colors[(255, 0, 0)] == demo.SIDE**2
    assert colors[(0, 0, 255)] == demo.SIDE**2 * len(demo.PROMPTS) * rows
