"""The ledger: nothing begun or released is lost in silence, by kills, writers or damage."""

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import dpzoo.ledger
from dpzoo.errors import InputError
from dpzoo.ledger import Ledger

DIGEST = "ab" * 32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "ledger.jsonl"


def begin(ledger: Ledger, step: int, run: str = "a", noise: float = 1.0, rate: float = 0.5) -> None:
    ledger.begin(run, step, noise_multiplier=noise, sample_rate=rate)


def count(ledger: Ledger, run: str = "a", after: int = 0) -> int:
    return sum(steps for _, _, steps in ledger.paid(run, after))


def filled(path: Path, steps: int = 3) -> Ledger:
    ledger = Ledger(path)
    for step in range(1, steps + 1):
        begin(ledger, step)
        assert ledger.commit("a", step, f"{step:064x}")
    return ledger


# What is paid


def test_a_step_is_paid_once_for_each_digest_and_once_if_it_has_none(path: Path) -> None:
    ledger = Ledger(path)
    assert ledger.paid("a") == []
    begin(ledger, 1)
    assert ledger.paid("a") == [(1.0, 0.5, 1)]  # begun, and killed
    assert ledger.commit("a", 1, DIGEST)
    assert ledger.paid("a") == [(1.0, 0.5, 1)]
    again = Ledger(path)
    begin(again, 1)
    assert not again.commit("a", 1, DIGEST)  # bit for bit
    assert again.paid("a") == [(1.0, 0.5, 1)]
    assert again.commit("a", 1, "cd" * 32)  # other sums
    assert again.paid("a") == ledger.paid("a") == [(1.0, 0.5, 2)]
    begin(again, 2)
    assert again.commit("a", 2, DIGEST)  # another step, whatever the digest
    assert again.paid("a") == [(1.0, 0.5, 3)]
    assert again.paid("a", after=1) == [(1.0, 0.5, 1)]
    assert again.paid("b") == []
    assert (again.steps("a"), again.steps("b")) == (2, 0)


def test_a_step_done_again_at_another_price_is_paid_again(path: Path) -> None:
    """Half the noise on equal sums is another release, also if the digest that was given is the same."""
    ledger = Ledger(path)
    for noise, rate in ((1.0, 0.5), (0.5, 0.5), (1.0, 0.25)):
        begin(ledger, 1, noise=noise, rate=rate)
        assert ledger.commit("a", 1, DIGEST)
        assert not ledger.commit("a", 1, DIGEST)
    assert sorted(ledger.paid("a")) == [(0.5, 0.5, 1), (1.0, 0.25, 1), (1.0, 0.5, 1)]
    begin(ledger, 1, noise=2.0)  # begun at a fourth, and killed
    assert count(ledger) == 4


def test_two_objects_commit_at_the_price_they_began_with(path: Path) -> None:
    one, two = Ledger(path), Ledger(path)
    begin(one, 1, noise=1.0)
    begin(two, 1, noise=2.0)
    assert one.commit("a", 1, DIGEST)
    assert two.commit("a", 1, DIGEST)
    third = Ledger(path)  # began nothing: the file's last
    assert not third.commit("a", 1, DIGEST)
    assert third.commit("a", 1, "01")
    assert sorted(third.paid("a")) == [(1.0, 0.5, 1), (2.0, 0.5, 2)]


def test_runs_do_not_mix(path: Path) -> None:
    ledger = Ledger(path)
    for run in ("a", "b", 'q"uote\n', "ü"):
        begin(ledger, 7, run)
        assert ledger.commit(run, 7, DIGEST)
    assert all(count(Ledger(path), run) == 1 for run in ("a", "b", 'q"uote\n', "ü"))


def test_a_commit_needs_a_begin(path: Path) -> None:
    ledger = filled(path)
    with pytest.raises(InputError, match=r"commit of step 9 of run 'a', which was not begun"):
        ledger.commit("a", 9, DIGEST)
    with pytest.raises(InputError, match="run 'b', which was not begun"):
        ledger.commit("b", 1, DIGEST)
    assert "b" not in Ledger(path)._steps
    assert count(ledger) == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"run": ""}, "run='', wanted a name"),
        ({"run": 5}, "run=5"),
        ({"step": -1}, "step=-1, wanted an integer from 1 on"),
        ({"step": 0}, "step=0"),  # `paid` after 0 would leave it out
        ({"step": 1.0}, "step=1.0"),
        ({"step": True}, "step=True"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier=nan, wanted 0 or more"),
        ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0"),
        ({"noise_multiplier": float("inf")}, "noise_multiplier=inf"),
        ({"noise_multiplier": None}, "noise_multiplier=None"),
        ({"sample_rate": 0.0}, "sample_rate=0.0, wanted above 0 and at most 1"),
        ({"sample_rate": 1.5}, "sample_rate=1.5"),
        ({"sample_rate": "x"}, "sample_rate='x'"),
    ],
)
def test_arguments_out_of_range(path: Path, change: dict[str, Any], says: str) -> None:
    given = {"run": "a", "step": 1, "noise_multiplier": 1.0, "sample_rate": 0.5, **change}
    with pytest.raises(InputError, match=says):
        Ledger(path).begin(**given)
    assert not path.exists()


@pytest.mark.parametrize("digest", ["", b"ab", None])
def test_a_digest_is_a_text(path: Path, digest: Any) -> None:
    with pytest.raises(InputError, match="wanted a text"):
        filled(path).commit("a", 1, digest)


# Damage


def test_a_flipped_bit_of_any_byte_is_noticed(path: Path) -> None:
    filled(path, 2)
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in (position % 8, 5):  # 5: small and capital letters
            path.write_bytes(
                whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :]
            )
            with pytest.raises(InputError, match=r"is damaged in line \d.*Restore the file"):
                Ledger(path).paid("a")


def test_an_end_that_was_cut_off_is_dropped_and_named(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At every byte of the last line: the lines before it stand, and the next entry follows them."""
    filled(path, 2)
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1  # of the last commit
    for end in range(start + 1, len(whole)):
        caplog.clear()
        path.write_bytes(whole[:end])
        ledger = Ledger(path)
        assert ledger.paid("a") == [(1.0, 0.5, 2)]
        if end == len(whole) - 1:
            assert not ledger.commit("a", 2, f"{2:064x}")  # all but the line break: it counts
        else:
            assert "dropped the line that a crash cut off" in caplog.text
            assert repr(whole[start:end])[2:40] in caplog.text
            assert ledger.commit("a", 2, f"{2:064x}")
        assert path.read_bytes() == whole


def test_a_long_end_that_was_cut_off_leaves_nothing_behind_a_short_entry(path: Path) -> None:
    ledger = filled(path)
    with open(path, "ab") as file:
        file.write(b'["begin", "' + b"x" * 500)
    begin(ledger, 4)
    assert path.read_bytes().count(b"\n") == 8
    assert b"x" not in path.read_bytes()
    assert count(Ledger(path)) == 4


def test_lines_that_are_missing_moved_doubled_or_foreign(path: Path, tmp_path: Path) -> None:
    filled(path, 4)
    other = tmp_path / "other"
    filled(other, 4)
    lines, foreign = path.read_bytes().splitlines(True), other.read_bytes().splitlines(True)
    wrong = [lines[:i] + lines[i + 1 :] for i in range(len(lines) - 1)]
    wrong += [[*lines[:i], lines[i + 1], lines[i], *lines[i + 2 :]] for i in range(len(lines) - 1)]
    wrong += [lines[: i + 1] + lines[i:] for i in range(len(lines))]
    wrong += [lines[:i] + foreign[i:] for i in range(1, len(lines))]
    wrong += [lines + foreign, [*lines, b"\n"], [*lines, b"\0" * 50 + b"\n"]]
    for content in wrong:
        path.write_bytes(b"".join(content))
        for call in (lambda x: x.paid("a"), lambda x: begin(x, 9), lambda x: x.require("a")):
            with pytest.raises(InputError, match="is damaged in line"):
                call(Ledger(path))
        assert path.read_bytes() == b"".join(content)  # nothing is made worse


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"{}", b"{}\n", b'{"a": 3}\n', b"\0" * 10, b"\x80\n", b"[] " + b"0" * 32],
)
def test_a_file_that_is_no_ledger_is_left_alone(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    for call in (lambda x: x.paid("a"), lambda x: begin(x, 1), lambda x: x.head):
        with pytest.raises(InputError, match="is damaged in line 1"):
            call(Ledger(path))
    assert path.read_bytes() == content


def test_a_folder_and_another_version(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a folder; wanted the path of a file in it"):
        Ledger(tmp_path)
    text = json.dumps(["dpzoo ledger", 99, "0"]).encode()
    path.parent.mkdir()
    path.write_bytes(text + b" " + dpzoo.ledger._hash("", text).encode() + b"\n")
    with pytest.raises(InputError, match=r"got 'dpzoo ledger' 99, wanted 'dpzoo ledger' 1"):
        Ledger(path).paid("a")


# What a checkpoint relies on


def test_a_ledger_that_a_checkpoint_names_must_be_there(path: Path, tmp_path: Path) -> None:
    ledger = filled(path)
    head = ledger.head
    Ledger(path).require("a")
    Ledger(path).require("a", head)
    begin(ledger, 4)
    Ledger(path).require("a", head)
    with pytest.raises(InputError, match=r"no entry of run 'b', only of \['a'\]"):
        Ledger(path).require("b")
    with pytest.raises(InputError, match=r"is gone; run 'a' needs it\. Copy it"):
        Ledger(tmp_path / "elsewhere").require("a", head)


def test_lines_missing_at_the_end_are_noticed_by_the_head(path: Path) -> None:
    """The chain alone cannot tell a ledger that was cut between lines, or restored from an older copy."""
    ledger = filled(path)
    head = ledger.head
    lines = path.read_bytes().splitlines(True)
    for end in range(1, len(lines)):
        path.write_bytes(b"".join(lines[:end]))
        Ledger(path).paid("a")
        with pytest.raises(InputError, match="is another one, or an older copy"):
            Ledger(path).require("a", head)
        with pytest.raises(InputError, match=r"has \d+ bytes and had \d+"):
            ledger.paid("a")
    path.unlink()
    filled(path)
    with pytest.raises(InputError, match="is another one, or an older copy"):
        Ledger(path).require("a", head)


def test_a_file_that_is_put_in_its_place_must_go_on_from_it(path: Path, tmp_path: Path) -> None:
    ledger = filled(path)
    copy, old = tmp_path / "copy", tmp_path / "old"
    shutil.copy(path, old)
    begin(ledger, 4)
    shutil.copy(path, copy)
    begin(Ledger(copy), 5)
    os.replace(copy, path)  # a newer one: taken
    assert count(ledger) == 5
    os.replace(old, path)
    with pytest.raises(InputError, match="is another one, or an older copy"):
        ledger.paid("a")
    path.unlink()
    with pytest.raises(InputError, match="is gone"):
        begin(filled(tmp_path / "x") and ledger, 5)
    assert not path.exists()


# Writers and kills


def _write(path: Path, run: str, steps: int) -> None:
    ledger = Ledger(path)
    for step in range(1, steps + 1):
        begin(ledger, step, run)
        begin(ledger, step, "shared")
        ledger.commit("shared", step, run)


def test_processes_that_write_at_once_lose_nothing(path: Path) -> None:
    """Four of them, from before the file is there; steps they share are paid once for each digest."""
    context = multiprocessing.get_context("spawn" if sys.platform == "win32" else "fork")
    workers = [context.Process(target=_write, args=(path, str(n), 50)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    ledger = Ledger(path)
    assert all(count(ledger, str(n)) == 50 for n in range(4))
    assert count(ledger, "shared") == 200
    assert sorted(os.listdir(path.parent)) in (
        ["ledger.jsonl"],
        ["ledger.jsonl", "ledger.jsonl.lock"],
    )


def test_threads_that_share_one_object_lose_nothing(path: Path) -> None:
    ledger = Ledger(path)

    def work(run: str) -> None:
        for step in range(1, 51):
            begin(ledger, step, run)
            ledger.commit(run, step, DIGEST)
            assert count(ledger, run) == step

    threads = [threading.Thread(target=work, args=(str(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(count(Ledger(path), str(n)) == 50 for n in range(4))


KILLED = textwrap.dedent(
    """
    import sys
    from dpzoo.ledger import Ledger
    ledger = Ledger(sys.argv[1])
    first = ledger.steps("a") + 1
    for step in range(first, first + 100_000):
        ledger.begin("a", step, noise_multiplier=1.0, sample_rate=0.5)
        print("begun", step, flush=True)
        for digest in ("0", "1"):
            ledger.commit("a", step, digest)
            print("released", step, digest, flush=True)
    """
)


def test_what_returned_before_a_kill_is_paid(path: Path) -> None:
    """Killed at random moments and begun again, five times: paid is never below what was acknowledged."""
    chance, released, begun = random.Random(0), set(), set()
    root = str(Path(__file__).parents[1])
    stub = f"import sys, types; sys.path.insert(0, {root!r})\n"
    # The package's own __init__ would import torch: seconds a process.
    stub += f"p = types.ModuleType('dpzoo'); p.__path__ = [{root + '/dpzoo'!r}]; sys.modules['dpzoo'] = p\n"
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", stub + KILLED, str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        said = process.stdout.readline()
        time.sleep(chance.random() * 0.1)
        process.kill()
        said += process.stdout.read()
        assert process.stderr.read() == ""
        process.wait()
        for kind, step, *digest in map(str.split, said.split("\n")[:-1]):  # whole lines
            begun.add(step)
            if kind == "released":
                released.add((step, *digest))
        steps = dict.fromkeys(begun, 0)
        for step, _ in released:
            steps[step] += 1
        assert len(begun) > 0
        assert count(Ledger(path)) >= sum(max(1, n) for n in steps.values())
        # At most one entry of each process was on disk and not acknowledged.
        assert count(Ledger(path)) <= sum(max(1, n) for n in steps.values()) + 5


def test_a_lock_that_is_not_given_back_is_named(path: Path) -> None:
    ledger = filled(path)
    waiting = Ledger(path, timeout=0.05)
    with ledger._writing(), pytest.raises(InputError, match=r"locked for 0.05 s by another"):
        begin(waiting, 9)
    begin(waiting, 9)


def test_a_full_disk_leaves_the_ledger_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = filled(path)
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dpzoo.ledger.os, "fsync", full)
    for call in (lambda: begin(ledger, 4), lambda: ledger.commit("a", 1, DIGEST)):
        with pytest.raises(OSError, match="No space left"):
            call()
    assert path.read_bytes() == before
    new = Ledger(path.parent / "new")
    with pytest.raises(OSError, match="No space left"):
        begin(new, 1)
    assert not any(name.startswith((".new", "new.js")) for name in os.listdir(path.parent))
    assert not (path.parent / "new").exists()
    monkeypatch.undo()
    begin(ledger, 4)
    begin(new, 1)
    assert count(Ledger(path)) == 4


def test_entries_are_on_disk_before_the_call_returns(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(
        dpzoo.ledger.os, "fsync", lambda handle: (fsync(handle), synced.append(handle))
    )
    ledger = Ledger(path)
    begin(ledger, 1)
    made = len(synced)
    assert made >= 2  # the file that was made, and the entry
    assert ledger.commit("a", 1, DIGEST)
    assert len(synced) == made + 1


def test_a_late_step_costs_what_an_early_one_does(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No entry is read twice, so that a step takes two writes whatever the ledger's length."""
    taken: list[bytes] = []
    take = Ledger._take
    monkeypatch.setattr(Ledger, "_take", lambda self, line: (taken.append(line), take(self, line)))
    ledger = filled(path, 50)
    for step in range(1, 51):
        begin(ledger, step)  # done again: nothing to write
        assert not ledger.commit("a", step, f"{step:064x}")
    assert count(ledger) == 50
    assert taken == path.read_bytes().splitlines()
