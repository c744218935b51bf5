from __future__ import annotations

import pytest

from instantcharacter.batch.processes import join, on_main


def test_one_process_is_the_main_one():
    state = join("cpu")
    assert (state.num_processes, state.is_main_process, state.device.type) == (1, True, "cpu")
    assert on_main(lambda: {"a": 1}) == {"a": 1}
    with pytest.raises(ValueError, match="^no$"):
        on_main(lambda: (_ for _ in ()).throw(ValueError("no")))


def test_processes_that_are_not_connected_are_refused(monkeypatch):
    join("cpu")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 processes are started, but accelerate connects 1"):
        join("cpu")
