"""bk on GPUs with NCCL: exactness, noise, memory and time of a rank, DDP and FSDP2. Not part of the suite.

    torchrun --standalone --nproc-per-node 2 -m tests.distributed.on_gpus

Expected (not yet seen on a GPU): "sums" below 1e-4 in float32, "noise" 1.00 within 0.02, for each model and
way; under FSDP2 "parameters" and "sums" 1 / N of DDP's, "peak" well below DDP's; "epsilon" equal for all.
"""

import copy
import os
import time
from typing import Any

import torch
import transformers
from torch import distributed
from torch.utils.data import DataLoader

import dpzoo
from tests.distributed.steps import Case, distribute, full

MODELS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=8,
            num_attention_heads=16,
            vocab_size=32000,
            tie_word_embeddings=True,
        )
    ),
    "bert": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ),
}
ROWS, SEQ, CLIP, NOISE = 8, 128, 0.5, 1.0


def private(model: Any, wrapped: Any, ids: torch.Tensor, noise: float, steps: int) -> Any:
    """Some steps on rows; the optimizer, epsilon, seconds a step and the numbers in a rank's sums."""
    engine = dpzoo.PrivacyEngine(accountant="rdp")
    module, optimizer, criterion, _ = engine.make_private(
        module=wrapped.train(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        criterion=dpzoo.ModelLoss(model),
        data_loader=DataLoader(list(range(10 * ROWS)), batch_size=ROWS),
        noise_multiplier=noise,
        max_grad_norm=CLIP,
        poisson_sampling=False,
        grad_sample_mode="bk",
    )
    times, held = [], 0
    for _ in range(steps):
        torch.cuda.synchronize()
        since = time.perf_counter()
        optimizer.zero_grad()
        criterion(module(input_ids=ids), ids).backward()
        held = sum(total.numel() for total in optimizer.sums.values())
        optimizer.step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - since)
    epsilon = engine.get_epsilon(1e-5) if noise else 0.0
    grads = {n: full(p.grad) for n, p in model.named_parameters()}
    module.cleanup()
    return grads, epsilon, sorted(times)[len(times) // 2], held


def main() -> None:
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    distributed.init_process_group()
    size = distributed.get_world_size()
    torch.backends.cuda.matmul.allow_tf32 = False
    for name, make in MODELS.items():
        torch.manual_seed(0)
        start = make().cuda()
        ids = torch.randint(3, 30000, (ROWS, SEQ), device="cuda")
        wanted, *_ = private(*[copy.deepcopy(start)] * 2, ids, 0.0, 1)
        for way in ("ddp", "layers"):
            model = copy.deepcopy(start)
            wrapped = distribute(Case(name, way), model) if way == "layers" else None
            if wrapped is None:
                wrapped = torch.nn.parallel.DistributedDataParallel(model, device_ids=[rank])
            mine = ids[rank::size]
            quiet, *_ = private(model, wrapped, mine, 0.0, 1)
            torch.cuda.reset_peak_memory_stats()
            loud, epsilon, seconds, held = private(model, wrapped, mine, NOISE, 5)
            peak = torch.cuda.max_memory_allocated() / 2**20
            scale = max(float(v.abs().max()) for v in wanted.values())
            off = max(float((quiet[n] - wanted[n]).abs().max()) for n in wanted) / scale
            noise = (
                torch.cat([(loud[n] - quiet[n]).flatten() for n in wanted]) * ROWS / (CLIP * NOISE)
            )
            own = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in model.parameters())
            if rank == 0:
                print(
                    f"{name} {way} x{size}: sums {off:.1e}, noise {float(noise.std()):.3f}, epsilon "
                    f"{epsilon:.4f}, parameters {own / 1e6:.1f}M, sums {held / 1e6:.1f}M, "
                    f"peak {peak:.0f} MiB, {1000 * seconds:.0f} ms a step"
                )
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
