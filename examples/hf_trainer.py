"""A text classifier by Hugging Face's Trainer, as run_glue.py has it, made private.

    python examples/hf_trainer.py --train_file train.tsv --validation_file dev.tsv --output_dir out \\
        --epsilon 8 --num_train_epochs 10 --learning_rate 5e-4 \\
        --per_device_train_batch_size 32 --gradient_accumulation_steps 16

The files have lines of text<TAB>label. All of Trainer's options may be given (--help); privacy's are
--epsilon, --clip and --mode. What differs from a script without privacy is marked with "private": two
imports, the PrivacyArguments and the argument that takes them. The model comes in and goes out as
transformers has it; DPTrainer converts it for the time in between.

The training rows' number, the set of labels and all options count as public. The validation rows are not
protected: nothing is trained on them, but their accuracy is printed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from support.data import DataError, Row, tsv_data
from support.models import minilm_folder
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    HfArgumentParser,
    TrainingArguments,
)

from dpzoo.integrations import DPTrainer, PrivacyArguments  # private


@dataclass
class ScriptArguments:
    train_file: str = field(metadata={"help": "lines of text<TAB>label"})
    validation_file: str | None = field(
        default=None, metadata={"help": "the same; without it, a tenth of the training rows"}
    )
    model: str | None = field(
        default=None, metadata={"help": "a model id or folder; all-MiniLM-L6-v2 from its wheel"}
    )
    max_length: int = field(default=128, metadata={"help": "tokens kept of a text"})
    epsilon: float = field(default=8.0, metadata={"help": "to end with; delta is 1 / rows"})
    clip: float = field(default=0.1, metadata={"help": "norm that a row's gradient is clipped to"})
    mode: str = field(default="bk", metadata={"help": "bk, ghost or hooks"})


def encode(rows: Sequence[Row], tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """Rows as Trainer takes them; its default collator pads them."""
    encoded = tokenizer([row.text for row in rows], truncation=True, max_length=max_length)
    return [
        {**{key: values[i] for key, values in encoded.items()}, "labels": row.label}
        for i, row in enumerate(rows)
    ]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def run(script: ScriptArguments, args: TrainingArguments) -> dict[str, float]:
    """Trains, evaluates and saves; gives the metrics of training and evaluation."""
    data = tsv_data(
        Path(script.train_file),
        Path(script.validation_file) if script.validation_file else None,
        label_names=None,
        seed=args.seed,
        heldout_share=0.1,
    )
    name = script.model or minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(
        name,
        id2label=dict(enumerate(data.label_names)),
        label2id={label: i for i, label in enumerate(data.label_names)},
    )
    trainer = DPTrainer(
        model=model,
        args=args,
        train_dataset=encode(data.train, tokenizer, script.max_length),
        eval_dataset=encode(data.heldout, tokenizer, script.max_length),
        processing_class=tokenizer,
        compute_metrics=accuracy,
        privacy=PrivacyArguments(  # private
            target_epsilon=script.epsilon, clipping_norm=script.clip, grad_sample_mode=script.mode
        ),
    )
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()  # a stock checkpoint
    metrics = {**result.metrics, **trainer.evaluate()}
    print(
        f"{len(data.train)} training rows, epsilon {trainer.epsilon:.2f} at delta {trainer.delta:.1e}, "
        f"noise multiplier {trainer.noise_multiplier:.3f}: accuracy {metrics['eval_accuracy']:.3f} "
        f"on {len(data.heldout)} other rows. Saved in {args.output_dir}"
    )
    return metrics


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser((ScriptArguments, TrainingArguments), description=__doc__)
    script, args = parser.parse_args_into_dataclasses(argv)
    transformers.set_seed(args.seed)  # the new head's weights
    try:
        return run(script, args)
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
