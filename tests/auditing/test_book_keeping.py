"""The audit of mode "bk": the zoo passes, planted bugs are named, and a broken bk is caught."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import dpzoo
from dpzoo.auditing import audit, audit_loop
from dpzoo.clipping.factor_store import FactorStore
from dpzoo.clipping.noise import NoiseSource
from dpzoo.clipping.optimizer import BookKeepingOptimizer
from dpzoo.clipping.rules import Adaptive, Flat
from dpzoo.clipping.units import Units
from dpzoo.factors import EACH, EmbeddingFactors, LinearFactors
from tests.auditing.clean import CLEAN
from tests.auditing.loops import ADAPTIVE, Loop
from tests.auditing.planted import PLANTED, Planted
from tests.auditing.test_zoo import SAMPLED
from tests.support import TIED, batch_for, stock_model


@pytest.mark.parametrize("name", SAMPLED)
def test_a_class_of_the_zoo_passes_every_check(name: str) -> None:
    """None is skipped but that of Opacus' unit, and a NaN row is left out: no note about one."""
    model = dpzoo.convert(stock_model(name, dtype=torch.float32))
    report = audit(model, batch_for(name), modes=("bk",))
    assert report.ok, str(report)
    assert [result.name for result in report if result.skipped] == ["privacy_unit"], str(report)
    assert all("one parameter under 2 names" in f.message for f in report.findings)
    assert bool(report.findings) == (name in TIED)


def test_bk_beside_opacus_own_modes() -> None:
    name = "GPT2LMHeadModel"
    model = dpzoo.convert(stock_model(name, dtype=torch.float32))
    report = audit(model, batch_for(name), modes=("bk", "hooks", "ghost"))
    assert report.ok, str(report)
    assert report.modes == ("bk", "hooks", "ghost")
    assert not any(result.skipped for result in report), str(report)


# --- clean models that are not dpzoo's ------------------------------------------------------------------

REFUSED = {"bag of words": "embedding_bag of bag.weight cannot be run for one row"}
"""Clean models that bk has no way for, and what it says."""


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_model_passes_or_is_refused_by_name(name: str) -> None:
    model, batch, options = CLEAN[name]()
    report = audit(model, batch, **{**options, "modes": ("bk",)})
    alarms = [f.message for f in report.findings if f.severity != "note"]
    if name in REFUSED:
        (alarm,) = alarms
        assert REFUSED[name] in alarm
        assert alarm.startswith("bk mode raises in its first step: ")
    elif "mean over the batch" in name:
        assert alarms == [
            "bk mode raises in its first step: InputError: bk: the loss is a scalar, and bk takes one loss "
            "for each row. Pass loss=... with one value for each row; dpzoo.ModelLoss(model) has them for "
            "transformers' models"
        ]
    else:
        assert not alarms, str(report)
        # One row passes for an empty batch, so that no model raises on it.
        assert not any(
            f.message.startswith("the model raises on an empty") for f in report.findings
        )
        assert not any("bk" in r.skipped for r in report if r.name != "privacy_unit")


# --- planted bugs ---------------------------------------------------------------------------------------

ROW = "differ by more than the clipping norm"
REFUSAL = "bk mode raises in its first step: "
NOISE_ALONE = "moved by noise alone"

IN_BK: dict[str, tuple[str, str]] = {
    "batch norm": ("coverage", REFUSAL + "InputError: batch_norm in training mode combines rows"),
    "a running mean": ("statelessness", "changed in a training forward pass"),
    "a frozen parameter that": ("statelessness", "changed in a training forward pass"),
    "statistics of": ("statelessness", "is in training mode"),
    "a table whose rows": ("statelessness", "has max_norm"),
    "a running variance": ("statelessness", "takes statistics over the rows"),
    "a sum over rows": ("isolation", "not the mean of the rows' losses"),
    "experts with a capacity, in": ("neighbours", "the other rows' gradients change"),
    "experts with a capacity": ("isolation", "there are 16 other rows"),
    "a head that reads": ("neighbours", "are padded to the longest of them"),
    "a mean that is kept": ("isolation", "other rows"),
    "ranks within": ("isolation", "other rows"),
    "rows that meet in large": ("neighbours", "the other rows' gradients change"),
    "rows that are mixed": ("isolation", "depends on other rows"),
    "the batch's mean": ("coverage", REFUSAL + "InputError: linear was called with a trainable parameter"),
    "in-batch negatives": ("coverage", REFUSAL + "InputError: The recorded per-sample gradients are not"),
    "a mixture's balance": ("isolation", "depends on other rows"),
    "a token-mean loss": ("isolation", "not the mean of the rows' losses"),
    "a loss over num_items": ("sensitivity", ROW),
    "Opacus' own EmbeddingBag": ("coverage", REFUSAL + "UnsupportedModelError: embedding_bag of"),
    "a branch": ("coverage", REFUSAL + "InputError: The recorded per-sample gradients are not"),
    "a trainable layer that is detached": ("coverage", NOISE_ALONE),
    "a loss computed from a copy": ("training_effect", "the loss did not follow"),
}  # fmt: skip
"""The beginning of a planted bug's name -> the check that names it in bk, and a part of the message."""

RIGHT_IN_BK = {
    "a buffer beside": "",
    "a module tie": "one parameter under 2 names",
    "an activation passed by keyword": "",
    "a padding row": "",
    "an empty batch that raises": "",  # one row passes for it, and counts for nothing
    "a grad sampler whose sum": "",  # bk goes by the layer's forward, which is nn.Linear's
    "a row whose gradient is NaN": "bk leaves the row out and counts it",
    # What Opacus' hooks do not see or see wrongly, and a recorder of functions sees:
    "a wrong batch axis": "",
    "choices flattened": "",
    "positions of shape": "",
    "a functional tie": "",
    "a weight used from outside": "",
    "a parameter held by": "",
}
"""The same of what is no bug in bk -> a part of the note that it gives, if it gives one."""


def _of(table: dict[str, Any], planted: Planted) -> Any:
    return next((table[key] for key in table if planted.name.startswith(key)), None)


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name)
def test_a_planted_bug_is_named_or_none_in_bk(planted: Planted) -> None:
    model, batch = planted.build()
    report = audit(model, batch, **{**planted.options, "modes": ("bk",)})
    expected = _of(IN_BK, planted)
    assert report.ok == (expected is None), str(report)
    if expected is None:
        note = _of(RIGHT_IN_BK, planted)
        assert all(note and note in f.message for f in report.findings)
        assert bool(report.findings) == bool(note)
        return
    check, says = expected
    found = [f for f in report[check].findings if says in f.message and f.severity != "note"]
    assert found, str(report)
    assert all(
        f.mode == (None if check in ("isolation", "neighbours", "statelessness") else "bk")
        and f.remedy
        for f in found
    )


# --- bk itself, broken ----------------------------------------------------------------------------------


def _no_cross_terms(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        "dpzoo.clipping.factor_store.inner_product", lambda a, b: torch.zeros(len(a.grads))
    )


def _repeated_ids_apart(patch: pytest.MonkeyPatch) -> None:
    """As if no id came twice in a row."""
    patch.setattr(
        EmbeddingFactors, "squared_norm", lambda self: (self.grads.square().sum((1, 2)), None)
    )


def _shares_of_other_rows(patch: pytest.MonkeyPatch) -> None:
    add_to = LinearFactors.add_to
    patch.setattr(
        LinearFactors, "add_to", lambda self, total, weights: add_to(self, total, weights.flip(0))
    )


def _factors_of_the_batch(patch: pytest.MonkeyPatch) -> None:
    factors = BookKeepingOptimizer.clip_factors

    def all_the_smallest(self: Any, squared: Any, norms: torch.Tensor) -> Any:
        made = factors(self, squared, norms)
        return {None: made[None].amin().expand_as(norms) if len(norms) else norms}

    patch.setattr(BookKeepingOptimizer, "clip_factors", all_the_smallest)


def _last_backward_only(patch: pytest.MonkeyPatch) -> None:
    weighted_sum = FactorStore.weighted_sum

    def forgetful(
        self: FactorStore,
        parameter: Any,
        weights: Any,
        kept: Any = None,
        total: Any = None,
        **more: Any,
    ) -> torch.Tensor:
        return weighted_sum(self, parameter, weights, kept, None, **more)

    patch.setattr(FactorStore, "weighted_sum", forgetful)


def _nan_rows_kept(patch: pytest.MonkeyPatch) -> None:
    weighted_sum = FactorStore.weighted_sum
    patch.setattr(
        FactorStore,
        "weighted_sum",
        lambda self, parameter, weights, kept=None, total=None, **more: weighted_sum(
            self, parameter, weights, None, total, **more
        ),
    )


def _sums_not_cleared(patch: pytest.MonkeyPatch) -> None:
    add_noise = BookKeepingOptimizer.add_noise

    def keeping(self: Any) -> None:
        sums = {p: total.clone() for p, total in self.sums.items()}
        trained = self._trained
        add_noise(self)
        self.sums, self._trained = sums, trained

    patch.setattr(BookKeepingOptimizer, "add_noise", keeping)
    patch.setattr(BookKeepingOptimizer, "zero_grad", lambda self, set_to_none=True: None)


def _half_the_noise(patch: pytest.MonkeyPatch) -> None:
    noise = BookKeepingOptimizer._noise_in_place
    patch.setattr(
        BookKeepingOptimizer,
        "_noise_in_place",
        lambda self, grads, std, scale: noise(self, grads, std / 2, scale),
    )


def _one_seed(patch: pytest.MonkeyPatch) -> None:
    """Noise that is the same in every step, whatever it is added to."""
    add = NoiseSource.add

    def again(self: Any, tensors: Any, std: float, scale: float = 1.0, **_: Any) -> bytes:
        return add(NoiseSource(bytes(32)), tensors, std, scale, step=0, digest=bytes(32))

    patch.setattr(NoiseSource, "add", again)


BROKEN: list[tuple[Callable[[pytest.MonkeyPatch], None], str, str]] = [
    (_no_cross_terms, "exactness", "bk mode's norms are"),
    (_repeated_ids_apart, "exactness", "bk mode's norms are"),
    (_shares_of_other_rows, "exactness", "the sum over rows is right and the rows are not"),
    (_factors_of_the_batch, "clipped_sum", "not that of the rows' true gradients"),
    (_last_backward_only, "microbatching", "physical batches of 1 give another sum"),
    (_nan_rows_kept, "edge_cases", "is not left out of the sum"),
    (_sums_not_cleared, "stale_state", "a step depends on the batch before it"),
    (_half_the_noise, "noise", "less than the standard deviation"),
    (_one_seed, "noise", "not independent"),
]


@pytest.mark.parametrize(
    ("broken", "check", "says"), BROKEN, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_broken_bk_is_caught(
    broken: Callable[[pytest.MonkeyPatch], None],
    check: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The check that is meant for it says so; one that cannot fail would prove nothing."""
    name = "GPT2LMHeadModel"
    model, batch = dpzoo.convert(stock_model(name)), batch_for(name)
    batch["input_ids"][:, 1] = batch["input_ids"][:, 2]  # twice in a row
    assert audit(model, batch, modes=("bk",), checks=[check]).ok
    broken(monkeypatch)
    report = audit(model, batch, modes=("bk",), checks=[check])
    assert not report.ok
    assert any(says in f.message for f in report.findings), str(report)


# --- loops ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [ADAPTIVE, {"clipping": "automatic"}], ids=lambda o: o["clipping"]
)
def test_a_right_loop_of_other_clippings_passes(options: dict[str, Any]) -> None:
    loop = Loop("bk", max_grad_norm=20.0, **options)
    clip = loop.optimizer.max_grad_norm
    report = audit_loop(*loop.objects(), step=loop.step)
    assert report.ok, str(report)
    assert report.modes == ("bk",)
    assert loop.optimizer.max_grad_norm == clip  # though steps were taken


def test_a_count_that_a_row_moves_by_one_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adaptive clipping's theorem has 1/2 for a row."""

    def whole(self: Any, clip: float, squared: Any, norms: torch.Tensor) -> Any:
        made = Flat.factors(self, clip, squared, norms)
        self.halves += float((made[None] >= 1).double().sum())
        return made

    loop = Loop("bk", max_grad_norm=20.0, **ADAPTIVE)
    assert audit_loop(*loop.objects(), step=loop.step).ok
    monkeypatch.setattr(Adaptive, "factors", whole)
    (finding,) = audit_loop(*loop.objects(), step=loop.step).failures
    assert "moves the count that adaptive clipping releases by more than 1/2" in finding.message
    assert (finding.expected, finding.got) == ("at most 0.5", "1")


def test_micro_batches_add_up_and_are_a_note_only() -> None:
    """Under ghost the same loop is a privacy matter."""
    loop = Loop("bk", max_grad_norm=20.0)

    def step(batch: Any) -> None:
        half = max(len(batch[0]) // 2, 1)
        loop.optimizer.zero_grad()
        for part in (slice(0, half), slice(half, None)):
            loop.backward((batch[0][part], batch[1][part]))
        loop.optimizer.step()

    report = audit_loop(*loop.objects(), step=step)
    assert report.ok, str(report)
    assert any("2 forward passes for one step" in f.message for f in report.findings)


@pytest.mark.parametrize(
    ("broken", "says"),
    [(_half_the_noise, "less than the standard deviation"), (_one_seed, "not independent")],
    ids=["half the noise", "one seed"],
)
def test_a_loop_with_wrong_noise_is_caught(
    broken: Callable[[pytest.MonkeyPatch], None], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch)
    report = audit_loop(*Loop("bk").objects())
    found = [f.message for f in report["noise"].findings if f.severity == "privacy"]
    assert any(says in message for message in found)


def test_a_sum_that_is_left_over_is_dropped() -> None:
    """The engine forgets it where the loader begins again: there is nothing to find."""
    loop = Loop("bk")
    loop.backward(next(iter(loop.loader)))
    assert loop.optimizer.sums
    report = audit_loop(*loop.objects())
    assert not report["stale_state"].findings
    assert not loop.optimizer.sums


def test_unfreezing_after_wrapping_is_no_matter_in_bk() -> None:
    """Unless the optimizer does not have the parameters."""
    loop = Loop("bk", freeze=("0.weight", "0.bias"))
    for p in loop.net.parameters():
        p.requires_grad_()
    report = audit_loop(*loop.objects())
    assert not report["stale_state"].findings
    (finding,) = report["loop lint"].findings
    assert "are not in the optimizer" in finding.message


# --- units ----------------------------------------------------------------------------------------------

TWO_ROWS_EACH = ["a", "b", "a", "c", "c", "b"]


def test_a_unit_less() -> None:
    model = dpzoo.convert(stock_model("GPT2LMHeadModel", dtype=torch.float32))
    batch = batch_for("GPT2LMHeadModel", rows=6)
    report = audit(model, batch, modes=("bk",), unit_ids=TWO_ROWS_EACH, checks=("sensitivity",))
    assert report.ok, str(report)
    assert not report.findings


@pytest.mark.parametrize("bug", ["rows are clipped as units", "a norm without cross terms"])
def test_a_broken_unit_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row by itself has norm C at most, and the unit has more: only a unit less shows it."""
    if bug == "rows are clipped as units":
        monkeypatch.setattr(Units, "mean", lambda self, losses: losses)
        norms = FactorStore.squared_norms
        monkeypatch.setattr(
            FactorStore,
            "squared_norms",
            lambda self: {p: v / self.units.sizes.to(v) ** 2 for p, v in norms(self).items()},
        )
    else:
        add = FactorStore.add

        def by_row(self: FactorStore, parameter: Any, use: Any, region: Any = None) -> None:
            add(self, parameter, use, region)
            if int(self.units.sizes.max()) > 1:
                for group, uses in zip(
                    self.units.groups, self._uses[parameter][region], strict=True
                ):
                    rows = use.joined(EACH).squared_norm()[0]
                    uses.squared, uses.magnitude = group.summed(rows), None

        monkeypatch.setattr(FactorStore, "add", by_row)
    model = torch.nn.Sequential(torch.nn.Linear(4, 7), torch.nn.Tanh(), torch.nn.Linear(7, 8))
    batch = (torch.randn(1, 4).expand(6, 4).contiguous(),)
    options: dict[str, Any] = {"modes": ("bk",), "checks": ("sensitivity",)}
    assert audit(model, batch, **options).ok
    report = audit(model, batch, **options, unit_ids=TWO_ROWS_EACH)
    (finding,) = report.findings
    assert finding.severity == "privacy"
    assert "one unit less" in finding.message


def test_unit_ids_that_cannot_be_tried() -> None:
    model, batch = torch.nn.Linear(4, 3), (torch.randn(6, 4),)
    with pytest.raises(dpzoo.InputError, match="unit_ids of one unit"):
        audit(model, batch, modes=("bk",), unit_ids=["a"] * 6)
    with pytest.raises(dpzoo.InputError, match="has 5 ids for 6 rows"):
        audit(model, batch, modes=("bk",), unit_ids=TWO_ROWS_EACH[1:])
    with pytest.raises(dpzoo.InputError, match="wanted 'bk' among the modes"):
        audit(model, batch, modes=("hooks",), unit_ids=TWO_ROWS_EACH)
