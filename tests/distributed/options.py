"""One of two processes that run DPTrainer under DDP and then under FSDP2, with one option after another.

    torchrun --nproc-per-node 2 -m tests.distributed.options FOLDER

writes FOLDER/options-RANK.pt, name -> {way: what came of it}. The judging is done in `test_trainers`.
"""

import copy
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import distributed

import dpzoo
from dpzoo.integrations import DPTrainer
from tests.distributed.steps import full
from tests.integrations.runs import BERT, LM, Rows, arguments, privacy
from tests.support import stock_model

BEST: dict[str, Any] = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "save_total_limit": 1,
    **{f"{what}_strategy": "steps" for what in ("eval", "save")},
    **{f"{what}_steps": 2 for what in ("eval", "save")},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "best": BEST,
    "checkpointing": {"gradient_checkpointing": True},
    "tied head": {"kind": LM},
    "model_init": {"model_init": lambda: stock_model(BERT)},
    "bf16": {"bf16": True},
    "epsilon": {"noise": 1.0},
    "one group": {
        **BEST,
        "fsdp_config": {"auto_wrap_policy": "NO_WRAP", "reshard_after_forward": False},
    },
    "workers": {"dataloader_num_workers": 1, "per_device_eval_batch_size": 2},
}


def outcome(folder: Path, way: str, options: dict[str, Any]) -> dict[str, Any]:
    options = copy.copy(options)
    kind, noise = options.pop("kind", BERT), options.pop("noise", 0.0)
    init = options.pop("model_init", None)
    if way == "fsdp":
        config = {"version": 2, **options.get("fsdp_config", {})}
        options |= {"fsdp": True, "fsdp_config": config}
    torch.manual_seed(0)
    dtype = torch.float32 if options.get("bf16") else torch.float64
    args = arguments(folder, **{"per_device_train_batch_size": 2, "ddp_backend": "gloo", **options})
    trainer = DPTrainer(
        model=None if init else dpzoo.convert(stock_model(kind, dtype)).train(),
        model_init=init,
        args=args,
        train_dataset=Rows(kind),
        eval_dataset=Rows(kind, 12),
        privacy=privacy(noise_multiplier=noise),
    )
    trainer.train()
    return {
        "weights": {k: full(v) for k, v in trainer.model.state_dict().items()},
        "epsilon": trainer.epsilon,
        "evaluated": trainer.evaluate()["eval_loss"],
        "predicted": trainer.predict(Rows(kind, 12)).metrics["test_loss"],
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = {
        name: {way: outcome(folder / f"{name}-{way}", way, options) for way in ("ddp", "fsdp")}
        for name, options in OPTIONS.items()
    }
    torch.save(results, folder / f"options-{os.environ['RANK']}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
