"""dpzoo.audit and dpzoo.audit_loop on the code that other packages ship, unmodified, on tiny models.

    python examples/others/audit.py opacus dptrainer mostlyai safe-synthesizer opake

Each name needs its package; docs/who-gets-it-right.md has versions, how to install them, and what was seen.
"""

import argparse
import importlib.metadata
import tempfile
import traceback
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)

import dpzoo

VOCAB, SEQ, ROWS = 60, 9, 64
SIZE = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": VOCAB}


def bert() -> Any:
    config = BertConfig(**SIZE, intermediate_size=32, max_position_embeddings=32, num_labels=3)
    return BertForSequenceClassification(config)


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZE, intermediate_size=32, num_key_value_heads=2))


def gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=VOCAB, n_positions=32)
    )


def lora(model: Any, targets: list[str]) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=targets))


def text_rows(rows: int = ROWS) -> dict[str, torch.Tensor]:
    """Rows of 2 to 9 tokens, padded, with labels of the language model."""
    torch.manual_seed(0)
    ids = torch.randint(3, VOCAB, (rows, SEQ))
    mask = (torch.arange(SEQ) < torch.randint(2, SEQ + 1, (rows, 1))).long()
    ids = ids * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def show(title: str, report: Any) -> None:
    print(f"## {title}: {'ok' if report.ok else 'FAILED'}")
    for finding in report.findings:
        got = f" (expected {finding.expected}, got {finding.got})" if finding.got else ""
        print(f"- {finding}{got}")
    for result in report:
        if result.skipped:
            print(f"- {result.name}, skipped: {result.skipped}")


def with_labels(model: Any, batch: Any) -> Any:
    """The loss that the package backpropagates: what the model returns for the batch."""
    return model(**batch).loss


# --- Opacus' tutorials ------------------------------------------------------------------------------


def opacus() -> None:
    from opacus import PrivacyEngine

    rows = text_rows()
    labels = torch.randint(3, (ROWS,))
    data = TensorDataset(
        rows["input_ids"], rows["attention_mask"], torch.zeros_like(rows["input_ids"]), labels
    )

    def classify(model: Any, batch: Any) -> Any:
        inputs = dict(
            zip(("input_ids", "attention_mask", "token_type_ids", "labels"), batch, strict=True)
        )
        return nn.functional.cross_entropy(model(**inputs)[1], batch[3], reduction="none")

    for name in ("upper layers", "LoRA", "every parameter"):
        model = bert()
        if name == "upper layers":
            model.requires_grad_(False)
            for part in (model.bert.encoder.layer[-1], model.bert.pooler, model.classifier):
                part.requires_grad_(True)
        elif name == "LoRA":
            from peft import LoraConfig, TaskType, get_peft_model

            config = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, lora_alpha=4, lora_dropout=0.05)
            model = get_peft_model(model, config)
            for p in model.base_model.bert.encoder.layer[:-1].parameters():
                p.requires_grad = False
        batch = data[:4]
        show(
            f"text classifier, {name}, ghost: audit",
            dpzoo.audit(model, batch, loss=classify, max_grad_norm=0.1, modes=("ghost",)),
        )
        if name == "every parameter":
            continue
        engine = PrivacyEngine()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, eps=1e-8)
        private, optimizer, criterion, loader = engine.make_private_with_epsilon(
            module=model.train(),
            optimizer=optimizer,
            data_loader=DataLoader(data, batch_size=16),
            criterion=nn.CrossEntropyLoss(reduction="mean"),
            target_delta=1 / 4,  # the tutorial's 1 / len(train_dataloader)
            target_epsilon=7.5,
            epochs=3,
            max_grad_norm=0.1,
            grad_sample_mode="ghost",
        )

        def step(batch: Any, private=private, optimizer=optimizer, criterion=criterion) -> None:
            optimizer.zero_grad()
            inputs = dict(
                zip(("input_ids", "attention_mask", "token_type_ids", "labels"), batch, strict=True)
            )
            outputs = private(**inputs)
            criterion(outputs[1], batch[3]).backward()
            optimizer.step()

        show(
            f"text classifier, {name}, ghost: audit_loop",
            dpzoo.audit_loop(private, optimizer, loader, engine, step=step),
        )

    net = nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    points = TensorDataset(torch.randn(100, 20), torch.randint(10, (100,)))
    show(
        "non-wrapping mode, hooks: audit",
        dpzoo.audit(net, points[:4], loss=_classes, modes=("hooks",)),
    )
    engine, optimizer = PrivacyEngine(), torch.optim.Adam(net.parameters(), lr=0.001)
    hooks, optimizer, loader = engine.make_private(
        module=net,
        optimizer=optimizer,
        data_loader=DataLoader(points, batch_size=32, shuffle=True),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        wrap_model=False,
    )

    def plain_step(batch: Any) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(batch[0]), batch[1]).backward()
        optimizer.step()

    show(
        "non-wrapping mode, hooks: audit_loop",
        dpzoo.audit_loop(hooks, optimizer, loader, engine, step=plain_step),
    )


def _classes(model: Any, batch: Any) -> Any:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


# --- trainers ---------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """Rows of `text_rows`, without their padding."""

    def __init__(self) -> None:
        self.columns = text_rows()

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        length = int(self.columns["attention_mask"][i].sum())
        return {"input_ids": self.columns["input_ids"][i, :length].tolist()}


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """As DataCollatorForLanguageModeling(mlm=False): padded to the longest row, labels -100 at padding."""
    ids = [torch.tensor(row["input_ids"], dtype=torch.long) for row in rows]
    mask = [torch.ones_like(row) for row in ids]
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, True),
        "attention_mask": pad(mask, True),
        "labels": pad(ids, True, -100),
    }


def arguments(**more: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=8, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", num_train_epochs=1, **more,
    )  # fmt: skip


def dptrainer() -> None:
    from dptrainer import DPTrainer, PrivacyArguments

    for name, model in (("GPT-2, as in its README", gpt2()), ("Llama", llama())):
        show(
            f"{name}, hooks: audit",
            dpzoo.audit(model, text_rows(4), loss=with_labels, modes=("hooks",)),
        )
        trainer = DPTrainer(
            model=model,
            args=arguments(),
            train_dataset=Rows(),
            privacy_args=PrivacyArguments(target_epsilon=8.0, per_sample_max_grad_norm=1.0),
            data_collator=collate,
        )
        loader = trainer.get_train_dataloader()
        optimizer = trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1  # which Trainer's loop sets

        def step(batch: Any, trainer=trainer, optimizer=optimizer) -> None:
            trainer.training_step(trainer.model, batch)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # DPCallback.on_step_end

        show(
            f"{name}, hooks: audit_loop",
            dpzoo.audit_loop(
                trainer.hooks,
                optimizer,
                loader,
                SimpleNamespace(accountant=trainer.dp_callback.accountant),
                step=step,
            ),
        )


def safe_synthesizer() -> None:
    import datasets
    from nemo_safe_synthesizer.privacy.dp_transformers.dp_utils import OpacusDPTrainer
    from nemo_safe_synthesizer.privacy.dp_transformers.privacy_args import PrivacyArguments

    data = datasets.Dataset.from_list([Rows()[i] for i in range(ROWS)])
    model = lora(llama(), ["q_proj", "v_proj"])
    show(
        "Llama with LoRA, hooks: audit",
        dpzoo.audit(model, text_rows(4), loss=with_labels, modes=("hooks",)),
    )
    for parts in (1, 4):
        for poisson in (False, True):
            trainer = OpacusDPTrainer(
                train_dataset=data,
                model=lora(llama(), ["q_proj", "v_proj"]),
                args=arguments(gradient_accumulation_steps=parts),
                privacy_args=PrivacyArguments(
                    target_epsilon=8.0,
                    target_delta=1e-2,
                    per_sample_max_grad_norm=1.0,
                    poisson_sampling=poisson,
                ),
                data_collator=collate,
            )
            optimizer, loader = trainer.create_optimizer(), trainer.get_train_dataloader()
            accountant, callback = trainer.accountant.accountant, trainer.dp_callback
            # DPCallback.on_step_end does this; and the sampler of entities is within a sampler of theirs.
            optimizer.attach_step_hook(
                lambda _, a=accountant, c=callback: a.step(
                    noise_multiplier=c.noise_multiplier, sample_rate=c.sampling_probability
                )
            )
            drawn = SimpleNamespace(batch_sampler=loader.batch_sampler.entity_sampler)
            rate = getattr(drawn.batch_sampler, "sample_rate", None)
            print(f"   the sampler's rate {rate}, the accountant's {trainer.sampling_probability}")
            engine = SimpleNamespace(accountant=accountant)
            report = dpzoo.audit_loop(
                trainer.model, optimizer, drawn, engine, accumulation_steps=parts
            )
            show(f"accumulation {parts}, poisson_sampling={poisson}: audit_loop", report)


def mostlyai() -> None:
    import mostlyai.engine._language.training  # noqa: F401 (it registers a grad sampler)
    from mostlyai.engine._language.lstm import LSTMFromScratchConfig, LSTMFromScratchLMHeadModel
    from opacus import PrivacyEngine
    from opacus.utils.batch_memory_manager import wrap_data_loader

    config = LSTMFromScratchConfig(
        vocab_size=VOCAB, embedding_size=16, hidden_size=16, with_dp=True
    )
    for name, model in (
        ("LSTM", LSTMFromScratchLMHeadModel(config)),
        ("Llama with LoRA", lora(llama(), ["q_proj", "v_proj"])),
    ):
        show(
            f"{name}, hooks: audit",
            dpzoo.audit(model, text_rows(4), loss=with_labels, modes=("hooks",)),
        )
        # _language/training.py, from the DataLoader to the step
        engine = PrivacyEngine(accountant="rdp")
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4)
        model.train()
        private, optimizer, loader = engine.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=DataLoader(Rows(), shuffle=True, batch_size=16, collate_fn=collate),
            noise_multiplier=1.5,
            max_grad_norm=1.0,
            poisson_sampling=True,
        )
        loader = wrap_data_loader(data_loader=loader, max_batch_size=64, optimizer=optimizer)

        def step(batch: Any, private=private, optimizer=optimizer) -> None:
            optimizer.zero_grad(set_to_none=True)
            private(**batch).loss.backward()
            optimizer.step()

        show(
            f"{name}, hooks: audit_loop",
            dpzoo.audit_loop(private, optimizer, loader, engine, step=step),
        )


# --- opake: functional, without modules or optimizers of torch's -------------------------------------


def opake() -> None:
    from opake.dpsgd.clipping import clipped_grad
    from opake.patches import apply_model_patches, apply_runtime_patches

    apply_runtime_patches()
    for name, model in (("Llama", llama()), ("GPT-2", gpt2()), ("BERT", bert())):
        model = model.double().eval()
        try:
            apply_model_patches(model)
        except Exception as error:
            print(
                f"- {name}: apply_model_patches: {type(error).__name__}: {str(error).splitlines()[0]}"
            )
        parameters = {n: p.detach() for n, p in model.named_parameters()}
        rows = text_rows(5)
        if name == "BERT":
            rows["labels"] = torch.tensor([0, 1, 2, 0, 1])

        def loss(parameters: Any, *row: torch.Tensor, model=model, rows=rows) -> torch.Tensor:
            batch = {key: value[None] for key, value in zip(rows, row, strict=True)}
            return torch.func.functional_call(model, parameters, kwargs=batch).loss

        for clip in (1e6, 0.1):
            try:
                function, state = clipped_grad(loss, clipping_norm=clip, batch_argnums=(1, 2, 3))
                clipped, _ = function(parameters, *rows.values(), state=state)
                fewer, _ = function(parameters, *(v[1:] for v in rows.values()), state=state)
            except Exception as error:
                print(f"- {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
                break
            alone = [torch.autograd.grad(loss(_leaves(parameters), *(v[i] for v in rows.values())),
                                         _LEAVES) for i in range(5)]  # fmt: skip
            norms = [torch.cat([g.flatten() for g in row]).norm() for row in alone]
            wanted = [
                sum(
                    min(1.0, clip / float(norm)) * row[j]
                    for norm, row in zip(norms, alone, strict=True)
                )
                for j in range(len(parameters))
            ]
            got = list(clipped.pytree.values())
            off = max(
                float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, wanted, strict=True)
            )
            moved = torch.cat(
                [(a - b).flatten() for a, b in zip(got, fewer.pytree.values(), strict=True)]
            ).norm()
            print(
                f"- {name}, C = {clip:g}: sum off the rows alone by {off:.1e}; "
                f"one row moves it by {float(moved) / clip:.3g} C"
            )


_LEAVES: list[torch.Tensor] = []


def _leaves(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    made = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    _LEAVES[:] = list(made.values())
    return made


PACKAGES = {
    "opacus": (opacus, "opacus"),
    "dptrainer": (dptrainer, "DPTrainer"),
    "mostlyai": (mostlyai, "mostlyai-engine"),
    "safe-synthesizer": (safe_synthesizer, "nemo-safe-synthesizer"),
    "opake": (opake, "opake"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=PACKAGES)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in parser.parse_args().names:
        run, package = PACKAGES[name]
        versions = [
            f"{p} {importlib.metadata.version(p)}"
            for p in (package, "opacus", "transformers", "torch")
        ]
        torch.manual_seed(0)
        print(f"# {', '.join(dict.fromkeys(versions))}")
        try:
            run()
        except Exception:
            print(f"- stopped: {traceback.format_exc()}")


if __name__ == "__main__":
    main()
