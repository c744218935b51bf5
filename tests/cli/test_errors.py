from __future__ import annotations

import pytest

from instantcharacter.cli.errors import hub_errors, one_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n  first \nsecond"), "first"),
        (ValueError(), "ValueError"),
        (FileNotFoundError(2, "No such file or directory", "gone.png"), "No such file or directory: gone.png"),
        (FileNotFoundError(2, "Not there", "a\nb\x1b[31m\udcff"), r"Not there: a\nb\x1b[31m\udcff"),
        (RuntimeError("CUDA out of memory."), "CUDA out of memory. Try --vram with less, --offload sequential, or"),
    ],
)
def test_error_is_one_line(error, line):
    assert one_line(error).startswith(line)
    assert "\n" not in one_line(error)


def test_hub_error_names_the_repositories_and_no_local_path(tmp_path):
    with pytest.raises(OSError, match="^a/b could not be had: offline$"), hub_errors(str(tmp_path), "a/b"):
        raise OSError("offline")


def test_error_of_a_local_path_is_unchanged(tmp_path):
    with pytest.raises(OSError, match="^broken$"), hub_errors(str(tmp_path)):
        raise OSError("broken")
