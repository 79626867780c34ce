"""From private text to a classifier that transformers runs, with differential privacy, in a minute or two.

    python examples/quickstart.py

The encoder is all-MiniLM-L6-v2 (22.7 million parameters), out of a Python package; the data are
sentences from Python's own documentation, to be sorted into six areas of the library. The encoder stays
as it is, and a head on it is trained with DP-SGD. examples/every_parameter.py trains all of it.
"""

import argparse
import logging
import time
import warnings
from pathlib import Path

import torch
import transformers
from support.data import docs_data
from support.models import minilm_folder
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from dpzoo.heads import pool_by_mean, read_features, train_head


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epsilon", type=float, default=8.0, help="the privacy budget of the run")
    parser.add_argument("--rows", type=int, default=500, help="training sentences of each area")
    parser.add_argument("--model", default=None, help="a BERT or RoBERTa: a model id or folder")
    parser.add_argument("--out", type=Path, default=Path("quickstart-model"))
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore", module="opacus")  # how it searches for the noise
    logging.getLogger("transformers").setLevel(logging.ERROR)  # "new head, train it": we do
    transformers.utils.logging.disable_progress_bar()
    began = time.monotonic()

    data = docs_data(seed=0, heldout_share=0.15, max_train_rows_per_label=options.rows)
    parts = (data.train, data.heldout)
    labels, heldout_labels = (torch.tensor([row.label for row in part]) for part in parts)
    print(f"data      {len(labels)} sentences to train on, {len(heldout_labels)} held out")
    print(f"labels    {', '.join(data.label_names)}")

    folder = options.model or str(minilm_folder())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = dict(enumerate(data.label_names))
    model = AutoModelForSequenceClassification.from_pretrained(  # transformers' own class
        folder, num_labels=len(names), id2label=names, label2id={v: k for k, v in names.items()}
    )
    norm = pool_by_mean(model)  # classify from all tokens, not from the first alone
    texts = ([row.text for row in part] for part in parts)
    train, heldout = (read_features(model, tokenizer, part, max_length=48) for part in texts)
    print(f"encoder   every sentence read once, {time.monotonic() - began:.0f} s so far")

    def train_and_score(**budget: float | None) -> tuple[float, object]:
        run = train_head(model, train, labels, **budget, feature_norm=norm)
        return (model.classifier(heldout).argmax(1) == heldout_labels).float().mean().item(), run

    majority = (heldout_labels == labels.mode().values).float().mean().item()
    nonprivate, _ = train_and_score(epsilon=None)
    private, run = train_and_score(epsilon=options.epsilon, delta=1 / (2 * len(labels)))

    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    classify = pipeline("text-classification", str(options.out))  # transformers alone
    text = data.heldout[0].text
    print(f"""
accuracy  {private:.1%} with privacy, {nonprivate:.1%} without, {majority:.1%} by always guessing one area
privacy   epsilon {run.epsilon:.2f} at delta {run.delta:.1e}, for one training sentence more or less
noise     {run.noise_multiplier:.2f} times the clipping norm, in each of {run.steps} steps;
          a sentence is in a step with probability {run.sample_rate:.2f}
time      {time.monotonic() - began:.0f} s
saved     {options.out}, a stock checkpoint: pipeline("text-classification", "{options.out}")
example   {text}
          -> {classify(text)[0]["label"]}""")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
