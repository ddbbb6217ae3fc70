"""Does a causal language model keep its promises? Checks that anyone can run on any model.

    python -m attention.contract SPEC

where SPEC is a folder, a name on the Hub, or `module:function` for a function that gives a model. What is checked, and
why, is in docs/contract.md. Nothing is known of families: a model is used through `forward`, `generate` and its config.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig

from .contract_checks import (
    CHECKS,
    Case,
    Check,
    DoesNotApply,
    Inputs,
    Mixing,
    Result,
    Subject,
    describe_error,
    difference,
    examine,
    module_in_float64,
    nudged,
    part,
    zero_parameters,
    zeroed,
    zeros_filled,
)
from .errors import CheckpointError
from .loading import load
from .mechanism import Mechanism

CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")  # what versions of transformers call it
SPY = "contract-spy"
LENGTH, LEAST_LENGTH = 320, 16  # the first is longer than the windows and blocks of the bundled variants
WORDS = 64  # different tokens in a text, few enough that they come again
SHORT, NEW_TOKENS = 5, 16  # tokens of a prompt, and after it
BEAMS, BEAM_TOKENS = 3, 8


@dataclass
class Memory:
    """A model's cache, None before the first call, under the name that the model gives it."""

    cache: Any = None


class Model(Subject):
    """A causal language model: outputs are logits (B, T, V), the one input is ids (B, T)."""

    def __init__(self, model: nn.Module):
        self.model = model
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's forward names less
        parameters = inspect.signature(inner.forward).parameters
        self.accepts = set(parameters)
        self.accepts_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def run(
        self,
        inputs: Inputs,
        memory: Memory | None = None,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        if mask is not None and "attention_mask" not in self.accepts:
            raise DoesNotApply("its forward takes no attention_mask")
        named = {"attention_mask": mask, "position_ids": positions if "position_ids" in self.accepts else None}
        arguments = {name: value for name, value in named.items() if value is not None}
        if memory is None:
            return logits_of(self.model(inputs[0], **arguments, **self._optional(use_cache=False)))
        if memory.cache is not None:
            arguments[self.cache_name] = memory.cache
        output = self.model(inputs[0], **arguments, **self._optional(use_cache=True))
        given = (getattr(output, name, None) for name in (self.cache_name, *CACHE_NAMES))
        memory.cache = next((cache for cache in given if cache is not None), None)
        if memory.cache is None:
            raise DoesNotApply("it gives no cache back with use_cache=True")
        return logits_of(output)

    def _optional(self, **arguments: Any) -> dict[str, Any]:
        """Arguments that a forward may do without."""
        return {name: value for name, value in arguments.items() if self.accepts_any or name in self.accepts}

    @property
    def cache_name(self) -> str:
        """What its forward calls the cache; the newest name where it takes any."""
        for name in CACHE_NAMES:
            if name in self.accepts:
                return name
        if self.accepts_any:
            return CACHE_NAMES[0]
        raise DoesNotApply("its forward takes no cache")

    def memory(self) -> Memory:
        self.cache_name  # noqa: B018 - or there is none
        return Memory()

    def record(self, memory: Memory) -> None:
        if not getattr(memory.cache, "is_croppable", False):
            raise DoesNotApply("its cache does not say that it can be cropped")
        memory.cache.activate_past_recording()

    def take_back(self, memory: Memory, count: int) -> None:
        memory.cache.crop(-count)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def mixing(self, inputs: Inputs) -> list[Mixing]:
        seen: list[Mixing] = []
        with ExitStack() as stack:
            mechanisms = [module for module in self.model.modules() if isinstance(module, Mechanism)]
            for module in mechanisms:
                hook = module.register_forward_hook(partial(_note_mechanism, seen), with_kwargs=True)
                stack.callback(hook.remove)
            if not mechanisms:
                stack.enter_context(spied_attention(self.model, seen))
            self.run(inputs)
        return seen

    def float64(self) -> AbstractContextManager[None]:
        return module_in_float64(self.model)

    def nudged(self) -> AbstractContextManager[None]:
        return nudged(self.model)


def logits_of(output: Any) -> Tensor:
    """The logits in what a forward gives: an object that has them, a tuple that they come first in, or they alone."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.logits


def _note_mechanism(seen: list[Mixing], module: Mechanism, args: tuple, kwargs: dict[str, Any], out: Tensor) -> None:
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    seen.append(Mixing(given["q"], given["k"], given["v"], out, given["q"].shape[-1] ** -0.5))


@contextmanager
def spied_attention(model: nn.Module, seen: list[Mixing]) -> Iterator[None]:
    """While it is open, attention that goes through transformers' `AttentionInterface` is noted.

    Raises:
        DoesNotApply: if the model's attention does not go through it.
    """
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if before is None or not hasattr(model, "set_attn_implementation"):
        raise DoesNotApply("its attention does not go through transformers' AttentionInterface")

    def spy(module, query, key, value, *args, scaling=None, **kwargs):
        inner = eager_attention(module) if before == "eager" else AttentionInterface()[before]
        out, weights = inner(module, query, key, value, *args, scaling=scaling, **kwargs)
        if query.shape[2] == key.shape[2]:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            seen.append(Mixing(query, key, value, out.transpose(1, 2), scale))
        return out, weights

    AttentionInterface.register(SPY, spy)
    AttentionMaskInterface.register(SPY, AttentionMaskInterface().get(before, lambda *args, **kwargs: None))
    try:
        model.set_attn_implementation(SPY)
        yield
    finally:
        model.set_attn_implementation(before)


def eager_attention(module: nn.Module) -> Callable:
    """The function that a layer of transformers uses where it is told to be eager; it is found beside the layer."""
    return sys.modules[type(module).__module__].eager_attention_forward


# Generating


def generate(case: Case) -> Result:
    """`generate`, greedy and sampling, writes from the logits that a forward of all that it wrote gives."""
    found = {}
    for prompt, sample in ((SHORT, False), (case.length // 2, False), (SHORT, True)):
        start = part(case.inputs, None, prompt, slice(1))
        how = f"{'sampled' if sample else 'greedy'} after {prompt} tokens"
        found[how] = _written_as_read(case, start, None, sample)
    how, worst = max(found.items(), key=lambda item: item[1])
    return case.judge(
        worst,
        "generate writes from the logits of a plain forward",
        f"generate writes from other logits than a plain forward gives: {worst:.2g} off ({how})",
    )


def generate_padded(case: Case) -> Result:
    """`generate` with rows padded on the left writes each row from the logits that it gives alone."""
    lengths = [case.length // 2, case.length // 3, SHORT][: case.rows]
    width = max(lengths)
    mask = torch.zeros(len(lengths), width, dtype=torch.long, device=case.inputs[0].device)
    ids = case.others[0][: len(lengths), :width].clone()
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
        ids[row, width - length :] = case.inputs[0][row, :length]
    worst = _written_as_read(case, (ids,), mask, sample=False)
    return case.judge(
        worst,
        "rows padded on the left are continued as each row alone",
        f"rows padded on the left are continued from other logits than each row alone: {worst:.2g} off",
    )


def _written_as_read(case: Case, start: Inputs, mask: Tensor | None, sample: bool) -> float:
    """How far the logits that `generate` wrote from are from those of a forward of the result, each row alone.

    A greedy token must have the largest logit there, too; how much it lacks counts.
    """
    output = _generate(case, start[0], mask, do_sample=sample, output_logits=True)
    prompt, written = start[0].shape[1], torch.stack(output.logits, 1)
    worst = 0.0
    for row in range(start[0].shape[0]):
        skip = 0 if mask is None else int((mask[row] == 0).sum())
        ids = output.sequences[row : row + 1, skip:]
        read = case.subject.run((ids,))[:, prompt - skip - 1 : -1]
        worst = max(worst, difference(read, written[row : row + 1]))
        if not sample:
            chosen = read.gather(2, ids[:, prompt - skip :, None])
            worst = max(worst, difference(read.amax(2, keepdim=True), chosen))
    return worst


def beams(case: Case) -> Result:
    """Beam search finds what a loop of plain forwards finds; scores are sums of log-probabilities."""
    start = part(case.inputs, None, SHORT, slice(1))
    options = {"num_beams": BEAMS, "length_penalty": 0.0, "output_scores": True, "max_new_tokens": BEAM_TOKENS}
    output = _generate(case, start[0], None, do_sample=False, **options)
    claimed = float(output.sequences_scores[0])
    read = case.subject.run((output.sequences[:1],))[:, SHORT - 1 : -1].log_softmax(-1)
    own = float(read.gather(2, output.sequences[:1, SHORT:, None]).sum())
    best = best_beam(case.subject, start[0])
    found = max(abs(claimed - own), abs(best - own))
    if not math.isfinite(found):
        found = math.inf
    nats = replace(case, tolerance=2 * BEAM_TOKENS * case.tolerance)
    return nats.judge(
        found,
        "beam search finds what a loop of forwards finds",
        f"beam search finds what is {max(0.0, best - own):.2g} nats worse than what a loop of forwards finds, and "
        f"misjudges it by {abs(claimed - own):.2g}",
    )


def best_beam(subject: Subject, ids: Tensor) -> float:
    """The score of the best of `BEAMS` beams, by plain forwards; ids are (1, T)."""
    scores = torch.zeros(1, 1, dtype=torch.float64, device=ids.device)
    for _ in range(BEAM_TOKENS):
        steps = subject.run((ids,))[:, -1].double().log_softmax(-1)
        scores, index = (scores + steps).flatten().topk(BEAMS)
        rows, tokens = index // steps.shape[1], index % steps.shape[1]
        ids, scores = torch.cat([ids[rows], tokens[:, None]], 1), scores[:, None]
    return float(scores[0])


def _generate(case: Case, ids: Tensor, mask: Tensor | None, **options: Any) -> Any:
    model = getattr(case.subject, "model", None)
    if not hasattr(model, "generate"):
        raise DoesNotApply("it has no generate")
    if mask is not None or "attention_mask" in case.subject.accepts:
        options["attention_mask"] = torch.ones_like(ids) if mask is None else mask
    most = min(NEW_TOKENS, case.length // 3)
    settings = {"max_new_tokens": most, "pad_token_id": 0, "return_dict_in_generate": True, **options}
    torch.manual_seed(0)
    return model.generate(ids, **settings)


MODEL_CHECKS: dict[str, Check] = {**CHECKS, "generate": generate, "generate_padded": generate_padded, "beams": beams}


def check(
    model: nn.Module,
    *,
    length: int = LENGTH,
    seed: int = 0,
    only: Sequence[str] | None = None,
    report: Callable[[str, Result], None] | None = None,
) -> dict[str, Result]:
    """Checks a causal language model; parameters that are zero throughout are given random values meanwhile.

    Args:
        model: any module whose forward takes ids (B, T) and gives logits; it is left as it was.
        length: tokens of a text; fewer where the model holds no more.
        seed: of texts and values.
        only: names of `MODEL_CHECKS`; all by default.
        report: called with each name and result as it is there.

    Returns:
        A result for "precision" and for each check.

    Raises:
        ValueError: for names that are none of `MODEL_CHECKS`, or a model whose vocabulary cannot be found.
        Exception: whatever the model's own forward raises for tokens alone.
    """
    if unknown := sorted(set(only or ()) - set(MODEL_CHECKS)):
        raise ValueError(f"no check {unknown}; there are {list(MODEL_CHECKS)}")
    checks = {name: MODEL_CHECKS[name] for name in MODEL_CHECKS if only is None or name in only}
    inputs, others = texts(model, length, seed)
    subject = Model(model)
    with _prepared(model), zeros_filled(model, seed) as zeros:
        results = examine(subject, inputs, others, {n: _with_zeros(c, zeros) for n, c in checks.items()}, report)
    return results


def _with_zeros(check: Check, filled: Mapping[str, nn.Parameter]) -> Check:
    """A check that says so where it would hold with the zero parameters left at zero."""

    def run(case: Case) -> Result:
        found = check(case)
        if found.holds is not False or not filled:
            return found
        with zeroed(filled.values()):
            if not check(case).holds:
                return found
        return found._replace(sentence=f"{found.sentence}; it holds while {len(filled)} parameters stay zero")

    return run


@contextmanager
def _prepared(model: nn.Module) -> Iterator[None]:
    """While it is open, a model is in evaluation mode, keeps no gradients and has no generation defaults of its own."""
    training, defaults = model.training, getattr(model, "generation_config", None)
    model.eval()
    if defaults is not None:
        model.generation_config = GenerationConfig()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        if defaults is not None:
            model.generation_config = defaults


def texts(model: nn.Module, length: int, seed: int) -> tuple[Inputs, Inputs]:
    """Two batches of random ids (3, T), the second of other ids than the first, without those that mean something.

    Raises:
        ValueError: if the vocabulary cannot be found, or the text would be too short to say anything.
    """
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    if vocabulary is None:
        raise ValueError(f"{type(model).__name__} has no config.vocab_size, so it is unknown which tokens there are")
    length = min(length, getattr(text, "max_position_embeddings", None) or length)
    if length < LEAST_LENGTH:
        raise ValueError(f"a text needs {LEAST_LENGTH} tokens or more; got {length}")
    generator = torch.Generator().manual_seed(seed)
    special = special_tokens(config) | special_tokens(text)
    plain = torch.tensor([token for token in range(vocabulary) if token not in special])
    words = plain[torch.randperm(len(plain), generator=generator)[:WORDS]]
    size = (3, length)
    first = torch.randint(len(words), size, generator=generator)
    step = torch.randint(1, len(words), size, generator=generator)
    device = next(model.parameters()).device
    return (words[first].to(device),), (words[(first + step) % len(words)].to(device),)


def special_tokens(config: Any) -> set[int]:
    """Ids that a config gives a meaning to: padding, the end of a text, the place of a picture."""
    found: set[int] = set()
    for name, value in config.to_dict().items() if hasattr(config, "to_dict") else ():
        if name.endswith(("token_id", "token_ids", "token_index", "token_idx")):
            found.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
    return found


# The command


class LoadError(Exception):
    """What was named could not be made a model; the message says why."""


def load_model(spec: str, device: str = "cpu") -> nn.Module:
    """The model that a folder, a name on the Hub, or `module:function` means.

    Raises:
        LoadError: if there is none.
    """
    try:
        if ":" in spec and not Path(spec).exists():
            model = _call(*spec.split(":", 1)).to(device)
        else:
            model, _ = load(spec, device=device)
    except (LoadError, CheckpointError) as error:
        raise LoadError(str(error)) from error
    except Exception as error:  # a model's own code decides what it raises
        raise LoadError(f"{spec} cannot be loaded: {describe_error(error)}") from error
    return model


def _call(module: str, function: str) -> nn.Module:
    made = getattr(importlib.import_module(module), function, None)
    if not callable(made):
        raise LoadError(f"{module} has no function {function!r}")
    model = made()
    if not isinstance(model, nn.Module):
        raise LoadError(f"{module}:{function} gives a {type(model).__name__}, not a torch module")
    return model


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; the exit status is 1 where something does not hold, 2 for what cannot be loaded or run."""
    options = _parser().parse_args(arguments)
    transformers.logging.set_verbosity_error()
    try:
        model = load_model(options.spec, options.device)
        report = None if options.json else _print_row
        if not options.json:
            print(_title(options.spec, model), flush=True)
        results = check(model, length=options.length, seed=options.seed, only=options.only, report=report)
    except Exception as error:  # a model that is no causal language model raises what it likes
        text = str(error) if isinstance(error, LoadError | ValueError) else describe_error(error)
        print(f"error: {text}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(as_json(options.spec, model, results), indent=2))
    return int(any(result.holds is False for result in results.values()))


def _title(spec: str, model: nn.Module) -> str:
    zeros = len(zero_parameters(model))
    return f"{spec}: {type(model).__name__}, transformers {transformers.__version__}, torch {torch.__version__}" + (
        f"; {zeros} parameters that are zero get random values" if zeros else ""
    )


def _print_row(name: str, result: Result) -> None:
    print(row(name, result), flush=True)


def row(name: str, result: Result) -> str:
    """A line of the table: does it hold, which check, the largest difference, and a sentence."""
    holds = {True: "holds", False: "FAILS", None: "-"}[result.holds]
    found = "" if result.difference is None else f"{result.difference:.2g}"
    return f"{holds:<6}{name:<30}{found:<10}{result.sentence}"


def as_json(spec: str, model: nn.Module, results: Mapping[str, Result]) -> dict[str, Any]:
    """Plain data; a difference that is not finite is null."""
    return {
        "spec": spec,
        "model": type(model).__name__,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "zero_parameters": list(zero_parameters(model)),
        "holds": all(result.holds is not False for result in results.values()),
        "checks": {name: _plain(result) for name, result in results.items()},
    }


def _plain(result: Result) -> dict[str, Any]:
    finite = result.difference is not None and math.isfinite(result.difference)
    return {**result._asdict(), "difference": result.difference if finite else None}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m attention.contract", description=__doc__.splitlines()[0])
    parser.add_argument(
        "spec", help="a folder, user/repo[/subfolder][@revision], or module:function that gives a model"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--length", type=int, default=LENGTH, help=f"tokens of a text (default: {LENGTH})")
    parser.add_argument("--seed", type=int, default=0, help="of the texts and of values for parameters that are zero")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", choices=list(MODEL_CHECKS), metavar="CHECK", help=", ".join(MODEL_CHECKS))
    return parser


if __name__ == "__main__":
    sys.exit(main())
