"""Reading stays within bounds: twice the size of a file in memory, and 10 s; a header that would not is refused."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time

import pytest
import torch

from instantcharacter import Character
from instantcharacter.files.reading import read_header, read_safetensors, read_whole

MEASURE = """
import sys
from pathlib import Path
from instantcharacter import Character, CharacterAdapter
from instantcharacter.files.reading import read_pickle, read_safetensors

def memory(name):
    return int(Path("/proc/self/status").read_text().split(name)[1].split()[0]) * 1024

path = Path(sys.argv[1])
read = {".bin": lambda: read_pickle(path, ""), ".st": lambda: read_safetensors(path, "")}
before = memory("VmRSS:")
Path("/proc/self/clear_refs").write_text("5")
content = read.get(path.suffix, lambda: Character.load(path))()
print(memory("VmHWM:") - before)
"""
"""The bytes of memory at most while a file is read."""


def write_header(path, tensors: int) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"layer.{i}.weight": empty for i in range(tensors)}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", ["fox.safetensors", "a.bin", "a.st"])
def test_reading_takes_at_most_twice_the_size_of_memory(tmp_path, name):
    path = tmp_path / name
    if name == "a.bin":
        torch.save({"a": torch.ones(10_000_000)}, path)
    else:
        Character(torch.ones(1, 10_000, 1000), "0" * 32).save(path)
    run = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 2 * path.stat().st_size + (4 << 20)  # the readers themselves


@pytest.mark.parametrize("read", [read_header, read_safetensors, read_whole])
def test_a_header_that_takes_too_long_is_refused_at_once(tmp_path, read):
    write_header(tmp_path / "a.safetensors", 150_000)
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"a\.safetensors has a header of \d+ bytes, more than 8388608\. Expected it"):
        read(tmp_path / "a.safetensors", "it")
    assert time.monotonic() - begin < 1


@pytest.mark.parametrize("read", [read_header, read_safetensors, read_whole])
def test_the_longest_header_is_read_in_time(tmp_path, read):
    write_header(tmp_path / "a.safetensors", 100_000)
    begin = time.monotonic()
    read(tmp_path / "a.safetensors", "it")
    assert time.monotonic() - begin < 10
