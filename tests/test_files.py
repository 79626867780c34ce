"""Whole files and folders: at any instant the old or the new stands, and what is left is cleaned up."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dpzoo
import dpzoo.files
from dpzoo.files import whole_file, whole_folder, write_text
from dpzoo.integrations.state import PrivacyState, save_random_state
from tests.faults import full_after, killed_at_each_instant, refused_at_each_instant
from tests.support import tiny_config

OLD, NEW = {"config.json": "old", "weights": "old"}, {"config.json": "new", "weights": "new"}


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def lay(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def fill(place: Path, keep: bool) -> None:
    with whole_folder(place, keep=lambda name: keep and name != "stale") as part:
        lay(part, NEW)


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopped", [killed_at_each_instant, refused_at_each_instant])
@pytest.mark.parametrize("before", ["old", None])
def test_a_file_is_the_old_or_the_new_one(
    stopped: Callable[..., Any], before: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "results.json"

    def reset() -> None:
        path.unlink(missing_ok=True)
        if before:
            path.write_text(before)

    reset()
    seen = set()
    for _ in stopped(lambda: write_text(path, "new")):
        seen.add(path.read_text() if path.exists() else None)
        if stopped is refused_at_each_instant:
            assert {p.name for p in tmp_path.iterdir()} <= {path.name}, "nothing is left"
        reset()
    assert seen == {before, "new"}
    write_text(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "the next writer cleans up"


def test_a_file_has_the_permissions_that_it_is_given_and_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with whole_file(tmp_path / "link", mode=0o600) as part:
        part.write_text("secret")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "secret"
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with whole_file(path) as outer:
        write_text(path, "inner")
        outer.write_text("outer")
    assert path.read_text() == "outer"


# --- folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-renames"])
@pytest.mark.parametrize("keep", [False, True], ids=["replace", "keep"])
@pytest.mark.parametrize("stopped", [killed_at_each_instant, refused_at_each_instant])
def test_a_folder_is_the_old_or_the_new_one(
    stopped: Callable[..., Any],
    keep: bool,
    exchange: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not exchange:
        monkeypatch.setattr(dpzoo.files, "_exchange", lambda one, other: False)
    place = tmp_path / "out"
    old = {**OLD, "notes": "mine", "stale": "old"}
    new = {**NEW, "notes": "mine"} if keep else NEW
    lay(place, old)
    seen = []
    for _ in stopped(lambda: fill(place, keep)):
        if not place.exists():
            assert not exchange
            dpzoo.files._place(place)  # what the next writer begins with
        seen.append(content(place))
        assert seen[-1] in (old, new)
        dpzoo.files._place(place)
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        fill(place, keep=False)
        for path in place.iterdir():
            path.unlink()
        lay(place, old)
    assert seen[0] == old
    assert seen[-1] == new


@pytest.mark.parametrize("stopped", [killed_at_each_instant, refused_at_each_instant])
def test_a_folder_with_subfolders_is_never_a_mixture(
    stopped: Callable[..., Any], tmp_path: Path
) -> None:
    place = tmp_path / "out"
    lay(place, OLD)
    lay(place / "checkpoint-1", OLD)
    for _ in stopped(lambda: fill(place, True)):
        found = content(place)
        assert content(place / "checkpoint-1") == OLD
        assert found in (OLD, NEW) or "config.json" not in found
        lay(place, OLD)
    fill(place, True)
    assert content(place) == NEW
    assert sorted(p.name for p in tmp_path.rglob("*") if p.name.startswith(".")) == []


def test_the_folder_that_the_process_runs_in_stays_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay(tmp_path / "out", {**OLD, "stale": "old"})
    monkeypatch.chdir(tmp_path / "out")
    fill(Path("."), True)
    assert content(Path(".")) == content(tmp_path / "out") == NEW


def test_a_folder_whose_parent_may_not_be_written_in_is_written_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "out"
    lay(place, {**OLD, "notes": "mine"})
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    fill(place, True)
    assert content(place) == {**NEW, "notes": "mine"}
    assert sorted(p.name for p in place.iterdir()) == ["config.json", "notes", "weights"]


def test_a_block_that_removes_its_folder_changes_nothing(tmp_path: Path) -> None:
    place = tmp_path / "out"
    lay(place, OLD)
    with whole_folder(place) as part:
        part.rmdir()
    assert content(place) == OLD
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# --- who uses them ------------------------------------------------------------------------------


def model(layers: int) -> Any:
    return dpzoo.BertModel(tiny_config("BertModel", num_hidden_layers=layers))


def whole(place: Path) -> int:
    """The layers of a checkpoint, which must be the same in both files."""
    config = dpzoo.BertModel.config_class.from_pretrained(place)
    names = load_file(place / "model.safetensors")
    held = {int(name.split(".")[2]) for name in names if name.startswith("encoder.layer.")}
    assert held == set(range(config.num_hidden_layers))
    return int(config.num_hidden_layers)


@pytest.mark.parametrize("stopped", [killed_at_each_instant, refused_at_each_instant])
def test_a_saved_model_is_the_old_or_the_new_one(
    stopped: Callable[..., Any], tmp_path: Path
) -> None:
    place, old, new = tmp_path / "model", model(1), model(2)
    old.save_pretrained(place)
    (place / "tokenizer.json").write_text("{}")
    seen = []
    for _ in stopped(lambda: new.save_pretrained(place)):
        seen.append(whole(place))
        assert (place / "tokenizer.json").read_text() == "{}"
        old.save_pretrained(place)
        assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert set(seen) == {1, 2}
    assert seen[-1] == 2


def test_a_disk_that_is_full_after_any_number_of_bytes_keeps_the_old_model(tmp_path: Path) -> None:
    place, old, new = tmp_path / "model", model(1), model(2)
    old.save_pretrained(place)
    size = (place / "config.json").stat().st_size
    for limit in (0, 1, size // 2, size, size + 4096, 20_000):
        assert full_after(lambda: new.save_pretrained(place), limit) == 3, limit
        assert whole(place) == 1
        assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert full_after(lambda: new.save_pretrained(place), 1 << 30) == 0
    assert whole(place) == 2


def test_a_saved_model_leaves_no_weights_of_an_earlier_one(tmp_path: Path) -> None:
    """transformers would go on to load an old model.safetensors beside new shards."""
    old, new = model(1), model(2)
    old.save_pretrained(tmp_path / "model")
    new.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert not (tmp_path / "model" / "model.safetensors").exists()
    loaded = dpzoo.from_pretrained(tmp_path / "model")
    for name, value in new.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    old.save_pretrained(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_no_place_to_write_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = dpzoo.BertModel(tiny_config("BertModel"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(
        dpzoo.InputError, match="save_pretrained got an empty path, wanted the path of a"
    ):
        model.save_pretrained("")
    with pytest.raises(
        dpzoo.InputError, match="from_pretrained got an empty path, wanted a hub id or"
    ):
        dpzoo.from_pretrained("")
    with pytest.raises(OSError, match=r"symbolic links: .*loop"):
        model.save_pretrained("loop")
    with pytest.raises(OSError, match="symbolic links: 'loop'"):
        write_text("loop", "text")
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path, "text")
    assert os.listdir(tmp_path) == ["loop"]


def test_saving_over_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        dpzoo.InputError, match=r"save_pretrained got .*file, a file; wanted a folder"
    ):
        model(1).save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def state(steps: int) -> PrivacyState:
    return PrivacyState("run", steps, "rdp", [], 1.0, 1e-5, 1.0, {}, "", {})


@pytest.mark.parametrize("stopped", [killed_at_each_instant, refused_at_each_instant])
def test_a_checkpoints_privacy_is_the_old_or_the_new_one(
    stopped: Callable[..., Any], tmp_path: Path
) -> None:
    def save(steps: int) -> None:
        save_random_state({"steps": steps}, tmp_path)
        state(steps).save(tmp_path)

    save(1)
    seen = set()
    for _ in stopped(lambda: save(2)):
        steps = PrivacyState.load(tmp_path).steps
        random = torch.load(tmp_path / "privacy_random_state.pt", weights_only=True)["steps"]
        seen.add((steps, random))
        save(1)
    # privacy.json comes last, and has the other file's digest in a whole checkpoint.
    assert seen == {(1, 1), (1, 2), (2, 2)}
    assert len(list(tmp_path.iterdir())) == 2
