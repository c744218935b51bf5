from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from support.pretended_cuda import CUDA, PretendedCuda
from torch import nn

from instantcharacter.offload.devices import (
    as_device,
    container_memory,
    current,
    default_device,
    free_memory,
    host_memory,
    same_device,
    synchronize,
)

CPU = torch.device("cpu")


def control_groups(root: Path, **groups: tuple[str, int, int]) -> Path:
    """Write groups by path below ``root``: the limit of each, the bytes in use, and those of them in file cache."""
    for path, (limit, used, cache) in groups.items():
        folder = root / path.replace("__", "/")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon {used - cache}\nfile {cache}\n")
    own = root / "own"
    own.write_text("0::/pod/container\n")
    return own


@pytest.mark.parametrize(
    ("groups", "left"),
    [
        ({"pod__container": ("8000", 5000, 1000)}, 4000),
        ({"pod__container": ("max", 5000, 1000)}, None),
        ({"pod": ("6000", 5000, 0), "pod__container": ("8000", 5000, 1000)}, 1000),
        ({"pod__container": ("4000", 5000, 0)}, 0),
        ({}, None),
    ],
)
def test_host_memory_ends_where_a_containers_does(tmp_path, groups, left):
    own = control_groups(tmp_path, **groups)
    total = psutil.virtual_memory().total
    assert container_memory(tmp_path, own) == (total if left is None else left)


def test_without_control_groups_host_memory_is_the_machines(tmp_path):
    assert container_memory(tmp_path, tmp_path / "none") == psutil.virtual_memory().total


def test_processes_of_one_machine_share_its_host_memory(monkeypatch):
    alone = host_memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    own = psutil.Process().memory_info().rss
    assert host_memory() < alone / 4 + own


def test_host_memory_counts_the_containers_limit(monkeypatch):
    before = host_memory()
    monkeypatch.setattr("instantcharacter.offload.devices.container_memory", lambda: 1000)
    own = psutil.Process().memory_info()
    assert host_memory() <= 1000 + own.rss < before


def test_default_device_is_the_gpu_if_there_is_one(monkeypatch):
    assert default_device() == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert default_device().type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default_device().type == "cuda"


def test_cuda_is_the_current_gpu():
    with PretendedCuda(devices=2), torch.cuda.device(1):
        second = torch.device("cuda", 1)
        assert [as_device(name) for name in (None, "cuda", "cuda:0", "cpu")] == [second, second, CUDA, CPU]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("mps", "mps:0", True),
        ("cpu", "cpu:0", True),
        ("cuda", "cuda:1", True),
        ("cuda", "cuda:0", False),
        ("cuda:0", "cuda:1", False),
        ("cpu", "cuda", False),
    ],
)
def test_a_device_without_a_number_is_the_current_one(one, other, same):
    with PretendedCuda(devices=2), torch.cuda.device(1):
        assert same_device(torch.device(one), torch.device(other)) == same
        assert same_device(torch.device(other), torch.device(one)) == same


def test_a_gpu_is_the_current_one_within_a_block_and_other_devices_change_nothing():
    with PretendedCuda(devices=2):
        for name, index in (("cuda:1", 1), ("cuda:0", 0), ("cpu", 0), ("mps", 0), ("privateuseone:0", 0)):
            with current(torch.device(name)):
                assert torch.cuda.current_device() == index
            assert torch.cuda.current_device() == 0


def test_one_device_is_waited_for_and_no_other():
    with PretendedCuda(devices=2) as card:
        synchronize(CPU)
        assert not card.initialized
        synchronize(torch.device("cuda", 1))
        assert card.contexts == {1}


@pytest.fixture
def backend(monkeypatch) -> None:
    """A device with 10 bytes free, and 2 more that torch has cached."""
    backend = SimpleNamespace(
        mem_get_info=lambda _: (10, 100), memory_reserved=lambda _: 7, memory_allocated=lambda _: 5
    )
    monkeypatch.setattr(torch, "get_device_module", lambda _: backend)


def test_weights_on_the_device_count_as_free(backend):
    module = nn.Linear(3, 5, bias=False)
    assert free_memory(torch.device("cuda"), [module]) == 12
    module.to("meta")
    assert free_memory(torch.device("meta"), [module, module]) == 12 + 60


def test_weights_on_another_gpu_do_not_count_as_free():
    module = nn.Linear(3, 5, bias=False)
    with PretendedCuda(capacity=1000, devices=2) as card:
        module.to("cuda")
        card.gpus[1].allocated = 30
        on_this, on_other = (free_memory(torch.device("cuda", i), [module]) for i in (0, 1))
        assert (on_this, on_other) == (1000, 970)
        assert free_memory(torch.device("cuda"), [module]) == on_this


def test_a_device_that_shares_host_memory_has_all_of_it():
    for device in ("cpu", "mps"):
        assert free_memory(torch.device(device), []) == psutil.virtual_memory().total
