from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.training_world import equal, weights

from instantcharacter.training import train


def states(folder: Path) -> dict[str, int]:
    """The states in a training's folder and their steps."""
    return {path.name: torch.load(path)["step"] for path in sorted(folder.glob("*.pt"))}


def spoil(path: Path, how: str) -> None:
    """Break a state's file."""
    if how == "missing":
        path.unlink()
    elif how == "cut off":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "empty":
        os.truncate(path, 0)
    elif how == "another pickle":
        torch.save({"step": 3}, path)
    else:
        state = torch.load(path)
        tensors = next(iter(state["optimizer"]["state"].values())) if how == "NaN moments" else state["weights"]
        next(tensor for tensor in tensors.values() if tensor.ndim).view(-1)[3] = float("nan" if "NaN" in how else "inf")
        torch.save(state, path)


SPOILED = ["missing", "cut off", "empty", "another pickle", "NaN moments", "NaN weights", "infinite weights"]


@pytest.fixture
def saved(config):
    """A training of 4 steps that ended after 3, with a state of each."""
    config = replace(config, save_every=1)
    train(replace(config, steps=3))
    return config


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_last_states_stay(saved, tmp_path, count):
    output = tmp_path / "some"
    train(replace(saved, output=output, keep_states=count))
    assert states(output) == dict(list({"state.1.pt": 3, "state.2.pt": 2, "state.pt": 4}.items())[: count - 1]) | {
        "state.pt": 4
    }


@pytest.mark.parametrize("how", SPOILED)
def test_a_broken_newest_state_falls_back_to_the_one_before_and_says_so(saved, tmp_path, caplog, how):
    whole = train(replace(saved, output=tmp_path / "whole"))
    spoil(saved.output / "state.pt", how)
    with caplog.at_level(logging.WARNING):
        resumed = train(saved)
    assert equal(weights(whole), weights(resumed))
    messages = [record.getMessage() for record in caplog.records if "goes on from" in record.getMessage()]
    if how == "missing":
        assert not messages
    else:
        assert len(messages) == 1
        assert str(saved.output / "state.pt") in messages[0]
        assert messages[0].endswith("The training goes on from state.1.pt, step 2.")


@pytest.mark.parametrize("how", [how for how in SPOILED if how != "missing"])
def test_without_a_good_state_nothing_is_trained_or_written(saved, how):
    for name in ("state.pt", "state.1.pt"):
        spoil(saved.output / name, how)
    before = {path.name: path.read_bytes() for path in saved.output.glob("*.*t*")}
    with pytest.raises(ValueError, match=r"state\.pt .*No other state is good: name another output"):
        train(saved, on_step=lambda *_: pytest.fail("it trained"))
    assert before == {path.name: path.read_bytes() for path in saved.output.glob("*.*t*")}


def test_a_training_that_was_killed_before_its_last_adapter_writes_it(saved):
    adapter = train(saved)
    whole = weights(adapter)
    adapter.unlink()
    assert equal(whole, weights(train(saved)))


def test_a_training_that_ended_writes_nothing_again(saved):
    adapter = train(saved)
    before = adapter.stat().st_ino
    assert train(saved).stat().st_ino == before


@pytest.mark.parametrize("taken_by", ["adapter", "folder", "file above"])
def test_output_that_is_not_the_trainings_own_is_refused_before_models_are_loaded(
    config, tmp_path, monkeypatch, taken_by
):
    monkeypatch.setattr("instantcharacter.training.launch.Accelerator", lambda **_: pytest.fail("it began"))
    mine = tmp_path / "mine/adapter.safetensors"
    mine.parent.mkdir()
    if taken_by == "folder":
        mine.mkdir()
    else:
        mine.write_text("mine")
    with pytest.raises(OSError, match="Not a directory" if taken_by == "file above" else "is there already, without"):
        train(config, replace(config, output=mine / "below" if taken_by == "file above" else mine.parent))
    assert taken_by == "folder" or mine.read_text() == "mine"
