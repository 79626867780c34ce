"""Starting two processes the way a user does, for tests: on loopback, and never left behind."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]


def run_two_processes(
    command: Sequence[str], log: Path, *, patience: int = 300, processes: int = 2
) -> str:
    """``torchrun --standalone --nproc-per-node 2 COMMAND``; fails the test if that fails.

    Args:
        command: what follows on torchrun's command line.
        log: a file for what the processes print.
        patience: seconds after which they are ended.
        processes: how many, if not two.

    Returns:
        What they printed.
    """
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": loopback,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",  # gloo on the CPU, wherever the tests run
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*torchrun, "--nproc-per-node", str(processes), *command],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            code: int | str = process.wait(patience)
        except subprocess.TimeoutExpired:
            code = f"none after {patience} s"
        finally:
            if process.poll() is None:  # torchrun ends its processes when it is asked to
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
    printed = log.read_text(encoding="utf-8", errors="replace")
    if code != 0:
        pytest.fail(f"exit code of torchrun: {code}\n{printed[-6000:]}")
    return printed


def saved_by_ranks(
    module: str,
    name: str,
    factory: pytest.TempPathFactory,
    *,
    cases: list[Any] | None = None,
    patience: int = 300,
    processes: int = 2,
) -> list[Any]:
    """What each rank of ``torchrun -m MODULE FOLDER`` saved. pytest's own workers share one run.

    Args:
        module: reads FOLDER/cases.pt, where there are cases, and saves FOLDER/RANK.pt.
        name: of the folder, one for each set of cases.
        factory: pytest's.
        cases: what the ranks work on.
        patience: see `run_two_processes`.
        processes: see `run_two_processes`.
    """
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / name
    folder.mkdir(exist_ok=True)
    files = [folder / f"{rank}.pt" for rank in range(processes)]
    with FileLock(folder / "lock"):
        if not all(file.is_file() for file in files):
            torch.save(cases, folder / "cases.pt")
            command = ["-m", module, str(folder)]
            run_two_processes(command, folder / "log", patience=patience, processes=processes)
    return [torch.load(file, weights_only=False) for file in files]
