from __future__ import annotations

import pytest
from PIL import Image
from support import browser

from instantcharacter.batch.folder import OutputFolder
from instantcharacter.batch.page import write_page

PROMPT = "<script>document.title = 'broken'</script> & \"a fox\" 狐狸 " + "x" * 300


@pytest.fixture
def folder(tmp_path, jobs_of):
    """The folder of a job with a page; one line failed."""
    output = OutputFolder(tmp_path / "ou t#1")
    rows = [{"prompt": PROMPT, "output": "one two/50% #1 'fox'.png", "size": "64x32"}]
    rows += [{"prompt": f"picture {i}", "size": 64, "true_cfg": 2, "negative_prompt": "<b>snow"} for i in range(5)]
    jobs = jobs_of(*rows)
    for i, job in enumerate(jobs[:-1]):
        output.save(job, Image.new("RGB", job.settings.size, f"hsl({60 * i}, 80%, 50%)"), 1.0, {})
    output.save_error(jobs[-1], "out of <luck>")
    write_page(output.path, output.entries(jobs), len(jobs))
    return output.path


def test_a_page_escapes_everything_and_names_no_other_address(folder):
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<b>" not in text
    assert "<luck>" not in text
    assert "http" not in text
    assert "5 of 6 pictures" in text
    assert "line 6, 0006.png: out of &lt;luck&gt;" in text


@pytest.mark.slow
@pytest.mark.skipif(browser.why_not() is not None, reason=str(browser.why_not()))
def test_the_page_opens_from_the_disk_with_its_pictures(folder, tmp_path):
    from playwright.sync_api import sync_playwright

    requests, errors = [], []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser.CHROMIUM, args=browser.ARGUMENTS)
        page = chromium.new_page(viewport={"width": 1000, "height": 700})
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: errors.append(message.text))
        page.goto((folder / "index.html").as_uri())
        page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth)")
        widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
        title, text = page.title(), page.inner_text("body")
        is_wide = page.evaluate("document.documentElement.scrollWidth > innerWidth")
        page.screenshot(path=tmp_path / "page.png")
        chromium.close()
    assert widths == [64] * 5
    assert title == "5 of 6 pictures"
    assert PROMPT in text
    assert "seed 3" in text
    assert "reference.png" in text
    assert errors == []
    assert not is_wide
    assert all(url.startswith("file://") for url in requests)
