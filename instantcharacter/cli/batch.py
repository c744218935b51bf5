"""The command ``batch``: many pictures, in one process or in several."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..batch.jobs import DEFAULTS, Job, foreign_characters, read_jobs, unequal_shares
from ..batch.processes import on_main
from ..batch.rows import BadLine
from ..batch.run import generate_batch
from ..files.fingerprint import fingerprint
from ..flux.pipeline import InstantCharacterPipeline
from .checks import check_flux_files, check_sources
from .loading import character_encoding, check_arithmetic, choose_device, choose_dtype, load_adapter, load_pipeline
from .options import BatchOptions
from .processes import joined, started


def batch(options: BatchOptions) -> int:
    """Generate the pictures of a job that are missing in its folder; every process runs this.

    Returns:
        The exit status: 1 if pictures are missing, since their lines are bad or have failed, else 0.

    Raises:
        OSError: a file cannot be found, read or written, or the hub cannot be reached.
        ValueError: bad lines, a folder of another job, or options that contradict each other.
    """
    with joined(options.with_toy_paths()) as (options, state):
        return _batch(options, state)


def _batch(options: BatchOptions, state: PartialState) -> int:
    jobs, bad = on_main(lambda: _good_lines(options, *_read(options)))
    adapter = load_adapter(options)
    made_by = adapter.fingerprint()
    jobs, foreign = on_main(lambda: _good_lines(options, jobs, foreign_characters(jobs, made_by)))

    def load() -> InstantCharacterPipeline:
        pipeline = load_pipeline(adapter, replace(options, lora=()))  # those of the lines are loaded
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    entries = generate_batch(
        jobs,
        options.output,
        load,
        lambda: character_encoding(adapter, options),
        fit=options.fit,
        cache_threshold=options.cache,
        batch_size=options.batch_size,
        settings=on_main(lambda: _settings(options)),
    )
    failed = [entry for entry in entries if "error" in entry]
    there, total = len(entries) - len(failed), len(jobs) + bad + foreign
    if state.is_main_process:
        for entry in failed:
            print(f"{options.jobs}:{entry['line']}: {entry['output']} failed: {entry['error']}", file=sys.stderr)
        print(f"{there} of {total} pictures are in {options.output / 'index.html'}")
    return int(there < total)


def _read(options: BatchOptions) -> tuple[list[Job], list[BadLine]]:
    """The jobs and the bad lines, after the checks of the other options."""
    check_sources(options)
    check_flux_files(options)
    check_arithmetic(options)
    values = {name: getattr(options, name) for name in DEFAULTS if name != "region"}
    paths = {name: tuple(map(Path, values[name])) for name in ("reference", "mask")}
    jobs, bad = read_jobs(options.jobs, values | paths)
    return jobs, bad + (unequal_shares(jobs, started()) if options.parallel else [])


def _good_lines(options: BatchOptions, jobs: Sequence[Job], bad: Sequence[BadLine]) -> tuple[list[Job], int]:
    """The jobs of no bad line, and the number of bad lines, which are printed.

    Raises:
        ValueError: there are bad lines, which are not to be skipped, or no others.
    """
    for line, fault in bad:
        print(f"{options.jobs}:{line}: {fault}", file=sys.stderr)
    lines = {line for line, _ in bad}
    good = [job for job in jobs if job.line not in lines]
    if bad and not (options.skip_bad and good):
        raise ValueError(
            f"{len(lines)} of {len(lines) + len(good)} lines are bad, see above, and nothing is generated: mend them, "
            "or give --skip-bad to generate the others"
        )
    return good, len(lines)


def _settings(options: BatchOptions) -> dict[str, Any]:
    """What pictures depend on beside their lines: they are of one job if it is equal."""
    device = choose_device(options.device)
    sources = {name: getattr(options, name) for name in ("model", "clip_l", "t5", "vae", "siglip", "dinov2", "adapter")}
    return {
        "model": Path(options.model).name,
        "dtype": str(choose_dtype(options.dtype, device)),
        "weight_dtype": options.weight_dtype,
        "compile": options.compile,
        **({"parallel": options.parallel} if options.parallel else {}),
        **{f"weights of {name}": _fingerprint(name, source) for name, source in sources.items() if source},
    }


def _fingerprint(name: str, source: str | Path) -> str:
    """Identifies a model's weights by their content."""
    whole = name == "model" and not Path(source).is_file()
    return fingerprint(source, *(("transformer", "text_encoder", "text_encoder_2", "vae") if whole else ()))
