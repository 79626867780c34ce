"""Peak memory of a step of GPT-2's language model, head tied: in ghost mode, hooks, bk, not private.

    python -m tests.opacus_modes.test_memory ghost   # or hooks, bk, none

Each figure comes from a process of its own, since a peak never falls, and is the resident memory of that
process: of all of it, and above what it held before the step (libraries, model and optimizer).
"""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config

import dpzoo
from tests.modes import engine_of

ROOT = Path(__file__).resolve().parents[2]

BATCH, SEQ, VOCAB, HIDDEN = 8, 128, 50257, 768
TABLES = BATCH * VOCAB * HIDDEN * 4 / 2**20
"""Size in MiB of the tied weight's per-sample gradients, in float32."""


def resident(peak: bool) -> float:
    """Resident memory of this process in MiB, now or at its peak."""
    status = Path("/proc/self/status")
    if status.exists():  # the figures of getrusage begin with those of the parent process
        key = "VmHWM" if peak else "VmRSS"
        return int(re.findall(rf"{key}:\s+(\d+) kB", status.read_text())[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (
        20 if sys.platform == "darwin" else 10
    )


def measure(mode: str) -> None:
    """Print the peak of a process that takes one step, and what it held before, in MiB."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_head=12, n_layer=4)
    module = model = dpzoo.GPT2LMHeadModel(config).train()
    assert model.lm_head.weight is model.transformer.wte.weight
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.1), dpzoo.ModelLoss()
    if mode != "none":
        module, optimizer, *ghost, _ = engine_of(mode).make_private(
            module=model,
            optimizer=optimizer,
            criterion=criterion,
            data_loader=DataLoader(list(range(BATCH)), batch_size=BATCH),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            grad_sample_mode=mode,
        )
        criterion = ghost[0] if ghost else criterion
    ids = torch.randint(0, VOCAB, (BATCH, SEQ))
    before = resident(peak=False)
    criterion(module(input_ids=ids, labels=ids)).backward()
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    print(f"{resident(peak=True):.0f} {before:.0f}")


def measured(mode: str) -> tuple[float, float]:
    """(peak, peak above what was held before the step), in MiB, of a fresh process."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.opacus_modes.test_memory", mode]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    peak, before = map(float, done.stdout.split())
    return peak, peak - before


@pytest.mark.slow
def test_ghost_mode_and_bk_need_a_fraction_of_the_memory_of_hooks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ghost, hooks, none = measured("ghost"), measured("hooks"), measured("none")
    book = measured("bk")
    with capsys.disabled():
        print(
            f"\ntied GPT-2 LM: vocabulary {VOCAB}, hidden {HIDDEN}, 4 layers, {BATCH} x {SEQ} tokens"
        )
        for name, figures in (
            ("ghost", ghost),
            ("hooks", hooks),
            ("bk", book),
            ("not private", none),
        ):
            print(f"{name:12} peak {figures[0]:5.0f} MiB, {figures[1]:5.0f} MiB of it in the step")
        print(f"ghost / hooks: {ghost[0] / hooks[0]:.2f}, in the step {ghost[1] / hooks[1]:.2f}")
    assert hooks[1] > 2 * TABLES  # the gradients, and a copy of Opacus' own
    assert ghost[0] < 0.5 * hooks[0]
    assert ghost[1] < 0.45 * hooks[1]
    assert ghost[1] < 1.5 * none[1]
    assert book[0] < min(1.15 * none[0], ghost[0])


if __name__ == "__main__":
    measure(sys.argv[1])
