"""A real ComfyUI for tests: where it is, a server of it with tiny models, and a client of its queue.

It is looked for at ``$COMFYUI_PATH``, then above the pack, if it is installed in one, then where comfy-cli puts it. Its
Python is ``$COMFYUI_PYTHON``, else the one in its ``.venv``.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACK = Path(__file__).parents[2]
NAME = "ComfyUI-InstantCharacter"
TEST_NODES = Path(__file__).parent / "comfyui_test_nodes.py"


def find_comfyui() -> Path | None:
    path = os.environ.get("COMFYUI_PATH")
    candidates = [*([Path(path)] if path else []), PACK.parent.parent, Path.home() / "comfy/ComfyUI"]
    return next((folder for folder in candidates if (folder / "comfy/ldm/flux/model.py").is_file()), None)


def comfyui_python(comfyui: Path) -> Path:
    return Path(os.environ.get("COMFYUI_PYTHON") or comfyui / ".venv/bin/python")


def why_not(*modules: str) -> str | None:
    """Why tests in a real ComfyUI cannot run here, if they cannot: it, or a module in its Python, is not there."""
    comfyui = find_comfyui()
    if comfyui is None:
        return "no ComfyUI at $COMFYUI_PATH or ~/comfy/ComfyUI"
    python = comfyui_python(comfyui)
    if not python.is_file():
        return f"no Python for ComfyUI at {python}: set COMFYUI_PYTHON"
    wanted = ("torchvision", "diffusers", *modules)
    probe = f"import importlib.util as u; print([m for m in {wanted} if not u.find_spec(m)])"
    missing = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=True).stdout.strip()
    return None if missing == "[]" else f"ComfyUI's Python lacks {missing}"


class Failed(Exception):
    """A prompt that ComfyUI refused or that ended in an error, with ComfyUI's message."""


class Server:
    """A running ComfyUI.

    Attributes:
        url: of its page.
        folder: its base directory, with ``models``, ``input`` and ``output`` in it.
        log: the file that it writes its log to.
        process: its process.
    """

    def __init__(self, url: str, folder: Path, log: Path, process: subprocess.Popen) -> None:
        self.url = url
        self.folder = folder
        self.log = log
        self.process = process
        self._client = uuid.uuid4().hex

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=60) as answer:
            content = answer.read()
            return json.loads(content) if "json" in answer.headers.get("Content-Type", "") else content

    def post(self, path: str, content: Any = None) -> Any:
        body = json.dumps(content or {}).encode()
        request = urllib.request.Request(f"{self.url}{path}", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or "{}")

    def queue(self, prompt: dict) -> str:
        """Put a prompt into the queue: its id.

        Raises:
            Failed: ComfyUI finds the prompt wrong.
        """
        try:
            return self.post("/prompt", {"prompt": prompt, "client_id": self._client})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise Failed(error.read().decode()) from error

    def wait(self, prompt_id: str, seconds: float = 240) -> dict:
        """What ``/history`` has of a prompt, once it has ended, however it ended."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if history := self.get(f"/history/{prompt_id}"):
                return history[prompt_id]
            if self.process.poll() is not None:
                raise Failed(f"ComfyUI has ended:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.05)
        raise Failed(f"not done after {seconds} s:\n{self.log.read_text()[-3000:]}")

    def run(self, prompt: dict, seconds: float = 240) -> dict:
        """The outputs of a prompt, by node.

        Raises:
            Failed: it ended in an error.
        """
        history = self.wait(self.queue(prompt), seconds)
        if history["status"]["status_str"] != "success":
            raise Failed(json.dumps(history["status"]["messages"]))
        return history["outputs"]

    def picture(self, shown: dict) -> bytes:
        """A picture that a node shows, fetched as the page does it."""
        fields = urllib.parse.urlencode({key: shown[key] for key in ("filename", "subfolder", "type")})
        return self.get(f"/view?{fields}")

    def memory(self) -> int:
        """Bytes of memory that the process has to itself."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    @contextmanager
    def listening(self) -> Iterator[Any]:
        """A websocket of this client."""
        import websocket

        address = self.url.replace("http", "ws")
        listener = websocket.create_connection(f"{address}/ws?clientId={self._client}", timeout=120)
        try:
            yield listener
        finally:
            listener.close()


@contextmanager
def serving(folder: Path, *arguments: str, cpu: bool = True) -> Iterator[Server]:
    """ComfyUI on a base directory of its own, with this pack and the tests' nodes in it."""
    comfyui = find_comfyui()
    assert comfyui is not None
    nodes = folder / "custom_nodes"
    nodes.mkdir(parents=True, exist_ok=True)
    for name, target in ((NAME, PACK), (TEST_NODES.name, TEST_NODES), ("ComfyUI-GGUF", gguf_pack())):
        link = nodes / name
        if link.is_symlink():
            link.unlink()  # a folder that outlives its server may link to what is gone
        if target and not link.exists():
            link.symlink_to(target)
    for name in ("user", "input", "output", "temp"):
        (folder / name).mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "comfyui.log"
    command = [
        *(comfyui_python(comfyui), comfyui / "main.py", "--listen", "127.0.0.1", "--port", str(port)),
        *(["--cpu"] if cpu else []),
        *("--base-directory", folder, "--database-url", "sqlite:///:memory:", "--disable-auto-launch", *arguments),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("w") as written:
        process = subprocess.Popen(command, cwd=folder, stdout=written, stderr=subprocess.STDOUT, env=environment)
    server = Server(f"http://127.0.0.1:{port}", folder, log, process)
    try:
        _wait_until_up(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def with_tiny_text_encoder(prompt: dict) -> dict:
    """A prompt with ComfyUI's text encoders replaced by the tests' one."""
    loaders = [key for key, node in prompt.items() if node["class_type"] == "DualCLIPLoader"]
    for key in loaders:
        del prompt[key]
    for node in prompt.values():
        if node["class_type"] == "CLIPTextEncode" and node["inputs"]["clip"][0] in loaders:
            node["class_type"] = "TestTextEncode"
            del node["inputs"]["clip"]
    return prompt


def gguf_pack() -> Path | None:
    """ComfyUI-GGUF, where that ComfyUI has it."""
    comfyui = find_comfyui()
    pack = comfyui and comfyui / "custom_nodes/ComfyUI-GGUF"
    return pack if pack and pack.is_dir() else None


def _wait_until_up(server: Server) -> None:
    for _ in range(1500):
        if server.process.poll() is not None:
            break
        try:
            server.get("/system_stats")
            return
        except OSError:
            time.sleep(0.2)
    sys.exit(f"ComfyUI did not start:\n{server.log.read_text()[-3000:]}")
