"""The pipeline that was loaded last, for all Load FLUX nodes of a workflow."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Hashable

from .sampler import HostedPipeline


class PipelineCache:
    """One pipeline and the settings that it was loaded with.

    Attributes:
        pipeline: the pipeline, None before the first one.
    """

    def __init__(self) -> None:
        self.pipeline: HostedPipeline | None = None
        self._key: Hashable = None

    def get(self, key: Hashable, load: Callable[[], HostedPipeline]) -> HostedPipeline:
        """The cached pipeline if its key is this one; otherwise a loaded one, after the cached one is freed."""
        if self.pipeline is None or key != self._key:
            self.pipeline = None
            gc.collect()  # a pipeline that has run is part of reference cycles
            self.pipeline, self._key = load(), key
        return self.pipeline


_shared: weakref.ref[PipelineCache] | None = None


def shared_pipeline_cache() -> PipelineCache:
    """The cache that all Load FLUX nodes of a workflow hold.

    ComfyUI frees a node's output before it runs the node with other settings. It keeps the node itself, and with it
    this cache, until the node is deleted from the workflow or ComfyUI frees memory.
    """
    global _shared
    cache = (_shared and _shared()) or PipelineCache()
    _shared = weakref.ref(cache)
    return cache
