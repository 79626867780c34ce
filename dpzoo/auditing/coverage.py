"""Coverage and privacy unit: is there a per-sample gradient, for every parameter, of the row?"""

import torch
from opacus.validators import ModuleValidator
from torch import nn

from dpzoo.auditing.capture import Trace
from dpzoo.auditing.findings import ShapeRow
from dpzoo.auditing.model_under_audit import ModelUnderAudit
from dpzoo.auditing.numerics import largest
from dpzoo.auditing.opacus_modes import PER_ROW_LOSS_ONLY
from dpzoo.auditing.record import Record
from dpzoo.errors import first_line as said
from dpzoo.modes import MODES
from dpzoo.opacus_internals import has_grad_sampler

PER_ROW = (
    "give the module one input row for each row of the batch (for positions: per-row position_ids of "
    "shape (rows, seq)); for a transformers model, dpzoo.convert(model)"
)


def coverage(subject: ModelUnderAudit, record: Record) -> None:
    """Every trainable parameter has a per-sample gradient with the batch's dimension.

    Catches: position tables that see (1, seq) ids, parameters without a grad_sample, parameters
    held by a container, buffers beside parameters, modules called with keywords only, tied
    parameters used behind Opacus' back, trained padding rows, branches that do not run, and every
    mode that raises.
    """
    record.ran()
    _structure(subject, record)
    _traced(subject, record)
    for mode in subject.modes:
        _mode(subject, record, mode)


def privacy_unit(subject: ModelUnderAudit, record: Record) -> None:
    """The batch dimension inside the model is the number of rows.

    Catches: multiple choice flattened to (rows * choices, seq), tokens flattened into the batch,
    a batch that is not the first dimension. Opacus clips what it finds in the first dimension: with
    k of those to a row, a row contributes up to k times the clipping norm.
    """
    if not _opacus(subject):
        if not record.parts:  # of Opacus' modes
            record.skip("bk follows the rows, in whatever dimension they are")
        return
    record.ran()
    for kind, message in (
        ("multiple", "the first dimension of its inputs is a multiple of the number of rows"),
        ("constant", "the first dimension of its inputs does not depend on the number of rows"),
        ("other", "the first dimension of its inputs is not the number of rows"),
    ):
        traces = [trace for trace in subject.traces if trace.unit == kind]
        if not traces:
            continue
        call = traces[0].odd_call()
        times = f" ({call.leading} = {(call.leading or 0) // subject.rows} * {subject.rows})"
        record.find(
            "privacy",
            f"the privacy unit is not the row: {message}{times if kind == 'multiple' else ''}. Opacus "
            f"clips per entry of the first dimension, not per row.",
            "keep the rows first and whole up to the module: fold further dimensions behind the first "
            "(rows, choices * seq), not into it; dpzoo.convert(model) does so for transformers models",
            modules=[trace.module for trace in traces],
            parameters=_held(subject, traces),
            expected=f"first dimension {subject.rows}",
            got=f"{call.leading} in {call.positional[-1]}",
        )


def shapes(subject: ModelUnderAudit) -> list[ShapeRow]:
    """The layer-by-layer table of activation, backprop and grad_sample shapes."""
    mode = next((m for m in subject.modes if not MODES[m].norms), None)
    rows = subject.mode_run(mode).rows if mode else {}
    table = []
    for trace in subject.traces:
        module = subject.model.get_submodule(trace.module)
        own = [n for n, p in module.named_parameters(recurse=False) if p.requires_grad]
        prefix = f"{trace.module}." if trace.module else ""
        by_name = {n: k for k, names in subject.names.items() for n in names}
        samples = {n: rows.get(by_name.get(prefix + n, "")) for n in own}
        call = trace.calls[0] if trace.calls else None
        table.append(
            ShapeRow(
                module=trace.module,
                kind=trace.kind.__name__,
                activation=(call.positional + call.keywords) if call else (),
                backprop=call.backprop if call else None,
                grad_sample={n: None if g is None else tuple(g.shape) for n, g in samples.items()},
            )
        )
    return table


def _held(subject: ModelUnderAudit, traces: list[Trace]) -> list[str]:
    modules = {trace.module for trace in traces}
    return [
        name
        for name, names in subject.names.items()
        if modules & {full.rpartition(".")[0] for full in names}
    ]


def _opacus(subject: ModelUnderAudit) -> bool:
    """Whether a mode of Opacus' own is audited: bk has other ways, and names itself what it refuses."""
    return any(not MODES[mode].own for mode in subject.modes)


def _structure(subject: ModelUnderAudit, record: Record) -> None:
    """What the module tree says before anything runs."""
    opacus_errors = (
        ModuleValidator.validate(subject.model, strict=False) if _opacus(subject) else []
    )
    for error in opacus_errors:
        record.find(
            "crash",
            f"PrivacyEngine.make_private refuses the model: {said(error)[:160]}",
            "opacus.validators.ModuleValidator.fix(model) replaces what it can (BatchNorm by GroupNorm)",
        )
    for trace in subject.traces if _opacus(subject) else ():
        module = subject.model.get_submodule(trace.module)
        prefix = f"{trace.module}." if trace.module else ""
        own = [n for n, p in module.named_parameters(recurse=False) if p.requires_grad]
        if any(True for _ in module.buffers()):
            record.find(
                "crash",
                f"{trace.kind.__name__} holds a buffer beside trainable parameters; Opacus refuses it, "
                f"for a buffer that follows the data (running statistics) is not private",
                "replace the layer by one without state (GroupNorm for BatchNorm), or move the buffer "
                "to a module without parameters",
                modules=[trace.module],
                parameters=[prefix + name for name in own],
            )
        inside = [n for n, p in module.named_parameters() if p.requires_grad]
        if len(inside) > len(own) and not has_grad_sampler(trace.kind):
            record.find(
                "note",
                f"{trace.kind.__name__} holds parameters itself and has submodules with parameters: "
                f"Opacus takes the whole subtree to functorch, which is slower, sees the first "
                f"positional input only and cannot see tied weights",
                "move each such parameter into a leaf module of its own",
                modules=[trace.module],
                parameters=[prefix + name for name in own],
            )
    for names in subject.tied:
        record.find(
            "note",
            f"one parameter under {len(names)} names; its per-sample gradient is the sum over all uses",
            "nothing to do where exactness passes",
            parameters=names,
            modules=[name.rpartition(".")[0] for name in names],
        )


def _traced(subject: ModelUnderAudit, record: Record) -> None:
    """What the modules saw in a forward pass."""
    for trace in subject.traces:
        by_keyword = trace.calls and all(not c.positional and c.keywords for c in trace.calls)
        if by_keyword and _opacus(subject):
            record.find(
                "crash",
                f"{trace.kind.__name__} is called with keyword arguments only; Opacus' forward hook "
                f"captures positional ones, and then has no activation for its parameters",
                "pass the module's input by position",
                modules=[trace.module],
                parameters=_held(subject, [trace]),
                expected="a positional tensor",
                got=f"keyword tensors of shapes {trace.calls[0].keywords}",
            )
        if trace.unit == "shared" and _opacus(subject):
            call = trace.odd_call()
            record.find(
                "crash",
                f"{trace.kind.__name__} sees one input for the whole batch: its per-sample gradient has "
                f"batch dimension 1, and no row's own part can be told",
                PER_ROW,
                modules=[trace.module],
                parameters=_held(subject, [trace]),
                expected=f"batch dimension {subject.rows}",
                got=f"batch dimension 1, input {call.positional[-1]}",
            )


def _mode(subject: ModelUnderAudit, record: Record, mode: str) -> None:
    run = subject.mode_run(mode)
    if run.error:
        tying = "tying" in run.error.lower()
        names = [n for names in subject.tied for n in names] if tying else []
        odd = [t.module for t in subject.traces if t.unit in ("shared", "unseen")]
        calls = (
            [t.module for t in subject.traces if len(t.calls) > 1] if tying and not names else []
        )
        scalar = mode == "bk" and PER_ROW_LOSS_ONLY["bk"] in run.error
        record.find(
            "note" if scalar and len(subject.modes) > 1 else "crash",
            f"{mode} mode raises in its first step: {run.error}",
            "give the parameter one module and one call, use hooks mode, or dpzoo.convert(model)"
            if tying
            else "see the other findings on these modules; the mode cannot be used before that",
            mode=mode,
            parameters=names,
            modules=subject.owners(names) or calls or odd,
        )
        return
    values = run.values
    _missing(subject, record, mode, [name for name in subject.parameters if name not in values])
    wrong = {name: len(v) for name, v in values.items() if len(v) != subject.rows}
    seen = {t.module for t in subject.traces if t.unit not in ("rows", "unseen")}
    unnamed = [n for n in wrong if not seen & set(subject.owners([n]))]
    for name in unnamed:  # those seen in the traces have a finding of their own
        record.find(
            "crash",
            "the per-sample gradient's batch dimension is not the number of rows",
            PER_ROW,
            parameters=[name],
            mode=mode,
            expected=f"batch dimension {subject.rows}",
            got=f"batch dimension {wrong[name]}",
        )
    if run.rows and not subject.random:
        sums = {n: v.sum(0) for n, v in run.rows.items() if n not in wrong}
        _sums(subject, record, mode, sums)


def _missing(subject: ModelUnderAudit, record: Record, mode: str, names: list[str]) -> None:
    """Parameters without a per-sample gradient, by cause."""
    if not names:
        return
    truth = subject.total_gradient(subject.batch)
    reached = [n for n in names if bool((truth[n] != 0).any())]
    unreached = [n for n in names if n not in reached]
    if MODES[mode].own:
        _without_uses(subject, record, reached, unreached)
        return
    if reached:
        record.find(
            "privacy",
            "trainable parameters get a gradient and no per-sample gradient: they are used past the "
            "module that holds them, so nothing clips what the rows contribute to them",
            "use each parameter through the forward of a module of its own",
            parameters=reached,
            mode=mode,
            expected=f"a per-sample gradient of {subject.rows} rows",
            got="none",
        )
    if unreached:
        record.find(
            "crash",
            "trainable parameters get no gradient from this batch (unused, detached, or on a branch "
            "that did not run); Opacus' step raises on them, or uses an older batch's norm",
            "freeze them with requires_grad_(False), or audit a batch that uses them",
            parameters=unreached,
            mode=mode,
        )


def _without_uses(
    subject: ModelUnderAudit, record: Record, reached: list[str], unreached: list[str]
) -> None:
    """Parameters that bk has no use of: no row is in their sums, which are noise."""
    for names, why, remedy in (
        (
            reached,
            "they are used past the module that holds them",
            "use each parameter through the forward of a module of its own",
        ),
        (
            unreached,
            "this batch does not reach them (unused, detached, or on a branch that did not run)",
            "freeze them with requires_grad_(False), or audit a batch that uses them",
        ),
    ):
        if names:
            # What a random model skips in one batch, it takes in another.
            skipped = names is unreached and subject.loss.fixed
            record.find(
                "note" if skipped else "utility",
                f"trainable parameters are moved by noise alone: {why}",
                remedy,
                parameters=names,
                mode="bk",
                expected=f"shares of {subject.rows} rows",
                got="none",
            )


def _sums(
    subject: ModelUnderAudit, record: Record, mode: str, sums: dict[str, torch.Tensor]
) -> None:
    """The sum over rows is autograd's gradient."""
    truth = subject.total_gradient(subject.batch)
    wrong = record.differ(sums, truth, subject.tolerance)
    padding = [n for n in wrong if _only_padding(subject, n, sums[n], truth[n])]
    if padding:
        record.find(
            "utility",
            "the padding row of an embedding gets a per-sample gradient, and none from autograd: "
            "Opacus' sampler ignores padding_idx, so noise and padding train that row",
            "use dpzoo.layers.TokenEmbedding, or an embedding without padding_idx",
            parameters=padding,
            mode=mode,
            expected="gradient 0 in the row padding_idx",
            got=f"up to {max(float((sums[n] - truth[n]).abs().max()) for n in padding):.3g}",
        )
    others = [n for n in wrong if n not in padding]
    if others:
        worst = others[0]
        record.find(
            "utility",
            "the per-sample gradients do not add up to autograd's gradient: a part of it is lost, or "
            "counted twice (a weight used past its module, as in F.linear(h, wte.weight)?)",
            "use the parameter through the forward of a module, once for each use",
            parameters=others,
            mode=mode,
            expected=f"relative error below {subject.tolerance:g}",
            got=f"{wrong[worst]:.3g} for {worst}",
        )


def _only_padding(
    subject: ModelUnderAudit, name: str, got: torch.Tensor, truth: torch.Tensor
) -> bool:
    for owner in subject.owners([name]):
        module = subject.model.get_submodule(owner)
        row = getattr(module, "padding_idx", None)
        if isinstance(module, nn.Embedding) and row is not None:
            difference = (got - truth).abs()
            difference[row] = 0
            if float(difference.max()) <= subject.tolerance * max(1e-30, largest({"": truth})):
                return True
    return False
