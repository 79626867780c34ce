"""Tiny instances: a default config shrunk by rules, random parameters, and a batch that the model takes."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from dpzoo.errors import UnsupportedModelError
from dpzoo.losses import ModelLoss

Batch = dict[str, torch.Tensor]

AUTO_CLASSES: dict[str, tuple[str, str]] = {
    "causal-lm": ("AutoModelForCausalLM", "CAUSAL_LM"),
    "masked-lm": ("AutoModelForMaskedLM", "MASKED_LM"),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM"),
    "sequence-classification": ("AutoModelForSequenceClassification", "SEQUENCE_CLASSIFICATION"),
    "image-classification": ("AutoModelForImageClassification", "IMAGE_CLASSIFICATION"),
}
"""Task -> the auto class, and the name of its list."""

LIMIT = 12_000_000
"""Parameters beyond which an instance is not tiny: the rules do not fit its config."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of an instance and of its batch."""

    rows: int = 4
    seq: int = 9
    hidden: int = 32
    heads: int = 4
    inner: int = 40
    vocab: int = 83
    labels: int = 3
    image: int = 32


COINCIDING = Sizes(rows=8, seq=8, hidden=32, heads=4, inner=32, vocab=80, labels=8)
"""Sizes that an engine that tells rows by their number would take for each other."""


# --- from a config to a tiny one --------------------------------------------------------------------

Rule = tuple[str, str, Callable[[Any, Sizes], Any]]

RULES: tuple[Rule, ...] = (
    # group, what the field's name matches in full, the tiny value from the default one
    (
        "vocab",
        r"(.*_)?vocab_size(_.*)?|encoder_hash_byte_group_vocab|text_vocab_size|n_vocab|entity_vocab_size",
        lambda v, s: s.vocab,
    ),
    (
        "size",
        r"hidden_size|n_embd|d_model|dim|model_dim|word_embed_proj_dim|emb_dim|lru_width|n_embed|hidden_size_global|"
        r"decoder_hidden_size|encoder_hidden_size|attention_hidden_size|true_hidden_size|hidden_dim_model|"
        r"d_embed|embedding_dim",
        lambda v, s: s.hidden,
    ),
    (
        "half",
        r"embedding_size|hidden_size_per_layer_input|intra_bottleneck_size|entity_emb_size|embedding_rank|emb_size",
        lambda v, s: s.hidden // 2,
    ),
    (
        "inner",
        r"(.*_)?intermediate_size(_.*)?|expert_ffn_hidden_size|(.*_)?ffn_dim|d_inner|d_ff|n_inner|ffn_hidden_size|hidden_dim|ffn_size|"
        r"inner_dim|block_ff_dim|ff_proj_dim|dim_ff|feed_forward_size",
        lambda v, s: s.inner,
    ),
    (
        "layers",
        r"(num_|n_)?(hidden_|encoder_|decoder_)?layers?|n_layers?|num_(encoder|decoder)_(blocks|layers)|"
        r"(encoder|decoder)_layers|num_blocks|num_mtp_layers|num_nextn_predict_layers|decoder_num_layers",
        lambda v, s: min(v, 2),
    ),
    (
        "heads",
        r"(.*_)?(num_|n_)?attention_heads|num_(encoder|decoder)_attention_heads|n_heads?|num_heads|(encoder|decoder)_(attention_)?heads|(index_)?n_heads|"
        r"(encoder|decoder)_num_heads",
        lambda v, s: s.heads if v else v,
    ),
    (
        "kv",
        r"(.*_)?(num_key_value_heads|n_kv_heads?|num_kv_heads|kv_n_heads|multi_query_group_num)",
        lambda v, s: max(s.heads // 2, 1),
    ),
    (
        "head_dim",
        r"(.*_)?head_dim|d_kv|d_head|kv_channels|attention_head_size",
        lambda v, s: s.hidden // s.heads,
    ),
    ("lora", r".*_lora_rank|.*_low_rank.*|lora_rank", lambda v, s: 8),
    ("mla", r"qk_nope_head_dim|qk_rope_head_dim|v_head_dim|qk_head_dim", lambda v, s: 4),
    ("rotary", r"rotary_dim|rope_dim", lambda v, s: 4),
    (
        "positions",
        r"(max_|n_)(.*_)?position(s|_embeddings)|n_ctx|max_target_positions|max_source_positions|"
        r"max_sequence_length|max_seq_len|seq_length|max_2d_position_embeddings|n_positions",
        lambda v, s: min(v, 64),
    ),
    ("types", r"type_vocab_size|n_langs", lambda v, s: v),
    (
        "experts",
        r"(.*_)?(num_|n_)(routed_|local_)?experts|moe_num_experts|num_expert",
        lambda v, s: min(v, 4),
    ),
    (
        "experts",
        r"(num_|moe_)?experts_per_tok(en)?|num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k|top_k_experts",
        lambda v, s: min(v, 2),
    ),
    (
        "experts",
        r"n_group|topk_group|num_expert_group|first_k_dense_replace|num_expert_groups|num_dense_layers",
        lambda v, s: min(v, 1),
    ),
    ("experts", r"zero_expert_num", lambda v, s: min(v, 2)),
    ("experts", r"expert_capacity", lambda v, s: 64),
    ("ssm", r"(mamba_)?(d_state|ssm_state_size|state_size|state_dim)", lambda v, s: 4),
    ("ssm", r"mamba_n_heads|mamba_num_heads|n_mamba_heads", lambda v, s: 4),
    ("ssm", r"mamba_d_head|mamba_head_dim", lambda v, s: 2 * s.hidden // 4),
    ("ssm", r"mamba_d_ssm", lambda v, s: 2 * s.hidden),
    ("latents", r"d_latents", lambda v, s: s.hidden),
    ("latents", r"num_latents", lambda v, s: 6),
    ("layers", r"num_self_attends_per_block", lambda v, s: min(v, 2)),
    ("ssm", r"mamba_n_groups|n_groups|mamba_ngroups", lambda v, s: 1),
    ("ssm", r"(mamba_)?chunk_size", lambda v, s: 4),
    ("ssm", r"time_step_rank|mamba_dt_rank|dt_rank", lambda v, s: 4),
    ("linear", r"linear_(key|value)_head_dim", lambda v, s: 6),
    ("linear", r"linear_num_(key|value)_heads", lambda v, s: 2 if s.heads > 2 else 1),
    (
        "window",
        r"(sliding_|attention_)?window(_size)?|local_attention|local_window",
        lambda v, s: 4,
    ),
    ("buckets", r"position_buckets|relative_attention_num_buckets|num_buckets", lambda v, s: 8),
    ("image", r"image_size|img_size|input_size", lambda v, s: s.image),
    ("image", r"patch_size", lambda v, s: min(v, 8)),
    ("image", r"embed_dim", lambda v, s: s.hidden),
    ("labels", r"num_labels", lambda v, s: s.labels),
)

LIST_RULES: tuple[tuple[str, Callable[[Any, Sizes], Any]], ...] = (
    (r"depths?|num_layers|layers|stage_num_blocks|layer_depths?", lambda v, s: [1] * len(v)),
    (
        r"(.*_)?(hidden_sizes|embed_dims?|hidden_dims|widths|embedding_dims|encoder_hidden_size)",
        lambda v, s: [8 * 2 ** min(i, 3) for i in range(len(v))],
    ),
    (r"num_heads|num_attention_heads", lambda v, s: [2] * len(v)),
    (r"block_sizes", lambda v, s: [1] * len(v)),
    (r"attention_window", lambda v, s: [4] * len(v)),
)

FALLBACKS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "",
        "none",
        "mha",
        "mha none",
        "types",
        "kv none",
        "half",
        "head_dim",
        "kv",
        "window",
        "lists",
        "image",
        "rotary",
        "ssm",
        "linear",
        "mla lora",
        "kv head_dim",
        "half head_dim kv",
        "lists image",
        "ssm window",
        "size half",
        "size half head_dim kv",
        "size half heads head_dim kv",
        "size half heads head_dim kv mla lora linear ssm lists image window rotary buckets",
    )
)
"""Groups of rules to leave out, tried in turn until an instance comes out that runs."""

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bit": {"num_groups": 4},
    "cvt": {"embed_dim": [8, 16, 24], "depth": [1, 1, 2], "num_heads": [1, 2, 2]},
    "efficientnet": {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 32},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "reformer": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [3, 3],
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 3,
        "lsh_attn_chunk_length": 3,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "esm": {"vocab_size": 83},
    "xmod": {"default_language": "en_XX"},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "longcat_flash": {"head_dim": 4, "qk_head_dim": 8},
    "perceiver": {"max_position_embeddings": 9, "image_size": 32},
}
"""Architecture -> config fields that no rule finds."""


KINDS = ("layer_types", "layers_block_type")
"""Fields with the kind of each layer."""

UNPADDED = ("led", "longformer", "prophetnet")
"""Architectures whose gradients are not finite where a row is padded."""


def shrink(config: Any, sizes: Sizes, leave: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The fields of a config to make another way, for a tiny model without dropout.

    Args:
        config: a default one.
        sizes: what the tiny one has.
        leave: groups of `RULES` to leave out.
    """
    made: dict[str, Any] = {}
    for name, value in {**config.to_dict(), **vars(config)}.items():
        if name.startswith("_"):
            continue
        if isinstance(value, transformers.PreTrainedConfig):
            made[name] = shrink(value, sizes, leave)
        elif isinstance(value, float) and re.search(r"drop|jitter", name):
            made[name] = 0.0
        elif value is None and name in ("head_dim", "num_key_value_heads") and "none" not in leave:
            made[name] = (
                sizes.hidden // sizes.heads if name == "head_dim" else max(sizes.heads // 2, 1)
            )
        elif isinstance(value, bool) or value is None:
            continue
        elif isinstance(value, int) and re.search(r"_(token_)?(id|index)$", name):
            if value >= 0:
                made[name] = _special(name, sizes)
        elif isinstance(value, int) and re.search(r"drop", name):
            made[name] = 0
        elif isinstance(value, int):
            for group, pattern, rule in RULES:
                if group not in leave and re.fullmatch(pattern, name):
                    made[name] = rule(value, sizes)
                    if group == "kv" and "mha" in leave:
                        made[name] = sizes.heads
                    if group == "layers":
                        made[name] = min(value, _layers(config))
                    break
        elif isinstance(value, list | tuple) and re.search(r"drop", name):
            made[name] = [0.0] * len(value)
        elif name in KINDS and isinstance(value, list | tuple) and "types" in leave:
            made[name] = list(value[: _layers(config)])
        elif isinstance(value, list | tuple) and value and "lists" not in leave:
            for pattern, rule in LIST_RULES:
                if all(isinstance(v, int) for v in value) and re.fullmatch(pattern, name):
                    made[name] = rule(value, sizes)
                    break
    return made


def _layers(config: Any) -> int:
    """How many layers have one of each kind that a config's layers are of; at least 2."""
    for name in KINDS:
        kinds = getattr(config, name, None)
        if isinstance(kinds, list | tuple) and len(set(kinds)) > 1:
            return max(2, 1 + max(list(kinds).index(kind) for kind in set(kinds)))
    return 2


def _special(name: str, sizes: Sizes) -> int:
    """A token id that no batch holds."""
    known = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return known.get(name, sizes.vocab - 1 - sum(map(ord, name)) % 8)


def architectures(tasks: Sequence[str] = tuple(AUTO_CLASSES)) -> list[str]:
    """Names of all that the installed transformers has: ``"causal-lm/llama"``."""
    return [
        f"{task}/{kind}"
        for task in tasks
        for kind in getattr(modeling_auto, f"MODEL_FOR_{AUTO_CLASSES[task][1]}_MAPPING_NAMES")
    ]


def _split(name: str) -> tuple[str, str]:
    if name in architectures():
        task, kind = name.split("/", 1)
        return task, kind
    for known in architectures():
        if known.split("/")[1] == name:
            return known.split("/")[0], name
    raise UnsupportedModelError(
        f"The installed transformers has no architecture {name!r}, wanted a model_type such as 'llama', or "
        f"'causal-lm/llama'. dpzoo.families.architectures() lists them."
    )


def model_class(name: str) -> type:
    """The stock class of an architecture.

    Raises:
        UnsupportedModelError: there is none.
    """
    task, kind = _split(name)
    names = getattr(modeling_auto, f"MODEL_FOR_{AUTO_CLASSES[task][1]}_MAPPING_NAMES")[kind]
    cls: type = getattr(transformers, names if isinstance(names, str) else names[0])
    return cls


def configure(name: str, sizes: Sizes = Sizes(), leave: frozenset[str] = frozenset()) -> Any:
    """A tiny config of an architecture."""
    task, kind = _split(name)
    cls: Any = model_class(name)
    config_class = transformers.AutoConfig.for_model(kind).__class__
    wanted = cls.config_class
    if isinstance(wanted, type) and issubclass(wanted, transformers.PreTrainedConfig):
        config_class = config_class if issubclass(config_class, wanted) else wanted
    fields = shrink(config_class(), sizes, leave)
    fields |= EXCEPTIONS.get(kind, {})
    fields["num_labels"] = sizes.labels
    if task == "causal-lm" and hasattr(config_class(), "is_decoder"):
        fields["is_decoder"] = True
    config = config_class(**fields)
    for one in _configs(config):
        if hasattr(one, "use_cache"):
            one.use_cache = False
        if getattr(one, "pad_token_id", None) is None:
            one.pad_token_id = 0
        if getattr(one, "decoder_start_token_id", None) is None and getattr(
            one, "is_encoder_decoder", False
        ):
            one.decoder_start_token_id = 2
        one._experts_implementation = "eager"  # the grouped kernels know no float64
    return config


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for value in vars(config).values():
        if isinstance(value, transformers.PreTrainedConfig):
            yield from _configs(value)


# --- the model and its batch ------------------------------------------------------------------------


def build(name: str, sizes: Sizes = Sizes(), seed: int = 0) -> tuple[Any, str]:
    """A tiny instance of an architecture, in train mode and float64, every parameter moved at random.

    Args:
        name: "llama", "causal-lm/llama".
        sizes: of the instance and the batch that it is tried with.
        seed: of the parameters.

    Returns:
        The model, and its task (which `ModelLoss` takes).

    Raises:
        UnsupportedModelError: there is no such architecture, or none of the rules gives an instance that
            runs; the message ends with the first error.
    """
    first = ""
    for leave in FALLBACKS:
        try:
            model = _instance(name, sizes, leave, seed)
            made, labels = batch(model, sizes=sizes)
            with torch.no_grad():
                losses = row_losses(model, made, labels)
            if losses.shape == (sizes.rows,) and losses.isfinite().all():
                return model, str(ModelLoss(model).task)
            first = first or f"losses {losses.tolist()}"
        except Exception as error:  # whatever a model's code raises on a config that does not fit
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            first = first or f"{type(error).__name__}: {first_line(error)} ({where})"
            if isinstance(error, ImportError):
                break
    raise UnsupportedModelError(f"No tiny instance of {name} runs: {first}")


def _instance(name: str, sizes: Sizes, leave: frozenset[str], seed: int) -> Any:
    config = configure(name, sizes, leave)
    cls: Any = model_class(name)
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > LIMIT:
        raise UnsupportedModelError(f"the tiny config makes {size / 1e6:.0f} million parameters")
    torch.manual_seed(seed)
    model = cls(config).double().train()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():  # zero biases and unit norms hide what is swapped
            parameter.add_(
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.05
            )
    return model


def batch(
    model: Any, rows: int | None = None, seq: int | None = None, sizes: Sizes = Sizes()
) -> tuple[Batch, torch.Tensor]:
    """A batch that a model takes, made from its config and its forward's arguments.

    Args:
        model: a stock model.
        rows: of the batch; by default of ``sizes``.
        seq: tokens a row; by default of ``sizes``.
        sizes: the sizes that the model was made with.

    Returns:
        The inputs, and the labels for `ModelLoss`.
    """
    rows, seq = rows or sizes.rows, seq or sizes.seq
    generator = torch.Generator().manual_seed(3)
    task = ModelLoss(model).task
    taken = inspect.signature(model.forward).parameters

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    config = model.config
    if task == "image-classification":
        images = pixels(config, rows, sizes.image, generator)
        return {"pixel_values": images}, draw(0, sizes.labels, rows)
    made: Batch = {}
    ids = draw(3, sizes.vocab - 12, rows, seq)
    ids[:, seq // 2] = ids[:, 1]  # a token twice in a row
    made["input_ids"] = ids
    mask = torch.ones_like(ids)
    if "attention_mask" in taken and seq > 3 and config.model_type not in UNPADDED:
        mask[-1, -2:] = 0  # one row is shorter
        ids[mask == 0] = 0
        made["attention_mask"] = mask
    if task == "sequence-classification" and config.is_encoder_decoder:
        ids[torch.arange(rows), mask.sum(1) - 1] = config.eos_token_id  # their heads read that one
    if "bbox" in taken:
        corner = draw(0, 20, rows, seq, 2)
        made["bbox"] = torch.cat([corner, corner + 5], -1)
    if task == "sequence-classification":
        return made, draw(0, sizes.labels, rows)
    if task == "seq2seq-lm":
        made["decoder_input_ids"] = draw(3, sizes.vocab - 12, rows, max(seq - 2, 2))
        return made, draw(3, sizes.vocab - 12, rows, max(seq - 2, 2))
    labels = ids.clone() if task == "causal-lm" else draw(3, sizes.vocab - 12, rows, seq)
    return made, labels.masked_fill(mask == 0, -100)


def pixels(config: Any, rows: int, side: int = Sizes.image, generator: Any = None) -> torch.Tensor:
    """Images, (rows, channels, height, width), of the size that a config says, or else ``side``."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", side)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    channels = getattr(vision, "num_channels", 3)
    return torch.randn(rows, channels, height, width, generator=generator, dtype=torch.float64)


def row_losses(
    model: Any, inputs: Mapping[str, torch.Tensor], labels: torch.Tensor
) -> torch.Tensor:
    """The losses of a batch's rows, (rows,), as `ModelLoss` has them."""
    return ModelLoss(model, reduction="none")(model(**inputs), labels)


def first_line(error: BaseException) -> str:
    """What an error says first."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
