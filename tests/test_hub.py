"""Checkpoints of a hub: from a cache, offline, and from a stand-in on loopback."""

import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import pytest
import torch

import dpzoo
from tests.stock_checkpoints import assert_loaded
from tests.support import stock_model

pytestmark = pytest.mark.usefixtures("quiet")


COMMITS = {"main": "a" * 40, "second": "b" * 40}
CLASSES = {"main": "GPT2LMHeadModel", "second": "GPT2ForTokenClassification"}


@pytest.fixture
def hub_folders(tmp_path: Path) -> dict[str, tuple[Path, Any]]:
    """Two revisions of one repository, saved from different classes."""
    revisions = {}
    for revision in COMMITS:
        stock = stock_model(CLASSES[revision], torch.float32)
        folder = tmp_path / "repo" / revision
        stock.save_pretrained(folder)
        stock.save_pretrained(folder / "inner")
        revisions[revision] = (folder, stock)
    return revisions


@pytest.fixture
def hub_cache(tmp_path: Path, hub_folders: Any) -> Path:
    """A hub cache as huggingface_hub lays it out, holding both revisions."""
    cache = tmp_path / "cache"
    repository = cache / "models--somebody--tiny"
    (repository / "refs").mkdir(parents=True)
    for revision, (folder, _) in hub_folders.items():
        (repository / "refs" / revision).write_text(COMMITS[revision])
        shutil.copytree(folder, repository / "snapshots" / COMMITS[revision])
    return cache


def test_a_filled_cache_needs_no_network(hub_cache: Path, hub_folders: Any) -> None:
    """cache_dir, revision, subfolder and local_files_only reach config and weights alike."""
    for revision, (_, stock) in hub_folders.items():
        for subfolder in ("", "inner"):
            zoo = dpzoo.from_pretrained(
                "somebody/tiny",
                revision=revision,
                subfolder=subfolder,
                cache_dir=hub_cache,
                local_files_only=True,
            )
            assert_loaded(zoo, stock)
            assert zoo.name_or_path == "somebody/tiny"
    with pytest.raises(OSError, match="couldn't find them in the cached files"):
        dpzoo.from_pretrained(
            "somebody/tiny", revision="third", cache_dir=hub_cache, local_files_only=True
        )
    config = {"cache_dir": hub_cache, "local_files_only": True}
    assert type(dpzoo.from_config("somebody/tiny", **config)) is dpzoo.GPT2LMHeadModel


def test_offline_mode(hub_cache: Path, hub_folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE=1, which huggingface_hub reads once at import."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    zoo = dpzoo.from_pretrained("somebody/tiny", cache_dir=hub_cache)
    assert_loaded(zoo, hub_folders["main"][1])
    with pytest.raises(OSError, match="couldn't find them in the cached files"):
        dpzoo.from_pretrained("somebody/other", cache_dir=hub_cache)


@pytest.fixture
def hub(
    hub_folders: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[tuple[str, str | None]]]:
    """A stand-in hub on loopback; gives the (path, Authorization) of each request it gets."""
    requests: list[tuple[str, str | None]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            path = urlsplit(self.path).path
            requests.append((path, self.headers.get("Authorization")))
            prefix = "/somebody/tiny/resolve/"
            revision, _, file = path.removeprefix(prefix).partition("/")
            names = {**{commit: name for name, commit in COMMITS.items()}, **dict.fromkeys(COMMITS)}
            known = path.startswith(prefix) and revision in names
            revision = names.get(revision) or revision
            if not known or not (hub_folders[revision][0] / file).is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = (hub_folders[revision][0] / file).read_bytes()
            self.send_response(200)
            self.send_header("ETag", f'"{revision}-{file}"')
            self.send_header("X-Repo-Commit", COMMITS[revision])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setenv("DISABLE_SAFETENSORS_CONVERSION", "1")
    yield requests
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_hub_id_is_downloaded(hub: Any, hub_folders: Any, tmp_path: Path) -> None:
    """Hub id, revision and token as a user passes them; the second load comes from the cache."""
    for revision, (_, stock) in hub_folders.items():
        hub.clear()
        zoo = dpzoo.from_pretrained(
            "somebody/tiny", revision=revision, cache_dir=tmp_path / "new", token="hf_secret"
        )
        assert_loaded(zoo, stock)
        assert {token for _, token in hub} == {"Bearer hf_secret"}
        files = {path.rsplit("/", 1)[1] for path, _ in hub}
        assert {"config.json", "model.safetensors"} <= files
    hub.clear()
    zoo = dpzoo.GPT2LMHeadModel.from_pretrained(
        "somebody/tiny", cache_dir=tmp_path / "new", local_files_only=True
    )
    assert_loaded(zoo, hub_folders["main"][1])
    assert not hub
    with pytest.raises(OSError, match="somebody/nothing"):
        dpzoo.from_pretrained("somebody/nothing", cache_dir=tmp_path / "new")
