"""Everything that DPTrainer cannot honour is refused by name, with the next step."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch.utils.data import IterableDataset

import dpzoo
from dpzoo.integrations import DPTrainer, PrivacyArguments
from dpzoo.integrations.arguments import REFUSED
from dpzoo.integrations.state import RANDOM_STATE_NAME
from tests.integrations.runs import BERT, Rows, arguments, privacy, trainer_of
from tests.support import stock_model


@pytest.fixture(scope="module")
def start() -> Any:
    torch.manual_seed(0)
    return dpzoo.convert(stock_model(BERT, torch.float32))


# --- PrivacyArguments ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "got neither of target_epsilon and noise_multiplier, wanted exactly one"),
        ({"target_epsilon": 1.0, "noise_multiplier": 1.0}, "got both of target_epsilon and"),
        ({"target_epsilon": 0.0}, "got target_epsilon=0.0, wanted a number above 0"),
        ({"noise_multiplier": -1.0}, "got noise_multiplier=-1.0, wanted 0 or more"),
        ({"target_delta": 1.0}, "got target_delta=1.0, wanted between 0 and 1"),
        ({"clipping_norm": 0.0}, "got clipping_norm=0.0, wanted a number above 0"),
        ({"clipping_norm": float("nan")}, "got clipping_norm=nan, wanted a number above 0"),
        ({"clipping_norm": float("inf")}, "got clipping_norm=inf, wanted a number above 0"),
        ({"grad_sample_mode": "ew"}, "got grad_sample_mode='ew', wanted one of"),
        ({"clipping": "per_layer"}, "got clipping='per_layer', wanted one of"),
        (
            {"clipping": "automatic", "grad_sample_mode": "ghost"},
            r"got clipping='automatic', wanted one of \('flat',\) in grad_sample_mode='ghost'",
        ),
        ({"accountant": "gdp"}, r"got accountant='gdp', wanted one of \('prv', 'rdp'\)"),
        ({"poisson_sampling": False}, "got poisson_sampling=False, wanted True: the accountants"),
        ({"secure_mode": True, "noise_seed": 1}, "got noise_seed=1, wanted None with secure_mode"),
    ],
)
def test_privacy_arguments(options: dict[str, Any], message: str) -> None:
    if options and "target_epsilon" not in options and "noise_multiplier" not in options:
        options = {"noise_multiplier": 1.0, **options}
    with pytest.raises(dpzoo.InputError, match=f"PrivacyArguments {message}"):
        PrivacyArguments(**options)


def test_delta_is_at_most_one_over_the_rows(start: Any, tmp_path: Path) -> None:
    assert PrivacyArguments(noise_multiplier=1.0).delta(50) == 0.02
    assert PrivacyArguments(noise_multiplier=1.0, target_delta=0.02).delta(50) == 0.02
    with pytest.raises(
        dpzoo.InputError, match=r"target_delta=0.1 for 16 rows, wanted at most 1/16"
    ):
        trainer_of(start, tmp_path, {"target_delta": 0.1})


@pytest.mark.parametrize("delta", [None, 1e-5])
def test_one_row_has_no_delta(delta: float | None) -> None:
    """1 / rows is 1, at which everything is private: epsilon came out at -2.25, then at 0."""
    with pytest.raises(dpzoo.InputError, match=r"got 1 rows \(or units\), wanted at least 2"):
        PrivacyArguments(target_epsilon=1.0, target_delta=delta).delta(1)


@pytest.mark.parametrize("given", [None, 8.0])
def test_privacy_is_asked_for(given: Any, start: Any, tmp_path: Path) -> None:
    with pytest.raises(dpzoo.InputError, match=f"got privacy={given!r}, wanted a PrivacyArguments"):
        DPTrainer(model=start, args=arguments(tmp_path), train_dataset=Rows(BERT), privacy=given)


# --- TrainingArguments --------------------------------------------------------------------------

FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"fp16": True}, "fp16=True, wanted False: its GradScaler multiplies .* Use bf16=True"),
    ({"_n_gpu": 2}, "n_gpu=2, wanted 1: nn.DataParallel .* Set CUDA_VISIBLE_DEVICES"),
    ({"deepspeed": {"a": 1}}, "deepspeed=.*, wanted none: .* the whole model on every rank"),
    ({"fsdp": True}, "fsdp=True in one process, wanted several: torchrun"),
    ({"parallelism_config": object()}, "parallelism_config=.*, wanted none"),
    ({"torch_compile": True}, "torch_compile=True, wanted False: a compiled model"),
    ({"use_liger_kernel": True}, "use_liger_kernel=True, wanted False: its layers"),
    ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0, wanted None: its noise depends"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1, wanted 0: Trainer's label"),
    (
        {"train_sampling_strategy": "group_by_length"},
        "train_sampling_strategy='group_by_length', wanted 'random': batches are Poisson",
    ),
    ({"dataloader_drop_last": True}, "dataloader_drop_last=True, wanted False: of Poisson"),
    ({"auto_find_batch_size": True}, "auto_find_batch_size=True, wanted False: steps would"),
    ({"ignore_data_skip": True}, "ignore_data_skip=True, wanted False: a resumed run"),
    ({"max_grad_norm": 0.5}, r"max_grad_norm=0.5, wanted 0 \(or the default.* The norm that"),
    ({"optim": "lomo"}, "optim=.*LOMO.*, wanted an optimizer that steps after the backward"),
    ({"optim": "galore_adamw_layerwise"}, "optim=.*LAYERWISE.*, wanted an optimizer that steps"),
]


@pytest.mark.parametrize(("fields", "message"), FIELDS, ids=[next(iter(f)) for f, _ in FIELDS])
def test_training_arguments(
    fields: dict[str, Any], message: str, start: Any, tmp_path: Path
) -> None:
    args = arguments(tmp_path)
    (name, value), *_ = fields.items()
    if name == "optim":
        args = arguments(tmp_path, optim=value)
    else:
        setattr(args, name, value)
    with pytest.raises(dpzoo.InputError, match=f"DPTrainer got TrainingArguments.{message}"):
        DPTrainer(model=start, args=args, train_dataset=Rows(BERT), privacy=privacy())


@pytest.mark.parametrize(
    ("mode", "tokens", "message"),
    [
        ("ghost", "no", "got 2 processes in grad_sample_mode='ghost', wanted mode 'bk'"),
        ("bk", "all", "include_num_input_tokens_seen='all', wanted 'no' in several processes"),
    ],
)
def test_several_processes(
    mode: str, tokens: str, message: str, start: Any, tmp_path: Path
) -> None:
    args = copy.copy(arguments(tmp_path, include_num_input_tokens_seen=tokens))
    args.__class__ = type("Two", (type(args),), {"world_size": 2})
    with pytest.raises(dpzoo.InputError, match=message):
        DPTrainer(
            model=start, args=args, train_dataset=Rows(BERT), privacy=privacy(grad_sample_mode=mode)
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fsdp_config": {"version": 1}}, r"fsdp_config={'version': 1}, wanted 2: FSDP1"),
        (
            {"fsdp_config": {"version": 2, "cpu_offload": True}},
            "{'cpu_offload': True}, wanted False",
        ),
        (
            {"fsdp_config": {"version": 2, "activation_checkpointing": True}},
            "gradient_checkpointing",
        ),
        (
            {"fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}},
            "'SHARDED_STATE_DICT'}, wanted 'FULL_STATE_DICT'",
        ),
        ({"fsdp_config": {"version": 2, "auto_wrap_policy": "SIZE_BASED_WRAP"}}, "or 'NO_WRAP'"),
        ({"fsdp_config": {"version": 2, "sharp": 1}}, "{'sharp': 1}, wanted a field of FSDP2's"),
        ({"bf16_full_eval": True}, "bf16_full_eval=True with fsdp, wanted False"),
        ({"even_batches": False}, "'even_batches': False} with fsdp, wanted True"),
        ({"environment": "true"}, r"ACCELERATE_USE_FSDP='true' in the environment .*fsdp=True"),
    ],
)
def test_fsdp(
    given: dict[str, Any],
    message: str,
    start: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = copy.copy(arguments(tmp_path))
    args.__class__ = type("Two", (type(args),), {"world_size": 2})
    args.fsdp, args.fsdp_config = True, {"version": 2}
    for name, value in given.items():
        if name == "environment":
            monkeypatch.setenv("ACCELERATE_USE_FSDP", value)
        elif name == "even_batches":
            args.accelerator_config = copy.copy(args.accelerator_config)
            args.accelerator_config.even_batches = value
        else:
            setattr(args, name, value)
    with pytest.raises(dpzoo.InputError, match=message):
        DPTrainer(model=start, args=args, train_dataset=Rows(BERT), privacy=privacy())


def test_checkpoint_folders_are_not_published(start: Any, tmp_path: Path) -> None:
    for strategy, refused in (("checkpoint", True), ("all_checkpoints", True), ("end", False)):
        args = arguments(tmp_path, hub_strategy=strategy)
        options = {"model": start, "args": args, "train_dataset": Rows(BERT)}
        DPTrainer(privacy=privacy(), **options)  # nothing is pushed
        args.push_to_hub = True
        if refused:
            with pytest.raises(
                dpzoo.InputError, match=r"hub_strategy=.*holds the state of the noise"
            ):
                DPTrainer(privacy=privacy(), **options)


def test_accumulation_has_one_name(start: Any, tmp_path: Path) -> None:
    config = {"gradient_accumulation_kwargs": {"num_steps": 2}}
    with pytest.raises(dpzoo.InputError, match=r"accelerator_config=.*give gradient_accumulation"):
        trainer_of(start, tmp_path, accelerator_config=config)


@pytest.mark.parametrize(("mode", "reentrant"), [("bk", True), ("ghost", False), ("hooks", False)])
def test_the_wrong_kind_of_checkpointing(
    mode: str, reentrant: bool, start: Any, tmp_path: Path
) -> None:
    field = "activation_checkpointing"
    if field not in transformers.TrainingArguments.__dataclass_fields__:
        field = "gradient_checkpointing"  # before transformers 5.23
    options = {field: True, f"{field}_kwargs": {"use_reentrant": reentrant}}
    wanted = f"use_reentrant={reentrant} in grad_sample_mode='{mode}', wanted {not reentrant}"
    with pytest.raises(dpzoo.InputError, match=wanted):
        trainer_of(start, tmp_path, {"grad_sample_mode": mode}, **options)


# --- model, data, calls -------------------------------------------------------------------------


def test_models_that_cannot_be_converted(tmp_path: Path) -> None:
    options = {"args": arguments(tmp_path), "train_dataset": Rows(BERT)}
    config = transformers.OPTConfig(
        vocab_size=9, hidden_size=4, ffn_dim=4, num_attention_heads=1, num_hidden_layers=1
    )
    ghost = privacy(grad_sample_mode="ghost")
    for model in (transformers.OPTForCausalLM(config), torch.nn.Linear(2, 2)):
        with pytest.raises(dpzoo.UnsupportedModelError, match=type(model).__name__):
            DPTrainer(model=model, privacy=ghost, **options)
    adapted = peft.get_peft_model(
        stock_model(BERT, torch.float32), peft.LoraConfig(task_type="SEQ_CLS")
    )
    with pytest.raises(dpzoo.UnsupportedModelError, match=r"around a BertForSequ.*Convert first"):
        DPTrainer(model=adapted, privacy=ghost, **options)
    trainer = DPTrainer(model=adapted, privacy=privacy(), **options)  # mode bk takes it as it is
    trainer.train()
    assert trainer.model is adapted


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(Rows(BERT))

    def __len__(self) -> int:
        return 16


def test_data_that_poisson_sampling_cannot_draw_from(start: Any, tmp_path: Path) -> None:
    with pytest.raises(dpzoo.InputError, match="got a Stream as train_dataset, wanted a data set"):
        trainer_of(start, tmp_path, train_dataset=Stream())
    with pytest.raises(dpzoo.InputError, match=r"logical batch .* of 8 rows for 7 training rows"):
        trainer_of(start, tmp_path, train_dataset=Rows(BERT, 7))
    trainer = trainer_of(start, tmp_path)
    trainer.train_dataset = Rows(BERT, 7)  # later on
    with pytest.raises(dpzoo.InputError, match=r"logical batch .* of 8 rows for 7 training rows"):
        trainer.train()
    trainer = trainer_of(start, tmp_path, train_dataset=None, eval_dataset=Rows(BERT))
    assert "epsilon" not in trainer.evaluate()  # evaluation alone
    with pytest.raises(dpzoo.InputError, match=r"train\(\) got train_dataset=None"):
        trainer.train()


def test_optimizers_that_are_not_the_models(start: Any, tmp_path: Path) -> None:
    other = torch.optim.SGD(copy.deepcopy(start).parameters(), lr=0.1)
    with pytest.raises(dpzoo.InputError, match="optimizer of other parameters than the model's"):
        trainer_of(start, tmp_path, optimizers=(other, None)).train()
    model = copy.deepcopy(start).train()
    made = dpzoo.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=dpzoo.ModelLoss(),
        data_loader=torch.utils.data.DataLoader(Rows(BERT), batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode="bk",
    )
    with pytest.raises(
        dpzoo.InputError, match="got a BookKeepingOptimizer in optimizers, wanted a"
    ):
        trainer_of(start, tmp_path, optimizers=(made[1], None)).train()


def test_batches_out_of_order(start: Any, tmp_path: Path) -> None:
    trainer = trainer_of(start, tmp_path)
    trainer.get_batch_samples = lambda *_: ([{"step": 1, "parts": []}], None)
    with pytest.raises(dpzoo.InputError, match="batch of step 1 came at step 0, and a batch is"):
        trainer.train()


def test_hyperparameter_search(start: Any, tmp_path: Path) -> None:
    with pytest.raises(
        dpzoo.InputError, match=r"hyperparameter_search\(\) would train on the same"
    ):
        trainer_of(start, tmp_path).hyperparameter_search()


def test_a_run_in_secure_mode_is_not_resumed(start: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    private = {"secure_mode": True, "noise_seed": None}
    for mode in ("bk", "ghost", "hooks"):
        folder = tmp_path / mode
        trainer = trainer_of(start, folder, {**private, "grad_sample_mode": mode}, **options)
        trainer.train()
        assert trainer.epsilon > 0
        again = trainer_of(start, folder, {**private, "grad_sample_mode": mode}, **options)
        with pytest.raises(dpzoo.InputError, match=f"{RANDOM_STATE_NAME}.*secure_mode"):
            again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))


class Overridden(DPTrainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().training_step(*args, **kwargs)


class OwnLoader(DPTrainer):
    def get_train_dataloader(self) -> Any:
        return []


class OwnSampler(DPTrainer):
    def _get_train_sampler(self, *args: Any) -> Any:
        return None


@pytest.mark.parametrize("kind", [Overridden, OwnLoader, OwnSampler])
def test_overridden_methods_of_a_step_are_refused(
    kind: type[DPTrainer], start: Any, tmp_path: Path
) -> None:
    with pytest.raises(
        dpzoo.InputError, match=rf"{kind.__name__} overrides \w+\(\), wanted DPTrainer's"
    ):
        kind(model=start, args=arguments(tmp_path), train_dataset=Rows(BERT), privacy=privacy())


class OwnLoss(DPTrainer):
    """transformers' documented way to a loss of one's own."""

    reduce = False

    def compute_loss(self, model: Any, inputs: Any, **_: Any) -> Any:
        losses = model(**inputs).loss_per_sample * 2
        return losses.mean() if self.reduce else losses


def test_an_overridden_loss_is_used(start: Any, tmp_path: Path) -> None:
    options = {
        "train_dataset": Rows(BERT),
        "privacy": privacy(noise_multiplier=0.0, clipping_norm=1e4),
    }
    moved = []
    for kind in (DPTrainer, OwnLoss):
        trainer = kind(model=copy.deepcopy(start), args=arguments(tmp_path, max_steps=1), **options)
        trainer.train()
        moved.append((trainer.model.classifier.weight - start.classifier.weight).detach())
    assert torch.allclose(moved[1], 2 * moved[0], rtol=1e-4, atol=1e-7)
    trainer = OwnLoss(model=copy.deepcopy(start), args=arguments(tmp_path), **options)
    trainer.reduce = True
    with pytest.raises(dpzoo.InputError, match=r"compute_loss gave a loss of shape \(\), wanted"):
        trainer.train()


class OverTheMean(DPTrainer):
    def compute_loss(self, model: Any, inputs: Any, **_: Any) -> Any:
        losses = model(**inputs).loss_per_sample
        return losses / losses.detach().mean()


def test_losses_that_depend_on_other_rows_are_refused(start: Any, tmp_path: Path) -> None:
    """Without a gradient between them."""

    def over_rows(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="none") / len(
            labels
        )

    for kind, options in ((OverTheMean, {}), (DPTrainer, {"compute_loss_func": over_rows})):
        trainer = kind(
            model=copy.deepcopy(start),
            args=arguments(tmp_path),
            train_dataset=Rows(BERT),
            privacy=privacy(),
            **options,
        )
        with pytest.raises(dpzoo.InputError, match=r"compute_loss.* gives a row another loss when"):
            trainer.train()


def test_a_collator_that_cuts_rows_is_refused(start: Any, tmp_path: Path) -> None:
    def cut(rows: list[Any]) -> Any:
        batch = torch.utils.data.default_collate(rows)
        return {k: torch.cat([v, v]) for k, v in batch.items()}

    trainer = trainer_of(start, tmp_path, data_collator=cut)
    with pytest.raises(dpzoo.InputError, match="the draw has"):
        trainer.train()


def test_the_documentation_names_what_is_refused() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "trainer.md").read_text(encoding="utf-8")
    for name in (*REFUSED, "hyperparameter_search"):
        assert f"`{name}" in page, name
    for field in PrivacyArguments.__dataclass_fields__:
        assert f"`{field}`" in page or field == "poisson_sampling", field
