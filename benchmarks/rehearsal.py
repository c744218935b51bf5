"""A dress rehearsal: files of the released sizes in a real ComfyUI, on a real GPU, through its queue.

    python benchmarks/rehearsal.py --base /tmp/base files               # the files: 46 GB, 75 s on an H100
    python benchmarks/rehearsal.py --base /tmp/base all 24 12-static    # a server for each card, every workflow on it
    python benchmarks/rehearsal.py --tiny                               # the same code on the CPU

parts:
  files      makes the released files of random numbers; the others make what they need and lack, too
  all        every workflow on the whole card, with switches between the two ways
  24, 12, …  the same on a card of so many GiB: another process holds the rest of the GPU's memory
  changes    what users change: prompts, scales, a photograph without alpha, a painted mask
  lora       LoRAs and their strength, and fp8, in both ways
  compile    the self-contained way, compiled
  folders    the earlier pack's workflow with diffusers folders; 24 GB more of files, so that
             BASE/models/diffusers/FLUX.1-dev may link to another disk
  gguf       the workflow with a GGUF file, where ComfyUI has ComfyUI-GGUF in its custom_nodes; 13 GB more of files
Each but files also with -static at its end, such as 24-static: without dynamic VRAM, ComfyUI's default on NVIDIA.

ComfyUI is looked for as the tests do it: $COMFYUI_PATH, ~/comfy/ComfyUI; its Python: $COMFYUI_PYTHON, .venv in it.
Times are from the queue to the saved file. GPU memory is what nvidia-smi shows above what others hold, at its peak;
host memory what the server has to itself after the prompt. Weights are random: neither depends on their values.
The table has what OUTPUT keeps of earlier runs, too. It ends with 1 if a node failed, a server died, or a prompt did
not end or was not run.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from PIL import Image
from rehearsal_card import GpuMemory, card
from rehearsal_prompts import CHANGES, COMPILED, FOLDERS, GGUF, LORA, WORKFLOWS, Prompt
from support import server as comfyui
from support.server import Failed, Server

SECONDS = 300
"""After so many a prompt has failed."""


@dataclass(frozen=True)
class Part:
    """What runs on one server.

    Attributes:
        name: as it is asked for.
        prompts: in this order; without any, no server is started.
        files: what is needed beside the released models, as ``released_files.py`` calls it.
        gib: the card's memory; None is the whole card.
        static: without dynamic VRAM.
    """

    name: str
    prompts: tuple[Prompt, ...] = ()
    files: tuple[str, ...] = ()
    gib: int | None = None
    static: bool = False


PARTS = (
    Part("files"),
    Part("all", WORKFLOWS),
    Part("changes", CHANGES),
    Part("lora", LORA),
    Part("compile", COMPILED),
    Part("folders", FOLDERS, ("diffusers",)),
    Part("gguf", GGUF, ("gguf",)),
)
USUAL = ("all", "changes", "lora", "folders")


@dataclass
class Result:
    """A prompt's; ``seconds`` is None for one that was not run, ``gpu`` and ``host`` are GiB."""

    part: str
    prompt: str
    seconds: float | None = None
    gpu: float = 0.0
    host: float = 0.0
    failure: str = ""
    pictures: list[str] = field(default_factory=list)


class Lost(Failed):
    """A prompt that did not end, or whose server did."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", type=part_named, metavar="PART", help=f"see above; without any: {' '.join(USUAL)}"
    )
    parser.add_argument("--base", type=Path, help="ComfyUI's base folder, kept; without it a temporary one")
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
        make_files(base, parts, options.tiny)
        results = []
        for part in parts:
            for result in rehearse(part, base, options, until):
                print(line(result), flush=True)
                results.append(result)
    if results:
        report(results, options.output)
    sys.exit(any(result.failure for result in results))


# What is asked for


def part_named(name: str) -> Part:
    stem = name.removesuffix("-static")
    known = {part.name: part for part in PARTS}
    if stem.isdecimal():
        known[stem] = replace(known["all"], gib=int(stem))
    if stem not in known:
        raise argparse.ArgumentTypeError(f"{name} is no part; expected {', '.join(known)}, or GiB such as 24")
    return replace(known[stem], name=name, static=stem != name)


def tiny(parts: list[Part]) -> Part:
    """All of them as one. BiRefNet has one size, which takes minutes on a CPU, so that it is left out."""
    prompts = {prompt.name: prompt for part in parts for prompt in part.prompts}
    small = tuple(prompt for prompt in prompts.values() if prompt.workflow != "background_removal")
    return Part("tiny", small, tuple(file for part in parts for file in part.files))


def only(part: Part, words: str) -> Part:
    return replace(part, prompts=tuple(prompt for prompt in part.prompts if words in prompt.name))


def make_files(base: Path, parts: list[Part], tiny: bool) -> None:
    """The files that these parts need, by ComfyUI's Python."""
    found = comfyui.find_comfyui()
    kinds = ["models", *dict.fromkeys(file for part in parts for file in part.files)]
    maker = Path(__file__).parent / "released_files.py"
    command = [comfyui.comfyui_python(found), maker, base, *kinds, "--comfyui", found, *(["--tiny"] if tiny else [])]
    if subprocess.run(command, check=False).returncode:
        sys.exit("the files could not be made; see above")


# One part


def rehearse(part: Part, base: Path, options: argparse.Namespace, until: float) -> Iterator[Result]:
    """The results of its prompts; a server that is lost is followed by another for the rest."""
    waiting = list(part.prompts)
    why = "not run: the limit came"
    try:
        with card(part.gib, comfyui.comfyui_python(comfyui.find_comfyui())), GpuMemory(not options.tiny) as gpu:
            while waiting and time.monotonic() < until:
                with serving(part, base, options) as server:
                    yield from work_off(part, waiting, server, gpu, options.tiny, until)
    except (Failed, OSError, SystemExit) as error:  # no such card, or no server
        why = brief(error)
    yield from (Result(part.name, prompt.name, failure=why) for prompt in waiting)


@contextmanager
def serving(part: Part, base: Path, options: argparse.Namespace) -> Iterator[Server]:
    """A ComfyUI for this part, with an empty page, since the frontend is a package of its own; its log is kept."""
    page = base / "page/index.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("<html></html>", encoding="utf-8")
    flags = ["--front-end-root", str(page.parent), "--disable-api-nodes"]
    flags += ["--disable-dynamic-vram"] if part.static else []
    try:
        with comfyui.serving(base, *flags, cpu=options.tiny) as server:
            print(f"--- {part.name}: {described(server)}", flush=True)
            yield server
    finally:
        with (options.output / f"{part.name}.log").open("a") as log:
            log.write((base / "comfyui.log").read_text(errors="replace"))


def work_off(
    part: Part, waiting: list[Prompt], server: Server, gpu: GpuMemory, tiny: bool, until: float
) -> Iterator[Result]:
    """Takes prompts from ``waiting`` and runs them, until the server is lost or the time is over."""
    loader = load_image(server)
    lost = False
    while waiting and not lost and time.monotonic() < until:
        result = Result(part.name, waiting[0].name)
        prompt = waiting.pop(0).build(tiny)
        for node in prompt.values():
            node["class_type"] = loader if node["class_type"] == "LoadImage" else node["class_type"]
        gpu.peak, begin = 0.0, time.monotonic()
        try:
            result.pictures = run(server, prompt, min(SECONDS, until - begin))
            result.host = server.memory() / 2**30
        except (Failed, OSError) as error:
            lost = isinstance(error, (Lost, OSError))
            result.failure = brief(f"{error}\n{server.log.read_text(errors='replace')[-250:]}" if lost else error)
        result.seconds, result.gpu = time.monotonic() - begin, gpu.peak
        yield result


def run(server: Server, prompt: dict, seconds: float) -> list[str]:
    """The names of the pictures that a prompt saves.

    Raises:
        Failed: it was refused, a node failed, or a picture is missing or of one colour.
        Lost: it did not end in time, or the server ended.
        OSError: the server does not answer.
    """
    try:
        prompt_id = server.queue(prompt)
    except Failed as error:
        raise Failed(refusal(str(error))) from error
    try:
        history = server.wait(prompt_id, seconds)
    except Failed as error:
        raise Lost(str(error).splitlines()[0]) from error
    for kind, content in history["status"]["messages"]:
        if kind == "execution_error":
            raise Failed(f"{content['node_type']}: {content['exception_message']}")
    if history["status"]["status_str"] != "success":
        raise Failed(json.dumps(history["status"]))
    shown = [picture for node in history["outputs"].values() for picture in node.get("images", [])]
    saved = [str(Path(picture["subfolder"], picture["filename"])) for picture in shown if picture["type"] == "output"]
    if not saved and any(node["class_type"] == "SaveImage" for node in prompt.values()):
        raise Failed("no picture was saved")
    for name in saved:
        with Image.open(server.folder / "output" / name) as picture:
            if all(low == high for low, high in picture.convert("RGB").getextrema()):
                raise Failed(f"{name} is of one colour")
    return saved


def load_image(server: Server) -> str:
    """The node that reads pictures: ComfyUI's, or the tests' where ComfyUI lacks ``av`` for it."""
    load = {"class_type": "LoadImage", "inputs": {"image": "character.png"}}
    try:
        run(server, {"1": load, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}, SECONDS)
    except Failed as error:
        print(f"TestLoadImage takes Load Image's place: {brief(error)}", flush=True)
        return "TestLoadImage"
    return "LoadImage"


def refusal(answer: str) -> str:
    """What ``/prompt`` found wrong."""
    try:
        nodes = json.loads(answer)["node_errors"].values()
        wrong = [f"{node['class_type']}: {error['details']}" for node in nodes for error in node["errors"]]
    except (ValueError, LookupError, AttributeError):
        wrong = []
    return f"refused: {'; '.join(wrong) or answer}"


def described(server: Server) -> str:
    """Card, versions and commit."""
    stats = server.get("/system_stats")
    git = subprocess.run(["git", "-C", comfyui.PACK, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return (
        f"{stats['devices'][0]['name']}, ComfyUI {stats['system']['comfyui_version']}, "
        f"torch {stats['system']['pytorch_version']}, commit {git.stdout.strip() or 'unknown'}"
    )


def brief(error: object) -> str:
    """A message in one line, its beginning and its end."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else f"{text[:150]} … {text[-250:]}"


# What it comes to


def line(result: Result) -> str:
    return f"{result.part:10s} {result.prompt:36s} {cell(result):28s} {result.failure or ' '.join(result.pictures)}"


def cell(result: Result) -> str:
    if result.seconds is None:
        return "–"
    if result.failure:
        return f"**failed** after {result.seconds:.1f} s"
    return f"{result.seconds:.1f} s; {result.gpu:.1f}, {result.host:.1f} GiB"


def report(results: list[Result], output: Path) -> None:
    """Keeps the results beside those of earlier runs, and prints the table of all and what failed in this one."""
    file = output / "results.json"
    earlier = [Result(**result) for result in json.loads(file.read_text())] if file.exists() else []
    kept = {(result.part, result.prompt): result for result in (*earlier, *results)}
    file.write_text(json.dumps([asdict(result) for result in kept.values()], indent=1))
    failed = [result for result in results if result.failure]
    print(f"\n{table(kept.values())}\n")
    for result in failed:
        print(f"{result.part}, {result.prompt}: {result.failure}")
    pictures = sum(len(result.pictures) for result in results)
    print(f"{len(results)} prompts, {pictures} pictures, {len(failed)} failed or not run; logs in {output}", flush=True)


def table(results: Iterable[Result]) -> str:
    """Markdown: a row for each prompt, a column for each part."""
    cells = {(result.prompt, result.part): cell(result) for result in results}
    parts, prompts = (list(dict.fromkeys(key[i] for key in cells)) for i in (1, 0))
    rows = [[prompt, *(cells.get((prompt, part), "") for part in parts)] for prompt in prompts]
    head = ["from the queue to the file; the GPU's and the host's memory", *parts]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    main()
