"""Generates the pictures of a job: batch after batch in each process, until none is missing."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache, partial
from pathlib import Path
from shutil import rmtree
from typing import Any, TypeAlias

from accelerate import PartialState
from huggingface_hub.utils import tqdm
from PIL import Image

from ..character.image import cut_out
from ..files.errors import reason
from ..files.pictures import ResizeMode, open_picture
from ..flux.pipeline import InstantCharacterPipeline
from ..model.character import Character
from .cache import JobCache, Prompt
from .folder import OutputFolder
from .generator import Generator
from .groups import Batch, batches_of, fitting_size, share
from .jobs import Job, Reference
from .page import write_page
from .processes import join, on_main

Encoding: TypeAlias = Callable[[], AbstractContextManager[Callable[[Image.Image], Character]]]
"""Loads what makes a character of a picture, and frees it at the end of the block."""

REFRESH, COUNT = 10, 1
"""Seconds between two pages, and between two counts of the pictures."""


def generate_batch(
    jobs: Sequence[Job],
    folder: str | Path,
    load: Callable[[], InstantCharacterPipeline],
    encoding: Encoding | None = None,
    *,
    fit: ResizeMode = "pad",
    cache_threshold: float = 0.0,
    batch_size: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Generate the pictures of a job that are missing in its folder.

    Under ``accelerate launch`` or ``torchrun`` every process calls it, and generates its part, or, if the pipeline's
    FLUX is context parallel, its part of each picture. Interrupted at any moment, it goes on where it was, with any
    number of processes: the pictures are the same, but for rounding where processes share a picture.

    Args:
        jobs: of :func:`~.jobs.read_jobs`.
        folder: where the pictures go, with ``index.html`` and ``pictures.jsonl``.
        load: makes the pipeline with its adapter, offloaded as it is to run; called if a picture is missing.
        encoding: makes characters; the pipeline does, by its own encoder, if not given.
        fit: how a reference becomes a square.
        cache_threshold: see :meth:`~instantcharacter.InstantCharacterPipeline.__call__`.
        batch_size: the most pictures at once; what fits the memory plan if not given. It stays as it was at first.
        settings: what else all pictures share, such as names and fingerprints of models, as JSON has it. Pictures carry
            ``model``.

    Returns:
        An entry for each picture that is there or has failed, as in ``pictures.jsonl``; those that failed have
        ``error``.

    Raises:
        ValueError: a folder of another job, or a batch size that is not positive.
        OSError: the folder cannot be written.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    state, output = join(), OutputFolder(Path(folder))
    shared = json.loads(json.dumps({**(settings or {}), "fit": fit, "cache": cache_threshold}))

    def begin() -> tuple[int | None, set[str]]:
        output.check_pictures(jobs)
        written = output.open(shared)
        if written and batch_size not in (None, written):
            raise ValueError(f"{folder} has batches of {written}, and stays with them: leave out --batch-size")
        return written, {job.output for job in output.present(jobs)}

    size, present = on_main(begin)
    if missing := [job for job in jobs if job.output not in present]:
        with _progress(output, jobs) if state.is_main_process else nullcontext():
            job_cache, loaded = JobCache(output.cache), cache(load)
            _encode_characters(missing, job_cache, output, encoding or _own_encoding(loaded, fit), state)
            pipeline = loaded()
            size = size or on_main(
                lambda: output.choose_batch_size(shared, batch_size or _fitting_size(pipeline, jobs, cache_threshold))
            )
            carried = {name: shared[name] for name in ("model", "cache") if shared.get(name)}
            generator = Generator(pipeline, job_cache, output, cache_threshold, carried)
            batches = [batch for batch in batches_of(jobs, size) if _is_missing(batch, present)]
            _generate(batches, generator, present, state)
    state.wait_for_everyone()
    return on_main(lambda: _finish(output, jobs))


def _own_encoding(load: Callable[[], InstantCharacterPipeline], fit: ResizeMode) -> Encoding:
    """A pipeline's own encoder, which stays as it is."""
    return lambda: nullcontext(partial(load().create_character, fit=fit))


def _encode_characters(
    jobs: Sequence[Job], job_cache: JobCache, output: OutputFolder, encoding: Encoding, state: PartialState
) -> None:
    """Make the characters that are not there; each process makes its part, and waits for the others."""
    missing = on_main(lambda: job_cache.missing(reference for job in jobs for reference in job.settings.reference))
    if mine := missing[state.process_index :: state.num_processes]:
        with encoding() as create:
            for reference in mine:
                try:
                    job_cache.save(reference, create(_open(reference)))
                except (ValueError, RuntimeError, OSError) as error:
                    for job in (job for job in jobs if reference in job.settings.reference):
                        output.save_error(job, reason(error))
    state.wait_for_everyone()


def _open(reference: Reference) -> Image.Image:
    picture, mask = reference
    return cut_out(picture.path, mask.path) if mask else open_picture(picture.path)


def _generate(batches: Sequence[Batch], generator: Generator, present: set[str], state: PartialState) -> None:
    """Generate this process's part of some batches. The first process that needs a prompt encodes it for all."""
    processes = range(state.num_processes)
    shares = [batches if generator.together else share(batches, i, len(processes)) for i in processes]
    mine = shares[state.process_index]
    encoded_by_others = {prompt for part in shares[: state.process_index] for prompt in _prompts(part)}
    generator.load_loras(mine)
    generator.encode_prompts(prompt for prompt in _prompts(mine) if prompt not in encoded_by_others)
    state.wait_for_everyone()
    generator.generate(mine, present)


def _prompts(batches: Sequence[Batch]) -> list[Prompt]:
    """The prompts of some batches, each once."""
    texts = (
        Prompt(text, batch.settings.lora)
        for batch in batches
        for job in batch.jobs
        for text in (job.prompt, job.negative_prompt)
        if text is not None
    )
    return list(dict.fromkeys(texts))


def _is_missing(batch: Batch, present: set[str]) -> bool:
    return any(job.output not in present for job in batch.jobs)


def _fitting_size(pipeline: InstantCharacterPipeline, jobs: Sequence[Job], cache_threshold: float) -> int:
    """One if steps are left out, since a batch leaves out those that all of its pictures can do without."""
    if cache_threshold or pipeline.offloader is None:
        return 1
    return fitting_size(pipeline.offloader.plan, jobs)


def _write_entries(output: OutputFolder, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Write the list and the page."""
    entries = output.entries(jobs)
    output.write_list(entries)
    write_page(output.path, entries, len(jobs))
    return entries


def _finish(output: OutputFolder, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Write the list and the page; embeddings are needed no more once no picture is missing."""
    entries = _write_entries(output, jobs)
    if len(output.present(jobs)) == len(jobs):
        rmtree(JobCache(output.cache).prompts, ignore_errors=True)
    return entries


@contextmanager
def _progress(output: OutputFolder, jobs: Sequence[Job]) -> Iterator[None]:
    """Context manager: a bar that counts the pictures of all processes, and a page that is seldom out of date."""
    done = threading.Event()

    def watch() -> None:
        written = time.monotonic()
        while not done.wait(COUNT):
            bar.update(len(output.present(jobs)) - bar.n)
            if time.monotonic() - written > REFRESH:
                with suppress(OSError):  # the process that writes pictures raises it, too
                    _write_entries(output, jobs)
                written = time.monotonic()

    with tqdm(total=len(jobs), initial=len(output.present(jobs)), desc="pictures", unit="picture") as bar:
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            bar.update(len(output.present(jobs)) - bar.n)
