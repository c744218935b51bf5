"""Many pictures in one ComfyUI: both ways in turn, with interruptions and a full GPU in between.

    python -m benchmarks.endurance --base /tmp/base              # released sizes, 300 pictures of 4 steps
    python -m benchmarks.endurance --base /tmp/small --small     # the tests' models on the GPU
    python -m benchmarks.endurance --tiny --pictures 40          # the same code on the CPU

References, prompts, sizes, LoRAs, scales and memory plans change from picture to picture, in an order that a seed
decides. Every fifth prompt is interrupted at a moment that the seed decides; during every tenth another process takes
all of the GPU's memory but 0.3 GiB. Each setting comes back several times: a picture is right if it equals the first of
its setting. Memory is compared between the prompts after the tenth and the last third of them. The exit code is 1 if a
picture is wrong, a prompt fails that is not disturbed, the server ends, or memory grows by more than 2 % and 0.1 GiB.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from support import server as comfyui
from support.server import Failed, Server

from .card import GpuMemory, GpuReserve
from .rehearsal.prompts import Prompt, native, native_lora, own
from .rehearsal.running import SECONDS, Lost, brief, load_image, run, with_loader
from .rehearsal.serving import make_files, serving

LORA = "ghibli_style.safetensors"
PORTRAIT = {"width": 832, "height": 1216}
SMALL = {"width": 512, "height": 512}
SETTINGS = (
    native("fox", seed=1),
    own("fox", seed=1),
    native("photograph, portrait", image="photograph.jpg", **PORTRAIT),
    own("photograph, small, streamed", image="photograph.jpg", offload="stream", **SMALL),
    native_lora(", small", **SMALL),
    own("LoRA, portrait", lora=LORA, **PORTRAIT),
    native("painted, another scale", image="painted.png", scale=0.6),
    own("painted, another prompt", image="painted.png", prompt="the fox reads a newspaper"),
    Prompt("two characters", "two_characters"),
    own("12 GiB, fp8", weight_dtype="fp8_e4m3fn", vram_gb=12.0),
)
"""The two ways in turn."""
STEPS = 4
LEFT = 0.3
"""GiB of GPU memory that the other process leaves free."""
ENDS = {"interrupted": "stopped", "full GPU": "out of memory"}
"""Disturbance → how it may end a prompt."""
TOLERANCE = 1.0
"""Largest mean difference, of 255, between pictures of one setting: other memory plans may take other kernels."""


@dataclass
class Course:
    """What happened.

    Attributes:
        first: setting → its first picture.
        outcomes: (disturbance, what came) → how often.
        host: GiB of the server's memory after each prompt.
        gpu: GiB of GPU memory at most during each prompt; 0 where another process filled it.
        furthest: the largest difference, of 255, between a picture and the first of its setting.
    """

    first: dict[str, np.ndarray] = field(default_factory=dict)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    host: list[float] = field(default_factory=list)
    gpu: list[float] = field(default_factory=list)
    furthest: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{count} {' '.join(key)}" for key, count in self.outcomes.items())

    def judge(self, setting: Prompt, picture: Path) -> str:
        """Whether a picture is equal to the first of its setting, right within :data:`TOLERANCE`, or wrong."""
        with Image.open(picture) as image:
            pixels = np.asarray(image.convert("RGB")).astype(np.int16)
        difference = np.abs(pixels - self.first.setdefault(setting.name, pixels))
        self.furthest = max(self.furthest, int(difference.max()))
        return "equal" if not difference.any() else "right" if difference.mean() <= TOLERANCE else "wrong"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.endurance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=300, help="prompts in all, %(default)s")
    parser.add_argument("--base", type=Path, help="ComfyUI's base folder; a temporary one by default")
    parser.add_argument("--output", type=Path, default=Path("output/endurance"), help="for the log, %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the order and the interruptions, %(default)s")
    parser.add_argument("--small", action="store_true", help="the tests' models")
    parser.add_argument("--tiny", action="store_true", help="the tests' models on the CPU, whose memory is not filled")
    options = parser.parse_args()
    if why := comfyui.why_not():
        sys.exit(why)
    options.small = options.small or options.tiny
    options.output.mkdir(parents=True, exist_ok=True)
    course, python = Course(), comfyui.comfyui_python(comfyui.find_comfyui())
    with ExitStack() as stack:
        base = (options.base or Path(stack.enter_context(tempfile.TemporaryDirectory()))).absolute()
        make_files(base, ["models"], options.small)
        reserve = None if options.tiny else stack.enter_context(GpuReserve(python))
        gpu = stack.enter_context(GpuMemory(not options.tiny))
        server = stack.enter_context(serving("endurance", base, options.output, static=False, cpu=options.tiny))
        try:
            endure(server, options, course, gpu, reserve)
        except (Lost, OSError) as error:
            course.outcomes["undisturbed", "server lost"] += 1
            print(brief(error), flush=True)
    sys.exit(report(course))


def endure(
    server: Server, options: argparse.Namespace, course: Course, gpu: GpuMemory, reserve: GpuReserve | None
) -> None:
    """Run the prompts.

    Raises:
        Lost: the server ended, or a prompt did not.
    """
    chance, loader, begin = random.Random(options.seed), load_image(server), time.monotonic()
    setting, seconds = SETTINGS[-1], 1.0
    for number in range(1, options.pictures + 1):
        setting = chance.choice([other for other in SETTINGS if other is not setting])
        prompt = with_loader(setting.build(options.small), loader)
        for node in prompt.values():
            node["inputs"] |= {"steps": STEPS} if "steps" in node["inputs"] else {}
        disturbance, disturbed = "undisturbed", nullcontext()
        if number % 10 == 0 and reserve:
            disturbance, disturbed = "full GPU", filled(reserve)
        elif number % 5 == 0:
            disturbance, disturbed = "interrupted", interrupting(server, chance.uniform(0, seconds))
        gpu.peak, asked = 0.0, time.monotonic()
        with disturbed:
            outcome = outcome_of(server, setting, prompt, course)
        seconds = time.monotonic() - asked
        course.outcomes[disturbance, outcome] += 1
        course.host.append(server.memory() / 2**30)
        course.gpu.append(0.0 if disturbance == "full GPU" else gpu.peak)
        if number % 10 == 0:
            print(f"{number:4d} {time.monotonic() - begin:6.0f} s  {course}", flush=True)


def outcome_of(server: Server, setting: Prompt, prompt: dict, course: Course) -> str:
    """The outcome of one prompt: its picture's, or what ended it."""
    try:
        (name,) = run(server, prompt, SECONDS)
    except Lost:
        raise
    except Failed as error:
        message = str(error)
        if "execution_interrupted" in message:
            return ENDS["interrupted"]
        if "out of memory" in message.lower() or "Allocation on device" in message:
            return ENDS["full GPU"]
        print(f"{setting.name}: {brief(error)}", flush=True)
        return "failed"
    return course.judge(setting, server.folder / "output" / name)


@contextmanager
def filled(reserve: GpuReserve) -> Iterator[None]:
    """Context manager in which the GPU has :data:`LEFT` free."""
    reserve.leave(LEFT)
    try:
        yield
    finally:
        reserve.leave(None)


@contextmanager
def interrupting(server: Server, seconds: float) -> Iterator[None]:
    """Context manager that interrupts what runs on the server after so many seconds."""
    timer = threading.Timer(seconds, server.post, ("/interrupt",))
    timer.start()
    try:
        yield
    finally:
        timer.join()


def report(course: Course) -> bool:
    """Print the table, and return whether anything is wrong."""
    wrong = [key for key in course.outcomes if key[1] not in ("equal", "right", ENDS.get(key[0]))]
    print("\n| outcome | prompts |\n| --- | --- |")
    for (disturbance, outcome), count in sorted(course.outcomes.items()):
        print(f"| {disturbance}: {outcome} | {count} |")
    print(f"\nlargest difference to the first picture of a setting: {course.furthest} of 255")
    grown = [growth("host", course.host), growth("GPU", course.gpu)]
    return bool(wrong) or any(grown)


def growth(name: str, memory: list[float]) -> bool:
    """Print the memory of a course, and return whether its last third takes more than the prompts before it."""
    after = memory[10:]
    third = len(after) // 3
    if not third:
        return False
    before, last = max(after[:-third]), max(after[-third:])
    print(f"{name} memory: {before:.2f} GiB at most after the tenth prompt, {last:.2f} in the last {third}")
    return last > before * 1.02 + 0.1


if __name__ == "__main__":
    main()
