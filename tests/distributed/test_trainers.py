"""DPTrainer in several processes: the run of one; and ranks that die or freeze."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dpzoo
from dpzoo.ledger import Ledger
from tests.distributed.options import OPTIONS
from tests.distributed.torchrun import ROOT, run_two_processes
from tests.integrations.runs import BERT, Owned, Rows, trainer_of
from tests.support import others_slow, stock_model

PARTS = {"per_device_train_batch_size": 2, "max_steps": 4}
TIMEOUT = 10


def start_model(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return dpzoo.convert(stock_model(BERT, dtype)).train()


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """Draws, weights, account; and one process goes on with their checkpoint, two rows a part as they."""
    options = [f"{k}={v}" for k, v in PARTS.items()]
    command = ["-m", "tests.distributed.trainers", str(tmp_path), "noise=0", *options]
    checkpoints = ["gradient_accumulation_steps=2", "save_strategy=steps", "save_steps=2"]
    printed = run_two_processes([*command, *checkpoints], tmp_path / "log")
    assert printed.count("'loss'") == 4  # by rank 0 alone
    first, second = (
        torch.load(tmp_path / f"trainer-{rank}.pt", weights_only=False) for rank in range(2)
    )
    alone = trainer_of(
        start_model(),
        tmp_path / "alone",
        {"noise_multiplier": 0.0},
        **PARTS,
        gradient_accumulation_steps=4,
        train_dataset=Rows(BERT),
    )
    alone.train()
    drawn = [batch[1:] for batch in alone.get_train_dataloader().batch_sampler]
    for one, other, both in zip(first["drawn"], second["drawn"], drawn, strict=True):
        assert sorted([*one, *other]) == both
    for key, value in alone.model.state_dict().items():
        assert torch.equal(first["weights"][key], second["weights"][key])
        torch.testing.assert_close(first["weights"][key], value, rtol=0, atol=1e-6)
    assert first["history"] == second["history"] == alone._account.history == [(0.0, 0.5, 4)]

    resumed = trainer_of(
        start_model(),
        tmp_path / "out",
        {"noise_multiplier": 0.0},
        **PARTS,
        gradient_accumulation_steps=4,
        save_strategy="steps",
        save_steps=2,
        train_dataset=Rows(BERT),
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    for key, value in resumed.model.state_dict().items():
        torch.testing.assert_close(value, first["weights"][key], rtol=0, atol=1e-6)
    other = trainer_of(start_model(), tmp_path / "out", **PARTS, train_dataset=Rows(BERT))
    with pytest.raises(dpzoo.InputError, match="per_device_train_batch_size=4"):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


DIFFERING = (
    r"InputError: Ranks differ in max_rows_per_unit (rank 0: 2, rank 1: 1)",
    r"InputError: Ranks differ in digest of unit_ids (rank 0: '",
    r"InputError: Ranks differ in rows of train_dataset (rank 0: 31, rank 1: 24); units",
)
CLOSE = 1e-9  # AdamW divides key biases' gradients, 1e-17 of rounding, by 1e-8


@pytest.mark.parametrize("way", others_slow(["ddp", "fsdp"], ["ddp"]))
def test_units_in_two_processes_are_those_of_one(way: str, tmp_path: Path) -> None:
    """Float64, AdamW: weights, evaluation, account, files; ranks that differ; one process goes on."""
    settings: dict[str, Any] = {**PARTS, "optim": "adamw_torch", "lr_scheduler_type": "linear"}
    settings |= {
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    options = [f"{k}={v}" for k, v in settings.items()]
    options += [
        "noise=0",
        "units=2",
        "gradient_accumulation_steps=2",
        *["fsdp=1"] * (way == "fsdp"),
    ]
    command = ["-m", "tests.distributed.trainers", str(tmp_path), *options]
    printed = run_two_processes([*command, "attack=1"], tmp_path / "log")
    assert printed.count("'loss'") == 4  # by rank 0 alone
    assert printed.count("'eval_loss'") == 3
    first, second = (
        torch.load(tmp_path / f"trainer-{rank}.pt", weights_only=False) for rank in range(2)
    )
    for rank in (first, second):
        for error, wanted in zip(rank["errors"], DIFFERING, strict=True):
            assert error.startswith(wanted)
        assert rank["own"] == (1.0 if way == "ddp" else pytest.approx(0.5, abs=0.1))
    private = {"noise_multiplier": 0.0, "unit_column": "who", "max_rows_per_unit": 2}
    settings |= {"gradient_accumulation_steps": 4}
    settings |= {"train_dataset": Owned(BERT), "eval_dataset": Rows(BERT, 12)}

    def assert_same(model: Any) -> None:
        for key, value in model.state_dict().items():
            torch.testing.assert_close(first["weights"][key], value, rtol=0, atol=CLOSE)

    alone = trainer_of(start_model(torch.float64), tmp_path / "alone", private, **settings)
    alone.train()
    assert_same(alone.model)
    assert not torch.equal(first["weights"]["classifier.weight"], start_model().classifier.weight)
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key])
    drawn = [batch[1:] for batch in alone.get_train_dataloader().batch_sampler]
    for one, other, both in zip(first["drawn"], second["drawn"], drawn, strict=True):
        assert sorted([*one, *other]) == both
    assert first["history"] == second["history"] == alone._account.history == [(0.0, 0.5, 4)]
    assert first["evaluated"] == pytest.approx(alone.evaluate()["eval_loss"], abs=1e-6)
    alone.save_model(str(tmp_path / "one"))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "saved"))
    assert list(one) == list(two)
    assert all(value.shape == two[key].shape for key, value in one.items())

    resumed = trainer_of(start_model(torch.float64), tmp_path / "out", private, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert_same(resumed.model)
    if way == "fsdp":  # and two go on with what one wrote
        shutil.rmtree(tmp_path / "out" / "checkpoint-4")
        run_two_processes([*command, "resume=1"], tmp_path / "log")
        again = torch.load(tmp_path / "trainer-1.pt", weights_only=False)
        for key, value in again["weights"].items():
            torch.testing.assert_close(first["weights"][key], value, rtol=0, atol=CLOSE)


@pytest.mark.slow
def test_under_fsdp_options_do_what_they_do_under_ddp(tmp_path: Path) -> None:
    run_two_processes(["-m", "tests.distributed.options", str(tmp_path)], tmp_path / "log")
    for rank in range(2):
        seen = torch.load(tmp_path / f"options-{rank}.pt", weights_only=False)
        assert list(seen) == list(OPTIONS)
        for name, ways in seen.items():
            ddp, fsdp = ways["ddp"], ways["fsdp"]
            assert ddp["epsilon"] == fsdp["epsilon"]
            if name == "epsilon":
                assert 0 < ddp["epsilon"] < 10  # the noise of shards is other noise
                continue
            # The layers compute in bfloat16, and under DDP autocast chooses what does.
            close = 1e-2 if name == "bf16" else 1e-12
            for what in ("evaluated", "predicted"):
                assert ddp[what] == pytest.approx(fsdp[what], abs=close)
            for key, value in ddp["weights"].items():
                torch.testing.assert_close(fsdp["weights"][key], value, rtol=0, atol=close)


def run_to_the_end(folder: Path, options: list[str], patience: float) -> list[tuple[int, str]]:
    """Two processes, not under torchrun, which would end the other: (exit code, errors) of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    running = []
    for rank in range(2):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": loopback,
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-m", "tests.distributed.trainers", str(folder), *options]
        with (folder / f"log-{rank}").open("w") as log:
            running.append(
                subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)
            )
    died = [folder / f"died-{rank}" for rank in range(2)]
    for note in died:
        note.unlink(missing_ok=True)
    since = time.monotonic()
    try:
        while time.monotonic() < since + patience:
            ended = [p.poll() is not None for p in running]
            gone = [e or d.exists() for e, d in zip(ended, died, strict=True)]
            if all(gone):
                break
            time.sleep(0.2)
        took = [died[rank].stat().st_mtime for rank in range(2) if died[rank].exists()]
        waited = time.time() - took[0] if took else 0.0
    finally:
        for process in running:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()
    logs = [(folder / f"log-{rank}").read_text(errors="replace") for rank in range(2)]
    assert all(gone), logs
    assert waited < TIMEOUT + 10, waited
    return [(p.returncode, log) for p, log in zip(running, logs, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_rank_that_dies_or_freezes_ends_the_other(seed: int, tmp_path: Path) -> None:
    """At ten random moments; the ledger has every step that any rank took; a resumed run is whole."""
    chance = random.Random(seed)
    rank, step, kind = chance.randrange(2), chance.randint(1, 5), ("SIGKILL", "SIGSTOP")[seed % 2]
    options = [f"{k}={v}" for k, v in {**PARTS, "max_steps": 6, "ddp_timeout": TIMEOUT}.items()]
    options += ["gradient_accumulation_steps=2", "save_strategy=steps", "save_steps=2"]
    options += ["fsdp=1"] * (seed % 3 == 0)
    ends = run_to_the_end(tmp_path, [*options, f"die={rank}:{step}:{kind}:{seed}"], 600)
    code, log = ends[1 - rank]
    assert code != 0
    assert f"RankError: Rank {1 - rank} waited in vain for" in log, log[-3000:]
    taken = [int((tmp_path / f"steps-{r}").read_text() or 0) for r in range(2)]
    ledger = Ledger(tmp_path / "out" / "privacy_ledger.jsonl")
    run = next(iter(ledger_runs(ledger)))
    paid = sum(count for _, _, count in ledger.paid(run))
    assert step + 3 >= paid >= max(taken) >= step - 2
    if step > 2 and seed < 4:
        assert max(taken) >= 2
        ends = run_to_the_end(tmp_path, [*options, "resume=1"], 600)
        assert [code for code, _ in ends] == [0, 0], ends[0][1][-3000:]
        assert sum(count for _, _, count in ledger.paid(run)) >= 6


def ledger_runs(ledger: Ledger) -> list[str]:
    ledger.steps("")
    return [run for run in ledger._steps if run]
