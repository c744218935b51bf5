"""On paper: how generating and training scale to hundreds of GPUs, from what one GPU was measured to do.

    python -m benchmarks.scaling_model      # the tables of SCALING.md

Three quantities decide: what a GPU computes, what it sends and receives over which link, and what all hosts read from
and write to the shared folder. Those of links and folder are assumed, and named so; ``benchmarks.scaling`` measures.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

WIDTH, BLOCKS, HEADS = 3072, 57, 24
IMAGE_TOKENS, TEXT_TOKENS = 4096, 512
"""Of FLUX.1, at 1024×1024."""
BF16 = 2
"""Bytes."""
FLUX, ADAPTER = 11.90e9, 2.795e9
"""Parameters."""


@dataclass(frozen=True)
class Machine:
    """Hosts with H100s; times in seconds, rates in bytes a second.

    Attributes:
        step: of one picture with a character, on one GPU (measured, ``benchmarks.adapter``).
        picture: of 28 steps, with encoding and decoding (measured, ``benchmarks.memory``).
        training_step: of stage 1, four samples with cached features (measured, ``benchmarks.training``).
        nvlink: between GPUs of a host, each way (assumed: two thirds of the nominal 450 GB/s).
        network: between hosts, for each GPU (assumed: nine tenths of a card of 400 Gbit/s).
        latency: of a collective operation (assumed).
        launch: the least time of a step in which the host launches its kernels (assumed).
        folder: what all hosts together read from or write to the shared folder (assumed).
        start: of a process, without reading its models (assumed).
    """

    gpus_of_host: int = 8
    step: float = 0.2002
    picture: float = 6.31
    training_step: float = 1.082
    nvlink: float = 300e9
    network: float = 45e9
    latency: float = 20e-6
    launch: float = 0.030
    folder: float = 10e9
    start: float = 30.0

    def hosts(self, gpus: int) -> int:
        return -(-gpus // self.gpus_of_host)

    def link(self, gpus: int) -> float:
        """The slowest link in a group of GPUs."""
        return self.nvlink if gpus <= self.gpus_of_host else self.network


def exchanged_bytes(
    gpus: int, tokens: int = IMAGE_TOKENS + TEXT_TOKENS, width: int = WIDTH, blocks: int = BLOCKS
) -> float:
    """What each GPU sends in a step of one picture: its parts of query, key, value and output in every block."""
    return blocks * 4 * (tokens / gpus) * width * BF16 * (gpus - 1) / gpus


def together(machine: Machine, gpus: int) -> float:
    """Seconds of a step of one picture on several GPUs; nothing is sent while the GPU computes."""
    if gpus == 1:
        return machine.step
    sending = exchanged_bytes(gpus) / machine.link(gpus) + BLOCKS * 4 * machine.latency
    return max(machine.step / gpus, machine.launch) + sending


MODELS = 45e9
"""Bytes of all model files, which each host reads once; its other processes find them in its memory."""
PNG, EMBEDDINGS = 1.7e6, TEXT_TOKENS * 4096 * BF16
"""Bytes in the folder of a picture, and of its prompt if no other has it."""


def apart(machine: Machine, gpus: int, pictures: int) -> tuple[float, float, float]:
    """Seconds of a batch with as many prompts: for reading models, generating, and what the folder takes in meanwhile.

    Processes have as many pictures each; the last has up to one more.
    """
    reading = machine.start + machine.hosts(gpus) * MODELS / machine.folder
    generating = -(-pictures // gpus) * machine.picture
    return reading, generating, pictures * (PNG + 2 * EMBEDDINGS) / machine.folder  # written once, read once


def training(machine: Machine, gpus: int, sharded_over: int) -> float:
    """Seconds of a step of stage 1; nothing is sent while the GPU computes.

    Args:
        machine: the hosts.
        gpus: all of them.
        sharded_over: GPUs that share the weights; each such group has all of them, and groups add up their gradients.
    """
    others = (sharded_over - 1) / sharded_over
    weights = 2 * (FLUX + ADAPTER) * BF16 * others  # before the forward pass, and again before the backward one
    gradients = ADAPTER * BF16 * others
    groups = gpus // sharded_over
    between = 2 * ADAPTER * BF16 / sharded_over * (groups - 1) / groups  # a ring over each shard
    return machine.training_step + (weights + gradients) / machine.link(sharded_over) + between / machine.network


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    cells = [list(head), ["---"] * len(list(head)), *rows]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in cells)


def tables(machine: Machine) -> str:
    """All tables, as SCALING.md has them."""
    one = [
        [gpus, f"{exchanged_bytes(gpus) / 1e9:.2f} GB", f"{seconds * 1000:.0f} ms", f"{seconds / machine.step:.2f}"]
        for gpus in (1, 2, 4, 8, 24)
        for seconds in [together(machine, gpus)]
    ]
    many = []
    for gpus in (1, 2, 8, 64, 512):
        for pictures in (10_000, 100_000):
            reading, generating, folder = apart(machine, gpus, pictures)
            total = reading + max(generating, folder)
            linear = pictures * machine.picture / gpus / total
            bound = max((reading, "reading models"), (generating, "generating"), (folder, "the folder"))[1]
            many.append([gpus, f"{pictures:,}", f"{total / 3600:.2f} h", f"{linear:.2f}", bound])
    steps = [
        [gpus, *(f"{seconds:.2f} s ({machine.training_step / seconds:.2f})" for seconds in both)]
        for gpus in (1, 2, 8, 64, 512)
        for both in [[training(machine, gpus, gpus), training(machine, gpus, min(gpus, machine.gpus_of_host))]]
    ]
    return "\n\n".join(
        [
            table(["GPUs", "sent by each", "a step", "of one GPU's"], one),
            table(["GPUs", "pictures", "time", "of linear", "most of it"], many),
            table(["GPUs", "sharded over all", "sharded in each host"], steps),
        ]
    )


if __name__ == "__main__":
    print(tables(Machine()))
