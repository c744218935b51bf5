"""Batches: jobs with the same settings, generated at once.

The jobs and the size of a batch alone decide what is in a batch. So a picture is the same whatever is missing when a
job goes on, and with any number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from ..offload.planning import MemoryPlan
from .jobs import Job, Settings

MOST = 4
"""The most pictures at once that are chosen. FLUX keeps a GPU busy with one of 1024×1024 already."""


class Batch(NamedTuple):
    """Jobs that are generated at once, in the order of their lines."""

    jobs: tuple[Job, ...]

    @property
    def settings(self) -> Settings:
        """What all of them have in common."""
        return self.jobs[0].settings

    @property
    def cost(self) -> float:
        """About how long it takes: in pixels of steps."""
        width, height = self.settings.size
        return len(self.jobs) * width * height * self.settings.steps * (2 if self.settings.true_cfg > 1 else 1)


def batches_of(jobs: Sequence[Job], size: int) -> list[Batch]:
    """All batches, those with the same LoRAs next to each other.

    Args:
        jobs: in the order of their lines.
        size: the most jobs in a batch.
    """
    groups: dict[Settings, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.settings, []).append(job)
    loras = {lora: i for i, lora in reversed([*enumerate(settings.lora for settings in groups)])}
    alike = sorted(groups.values(), key=lambda group: loras[group[0].settings.lora])
    return [Batch(tuple(group[i : i + size])) for group in alike for i in range(0, len(group), size)]


def share(batches: Sequence[Batch], process: int, processes: int) -> list[Batch]:
    """The part of some batches that one process generates: neighbours, of about the same cost in all processes."""
    ends = [*accumulate(batch.cost for batch in batches)]
    middles = [(end - batch.cost / 2) / ends[-1] for batch, end in zip(batches, ends)]
    return [batch for batch, middle in zip(batches, middles) if int(middle * processes) == process]


def fitting_size(plan: MemoryPlan, jobs: Sequence[Job]) -> int:
    """The most pictures at once, up to :data:`MOST`, with which as many weights stay on the device as with one."""
    resolution = max((job.settings.size for job in jobs), key=lambda size: size[0] * size[1])
    alone = plan.for_pictures(resolution, 1)
    plans = {size: plan.for_pictures(resolution, size) for size in range(2, MOST + 1)}
    return max((size for size, other in plans.items() if other.fits and other.resident >= alone.resident), default=1)
