"""Trials of a loop's body: runs on draws that differ in one thing, and what may not differ by it.

Each trial begins with the same weights. The draw is made from the loop's own data set and collator. All
random numbers except the noise are held fixed. After the private optimizer has made its noisy gradient, the
trial replaces it by the same gradient in every run. If anything still depends on the batch afterwards, it
has bypassed the clipping and the noise.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from dpzoo.auditing.loop_lint import Loop
from dpzoo.auditing.numerics import Gradients, row_norms
from dpzoo.auditing.opacus_modes import first_line
from dpzoo.auditing.randomness import fixed_draws, numbers
from dpzoo.auditing.record import Record
from dpzoo.auditing.sensitivity import SLACK
from dpzoo.clipping.draws import Draws
from dpzoo.clipping.noise import NoiseSource
from dpzoo.clipping.optimizer import Release
from dpzoo.clipping.units import Units
from dpzoo.opacus_internals import STEP_STATE, forget_skips, is_poisson, norms_of

ROWS = 5
TOLERANCE = 1e-3
"""Of sums in the model's own dtype, relative to their largest entry."""
UNCLIPPED, TIGHT = 1e9, 1e-4
"""Clipping norms that clip no row, and every row."""
RANDOM = (
    "random: collator or body draw from Python's or numpy's generator as often as there are rows"
)


@dataclass
class Trial:
    """What a run of the body did.

    Args:
        steps: private steps.
        accounted: those that the optimizer's step hook, the accountant's, was called for.
        clip: C, when the noise was added; None for several.
        sigma: the noise multiplier then.
        rows: rows whose gradients entered them; None where that cannot be told.
        sums: name -> the clipped sum, before noise.
        grads: name -> what the optimizer was given, noise included.
        count: of rows, less half their number, that adaptive clipping releases.
        end: name -> weights, buffers, optimizer state and settings at the end.
        generators: states of torch's and the loader's generators at the end.
        drawn: of Python's and numpy's at the end, and whether torch drew what has no constants.
        error: what it raised.
    """

    steps: int = 0
    accounted: int = 0
    clip: float | None = None
    sigma: float = 0.0
    rows: int | None = None
    sums: Gradients = field(default_factory=dict)
    grads: Gradients = field(default_factory=dict)
    count: float = 0.0
    end: dict[str, Any] = field(default_factory=dict)
    generators: list[torch.Tensor] = field(default_factory=list)
    drawn: tuple[Any, ...] = ()
    error: str = ""


class _RowCount(Draws):
    """Draws that are not compared with the steps, and whose rows are counted.

    Args:
        labels: the units that the rows are of.
    """

    def __init__(self, labels: list[int]) -> None:
        super().__init__(strict=False)
        self.rows, self.labels = 0, labels

    def units(self, rows: int, ids: Any = None) -> Units:
        """Those of the labels, where the rows are as many; else each row is one."""
        return Units(self.labels if rows == len(self.labels) else range(rows))

    def take(self, rows: int, *rest: Any, **more: Any) -> None:
        self.rows += rows


class Trials:
    """Runs of a loop's body."""

    def __init__(self, loop: Loop, body: Callable[[Any], Any], scheduler: Any) -> None:
        self.loop, self.body, self.scheduler = loop, body, scheduler
        self.optimizer = loop.optimizer
        self.names = {id(p): n for n, p in loop.module.named_parameters()}
        self.generators = loop.generators()

    def run(self, draw: Sequence[int], *, seed: int = 1, clip: float | None = None) -> Trial:
        """Run the body on a draw, from the weights of now; they are put back."""
        trial, loop, optimizer = Trial(), self.loop, self.optimizer
        before = self._state()
        kept = {name: vars(optimizer).get(name) for name in ("pre_step", "add_noise", "step_hook")}
        queue = {name: copy.copy(vars(optimizer).get(name)) for name in STEP_STATE}
        draws = getattr(optimizer, "draws", None)
        strict = getattr(draws, "strict", False)
        clips = [o for o in (optimizer, loop.wrapper) if clip and "max_grad_norm" in vars(o)]
        norms = [o.max_grad_norm for o in clips]
        self._clear()
        if hasattr(optimizer, "draws"):
            optimizer.draws.strict = False  # ghost mode's criterion uses it, wherever it is
            optimizer.draws = _RowCount(loop.rows_of(draw)[1])
            optimizer.release = Release(NoiseSource())
        for owner in clips:
            owner.max_grad_norm = clip
        optimizer.pre_step = self._pre_step(trial, optimizer.pre_step)
        optimizer.add_noise = self._add_noise(trial, optimizer.add_noise)
        optimizer.step_hook = lambda _: setattr(trial, "accounted", trial.accounted + 1)
        torch.manual_seed(seed)
        for generator in self.generators:
            generator.manual_seed(seed)
        try:
            with fixed_draws(seed) as random:
                self.body(loop.collated(draw))
            trial.drawn = (*numbers(), bool(random.loose))
        except Exception as error:
            trial.error = first_line(error)
        finally:
            trial.generators = [torch.get_rng_state(), *(g.get_state() for g in self.generators)]
            for owner, norm in zip(clips, norms, strict=True):
                owner.max_grad_norm = norm
            trial.end = self._state()
            self._put_back(before)
            self._clear()
            vars(optimizer).update(queue)
            if draws is not None:
                optimizer.draws, draws.strict = draws, strict
            for name, value in kept.items():
                vars(optimizer).pop(name, None)
                if value is not None:
                    vars(optimizer)[name] = value
        return trial

    # --- watching -------------------------------------------------------------------------------

    def _named(self, values: dict[int, torch.Tensor]) -> Gradients:
        return {self.names.get(i, "(not in the model)"): v for i, v in values.items()}

    def _pre_step(self, trial: Trial, original: Any) -> Any:
        def pre_step(*args: Any, **kwargs: Any) -> Any:
            rows = self._rows()
            stepped = original(*args, **kwargs)
            draws = getattr(self.optimizer, "draws", None)
            if isinstance(draws, _RowCount) and draws.rows:  # some count in the step itself
                rows, draws.rows = draws.rows, 0
            if rows is not None:
                trial.rows = (trial.rows or 0) + rows
            if stepped:
                trial.steps += 1
                for p in self.optimizer.params:
                    if p.grad is not None:
                        p.grad = torch.full_like(p, 1e-3)
            return stepped

        return pre_step

    def _add_noise(self, trial: Trial, original: Any) -> Any:
        def add_noise(*args: Any, **kwargs: Any) -> Any:
            own = getattr(self.optimizer, "sums", None)
            sums = {
                id(p): own.get(p) if own is not None else getattr(p, "summed_grad", None)
                for p in self.optimizer.params
            }
            found = self._named({i: s.detach().clone() for i, s in sums.items() if s is not None})
            for name, value in found.items():
                trial.sums[name] = trial.sums.get(name, 0) + value
            rule = getattr(self.optimizer, "rule", None)
            trial.count += sum(float(count) for count in rule.counts()) if rule is not None else 0.0
            # bk's noise is for the largest C that the rows were clipped at.
            clips = (self.optimizer.max_grad_norm, getattr(self.optimizer, "_clipped_at", 0.0))
            trial.clip = max(clips) if isinstance(clips[0], (int, float)) else None
            trial.sigma = float(self.optimizer.noise_multiplier)
            with _disable_current_modes():  # the noise is real
                made = original(*args, **kwargs)
            trial.grads = self._named(
                {
                    id(p): p.grad.detach().clone()
                    for p in self.optimizer.params
                    if p.grad is not None
                }
            )
            return made

        return add_noise

    def _rows(self) -> int | None:
        """Rows of the coming step, by what a backward pass of Opacus' has left."""
        for p in self.optimizer.params:
            ghost = self.loop.mode == "ghost"
            sample = norms_of(p) if ghost else getattr(p, "grad_sample", None)
            if sample is not None:
                return sum(map(len, sample)) if isinstance(sample, list) else len(sample)
        return None

    # --- state ----------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        module, optimizer = self.loop.module, self.optimizer.original_optimizer
        made: dict[str, Any] = {n: p.detach().clone() for n, p in module.named_parameters()}
        made |= {n: b.detach().clone() for n, b in module.named_buffers()}
        for i, group in enumerate(optimizer.param_groups):
            own = {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
            made[f"the optimizer's settings {i}"] = own
        for p, values in optimizer.state.items():
            made[f"the optimizer's state of {self.names.get(id(p), '?')}"] = copy.deepcopy(values)
        for name in ("noise_multiplier", "expected_batch_size"):
            made[f"the optimizer's {name}"] = getattr(self.optimizer, name, None)
        if self.scheduler is not None:
            made["the scheduler's state"] = copy.deepcopy(self.scheduler.state_dict())
        return made

    def _put_back(self, state: dict[str, Any]) -> None:
        module, optimizer = self.loop.module, self.optimizer.original_optimizer
        with torch.no_grad():
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                if name in state and not torch.equal(tensor, state[name]):
                    tensor.copy_(state[name])
        for i, group in enumerate(optimizer.param_groups):
            group.update(copy.deepcopy(state[f"the optimizer's settings {i}"]))
        optimizer.state.clear()
        for p in self.optimizer.params:
            values = state.get(f"the optimizer's state of {self.names.get(id(p), '?')}")
            if values is not None:
                optimizer.state[p] = copy.deepcopy(values)
        for name in ("noise_multiplier", "expected_batch_size"):
            if hasattr(self.optimizer, name):
                setattr(self.optimizer, name, state[f"the optimizer's {name}"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["the scheduler's state"])

    def _clear(self) -> None:
        forget_skips(self.optimizer)
        if hasattr(self.optimizer, "sums"):
            self.optimizer.drop()
        self.optimizer.zero_grad()
        for p in self.loop.module.parameters():
            p.grad = None
            for name in ("grad_sample", "summed_grad"):
                if hasattr(p, name):
                    setattr(p, name, None)


def trials(loop: Loop, body: Callable[[Any], Any], scheduler: Any, record: Record) -> None:
    """Run the body on draws that differ in one thing, and judge what differs by it."""
    size = loop.size()
    if size is None or size < 2:
        record.skip("trials of the body: the loader has no data set of rows, and no collator")
        return
    rows = min(ROWS, size // 2)
    draw, other = range(rows), range(rows, 2 * rows)
    run = Trials(loop, body, scheduler).run
    given = run(draw)
    if given.error:
        record.find(
            "crash",
            f"the loop's body raises on a draw of {rows} rows: {given.error}",
            "see the error; nothing else can be tried before",
        )
        return
    record.ran()
    _judge_leaks(record, given, run(other[1:]))  # other rows, and another number of them
    if given.steps != 1:  # as the observed batches show
        record.skip(f"other trials of the body: it takes {given.steps} private steps for one batch")
        return
    if given.accounted != given.steps:
        record.find(
            "privacy",
            "the loop's body takes a step of which the accountant is not told",
            "leave optimizer.step_hook as the engine has attached it",
            expected=f"{given.steps} step accounted",
            got=str(given.accounted),
        )
    _judge_rows(record, given, len(loop.rows_of(draw)[1]))
    _judge_seeds(loop, record, given, run(draw, seed=2))
    _judge_neighbours(loop, record, run, draw, given)
    _judge_memory(record, run, draw, other)
    if is_poisson(loop.sampler):
        _judge_empty(record, run([]))


def _judge_rows(record: Record, given: Trial, rows: int) -> None:
    if given.rows is not None and given.rows != rows:
        record.find(
            "privacy",
            f"a step takes {given.rows} rows where the draw has {rows}: a collator or a model that cuts, "
            f"joins, copies or drops rows, or a body that trains on other rows than its batch",
            "let each row that is drawn give one loss, and train on the batch alone",
            expected=str(rows),
            got=str(given.rows),
        )


def _judge_seeds(loop: Loop, record: Record, one: Trial, two: Trial) -> None:
    """The same draw with other random states has other noise."""
    same = [n for n, g in one.grads.items() if n in two.grads and torch.equal(g, two.grads[n])]
    if same and loop.optimizer.noise_multiplier:
        record.find(
            "privacy",
            "the noise is the same whatever the generator's state: it is seeded in the loop, and whoever "
            "knows the seed can subtract it"
            if one.sigma
            else "the loop's body sets noise_multiplier to 0: its step has no noise",
            "do not seed generators in the loop, and leave the optimizer's noise alone",
            parameters=same,
            mode=loop.mode,
        )
    pairs = zip(one.generators, two.generators, strict=True)
    if any(torch.equal(a, b) for a, b in pairs):
        record.find(
            "privacy",
            "the loop's body seeds a generator: who is drawn next"
            + (
                " follows from a seed"
                if loop.mode == "bk"
                else ", and the noise, follow from a seed"
            ),
            "seed once, before training, if at all",
        )


def _judge_neighbours(
    loop: Loop, record: Record, run: Callable[..., Trial], draw: Sequence[int], given: Trial
) -> None:
    """A row taken out moves the clipped sum by its own clipped gradient."""
    if given.clip is None:
        record.skip("a row taken out of a draw: a clipping norm for each layer")
        return
    without = run(draw[1:])
    if without.drawn != given.drawn or any(given.drawn[-1:]):
        record.skip(RANDOM)
        return
    # At a C below every row's norm the clipping itself shows.
    pairs = ((given, without), (run(draw, clip=TIGHT), run(draw[1:], clip=TIGHT)))
    ratio = max(_moved(one, two) for one, two in pairs)
    record.measure(ratio, "C")
    whole, wrong = run(draw, clip=UNCLIPPED), {}
    for i in range(len(draw)):
        rest = run([*draw[:i], *draw[i + 1 :]], clip=UNCLIPPED)
        own = run([draw[i]], clip=UNCLIPPED)
        error = without.error or rest.error or own.error
        if error:
            record.find(
                "crash",
                f"the loop's body raises on a draw of another size: {error}",
                "Poisson sampling draws batches of all sizes",
            )
            return
        wanted = {n: rest.sums.get(n, 0) + g for n, g in own.sums.items()}
        wrong = record.differ(whole.sums, wanted, TOLERANCE)
        if wrong:
            break
    if wrong or ratio > 1 + SLACK:
        record.find(
            "privacy",
            "what a row adds to the sum is not its own gradient alone, but changes the other rows' share: "
            "rows meet in the collator, the model, the loss or its reduction"
            if wrong
            else "a row moves the clipped sum by more than the clipping norm",
            "let a row's loss depend on that row alone, give criterion and make_private one reduction, and "
            "clip and add noise at one C",
            parameters=wrong,
            mode=loop.mode,
            expected="at most C, its own gradient",
            got=f"{ratio:.4g} times C, off by {max(wrong.values(), default=0.0):.3g} without clipping",
        )
    moved = abs(given.count - without.count)
    if moved > 0.5 + 1e-6:
        record.find(
            "privacy",
            "a row moves the count that adaptive clipping releases by more than 1/2, for which its noise "
            "is accounted",
            "count 1/2 for a row that is not clipped, and -1/2 for others",
            expected="at most 0.5",
            got=f"{moved:g}",
        )


def _moved(one: Trial, two: Trial) -> float:
    """By how many clipping norms two sums differ."""
    return _norm({n: one.sums[n] - two.sums.get(n, 0) for n in one.sums}) / float(one.clip or 1.0)


def _judge_memory(
    record: Record, run: Callable[..., Trial], draw: Sequence[int], other: Sequence[int]
) -> None:
    """A step is the same whoever was in the batch before."""
    after = []
    for before in (draw, draw[1:], draw):
        run(before)
        after.append(run(other).sums)
    if record.differ(after[2], after[0], TOLERANCE):
        return  # it counts batches, say: nothing can be told
    wrong = record.differ(after[1], after[0], TOLERANCE)
    if wrong:
        record.find(
            "privacy",
            "a step depends on the rows of the batch before it: a row that was drawn once is in two steps",
            "keep nothing of a batch in the collator, the body or the model",
            parameters=wrong,
        )


def _judge_leaks(record: Record, one: Trial, two: Trial) -> None:
    """Two draws, one noisy gradient: nothing differs afterwards."""
    leaks = [n for n, value in one.end.items() if not _equal(value, two.end.get(n))]
    if leaks and not two.error:
        record.find(
            "privacy",
            "the loop learns from the batch past clipping and noise: after one and the same noisy gradient "
            "it ends with other values for another batch (a second optimizer, statistics, a learning rate "
            "that follows the loss)",
            "change weights and settings by what the private optimizer releases, and by nothing else",
            parameters=leaks,
        )


def _judge_empty(record: Record, empty: Trial) -> None:
    if empty.error:
        record.find(
            "crash",
            f"the loop's body raises on an empty batch, which Poisson sampling draws: {empty.error}",
            "let the body run on 0 rows; in bk, leave forward and backward pass out, and step all the same",
        )
    elif empty.steps == 0:
        record.find(
            "privacy",
            "the loop's body takes no step on an empty batch: that there is no noise tells that nobody was "
            "drawn, and the step is not accounted",
            "call optimizer.step() for each batch, empty ones too",
            expected="1 step",
            got="0",
        )


def repeated_draws(loop: Loop, record: Record) -> None:
    """Two passes over the loader draw other rows."""
    if not is_poisson(loop.sampler) or not loop.size():
        return
    states = [(g, g.get_state()) for g in loop.generators()]
    optimizer = loop.optimizer  # in which a BatchMemoryManager announces parts
    kept = {name: copy.copy(vars(optimizer).get(name)) for name in STEP_STATE}
    try:
        one, two = (list(islice(iter(loop.loader), 3)) for _ in range(2))
    finally:
        for generator, state in states:
            generator.set_state(state)
        vars(optimizer).update(kept)
    if len(one) > 1 and _equal(one, two):
        record.find(
            "privacy",
            "every pass over the loader draws the same rows: a generator is seeded at its beginning, and "
            "the accountant counts on fresh draws in each step",
            "seed once, before training, if at all",
            expected="other rows in the second pass",
            got=f"{len(one)} equal batches",
        )


def _norm(values: Gradients) -> float:
    return float(row_norms({n: v[None].double() for n, v in values.items()})) if values else 0.0


def _equal(a: Any, b: Any) -> bool:
    """Whether nested values with tensors are equal; what is not known is."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    if hasattr(a, "keys") and hasattr(b, "keys"):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, (int, float, str, bool)):
        return bool(a == b or (a != a and b != b))
    return True
