"""A dress rehearsal: files of the released sizes in a real ComfyUI, on a real GPU, through its queue.

    python -m benchmarks.rehearsal --base /tmp/base files               # the files: 46 GB, 75 s on an H100
    python -m benchmarks.rehearsal --base /tmp/base all 24 12-static    # a server for each card, every workflow on it
    python -m benchmarks.rehearsal --tiny                               # the same code on the CPU

parts:
  files      makes the released files of random numbers; the other parts make missing files, too
  all        every workflow on the whole card, with switches between the two ways
  24, 12, …  the same on a card of 24, 12, … GiB: another process holds the rest of the GPU's memory
  switches   the two ways in turn, five times
  changes    what users change: prompts, scales, a photograph without alpha, a painted mask
  lora       LoRAs and their strength, and fp8, in both ways
  compile    the self-contained way, compiled
  fast       8-bit arithmetic, compiled, with steps left out
  folders    the earlier pack's workflow with diffusers folders; 24 GB more of files, so that
             BASE/models/diffusers/FLUX.1-dev may link to another disk
  gguf       the workflow with a GGUF file, where ComfyUI has ComfyUI-GGUF in its custom_nodes; 13 GB more of files
-24 at the end of a part, such as switches-24, runs it on such a card; -static at the very end, such as 24-static, turns
off dynamic VRAM, ComfyUI's default on NVIDIA.

ComfyUI is at $COMFYUI_PATH or ~/comfy/ComfyUI, its Python at $COMFYUI_PYTHON or in its .venv.
Times are from the queue to the saved file. GPU memory is nvidia-smi's peak above the memory of other processes, host
memory the server's own after the prompt. Weights are random: times and memory do not depend on their values.
The table includes the results of earlier runs in OUTPUT. The exit code is 1 if a node failed, a server died, or a
prompt did not end or was not run.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from support import server as comfyui
from support.server import Failed, Server

from ..card import GpuMemory, card
from .parts import USUAL, RehearsalPart, only, part_named, tiny
from .prompts import Prompt
from .results import Result, line, report
from .running import SECONDS, Lost, brief, load_image, run, with_loader
from .serving import make_files, serving


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rehearsal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", type=part_named, metavar="PART", help=f"see above; without any: {' '.join(USUAL)}"
    )
    parser.add_argument("--base", type=Path, help="ComfyUI's base folder; a temporary one by default")
    parser.add_argument(
        "--output", type=Path, default=Path("output/rehearsal"), help="for logs and results, %(default)s"
    )
    parser.add_argument("--only", default="", metavar="WORDS", help="only prompts with this in their names")
    parser.add_argument("--limit", type=float, default=math.inf, metavar="SECONDS", help="stop then, table and all")
    parser.add_argument("--tiny", action="store_true", help="the tests' models on the CPU, all parts on one server")
    options = parser.parse_args()
    until = time.monotonic() + options.limit
    if why := comfyui.why_not():
        sys.exit(why)
    parts = options.parts or [part_named(name) for name in USUAL]
    parts = [only(part, options.only) for part in ([tiny(parts)] if options.tiny else parts)]
    if options.only and not any(part.prompts for part in parts):
        parser.error(f"no prompt of these parts has {options.only!r} in its name")
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        base = (options.base or Path(temporary)).absolute()
        kinds = dict.fromkeys(["models", *(file for part in parts for file in part.files)])
        make_files(base, kinds, options.tiny)
        results = []
        for part in parts:
            for result in rehearse(part, base, options, until):
                print(line(result), flush=True)
                results.append(result)
    if results:
        report(results, options.output)
    sys.exit(any(result.failure for result in results))


def rehearse(part: RehearsalPart, base: Path, options: argparse.Namespace, until: float) -> Iterator[Result]:
    """The results of a part's prompts; after a lost server another one takes the rest."""
    waiting = list(part.prompts)
    why = "not run: the limit came"
    try:
        with card(part.gib, comfyui.comfyui_python(comfyui.find_comfyui())), GpuMemory(not options.tiny) as gpu:
            while waiting and time.monotonic() < until:
                with serving(part.name, base, options.output, static=part.static, cpu=options.tiny) as server:
                    yield from run_prompts(part, waiting, server, gpu, options.tiny, until)
    except (Failed, OSError, SystemExit) as error:  # no such card, or no server
        why = brief(error)
    yield from (Result(part.name, prompt.name, failure=why) for prompt in waiting)


def run_prompts(
    part: RehearsalPart, waiting: list[Prompt], server: Server, gpu: GpuMemory, tiny: bool, until: float
) -> Iterator[Result]:
    """Run the prompts in ``waiting`` and remove them from it, until the server is lost or the time is over."""
    loader = load_image(server)
    lost = False
    while waiting and not lost and time.monotonic() < until:
        result = Result(part.name, waiting[0].name)
        prompt = with_loader(waiting.pop(0).build(tiny), loader)
        gpu.peak, begin = 0.0, time.monotonic()
        try:
            result.pictures = run(server, prompt, min(SECONDS, until - begin))
            result.host = server.memory() / 2**30
        except (Failed, OSError) as error:
            lost = isinstance(error, (Lost, OSError))
            result.failure = brief(f"{error}\n{server.log.read_text(errors='replace')[-250:]}" if lost else error)
        result.seconds, result.gpu = time.monotonic() - begin, gpu.peak
        yield result


if __name__ == "__main__":
    main()
