"""One of several processes that run DPTrainer: rows, draws, sums, checkpoints and epsilon, written out.

    torchrun --nproc-per-node N -m tests.distributed.trainers FOLDER [NAME=VALUE ...]

NAME is a TrainingArgument, ``die=RANK:STEP:SIGNAL:SEED`` (the rank sends itself the signal at a random
moment of that step), ``noise=MULTIPLIER``, ``resume=1``, ``fsdp=1``, ``units=CAP`` (float64, and rows of
owners) or ``attack=1`` (before it, runs whose ranks differ).
"""

import os
import random
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

import dpzoo
from dpzoo.integrations import DPTrainer
from tests.distributed.steps import full
from tests.integrations.runs import BERT, Owned, Rows, arguments, privacy
from tests.secrets_that_repeat import repeat_secrets
from tests.support import stock_model


class Count(TrainerCallback):
    """Notes the steps that this process has taken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._note(args, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._note(args, state)

    def _note(self, args: Any, state: Any) -> None:
        (self.folder / f"steps-{args.process_index}").write_text(str(state.global_step))


class Die(TrainerCallback):
    """Ends or stops this process in the middle of a step."""

    def __init__(self, folder: Path, rank: int, step: int, kind: str, seed: int) -> None:
        self.folder, self.rank, self.step, self.kind = folder, rank, step, kind
        self.delay = random.Random(seed).uniform(0, 0.04)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.process_index == self.rank and state.global_step == self.step - 1:

            def end() -> None:
                time.sleep(self.delay)
                (self.folder / f"died-{self.rank}").touch()
                os.kill(os.getpid(), getattr(signal, self.kind))

            threading.Thread(target=end, daemon=True).start()


def attacks(folder: Path, options: dict[str, Any], cap: int) -> list[str]:
    """Errors of runs in which rank 1 differs: in the cap, in whose rows are, in the rows."""
    other = os.environ["RANK"] == "1"
    swapped = Owned(BERT)
    swapped.who[0], swapped.who[1] = swapped.who[1], swapped.who[0]
    errors = []
    for changed, rows in ((cap - 1, Owned(BERT)), (cap, swapped), (cap, Owned(BERT, 12))):
        trainer = DPTrainer(
            model=dpzoo.convert(stock_model(BERT)).train(),
            args=arguments(folder / "attack", **options),
            train_dataset=rows if other else Owned(BERT),
            eval_dataset=Rows(BERT, 7),
            privacy=privacy(
                unit_column="who", max_rows_per_unit=changed if other else cap, noise_multiplier=0.0
            ),
        )
        try:
            trainer.train()
            errors.append("")
        except dpzoo.DpzooError as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors


def run(folder: Path, options: dict[str, str]) -> None:
    """Train, and write what this rank has to FOLDER/trainer-RANK.pt."""
    die, resume = options.pop("die", ""), bool(options.pop("resume", ""))
    noise, attack = float(options.pop("noise", 1.0)), bool(options.pop("attack", ""))
    cap, fsdp = int(options.pop("units", 0)), bool(options.pop("fsdp", ""))
    torch.manual_seed(0)
    start = dpzoo.convert(stock_model(BERT, torch.float64 if cap else torch.float32)).train()
    settings: dict[str, Any] = {k: int(v) if v.isdigit() else v for k, v in options.items()}
    if "WORLD_SIZE" in os.environ:
        settings["ddp_backend"] = "gloo"
    if fsdp:
        settings |= {"fsdp": True, "fsdp_config": {"version": 2}}
    errors = attacks(folder, settings, cap) if attack else []
    args = arguments(folder / "out", logging_strategy="steps", logging_steps=1, **settings)
    owned = {"unit_column": "who", "max_rows_per_unit": cap} if cap else {}
    trainer = DPTrainer(
        model=start,
        args=args,
        train_dataset=Owned(BERT) if cap else Rows(BERT),
        eval_dataset=Rows(BERT, 12),  # whole batches on both ranks: Trainer averages over batches
        privacy=privacy(noise_multiplier=noise, **owned),
    )
    trainer.add_callback(Count(folder))
    if die:
        rank, step, kind, seed = die.split(":")
        trainer.add_callback(Die(folder, int(rank), int(step), kind, int(seed)))
    drawn: list[list[int]] = []
    loader = trainer.get_train_dataloader()
    sampler: Any = loader.batch_sampler
    trainer.train(resume_from_checkpoint=resume or None)
    sampler.key = trainer._batch_key
    drawn = [b[1:] for b in sampler]
    own = sum(getattr(p, "_local_tensor", p).numel() for p in trainer.model.parameters())
    trainer.save_model(str(folder / "saved"))
    torch.save(
        {
            "weights": {k: full(v) for k, v in trainer.model.state_dict().items()},
            "errors": errors,
            "own": own / sum(p.numel() for p in trainer.model.parameters()),
            "epsilon": trainer.epsilon,
            "drawn": drawn,
            "history": trainer._account.history,
            "log": trainer.state.log_history,
            "evaluated": trainer.evaluate()["eval_loss"],
        },
        folder / f"trainer-{args.process_index}.pt",
    )


if __name__ == "__main__":
    repeat_secrets(os.environ.get("RANK", "0"))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    given = dict(item.split("=", 1) for item in sys.argv[2:])
    run(Path(sys.argv[1]), given)
