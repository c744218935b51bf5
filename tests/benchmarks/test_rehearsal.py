"""The rehearsal at its tiny size: every workflow through a real ComfyUI, its table and its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import server as comfyui
from support import workflows

from benchmarks.rehearsal import prompts

PARTS = {"all": prompts.WORKFLOWS, "changes": prompts.CHANGES, "lora": prompts.LORA, "folders": prompts.FOLDERS}
PARTS |= {"gguf": prompts.GGUF} if comfyui.gguf_pack() else {}

pytestmark = pytest.mark.xdist_group("comfyui")
in_comfyui = pytest.mark.skipif(bool(comfyui.why_not()), reason=str(comfyui.why_not()))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("rehearsal")


def rehearse(base: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.rehearsal", "--tiny", "--base", base, "--output", base / "logs"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, cwd=comfyui.PACK)
    print(run.stdout, run.stderr[-3000:])
    return run


def rows(run: subprocess.CompletedProcess) -> dict[str, str]:
    """The table's cells by their prompts."""
    lines = [line.split("|") for line in run.stdout.splitlines() if line.startswith("| ")]
    return {cells[1].strip(): cells[2].strip() for cells in lines[2:]}


def test_every_workflow_file_is_rehearsed():
    lists = (prompts.WORKFLOWS, prompts.CHANGES, prompts.SWITCHES, prompts.LORA, prompts.COMPILED, prompts.FAST)
    lists += (prompts.FOLDERS, prompts.GGUF)
    everything = [prompt for part in lists for prompt in part]
    files = {workflows.name(path) for path in workflows.PROMPTS}
    assert {prompt.workflow for prompt in everything} == files
    assert len({prompt.name for prompt in everything}) == len(everything)


@pytest.mark.parametrize("tiny", [True, False])
def test_a_change_replaces_inputs_of_its_kind(tiny):
    plain, photograph = (
        prompts.Prompt("", "native", changes).build(tiny) for changes in (prompts.PLAIN, {"image": "a"})
    )
    assert plain["17"]["inputs"]["model"] == ["10", 0]
    assert (photograph["4"]["inputs"]["image"], photograph["6"]["inputs"]["image"]) == ("a", ["4", 0])
    assert photograph["17"]["inputs"]["steps"] == (2 if tiny else 28)


@pytest.mark.slow
@in_comfyui
def test_every_workflow_generates(base):
    run = rehearse(base, *PARTS)
    assert run.returncode == 0
    cells = rows(run)
    assert set(cells) == {prompt.name for part in PARTS.values() for prompt in part} - {"background removal"}
    assert all(cell.endswith("GiB") for cell in cells.values())
    assert f"{len(cells)} prompts, " in run.stdout
    assert " 0 failed or not run" in run.stdout


@pytest.mark.slow
@in_comfyui
def test_a_failed_node_is_reported_and_the_rest_runs(base):
    rehearse(base, "files")
    adapter = base / "models/ipadapter/instantcharacter_ip-adapter.bin"
    whole = adapter.read_bytes()
    adapter.write_bytes(whole[:-1])
    try:
        run = rehearse(base, "all", "--only", "next seed")
    finally:
        adapter.write_bytes(whole)
    assert run.returncode == 1
    assert "tiny, native, next seed: InstantCharacterAdapterLoader: " in run.stdout
    assert "failed" in rows(run)["native, next seed"]
    assert "GiB" in rows(run)["plain FLUX, next seed"]


@pytest.mark.slow
@in_comfyui
def test_prompts_after_the_limit_are_reported(base):
    run = rehearse(base, "all", "--only", "toy", "--limit", "0")
    assert run.returncode == 1
    assert "tiny, toy: not run" in run.stdout


@pytest.mark.slow
@in_comfyui
def test_an_unknown_part_is_refused(base):
    run = rehearse(base, "24GB")
    assert run.returncode == 2
    assert "24GB is no part" in run.stderr
