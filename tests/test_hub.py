"""weights/hub.py: which files are requested, its error messages, and a download from a local hub."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

import minidiff
from minidiff.weights.hub import fetch_model, fetch_tokenizer, fetch_vae

COMMIT = "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"
CONFIGS = ["model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json", "unet/config.json"]
TOKENIZER = ["tokenizer/" + name for name in ("merges.txt", "special_tokens_map.json", "tokenizer_config.json")]
TOKENIZER += ["tokenizer/vocab.json"]
VAE = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
WEIGHTS = ["text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"]
NEEDED = sorted(CONFIGS + TOKENIZER + VAE + WEIGHTS)


# ---- which files


@dataclass
class Asked:
    """Replaces snapshot_download: records the request and returns a folder, or a cache with the requested
    files."""

    folder: Path
    cache: Path | None = None
    files: list[str] = field(default_factory=list)
    repos: list[tuple[str, str | None]] = field(default_factory=list)

    def __call__(self, repo: str, *, revision: str | None, allow_patterns: Sequence[str]) -> str:
        assert not any("*" in name or name.endswith(".bin") for name in allow_patterns)
        self.repos.append((repo, revision))
        self.files += [name for name in allow_patterns if (self.folder / name).is_file() and name not in self.files]
        if self.cache is None:
            return str(self.folder)
        for name in self.files:
            (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.folder / name, self.cache / name)
        return str(self.cache)


@pytest.fixture
def asked(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """A hub with one repository: the tiny folder plus the other files of the real one."""
    hub = Asked(publish(tiny_folder, tmp_path / "repo"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


def publish(folder: Path, target: Path) -> Path:
    """A copy of a model folder, plus files that must not be downloaded."""
    shutil.copytree(folder, target, copy_function=os.link)
    (target / "safety_checker").mkdir()
    for name in ("safety_checker/model.safetensors", "v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.bin"):
        (target / name).write_bytes(b"large")
    os.link(target / VAE[1], target / "vae/diffusion_pytorch_model.fp16.safetensors")
    return target


def test_only_what_is_needed(asked: Asked) -> None:
    assert fetch_model("a/model", None, None) == asked.folder
    assert sorted(asked.files) == NEEDED
    assert set(asked.repos) == {("a/model", None)}


def test_a_revision_and_a_variant(asked: Asked, tmp_path: Path) -> None:
    asked.cache = tmp_path / "cache"
    assert fetch_model("a/model", "v2", "fp16") == asked.cache
    assert set(asked.repos) == {("a/model", "v2")}
    weights = ["vae/diffusion_pytorch_model.fp16.safetensors", *WEIGHTS]  # one part has it, others use plain files
    assert sorted(name for name in asked.files if name.endswith(".safetensors")) == sorted(weights)
    with pytest.raises(ValueError, match="a/model at revision v2 holds no .* of the variant 'bf16'"):
        fetch_model("a/model", "v2", "bf16")


def test_shards(asked: Asked, tmp_path: Path) -> None:
    asked.cache = tmp_path / "cache"
    unet, names = asked.folder / "unet", ["a.safetensors", "b.safetensors"]
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / names[0])
    (unet / names[1]).touch()
    index = {"weight_map": dict(zip("xy", names, strict=True))}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    fetch_model("a/model", None, None)
    index_file = "diffusion_pytorch_model.safetensors.index.json"
    expected = [f"unet/{name}" for name in (names[0], names[1], "config.json", index_file)]
    assert sorted(name for name in asked.files if name.startswith("unet/")) == expected


def test_what_the_caller_brings_is_not_fetched(asked: Asked, tiny_folder: Path) -> None:
    model = minidiff.load("a/model", vae=tiny_folder, tokenizer=tiny_folder / "tokenizer", dtype="float32")
    assert sorted(asked.files) == sorted(CONFIGS + WEIGHTS)
    assert (model.name, model.origin) == ("a/model", asked.folder)
    assert model.options == {"vae": "tiny", "tokenizer": "tokenizer"}


def test_the_vae_of_another_repository(asked: Asked, tiny_folder: Path) -> None:
    model = minidiff.load(tiny_folder, vae="b/model", dtype="float32")
    assert asked.files == VAE
    assert asked.repos == [("b/model", None)]
    assert model.options == {"vae": "b/model"}


def test_a_repository_that_is_a_vae(asked: Asked) -> None:
    asked.folder = asked.folder / "vae"
    assert fetch_vae("b/vae", None) == asked.folder
    assert asked.files == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_a_vae_need_not_have_the_variant(asked: Asked) -> None:
    assert fetch_vae("b/model", "fp16") == asked.folder / "vae"
    assert asked.files == ["vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors"]
    asked.files.clear()
    assert fetch_vae("b/model", "bf16") == asked.folder / "vae"
    assert asked.files == VAE
    (asked.folder / VAE[1]).unlink()
    with pytest.raises(ValueError, match="b/model holds no autoencoder; expected config.json and diffusion_pytorch"):
        fetch_vae("b/model", None)


def test_another_kind_of_model_is_refused_before_its_weights_are_fetched(asked: Asked) -> None:
    config = json.loads((asked.folder / "unet/config.json").read_text())
    (asked.folder / "unet/config.json").unlink()  # a hard link: the original stays
    (asked.folder / "unet/config.json").write_text(json.dumps(config | {"cross_attention_dim": 2048}))
    with pytest.raises(ValueError, match="it is a Stable Diffusion XL model"):
        fetch_model("a/xl", None, None)
    assert not [name for name in asked.files if name.endswith(".safetensors")]


def test_a_repository_without_safetensors(asked: Asked) -> None:
    (asked.folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"a/old holds no unet/diffusion_pytorch_model.safetensors; .*Pickles \(.bin"):
        fetch_model("a/old", None, None)


def test_a_repository_of_something_else(asked: Asked, tmp_path: Path) -> None:
    asked.folder = tmp_path / "nothing matched"
    with pytest.raises(ValueError, match="a/dataset holds no unet/config.json, .*expected a Stable Diffusion 1.x"):
        fetch_model("a/dataset", None, None)


def test_the_tokenizer_of_single_files(asked: Asked) -> None:
    asked.folder = asked.folder / "tokenizer"
    assert fetch_tokenizer() == asked.folder
    assert sorted("tokenizer/" + name for name in asked.files) == TOKENIZER
    assert asked.repos == [("openai/clip-vit-large-patch14", None)]


# ---- errors of the real client


def test_offline_with_an_empty_cache() -> None:
    message = "nobody/nothing is not in the hub's cache and the hub cannot be reached .* go online once"
    with pytest.raises(ValueError, match=message):
        minidiff.load("nobody/nothing")
    with pytest.raises(ValueError, match="nobody/nothing at revision 1 is not in the hub's cache"):
        minidiff.load("nobody/nothing", revision="1")
    with pytest.raises(ValueError, match=message):
        fetch_vae("nobody/nothing", None)
    with pytest.raises(ValueError, match=r"there is no 'tiny-sd' here; if a picture names it, give its path"):
        minidiff.load("tiny-sd")


@pytest.mark.parametrize("ref", [None, COMMIT + "\n", "0" * 40], ids=["no refs", "a line's end", "another commit"])
def test_a_cache_that_was_filled_by_hand(
    ref: str | None, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    root = tmp_path / "models--a--model"
    shutil.copytree(tiny_folder, root / "snapshots" / COMMIT)
    if ref is not None:
        (root / "refs").mkdir()
        (root / "refs/main").write_text(ref)

    def offline(*_: object, **__: object) -> str:
        raise huggingface_hub.utils.LocalEntryNotFoundError("not cached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert fetch_model("a/model", None, None) == root / "snapshots" / COMMIT
    with pytest.raises(ValueError, match="runwayml/x is not in .*It moved to stable-diffusion-v1-5/x"):
        fetch_model("runwayml/x", None, None)


@pytest.mark.parametrize("name", ["a//b", "no such model", "/no/such/folder", "./none", "a/b/c", "-x"])
def test_no_hub_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="neither a file or folder here nor a hub id"):
        minidiff.load(name)


@pytest.mark.parametrize(("error", "problem"), [(OSError("disk full\nmore"), "disk full"), (KeyError(), "KeyError")])
def test_a_download_that_breaks_off(error: Exception, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The HTTP library's errors are not OSErrors in every version of huggingface_hub."""

    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match=f"could not fetch a/model at revision 1 from the hub: {problem}. Try again"):
        fetch_model("a/model", "1", None)


# ---- a local hub


class Hub(ThreadingHTTPServer):
    """Emulates huggingface.co as far as snapshot_download needs; `requested` lists the files read."""

    def __init__(self, repos: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos, self.requested = repos, list[str]()


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/").removeprefix("api/models/")
        owner, name, *rest = path.split("/")
        repo = f"{owner}/{name}"
        if repo not in self.server.repos:
            return self.error(401, "RepoNotFound")
        kind, revision, *file = rest or ["revision", "main"]
        if revision not in ("main", COMMIT):
            return self.error(404, "RevisionNotFound")
        folder = self.server.repos[repo]
        if kind == "resolve":
            if owner == "gated":
                return self.error(403, "GatedRepo")
            return self.file(folder / "/".join(file), f"{repo}/{'/'.join(file)}")
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        names = [path.relative_to(folder).as_posix() for path in files]
        if kind == "tree":
            rows = zip(names, files, strict=True)
            return self.json([{"type": "file", "path": n, "oid": "0" * 40, "size": f.stat().st_size} for n, f in rows])
        return self.json({"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]})

    def file(self, path: Path, name: str) -> None:
        if not path.is_file():
            return self.error(404, "EntryNotFound")
        content = path.read_bytes()
        if self.command == "GET":
            self.server.requested.append(name)
        return self.answer(200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def error(self, status: int, code: str) -> None:
        self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tiny_folder: Path, tmp_path: Path) -> Iterator[Hub]:
    repo = publish(tiny_folder, tmp_path / "repo")
    server = Hub({"tiny/model": repo, "gated/model": repo})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


LOAD = """
import json, sys
import minidiff

def try_to_load(arguments):
    try:
        model = minidiff.load(dtype="float32", device="cpu", **arguments)
    except ValueError as error:
        return str(error)
    return [model.name, float(model.unet.conv_in.weight.double().sum())]

print(json.dumps([try_to_load(arguments) for arguments in json.loads(sys.argv[1])]))
"""


def load_elsewhere(hub: Hub, home: Path, offline: bool, *arguments: dict[str, str]) -> list[str | tuple[str, float]]:
    """The result of minidiff.load in a separate process that uses our hub, with its cache below `home`."""
    url = f"http://127.0.0.1:{hub.server_port}"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_"))}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "no_proxy": "*"}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    command = [sys.executable, "-c", LOAD, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_download_and_the_cache_after_it(hub: Hub, tmp_path: Path, tiny_model: minidiff.Model) -> None:
    expected = ["tiny/model", float(tiny_model.unet.conv_in.weight.double().sum())]
    found, nothing, gated, revision = load_elsewhere(
        hub,
        tmp_path / "home",
        False,
        {"source": "tiny/model"},
        {"source": "tiny/nothing"},
        {"source": "gated/model"},
        {"source": "tiny/model", "revision": "v9"},
    )
    assert found == expected
    assert sorted(hub.requested) == [f"tiny/model/{name}" for name in NEEDED]
    assert nothing.startswith("there is no model 'tiny/nothing' on the hub, and no such file or folder here")
    assert gated.startswith("gated/model requires an account that has accepted its terms")
    assert revision.startswith("the hub has no tiny/model at revision v9; leave revision out")

    hub.requested.clear()
    again, by_commit, other = load_elsewhere(
        hub,
        tmp_path / "home",
        True,
        {"source": "tiny/model"},
        {"source": "tiny/model", "revision": COMMIT},
        {"source": "tiny/other"},
    )
    assert again == by_commit == expected
    assert other.startswith("tiny/other is not in the hub's cache and the hub cannot be reached")
    assert hub.requested == []
