"""Runs one prompt on a server, and checks the pictures."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image
from support.server import Failed, Server

SECONDS = 300
"""Longest time of a prompt."""


class Lost(Failed):
    """A prompt that did not end, or whose server did."""


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
    """The node that loads pictures: ComfyUI's, or the tests' if ComfyUI lacks ``av`` for it."""
    load = {"class_type": "LoadImage", "inputs": {"image": "character.png"}}
    try:
        run(server, {"1": load, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}, SECONDS)
    except Failed as error:
        print(f"TestLoadImage takes Load Image's place: {brief(error)}", flush=True)
        return "TestLoadImage"
    return "LoadImage"


def with_loader(prompt: dict, loader: str) -> dict:
    """A prompt with another node in place of Load Image."""
    for node in prompt.values():
        node["class_type"] = loader if node["class_type"] == "LoadImage" else node["class_type"]
    return prompt


def refusal(answer: str) -> str:
    """The errors in an answer of ``/prompt``."""
    try:
        nodes = json.loads(answer)["node_errors"].values()
        wrong = [f"{node['class_type']}: {error['details']}" for node in nodes for error in node["errors"]]
    except (ValueError, LookupError, AttributeError):
        wrong = []
    return f"refused: {'; '.join(wrong) or answer}"


def brief(error: object) -> str:
    """A message in one line, its beginning and its end."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else f"{text[:150]} … {text[-250:]}"
