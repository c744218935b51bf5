"""Finding and fetching model files, from a hub on the loopback with huggingface_hub's real client."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import huggingface_hub
import pytest
from packaging.version import Version
from support.loopback_hub import Hub, connect, serving

from instantcharacter.cli.main import main
from instantcharacter.files import folders as model_folders_module
from instantcharacter.files.catalog import FILES
from instantcharacter.files.download import RESERVED, fetch
from instantcharacter.files.folders import find

ROOT = Path(__file__).parents[2]
CONTENT = bytes(range(256)) * 4096
"""1 MiB."""
ADAPTER = FILES["adapter"]
TELLS_PROGRESS = Version(huggingface_hub.__version__) >= Version("1.2")


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Hub:
    with serving() as hub:
        connect(hub, monkeypatch, tmp_path / "cache")
        for file in FILES.values():
            hub.files[file.repo, file.path] = CONTENT
        yield hub


def touch(path: Path) -> None:
    """Make an empty file, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def go_offline(monkeypatch) -> None:
    """As HF_HUB_OFFLINE=1 in the environment does it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    getattr(huggingface_hub.utils, "reset_sessions", lambda: None)()  # older clients look at it when they connect


def left(directory) -> list[str]:
    """The model files in a directory, whole or not."""
    return sorted(path.name for path in directory.rglob("*") if path.is_file() and ".cache" not in path.parts)


@pytest.mark.parametrize("name", FILES)
def test_each_file_is_fetched_to_its_place(hub, tmp_path, name):
    file = FILES[name]
    assert fetch(file, tmp_path) == tmp_path / file.saved_as
    assert (tmp_path / file.saved_as).read_bytes() == CONTENT
    assert find(file, {folder: [tmp_path] for folder in file.searched}) == tmp_path / file.saved_as


def test_file_is_fetched_in_a_process_that_has_loaded_nothing_else(tmp_path):
    """huggingface_hub loads its parts when they are named, and not all of them can be named."""
    with serving() as hub:
        hub.files[ADAPTER.repo, ADAPTER.path] = CONTENT
        code = (
            "import sys; from instantcharacter.files.catalog import FILES; "
            "from instantcharacter.files.download import fetch; "
            "print(fetch(FILES['adapter'], sys.argv[1]))"
        )
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url}
        run = subprocess.run(
            [sys.executable, "-c", code, tmp_path], cwd=ROOT, env=environment, capture_output=True, text=True
        )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / ADAPTER.path).read_bytes() == CONTENT


def test_whole_file_is_not_fetched_again(hub, tmp_path):
    fetch(ADAPTER, tmp_path)
    fetch(ADAPTER, tmp_path)
    assert len(hub.ranges) == 1


def test_cut_connection_is_resumed_where_it_was_cut(hub, tmp_path):
    hub.cut_after = 300_000
    try:
        fetch(ADAPTER, tmp_path)  # newer clients go on by themselves, older ones when they are called again
    except OSError as error:
        assert "came cut off" in str(error)
        assert left(tmp_path) == []
    assert fetch(ADAPTER, tmp_path).read_bytes() == CONTENT
    first, second = hub.ranges
    assert first is None
    start = int(second.removeprefix("bytes=").split("-")[0])
    assert 0 < start <= 300_000


@pytest.mark.skipif(not TELLS_PROGRESS, reason="huggingface_hub before 1.2 cannot tell how far a download is")
def test_progress_is_reported_and_ends_at_the_size(hub, tmp_path):
    reports = []
    fetch(ADAPTER, tmp_path, progress=lambda done, total: reports.append((done, total)))
    assert reports[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)
    assert len(reports) > 3


@pytest.mark.skipif(not TELLS_PROGRESS, reason="huggingface_hub before 1.2 cannot be cancelled by its progress")
def test_cancelled_download_leaves_no_file_of_that_name_and_can_be_fetched_again(hub, tmp_path):
    class Cancelled(BaseException):
        pass

    def cancel(done, total):
        if done > total // 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        fetch(ADAPTER, tmp_path, progress=cancel)
    assert left(tmp_path) == []
    assert find(ADAPTER, {"ipadapter": [tmp_path]}) is None
    assert fetch(ADAPTER, tmp_path).read_bytes() == CONTENT


def test_wrong_size_is_never_taken_for_whole(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda _: None)
    hub.announced = len(CONTENT) + 1000
    with pytest.raises(OSError, match="the InstantCharacter adapter .* by hand from https://huggingface.co/tencent"):
        fetch(ADAPTER, tmp_path)
    assert left(tmp_path) == []


@pytest.mark.parametrize("status", [401, 403])
def test_gated_file_says_where_to_accept_its_licence(hub, tmp_path, status):
    file = FILES["flux"]
    hub.status[file.repo], hub.error_code[file.repo] = status, "GatedRepo"
    with pytest.raises(OSError, match=r"licence: accept it at https://huggingface.co/black-forest.*`hf auth login`"):
        fetch(file, tmp_path)
    assert left(tmp_path) == []


def test_refused_file_says_to_check_the_token(hub, tmp_path):
    hub.status[ADAPTER.repo] = 403
    with pytest.raises(OSError, match=r"refused \(403\): check HF_TOKEN"):
        fetch(ADAPTER, tmp_path)


def test_missing_file_says_where_to_look(hub, tmp_path):
    del hub.files[ADAPTER.repo, ADAPTER.path]
    with pytest.raises(OSError, match="is not at https://huggingface.co/tencent/InstantCharacter any more"):
        fetch(ADAPTER, tmp_path)


def test_hub_in_trouble_says_to_try_later(hub, tmp_path, monkeypatch):
    hub.status[ADAPTER.repo] = 418
    with pytest.raises(OSError, match="the hub says 418.*try again later"):
        fetch(ADAPTER, tmp_path)


def test_offline_says_how_to_go_on(hub, tmp_path, monkeypatch):
    go_offline(monkeypatch)
    with pytest.raises(OSError, match="go online, unset HF_HUB_OFFLINE.*by hand from"):
        fetch(ADAPTER, tmp_path)
    assert hub.tokens == []


def test_offline_takes_what_is_there(hub, tmp_path, monkeypatch):
    fetch(ADAPTER, tmp_path)
    go_offline(monkeypatch)
    assert fetch(ADAPTER, tmp_path).read_bytes() == CONTENT


def test_no_network_says_how_to_go_on(hub, tmp_path, monkeypatch):
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    for module in (huggingface_hub.constants, huggingface_hub.file_download):
        if hasattr(module, "HUGGINGFACE_CO_URL_TEMPLATE"):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(OSError, match="could not be reached.*check HF_ENDPOINT"):
        fetch(ADAPTER, tmp_path)


def test_full_disk_is_seen_before_anything_is_fetched(hub, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=RESERVED)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(OSError, match=r"0\.0 GB are needed, 0\.3 GB are free\): make room"):
        fetch(ADAPTER, tmp_path)
    assert hub.ranges == []


def test_token_goes_with_that_download_alone(hub, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "login", lambda *_, **__: pytest.fail("login() was called"))
    fetch(ADAPTER, tmp_path, token="hf_secret")
    assert set(hub.tokens) == {"Bearer hf_secret"}
    hub.tokens.clear()
    fetch(FILES["siglip"], tmp_path)
    assert set(hub.tokens) == {None}
    assert "hf_secret" not in caplog.text
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]


@pytest.mark.parametrize("token", ["hf_hidden\nb", "hf_hidden\0", "hf_hidd\u00e9n", "hf_hidden \ud800"])
def test_token_that_cannot_be_sent_is_refused_and_not_quoted(hub, tmp_path, token):
    with pytest.raises(ValueError, match="no Hugging Face token") as raised:
        fetch(ADAPTER, tmp_path / "ipadapter", token=token)
    assert "hf_hidd" not in "".join(traceback.format_exception(raised.value)[-1:])
    assert raised.value.__context__ is None
    assert hub.tokens == []


# Linked and extra folders


@pytest.mark.parametrize(
    ("written", "name", "where"),
    [
        ("base_path: DISK\n    unet: models/unet", "flux", "disk/models/unet"),
        ("base_path: DISK\n    diffusion_models: |\n        unet\n        diffusion_models", "flux", "disk/unet"),
        ("base_path: $ANYWHERE\n    clip: models/clip/", "clip_l", "disk/models/clip"),
        ("base_path: ~/comfy\n    clip_vision: models/clip_vision", "siglip", "home/comfy/models/clip_vision"),
        ("base_path: ../disk\n    vae: models/VAE", "vae", "disk/models/VAE"),
        ("ipadapter: ../disk/ip", "adapter", "disk/ip"),
        ("vae: DISK/vae", "vae", "disk/vae"),
        ("is_default: true\n    base_path: DISK\n    text_encoders: te", "t5", "disk/te"),
    ],
)  # fmt: skip
def test_extra_model_paths_are_searched_as_comfyui_does_it(tmp_path, monkeypatch, capsys, written, name, where):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ANYWHERE", str(tmp_path / "disk"))
    models = tmp_path / "ComfyUI/models"
    models.mkdir(parents=True)
    written = f"# mine\nothers:\nmine:\n    {written.replace('DISK', str(tmp_path / 'disk'))}\n"
    (tmp_path / "ComfyUI/extra_model_paths.yaml").write_text(written)
    file = FILES[name]
    touch(tmp_path / where / file.saved_as)
    assert main(["download", name, "--models", str(models)]) == 0
    path = Path(capsys.readouterr().out.split(": ", 1)[1].strip())
    assert path.samefile(tmp_path / where / file.saved_as)
    assert list(models.iterdir()) == []


def test_default_of_extra_model_paths_is_where_files_are_fetched_to(hub, tmp_path):
    (tmp_path / "models").mkdir()
    extra = f"mine:\n    is_default: true\n    base_path: {tmp_path / 'disk'}\n    ipadapter: ipadapter\n"
    (tmp_path / "extra_model_paths.yaml").write_text(extra)
    assert main(["download", "adapter", "--models", str(tmp_path / "models")]) == 0
    assert (tmp_path / "disk/ipadapter" / ADAPTER.path).read_bytes() == CONTENT


@pytest.mark.parametrize("written", ["mine: [", "mine: text", "- a", "mine:\n  vae: 3", "\0"])
def test_extra_model_paths_that_cannot_be_read_are_one_line(tmp_path, capsys, written):
    (tmp_path / "models").mkdir()
    (tmp_path / "extra_model_paths.yaml").write_text(written)
    assert main(["download", "vae", "--models", str(tmp_path / "models")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "extra_model_paths.yaml is not as ComfyUI expects it" in line


def test_download_command_fetches_what_is_not_there(hub, tmp_path, capsys):
    there = tmp_path / "clip_vision/sigclip_vision_patch14_384.safetensors"
    there.parent.mkdir()
    there.write_bytes(b"mine")
    assert main(["download", "siglip", "adapter", "flux", "--models", str(tmp_path)]) == 0
    assert there.read_bytes() == b"mine"
    assert (tmp_path / "ipadapter" / ADAPTER.path).read_bytes() == CONTENT
    assert (tmp_path / "unet/flux1-dev.safetensors").read_bytes() == CONTENT
    assert len(hub.ranges) == 2
    assert main(["download", "siglip", "adapter", "flux", "--models", str(tmp_path)]) == 0
    assert len(hub.ranges) == 2
    assert f"siglip: {there}" in capsys.readouterr().out


@pytest.mark.parametrize("installed", ["copied", "linked"])
@pytest.mark.parametrize(("folder", "line"), [("custom_nodes/ComfyUI-InstantCharacter", 0), (".", 1)])
def test_readmes_download_command_finds_the_comfyui_it_is_in(tmp_path, installed, folder, line):
    commands = re.findall(r"^python .* download .*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) == 2
    comfyui = tmp_path / "ComfyUI"
    pack = comfyui / "custom_nodes/ComfyUI-InstantCharacter"
    pack.parent.mkdir(parents=True)
    if installed == "linked":
        pack.symlink_to(ROOT)
    else:
        shutil.copytree(
            ROOT / "instantcharacter", pack / "instantcharacter", ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("adapter", "siglip", "dinov2"):
        touch(comfyui / "models" / FILES[name].folder / FILES[name].saved_as)
    command = commands[line].replace("python", shlex.quote(sys.executable), 1)
    run = subprocess.run(["sh", "-c", f"cd {comfyui / folder} && {command}"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        f"{name}: {comfyui / 'models' / FILES[name].folder / FILES[name].saved_as}"
        for name in ("adapter", "siglip", "dinov2")
    ]


def test_download_command_outside_of_a_comfyui_asks_for_its_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(model_folders_module, "comfyui_folder", lambda: None)
    assert main(["download", "adapter"]) == 2
    assert "this pack is in no ComfyUI: give ComfyUI's models folder with --models" in capsys.readouterr().err


def test_download_command_says_what_is_wrong(hub, tmp_path, capsys):
    assert main(["download", "--models", str(tmp_path / "nowhere")]) == 2
    assert "give ComfyUI's models folder with --models" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["download", "everything"])
    hub.status[ADAPTER.repo] = 403
    assert main(["download", "adapter", "--models", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: the InstantCharacter adapter")
