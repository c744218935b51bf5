"""Which weights are on the GPU, and how the others get there. Knows modules and bytes alone.

``sizes`` measures models, ``planning`` computes a plan from the sizes, ``offloader`` carries it out with ``streaming``
and ``host_weights``; ``devices`` says how much memory there is.
"""

from .offloader import Offloader
from .planning import STRATEGIES, MemoryPlan, Strategy, plan
from .sizes import GIB, RELEASED, ComponentSize, ComponentSizes, ModuleSize, Phase, measure
from .streaming import on_device

__all__ = [
    "GIB",
    "RELEASED",
    "STRATEGIES",
    "ComponentSize",
    "ComponentSizes",
    "MemoryPlan",
    "ModuleSize",
    "Offloader",
    "Phase",
    "Strategy",
    "measure",
    "on_device",
    "plan",
]
