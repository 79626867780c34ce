"""Fine-tune a stock classifier with differential privacy in several processes: DDP, or FSDP2.

    torchrun --standalone --nproc-per-node 2 examples/distributed.py --data train.tsv --eval dev.tsv
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-endpoint HOST:PORT ...  --way fsdp  # on each machine

The files have lines of text<TAB>label. The batch size is that of all processes together, and epsilon is
one process'. A rank that dies or freezes ends the others within --timeout seconds (docs/distributed.md).
"""

import argparse
import os
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import dpzoo

TEXTS = "model=bert-base-uncased data=train.tsv eval=dev.tsv out=distributed-model way=ddp"
NUMBERS = "epochs=3 batch_size=256 physical=16 max_length=64 timeout=300"  # physical: rows at once
REALS = "learning_rate=5e-4 epsilon=8 max_grad_norm=0.1"


def start(timeout: int) -> torch.device:
    """Join the processes that torchrun started. Returns the device of this one: a GPU, or the CPU."""
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit("Start it with torchrun --standalone --nproc-per-node 2 SCRIPT")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        torch.cuda.set_device(device := torch.device("cuda", int(os.environ["LOCAL_RANK"])))
    distributed.init_process_group(timeout=timedelta(seconds=timeout))
    return device


def spread(model: nn.Module, way: str) -> nn.Module:
    """The model over all ranks: whole on each (DDP), or a part on each (FSDP2), layer by layer."""
    if way == "ddp":
        return DistributedDataParallel(model)
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for layer in [layer for stack in stacks for layer in stack]:
        fully_shard(layer)
    return fully_shard(model)


def rows_of(path: str, tokenizer, length: int) -> list[dict[str, torch.Tensor]]:
    """The rows of a file: ids, mask and label, which is the rank of its text among the labels."""
    lines = [line.rsplit("\t", 1) for line in Path(path).read_text("utf-8").splitlines()]
    names, texts = sorted({label for _, label in lines}), [text for text, _ in lines]
    kept = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    kept["labels"] = torch.tensor([names.index(label) for _, label in lines])
    return [{key: value[i] for key, value in kept.items()} for i in range(len(lines))]


def train(model: nn.Module, rows: list, options: argparse.Namespace, device: torch.device) -> float:
    """Train in place, on all ranks. Returns epsilon."""
    torch.seed()  # each rank draws its own rows: with one seed for all, make_private refuses
    engine = dpzoo.PrivacyEngine()
    private, optimizer, criterion, loader = engine.make_private_with_epsilon(
        module=spread(model.train(), options.way),
        optimizer=torch.optim.AdamW(model.parameters(), lr=options.learning_rate),
        criterion=dpzoo.ModelLoss(model),
        data_loader=DataLoader(rows, batch_size=options.batch_size),
        target_epsilon=options.epsilon,
        target_delta=1 / len(rows),
        epochs=options.epochs,
        max_grad_norm=options.max_grad_norm,
        grad_sample_mode="bk",
    )
    for _ in range(options.epochs):
        for batch in loader:
            batch = {key: value.to(device) for key, value in batch.items()}
            labels = batch.pop("labels")
            # Under FSDP2 every pass is a collective: all ranks take as many parts, empty ones too.
            most = torch.tensor(max(1, len(labels)), device=device)
            distributed.all_reduce(most, distributed.ReduceOp.MAX)
            for begin in range(0, int(most), options.physical):
                part = slice(begin, begin + options.physical)
                optimizer.signal_skip_step(begin + options.physical < int(most))
                optimizer.zero_grad()
                logits = private(**{key: value[part] for key, value in batch.items()})
                criterion(logits, labels[part]).backward()
                optimizer.step()
    return engine.get_epsilon(1 / len(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for kind, items in ((str, TEXTS), (int, NUMBERS), (float, REALS)):
        for name, default in (item.split("=") for item in items.split()):
            parser.add_argument(f"--{name}", type=kind, default=kind(default))
    options = parser.parse_args()
    device = start(options.timeout)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows, held = (rows_of(p, tokenizer, options.max_length) for p in (options.data, options.eval))
    count = len({int(row["labels"]) for row in rows})
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=count)
    epsilon = train(model.to(device), rows, options, device)
    right = 0
    with torch.no_grad():
        for batch in DataLoader(held, 64):  # on all ranks: so FSDP2 wants it
            batch = {key: value.to(device) for key, value in batch.items()}
            labels = batch.pop("labels")
            right += int((model.eval()(**batch).logits.argmax(-1) == labels).sum())
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if distributed.get_rank() == 0:
        model.save_pretrained(options.out, state_dict=state)  # transformers loads it as it is
        tokenizer.save_pretrained(options.out)
        print(f"{options.way}: epsilon {epsilon:.2f}, accuracy {right / len(held):.1%}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
