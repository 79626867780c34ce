"""A step of a Llama-like model in dpzoo, opake, Opacus' hooks and without privacy: one interleaved run.

    pip install opake torchopt optree    # docs/comparison.md was made with opake 0.16.1
    python examples/others/cost.py --shapes 8x128,2x512

The model is a stock `LlamaForCausalLM` of random weights: 4 layers of width 768, 32,000 words, tied. A step
computes the clipped sum (or, without privacy, the gradient) and applies SGD; no noise. JetBrains' DPTrainer
runs Opacus' hooks, which are measured here without its Trainer around them. Times are medians; memory is
the peak of a process of its own above what it held before the model.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from opacus import GradSampleModule
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import dpzoo

KINDS = ("none", "dpzoo", "opake", "hooks")
RATE, CLIP = 1e-3, 0.1


def build() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=32_000,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).train()


def row_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of each row, (rows,)."""
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(1)


def stepper(kind: str, rows: int) -> Callable[[torch.Tensor], None]:
    """A function that takes one step without noise on ids of (rows, seq)."""
    model = build()
    if kind == "opake":
        return _opake(model, rows)
    if kind == "dpzoo":
        return _dpzoo(model, rows)
    if kind == "hooks":
        model = GradSampleModule(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def step(ids: torch.Tensor) -> None:
        optimizer.zero_grad()
        row_losses(model(input_ids=ids).logits, ids).mean().backward()
        if kind == "hooks":
            with torch.no_grad():
                clip(model)
        optimizer.step()

    return step


def clip(model: torch.nn.Module) -> None:
    """The clipped sums of `grad_sample`, as Opacus' optimizer makes them."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    samples: list[torch.Tensor] = [p.grad_sample for p in parameters]  # type: ignore[misc]
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in samples], 1).norm(dim=1)
    factors = (CLIP / (norms + 1e-6)).clamp(max=1)
    for p, grad in zip(parameters, samples, strict=True):
        p.grad = torch.einsum("i,i...->...", factors, grad) / len(factors)
        p.grad_sample = None  # type: ignore[attr-defined]


def _dpzoo(model: Any, rows: int) -> Callable[[torch.Tensor], None]:
    data = torch.utils.data.TensorDataset(torch.zeros(rows, 2, dtype=torch.long))
    private, optimizer, criterion, _ = dpzoo.PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=RATE),
        data_loader=torch.utils.data.DataLoader(data, batch_size=rows),
        criterion=dpzoo.ModelLoss(model),
        noise_multiplier=0.0,
        max_grad_norm=CLIP,
        poisson_sampling=False,
        grad_sample_mode="bk",
    )

    def step(ids: torch.Tensor) -> None:
        optimizer.zero_grad()
        criterion(private(input_ids=ids), ids).backward()
        optimizer.step()

    return step


def _opake(model: Any, rows: int) -> Callable[[torch.Tensor], None]:
    from opake.dpsgd.clipping import clipped_grad
    from opake.patches import apply_model_patches, apply_runtime_patches

    apply_runtime_patches()
    apply_model_patches(model)
    names = {name for name, _ in model.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        out = torch.func.functional_call(model, parameters, (), {"input_ids": ids[None]})
        return row_losses(out.logits, ids[None])[0]

    grads_of, state = clipped_grad(loss, clipping_norm=CLIP, batch_argnums=1, normalize_by=rows)
    held = {"state": state, "parameters": {n: p.detach() for n, p in model.named_parameters()}}
    assert held["parameters"].keys() == names

    def step(ids: torch.Tensor) -> None:
        grads, held["state"] = grads_of(held["parameters"], ids, state=held["state"])
        for name, parameter in held["parameters"].items():
            parameter.sub_(grads.pytree[name], alpha=RATE)

    return step


def peak() -> int:
    """The most memory that this process has held, in bytes."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def memory(kind: str, rows: int, seq: int) -> int:
    """Peak of a process of its own, above that before the model, in bytes."""
    command = [sys.executable, __file__, "--memory", kind, "--shapes", f"{rows}x{seq}"]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(256 * 2**10)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shapes", default="8x128", help="rows x tokens, with commas between")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    kinds = options.kinds.split(",")
    for shape in options.shapes.split(","):
        rows, seq = map(int, shape.split("x"))
        ids = torch.randint(0, 32_000, (rows, seq))
        if options.memory:
            before = peak()
            step = stepper(options.memory, rows)
            for _ in range(3):
                step(ids)
            print(peak() - before)
            return
        steppers = {kind: stepper(kind, rows) for kind in kinds}
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(options.steps + 2):
            for kind, step in steppers.items():
                start = time.perf_counter()
                step(ids)
                times[kind].append(time.perf_counter() - start)
        medians = {kind: statistics.median(ts[2:]) for kind, ts in times.items()}
        del steppers
        held = {kind: memory(kind, rows, seq) for kind in kinds}
        for kind in kinds:
            ratios = sorted(
                t / u for t, u in zip(times[kind][2:], times[kinds[0]][2:], strict=True)
            )
            print(
                f"{shape} {kind:6} {medians[kind]:.3f} s, {medians[kind] / medians[kinds[0]]:.2f} times "
                f"({ratios[0]:.2f} to {ratios[-1]:.2f}); {held[kind] / 2**20:.0f} MiB, "
                f"{held[kind] / held[kinds[0]]:.2f} times",
                flush=True,
            )


if __name__ == "__main__":
    main()
