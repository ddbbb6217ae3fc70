"""What a causal sequence model promises, one small function a promise; each tries it and says how far off it is.

The checks know nothing of a model's inside: they see a `Subject`, which gives an output for every token, and a `Case`,
which holds the tokens to try it with. `attention.contract` has those that only a whole language model can be asked.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, chain, cycle, repeat, takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .mechanism import repeat_heads

Inputs = tuple[Tensor, ...]

MARGIN = 8  # times the rounding that is measured once: there are many more differences, each of two computations
BLOCKS = (9, 7, 10)  # none divides another or a usual block
SHORT_PROMPT = 3
DRAFTS = ((1, 4), (3, 2), (5, 0), (1, 1), (2, 9))  # tokens of a draft that hold, and that are taken back
PREFIXES = (1, 2, 3, 5, 8, 11, 16, 17, 23, 31, 32, 33, 47, 64, 71, 96, 100, 127, 128, 129, 191, 200, 255, 256, 257, 300)
SIGHT = 64  # tokens for which every pair is tried
FLAT = 0.1  # of what softmax adds to a running mean; less than that is a running mean


class DoesNotApply(Exception):  # noqa: N818 - an answer, not an error
    """A subject cannot be asked this; the message says what it lacks."""


class Result(NamedTuple):
    """What a check found.

    Attributes:
        holds: whether the promise is kept; None where it cannot be asked.
        difference: the largest difference seen, in the unit of the outputs unless the sentence names another; infinite
            where an output is not finite, None where nothing was compared.
        sentence: what was found, in words.
    """

    holds: bool | None
    difference: float | None
    sentence: str


class Mixing(NamedTuple):
    """What went into and came out of one attention layer: q and out (B, H, T, D), k and v (B, H_kv, T, D).

    Scores are q·k·scale.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scale: float


class Subject(ABC):
    """Anything that gives an output for each token of a row."""

    @abstractmethod
    def run(
        self, inputs: Inputs, memory: Any = None, *, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """The outputs (B, T, ...) of tokens (each tensor of the inputs is (B, T, ...)).

        Args:
            inputs: the tokens.
            memory: what `memory` gave; the tokens go on after what it has seen, and it sees them.
            mask: (B, seen + T), 1 for tokens and 0 for padding.
            positions: (B, T), the place of each token in its row.

        Raises:
            DoesNotApply: if the subject cannot be asked this.
        """

    def memory(self) -> Any:
        """A memory that has seen nothing."""
        raise DoesNotApply("it keeps no memory of earlier tokens")

    def record(self, memory: Any) -> None:
        """Asks a memory that has seen something to keep what `take_back` needs, from now on."""
        raise DoesNotApply("its memory cannot forget")

    def take_back(self, memory: Any, count: int) -> None:
        """Has a memory forget its last tokens, of those that came since `record` or since it last forgot some."""
        raise DoesNotApply("its memory cannot forget")

    def mixing(self, inputs: Inputs) -> list[Mixing]:
        """What each attention layer mixes; layers of other kinds are left out."""
        raise DoesNotApply("its queries, keys and values cannot be seen from outside")

    @contextmanager
    def float64(self) -> Iterator[None]:
        """While it is open, the subject computes in float64."""
        raise DoesNotApply("it has no float64")
        yield

    @contextmanager
    def nudged(self) -> Iterator[None]:
        """While it is open, the subject's parameters are off by one rounding of themselves."""
        raise DoesNotApply("it has no parameters that can be moved")
        yield


@dataclass(frozen=True)
class Case:
    """A subject and what to try it with.

    Attributes:
        subject: what is tried.
        inputs: rows of tokens, each tensor (B, T, ...).
        others: what tokens are replaced with; the same shapes.
        tolerance: how far apart two computations of one output may be.
    """

    subject: Subject
    inputs: Inputs
    others: Inputs
    tolerance: float

    @property
    def length(self) -> int:
        return self.inputs[0].shape[1]

    @property
    def rows(self) -> int:
        return self.inputs[0].shape[0]

    def first_row(self) -> Case:
        """The same with one row, which is enough for what is not about batches."""
        return replace(
            self, inputs=part(self.inputs, None, None, slice(1)), others=part(self.others, None, None, slice(1))
        )

    def judge(self, found: float, good: str, bad: str) -> Result:
        """A result with the sentence that suits the difference."""
        holds = found <= self.tolerance
        return Result(holds, found, good if holds else bad)


Check = Callable[[Case], Result]


def part(inputs: Inputs, start: int | None, stop: int | None, rows: slice = slice(None)) -> Inputs:
    """Tokens `start` to `stop` of some rows."""
    return tuple(tensor[rows, start:stop] for tensor in inputs)


def joined(*parts: Inputs) -> Inputs:
    """Tokens of one part after those of another."""
    return tuple(torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors, infinite where one is not finite."""
    found = (a.double() - b.double()).abs().amax() if a.numel() else torch.zeros(())
    return float(found) if torch.isfinite(found) else math.inf


def arange_positions(inputs: Inputs, start: int = 0) -> Tensor:
    """(B, T) the places of tokens that come after `start` others."""
    batch, length = inputs[0].shape[:2]
    return torch.arange(start, start + length, device=inputs[0].device).expand(batch, -1)


# Causal


def repeated(case: Case) -> Result:
    """The same tokens give the same outputs a second time."""
    found = difference(case.subject.run(case.inputs), case.subject.run(case.inputs))
    return case.judge(
        found,
        "the same call gives the same again",
        f"the same call gives something else ({found:.2g} away): it draws random numbers or remembers the call before",
    )


def replaced_tokens(case: Case, cuts: Sequence[int] | None = None) -> Result:
    """What comes after a token changes nothing at it."""
    length = case.length
    if cuts is None:
        cuts = sorted({1, 2, 5, length // 3, length // 2, length - 2, length - 1} & set(range(1, length)))
    before = case.subject.run(case.inputs)
    found = {}
    for cut in cuts:
        after = case.subject.run(joined(part(case.inputs, None, cut), part(case.others, cut, None)))
        found[cut] = difference(before[:, :cut], after[:, :cut])
    cut, worst = _worst(found)
    return case.judge(
        worst,
        "other tokens later change nothing earlier",
        f"leaks: other tokens from token {cut} on change what comes before by {worst:.2g}",
    )


def prefixes(case: Case, lengths: Sequence[int] | None = None) -> Result:
    """The start of a text gives what it gives within the whole, whatever its length: odd, prime or round."""
    if lengths is None:
        lengths = sorted({n for n in (*PREFIXES, case.length - 1) if 0 < n < case.length})
    whole = case.subject.run(case.inputs)
    found = {n: difference(case.subject.run(part(case.inputs, None, n)), whole[:, :n]) for n in lengths}
    length, worst = _worst(found)
    return case.judge(
        worst,
        "a text's start gives the same alone as within the text",
        f"leaks: the first {length} tokens alone differ by {worst:.2g} from the same within {case.length}; "
        f"{sum(one > case.tolerance for one in found.values())} of {len(found)} lengths do",
    )


def _worst(found: dict[Any, float]) -> tuple[Any, float]:
    """Where the largest difference is."""
    return max(found.items(), key=lambda item: item[1], default=(None, 0.0))


# Cached


def cached(case: Case, parts: Sequence[int], positions: bool = True) -> Result:
    """A text in parts, each after a memory of what came before, gives what it gives in one piece."""
    memory, found, start = case.subject.memory(), {}, 0
    expected = case.subject.run(case.inputs)
    for length in parts:
        piece = part(case.inputs, start, start + length)
        places = arange_positions(piece, start) if positions else None
        output = case.subject.run(piece, memory, positions=places)
        found[start] = difference(output, expected[:, start : start + length])
        start += length
    _, worst = _worst(found)
    first = next((start for start, one in found.items() if one > case.tolerance), None)
    size = dict(zip(accumulate(parts, initial=0), parts, strict=False)).get(first)
    return case.judge(
        worst,
        f"{len(found)} parts give what one piece gives",
        f"the memory is wrong: up to {worst:.2g} off, first in the part of {size} token(s) after {first}",
    )


def cached_one_by_one(case: Case) -> Result:
    """Half a text, then token by token."""
    return cached(case, parts_of(case.length, [max(1, case.length // 2)], repeat(1)))


def cached_in_blocks(case: Case) -> Result:
    """Blocks of several tokens after each other."""
    return cached(case, parts_of(case.length, BLOCKS, cycle(BLOCKS)))


def cached_after_short_prompt(case: Case) -> Result:
    """A few tokens, fewer than any block, then token by token."""
    return cached(case, parts_of(case.length, [SHORT_PROMPT], repeat(1)))


def cached_without_position_ids(case: Case) -> Result:
    """Blocks, then token by token, while nobody says where the tokens are."""
    short = min(case.length, 2 * sum(BLOCKS))
    case = replace(case, inputs=part(case.inputs, None, short), others=part(case.others, None, short))
    return cached(case, parts_of(case.length, BLOCKS, repeat(1)), positions=False)


def rollback(case: Case) -> Result:
    """Other tokens after a part of the text, some or all of them forgotten again, leave no trace in the memory.

    This is what a draft of several tokens needs, of which the first ones hold (arXiv 2211.17192).
    """
    expected, memory, found = case.subject.run(case.inputs), case.subject.memory(), {}
    start = max(1, case.length // 3)
    case.subject.run(part(case.inputs, None, start), memory)
    case.subject.record(memory)
    for right, wrong in cycle(DRAFTS):
        stop = start + right
        if stop + wrong > case.length:
            break
        tokens = joined(part(case.inputs, start, stop), part(case.others, stop, stop + wrong))
        output = case.subject.run(tokens, memory, positions=arange_positions(tokens, start))
        case.subject.take_back(memory, wrong)
        found[start] = difference(output[:, :right], expected[:, start:stop])
        start = stop
    rest = part(case.inputs, start, None)
    if rest[0].shape[1]:
        output = case.subject.run(rest, memory, positions=arange_positions(rest, start))
        found[start] = difference(output, expected[:, start:])
    _, worst = _worst(found)
    first = next((start for start, one in found.items() if one > case.tolerance), None)
    return case.judge(
        worst,
        f"{len(found)} drafts, partly or wholly taken back, leave no trace",
        f"tokens that were taken back leave a trace: up to {worst:.2g} off, first after {first} tokens",
    )


def parts_of(length: int, first: Sequence[int], then: Iterator[int]) -> list[int]:
    """Sizes of parts that make up `length` tokens."""
    sizes = chain(first, then)
    ends = [*takewhile(lambda end: end < length, accumulate(sizes)), length]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


# Batches


def batch(case: Case) -> Result:
    """Rows of a batch do not see each other: in another order, and alone, each gives the same."""
    together = case.subject.run(case.inputs)
    order = torch.arange(case.rows - 1, -1, -1, device=together.device)
    turned = difference(case.subject.run(tuple(t[order] for t in case.inputs)), together[order])
    alone = max(
        difference(case.subject.run(part(case.inputs, None, None, slice(row, row + 1))), together[row : row + 1])
        for row in range(case.rows)
    )
    return case.judge(
        max(turned, alone),
        "a row gives in a batch, in any order, what it gives alone",
        f"rows of a batch see each other: {alone:.2g} away from a row alone, {turned:.2g} in another order",
    )


def padded_left(case: Case) -> Result:
    """Rows with padding before them, with the positions that `generate` would give, equal each row alone."""
    return padded(case, "left")


def padded_right(case: Case) -> Result:
    """Rows with padding after them equal each row alone."""
    return padded(case, "right")


def padded(case: Case, side: str, lengths: Sequence[int] | None = None) -> Result:
    """Rows of a batch shorter than the longest, filled with tokens that the mask hides, equal each row alone."""
    if lengths is None:
        lengths = [case.length, 2 * case.length // 3 | 1, min(5, case.length)][: case.rows]
    places = [_place(length, case.length, side) for length in lengths]
    mask = torch.zeros(len(lengths), case.length, dtype=torch.long, device=case.inputs[0].device)
    filled = tuple(tensor[: len(lengths)].clone() for tensor in case.others)
    for row, (length, place) in enumerate(zip(lengths, places, strict=True)):
        mask[row, place] = 1
        for tensor, real in zip(filled, case.inputs, strict=True):
            tensor[row, place] = real[row, :length]
    output = case.subject.run(filled, mask=mask, positions=(mask.cumsum(1) - 1).clamp(min=0))
    found = {}
    for row, (length, place) in enumerate(zip(lengths, places, strict=True)):
        alone = case.subject.run(part(case.inputs, None, length, slice(row, row + 1)))
        found[row] = difference(output[row : row + 1, place], alone)
    row, worst = _worst(found)
    return case.judge(
        worst,
        f"rows padded on the {side} give what each gives alone",
        f"padding on the {side} is read: a row of {lengths[row]} tokens padded to {case.length} is {worst:.2g} off",
    )


def _place(length: int, width: int, side: str) -> slice:
    return slice(width - length, width) if side == "left" else slice(0, length)


# What is read at all


def sight(case: Case) -> Result:
    """How many of the earlier tokens have any effect: each is replaced in turn."""
    length = min(case.length, SIGHT)
    moved = moves(case.subject, part(case.inputs, None, length), part(case.others, None, length))
    earlier = torch.ones(length, length, dtype=torch.bool).triu(1)
    share = float(moved[earlier].double().mean()) if length > 1 else 1.0
    last = int(moved[:-1, -1].sum())
    sentence = f"{last} of the {length - 1} earlier tokens move the last output; of all pairs of tokens {share:.0%}"
    return Result(last > 0 or length == 1, None, sentence)


def moves(subject: Subject, inputs: Inputs, others: Inputs, at_once: int = 8) -> Tensor:
    """(T, T), whether output t of the first row moves when token j is replaced.

    Less than one rounding of the largest output, or than two equal rows of a batch differ, is no move.
    """
    inputs, others = part(inputs, None, None, slice(1)), part(others, None, None, slice(1))
    length, moved = inputs[0].shape[1], []
    for start in range(0, length, at_once):
        replaced = range(start, min(length, start + at_once))
        rows = tuple(t.repeat(len(replaced) + 2, *[1] * (t.ndim - 1)) for t in inputs)
        for row, token in enumerate(replaced, start=1):
            for tensor, other in zip(rows, others, strict=True):
                tensor[row, token] = other[0, token]
        output = subject.run(rows).flatten(2)
        least = torch.finfo(output.dtype).eps * output[0].abs().amax()
        noise = (output[0] - output[-1]).abs().amax().maximum(least)
        moved.append((output[1:-1] - output[0]).abs().amax(-1) > noise)
    return torch.cat(moved).cpu()


def running_mean(case: Case) -> Result:
    """Whether attention does more than average the values so far, measured by what softmax would add to that."""
    layers = case.subject.mixing(case.inputs)
    if not layers:
        raise DoesNotApply("it has no attention layer whose values can be seen from outside")
    shares = [beyond_the_mean(layer) for layer in layers]
    flat = [number for number, share in enumerate(shares) if share < FLAT]
    best = max(shares)
    rest = f"; layers that hardly do: {flat}" if flat else ""
    return Result(
        best >= FLAT,
        best,
        f"attention departs from the running mean of its values {best:.2g} times as far as softmax does{rest}"
        if best >= FLAT
        else f"attention is a running mean of its values: it departs from that {best:.2g} times as far as softmax does",
    )


def beyond_the_mean(layer: Mixing) -> float:
    """How far the output is from the running mean of the values, in units of how far softmax is, at a usual token.

    Of each, the median over tokens and heads: a few tokens that go far do not make up for all that do not.
    """
    v = repeat_heads(layer.v, layer.out.shape[1])
    k = repeat_heads(layer.k, layer.out.shape[1])
    counts = torch.arange(1, v.shape[2] + 1, device=v.device)[:, None]
    mean = v.cumsum(2) / counts
    softmax = scaled_dot_product_attention(layer.q, k, v, is_causal=True, scale=layer.scale)
    reference = (softmax - mean).norm(dim=-1).median()
    return float((layer.out - mean).norm(dim=-1).median() / reference.clamp(min=1e-30))


# Rounding


@contextmanager
def module_in_float64(module: nn.Module) -> Iterator[None]:
    """While it is open, a module's floating-point parameters and buffers are float64; afterwards they are as before."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()}.values()
    kept = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor, data in kept:
            tensor.data = data.double()
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def zero_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are zero throughout, by name."""
    named = ((name, p) for name, p in module.named_parameters() if p.is_floating_point() and p.numel())
    return {name: p for name, p in named if not p.data.any()}


@contextmanager
def zeros_filled(module: nn.Module, seed: int = 0, scale: float = 0.1) -> Iterator[dict[str, nn.Parameter]]:
    """While it is open, parameters that are zero throughout hold small random values; gives them by name.

    What starts as zero hides what it is used for: a learned memory key, a gate, a bias.
    """
    found = zero_parameters(module)
    generator = torch.Generator().manual_seed(seed)
    try:
        for p in found.values():
            p.data.copy_(scale * torch.randn(p.shape, generator=generator))
        yield found
    finally:
        for p in found.values():
            p.data.zero_()


@contextmanager
def zeroed(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """While it is open, the parameters are zero."""
    kept = [(p, p.data) for p in parameters]
    try:
        for p, data in kept:
            p.data = torch.zeros_like(data)
        yield
    finally:
        for p, data in kept:
            p.data = data


@contextmanager
def nudged(module: nn.Module, seed: int = 0) -> Iterator[None]:
    """While it is open, every parameter is off by one rounding of itself, up or down."""
    kept = [(p, p.data) for p in module.parameters() if p.is_floating_point()]
    generator = torch.Generator().manual_seed(seed)
    try:
        for p, data in kept:
            sign = torch.randint(2, p.shape, generator=generator).to(data) * 2 - 1
            p.data = data + data * sign * torch.finfo(data.dtype).eps
        yield
    finally:
        for p, data in kept:
            p.data = data


def precision(subject: Subject, inputs: Inputs) -> tuple[Result, float]:
    """How far rounding moves the outputs, and the tolerance that follows from it.

    The distance from float64, or, where a subject has none, from weights that are one rounding off: the largest of all
    rows but those that lose more than half of their digits, for there rounding has decided a choice, such as an expert,
    and what follows it differs by more. One row at least must keep half of its digits.
    """
    plain = subject.run(inputs)
    eps, largest = torch.finfo(plain.dtype).eps, float(plain.abs().amax())
    if not math.isfinite(largest):
        return Result(False, math.inf, "outputs are not finite"), 0.0
    least = eps / 2 * largest
    if (again := difference(plain, subject.run(inputs))) > MARGIN * least:
        return Result(False, again, f"two equal calls differ by {again:.2g}"), MARGIN * least
    exact, how = _exactly(subject, inputs)
    rows = (plain.double() - exact.double()).abs().flatten(1).amax(1)
    size, name = float(exact.double().std()), str(plain.dtype).removeprefix("torch.")
    kept = rows[rows <= eps**0.5 * size]
    found = float(kept.max() if len(kept) else rows.min())
    sentence = f"{name} is {found:.2g} away from {how}; outputs spread by {size:.2g}"
    return Result(len(kept) > 0, found, sentence), MARGIN * (max(found, least) if len(kept) else least)


def _exactly(subject: Subject, inputs: Inputs) -> tuple[Tensor, str]:
    """The outputs in float64 and the word for them, or the next best."""
    try:
        with subject.float64():
            return subject.run(inputs), "float64"
    except Exception as error:  # a model's own code decides what it raises
        with subject.nudged():
            return subject.run(inputs), f"weights one rounding off (in float64 it raises {describe_error(error)})"


# All together

CHECKS: dict[str, Check] = {
    "repeated": repeated,
    "replaced_tokens": replaced_tokens,
    "prefixes": prefixes,
    "cached_one_by_one": cached_one_by_one,
    "cached_in_blocks": cached_in_blocks,
    "cached_after_short_prompt": cached_after_short_prompt,
    "cached_without_position_ids": cached_without_position_ids,
    "rollback": rollback,
    "batch": batch,
    "padded_left": padded_left,
    "padded_right": padded_right,
    "sight": sight,
    "running_mean": running_mean,
}


OF_BATCHES = {"batch", "padded_left", "padded_right", "generate_padded"}


def examine(
    subject: Subject,
    inputs: Inputs,
    others: Inputs,
    checks: Mapping[str, Check] = CHECKS,
    report: Callable[[str, Result], None] | None = None,
) -> dict[str, Result]:
    """Tries the checks one after the other; the tolerance comes from how far rounding moves this subject's outputs.

    Args:
        subject: what is tried.
        inputs: rows of tokens, each tensor (B, T, ...); three rows or more, for batches.
        others: what tokens are replaced with; the same shapes.
        checks: by name.
        report: called with each name and result as it is there.

    Returns:
        A result for "precision" and for each check.
    """
    results = {}

    def add(name: str, result: Result) -> None:
        results[name] = result
        if report is not None:
            report(name, result)

    rounded, tolerance = precision(subject, inputs)
    add("precision", rounded)
    case = Case(subject, inputs, others, tolerance)
    for name, check in checks.items():
        add(name, attempt(check, case if name in OF_BATCHES else case.first_row()))
    return results


def attempt(check: Check, case: Case) -> Result:
    """A check's result; where rounding may be to blame, float64 decides."""
    found = _guarded(check, case)
    if found.holds is not False or found.difference is None:
        return found
    exact = _guarded_in_float64(check, case)
    if exact is None or exact.holds is None or exact.difference is None:
        return found
    if exact.holds:
        return exact._replace(sentence=f"{exact.sentence} (in float64; float32 rounds by {found.difference:.2g})")
    return exact


def _guarded(check: Check, case: Case) -> Result:
    try:
        return check(case)
    except DoesNotApply as reason:
        return Result(None, None, str(reason))
    except Exception as error:  # whatever a model's own code raises is what is to be reported
        return Result(False, None, f"raises {describe_error(error)}")


def _guarded_in_float64(check: Check, case: Case) -> Result | None:
    try:
        with case.subject.float64():
            return check(case)
    except Exception:  # some models cannot compute in float64: then float32 has the last word
        return None


def describe_error(error: BaseException) -> str:
    """An error's class and the first line of its message, not too long."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
