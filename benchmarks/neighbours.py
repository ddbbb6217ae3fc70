"""Which tools around a model work with variants, and how?

    pip install -r requirements-neighbours.txt
    python -m benchmarks.neighbours

tries each tool that is installed with the bundled variants and with a tiny random Llama whose attention was swapped,
each tool in a process of its own, and writes docs/neighbours.md: version, how, and what was seen. What raises, or is
farther apart than it may be, is recorded in words. To add a tool, add a function of a `Subject` and a line of `TOOLS`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

import attention
from attention.contract_checks import describe_error
from attention.export import export_onnx
from benchmarks.contracts import Report, add_running, broken, reports
from benchmarks.peers import installed_version

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ("masks", "nsa", "performer", "performer-window")
LLAMA = "a tiny Llama with nsa"
ROUNDING = 2e-4  # that logits of the bundled variants, which reach some tens, may differ by
LENGTH, PROMPT = 96, 80  # tokens of a text; more than the windows of the bundled variants
SENTENCE = "The old man looked at the sea and"
Seen = dict[str, float | str]


@dataclass(frozen=True)
class Subject:
    """A variant to try a tool with.

    Attributes:
        name: as the page calls it.
        folder: where it lies.
        base: where its base lies.
        tokenizer: of both.
        work: an empty folder.
    """

    name: str
    folder: Path
    base: Path
    tokenizer: PreTrainedTokenizerBase
    work: Path

    def model(self) -> PreTrainedModel:
        """The variant, loaded anew."""
        return attention.load(self.folder)[0]

    @property
    def texts(self) -> Tensor:
        """(2, LENGTH) tokens that its base writes."""
        return written_by(self.base)


@functools.cache
def written_by(folder: Path) -> Tensor:
    """(2, LENGTH) tokens that the model in a folder writes."""
    model, tokenizer = attention.load(folder)
    torch.manual_seed(0)
    start = tokenizer(SENTENCE, return_tensors="pt").input_ids.expand(2, -1)
    options = {"do_sample": True, "min_new_tokens": LENGTH, "max_new_tokens": LENGTH, "pad_token_id": 0}
    return model.generate(start, attention_mask=torch.ones_like(start), **options)[:, :LENGTH]


@dataclass(frozen=True)
class Tool:
    """A tool and how it is tried.

    Attributes:
        package: its name on PyPI; the version of transformers is printed for what is its own.
        what: what is tried.
        how: code of a person who uses it.
        seen: tries it: named differences, which may be at most ROUNDING, and words to print.
    """

    package: str
    what: str
    how: str
    seen: Callable[[Any, Subject], Seen]


# What a model gives


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def apart(one: Tensor, other: Tensor) -> float:
    return (one.detach() - other.detach()).abs().max().item()


@torch.no_grad()
def cached(model: nn.Module, ids: Tensor) -> float:
    """How far the logits of PROMPT tokens and then single ones, with a cache, are from those of one forward."""
    output = model(input_ids=ids[:, :PROMPT], use_cache=True)
    pieces = [output.logits]
    for place in range(PROMPT, ids.shape[1]):
        output = model(input_ids=ids[:, place : place + 1], cache=output.cache, use_cache=True)
        pieces.append(output.logits)
    return apart(torch.cat(pieces, 1), logits(model, ids))


@torch.no_grad()
def divergence(model: nn.Module, other: nn.Module, ids: Tensor) -> float:
    """KL(model ‖ other), nats per token."""
    expected, found = (each(input_ids=ids).logits.log_softmax(-1) for each in (model, other))
    return (expected.exp() * (expected - found)).sum(-1).mean().item()


# The tools


def tuned(peft: Any, subject: Subject, config: Any) -> Seen:
    """An adapter with random numbers: used, saved, found again by its folder alone, merged."""
    torch.manual_seed(0)
    model = peft.get_peft_model(subject.model(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "ia3" in name or "mechanism" in name):
                parameter += 0.05 * torch.randn_like(parameter)
    found, folder = logits(model, subject.texts), subject.work / "adapter"
    if not apart(found, logits(subject.model(), subject.texts)) > 1e-2:
        raise ValueError("the adapter changes nothing")
    model.save_pretrained(folder)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    return {
        "cached": cached(model, subject.texts),
        "saved and loaded": apart(found, logits(loaded, subject.texts)),
        "merged": apart(found, logits(model.merge_and_unload(), subject.texts)),
    }


def lora(peft: Any, subject: Subject) -> Seen:
    return tuned(peft, subject, peft.LoraConfig(task_type="CAUSAL_LM"))


def dora(peft: Any, subject: Subject) -> Seen:
    return tuned(peft, subject, peft.LoraConfig(task_type="CAUSAL_LM", use_dora=True))


def ia3(peft: Any, subject: Subject) -> Seen:
    table = peft.utils.constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    feedforward = peft.utils.constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    family = subject.model().config.family
    options = {"target_modules": table[family], "feedforward_modules": feedforward[family]}
    return tuned(peft, subject, peft.IA3Config(task_type="CAUSAL_LM", **options))


def mechanism_saved(peft: Any, subject: Subject) -> Seen:
    return tuned(peft, subject, peft.LoraConfig(task_type="CAUSAL_LM", modules_to_save=["mechanism"]))


def sft(trl: Any, subject: Subject) -> Seen:
    """Two steps on a folder, then the result loaded."""
    datasets = import_module("datasets")
    options = {"output_dir": str(subject.work), "max_steps": 2, "per_device_train_batch_size": 2, "report_to": []}
    options |= {"max_length": 32, "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    tokenizer = copy.deepcopy(subject.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    trainer = trl.SFTTrainer(
        model=str(subject.folder),
        args=trl.SFTConfig(**options),
        train_dataset=datasets.Dataset.from_dict({"text": [f"{SENTENCE} the ship."] * 4}),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(subject.work / "tuned"))
    found = logits(trainer.model.eval(), subject.texts)
    return {"saved and loaded": apart(found, logits(attention.load(subject.work / "tuned")[0], subject.texts))}


def resumed(library: Any, subject: Subject) -> Seen:
    """Four steps, and two and then two more from the checkpoint, of transformers' own trainer."""
    rows = [{"input_ids": text, "labels": text} for text in torch.cat([subject.texts, subject.texts.flip(1)])]

    def run(folder: str, steps: int, resume: bool) -> PreTrainedModel:
        arguments = TrainingArguments(
            output_dir=str(subject.work / folder),
            max_steps=steps,
            per_device_train_batch_size=2,
            save_steps=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            lr_scheduler_type="constant",
        )
        trainer = Trainer(model=subject.model(), args=arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.eval()

    whole = run("whole", 4, False)
    run("parts", 2, False)
    parts = run("parts", 4, True)
    pairs = zip(whole.state_dict().values(), parts.state_dict().values(), strict=True)
    return {"the weights": max(apart(one.float(), other.float()) for one, other in pairs)}


def auto_model(library: Any, subject: Subject) -> Seen:
    body = AutoModel.from_pretrained(subject.folder).eval()
    with torch.no_grad():
        found = body(subject.texts).last_hidden_state
        return {"from the model's own": apart(found, subject.model().base_model(subject.texts).last_hidden_state)}


def harness(lm_eval: Any, subject: Subject) -> Seen:
    """The log-likelihood of the second half of a text, and the dtypes that it takes by itself."""
    harness_model = import_module("lm_eval.models.huggingface").HFLM
    ids = subject.texts[:1]
    half = ids.shape[1] // 2
    model = subject.model()
    wrapped = harness_model(pretrained=model, tokenizer=subject.tokenizer, batch_size=1, device="cpu")
    request = (("", ""), ids[0, :half].tolist(), ids[0, half:].tolist())
    ((found, _),) = wrapped._loglikelihood_tokens([request], disable_tqdm=True)
    scores = logits(model, ids)[0, half - 1 : -1].log_softmax(-1)
    expected = scores.gather(-1, ids[0, half:, None]).sum().item()
    places = {"the variant's": subject.folder, "the base's": subject.base}
    dtypes = [
        f"{name} {harness_model(pretrained=str(place), device='cpu').model.dtype}" for name, place in places.items()
    ]
    return {"from own computation, relative": abs(found / expected - 1), "dtype by folder": ", ".join(dtypes)}


def traced(nnsight: Any, subject: Subject) -> Seen:
    model = subject.model()
    language = nnsight.LanguageModel(model, tokenizer=subject.tokenizer)
    with torch.no_grad(), language.trace(SENTENCE):
        found = language.lm_head.output.save()
    return {"from a forward": apart(found, logits(model, subject.tokenizer(SENTENCE, return_tensors="pt").input_ids))}


def attributed(captum: Any, subject: Subject) -> Seen:
    """How far the attributions are from summing to what they explain, relative to it."""
    methods, model, ids = import_module("captum.attr"), subject.model(), subject.texts[:1, :24]
    target = logits(model, ids)[0, -1].argmax()

    def score(given: Tensor) -> Tensor:
        return model(given, use_cache=False).logits[:, -1, target]

    explain = methods.LayerIntegratedGradients(score, model.get_input_embeddings())
    blank = torch.full_like(ids, ids[0, 0])
    found = explain.attribute(ids, baselines=blank, n_steps=64, internal_batch_size=8)
    expected = (score(ids) - score(blank)).item()
    return {"left unexplained": f"{abs(found.sum().item() / expected - 1):.1%}"}


def pictured(bertviz: Any, subject: Subject) -> Seen:
    with torch.no_grad():
        maps = subject.model()(subject.texts[:1, :16], output_attentions=True).attentions
    page = bertviz.head_view(maps, [str(token) for token in range(16)], html_action="return")
    sums = torch.stack([each.sum(-1) for each in maps])  # not 1 for nsa, whose gates need not sum to it
    return {"page": _size(page.data), "rows sum to": f"{sums.min().item():.2f} to {sums.max().item():.2f}"}


def _size(text: str) -> str:
    return f"{len(text) / 1e6:.1f} MB"


def explained(inseq: Any, subject: Subject) -> Seen:
    wrapped = inseq.load_model(subject.model(), "saliency", tokenizer=subject.tokenizer)
    found = wrapped.attribute(SENTENCE, f"{SENTENCE} the ship", show_progress=False, pretty_progress=False)
    return {"attributions": " × ".join(map(str, found.sequence_attributions[0].target_attributions.shape))}


def torchao_int8(torchao: Any, subject: Subject) -> Seen:
    library = import_module("torchao.quantization")

    def quantize(model: nn.Module) -> nn.Module:
        library.quantize_(model, library.Int8WeightOnlyConfig())
        return model

    return compared(subject, quantize, quantize(attention.conv1d_to_linear(subject.model())))


def quanto_int8(quanto: Any, subject: Subject) -> Seen:
    """As quanto's own documentation saves and loads a model."""

    def quantize(model: nn.Module) -> nn.Module:
        quanto.quantize(model, weights=quanto.qint8, exclude="lm_head")
        quanto.freeze(model)
        return model

    first, place = quantize(attention.conv1d_to_linear(subject.model())), subject.work / "weights.safetensors"
    kept = {name: tensor for name, tensor in first.state_dict().items() if name != "lm_head.weight"}
    safetensors.torch.save_file(kept, place)
    again, content = attention.conv1d_to_linear(subject.model()), safetensors.torch.load_file(place)
    content["lm_head.weight"] = first.lm_head.weight.detach()
    quanto.requantize(again, content, quanto.quantization_map(first))
    return compared(subject, quantize, again.eval())


def compared(subject: Subject, quantize: Callable[[nn.Module], nn.Module], again: nn.Module) -> Seen:
    """A quantized model beside the variant, and beside `again`, the same made a second time or loaded."""
    plain = subject.model()
    model = quantize(attention.conv1d_to_linear(subject.model()))
    try:
        attention.save(model, subject.work / "refused")
    except attention.CheckpointError:
        refused = "refused"
    else:
        raise ValueError("attention.save wrote a quantized model")
    return {
        "cached": cached(model, subject.texts),
        "loaded again": apart(logits(model, subject.texts), logits(again, subject.texts)),
        "KL from the variant": f"{divergence(plain, model, subject.texts):.1e} nats per token",
        "memory of the weights": f"{nbytes(plain) / 1e6:.1f} MB, then {nbytes(model) / 1e6:.1f} MB",
        "attention.save": refused,
    }


def nbytes(model: nn.Module) -> int:
    """Bytes of a model's tensors, each counted once; of quantized ones, of what they hold."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(_held(tensor) for tensor in tensors.values())


def _held(tensor: Tensor) -> int:
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(_held(getattr(tensor, name)) for name in names)


PEFT = 'get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))'
INT8 = "model = attention.conv1d_to_linear(attention.load(FOLDER)[0])"


def assisted(_: Any, subject: Subject) -> Seen:
    """The variant drafts for its base, and the base for the variant: each writes what it writes alone."""
    base, variant, ids = attention.load(subject.base)[0], subject.model(), subject.texts[:1, :PROMPT]
    return {
        f"{side}'s text": other_text(writer, ids, assistant_model=drafter)
        for side, writer, drafter in (("variant", variant, base), ("base", base, variant))
    }


def looked_up(_: Any, subject: Subject) -> Seen:
    """Drafts are what followed the same tokens before."""
    return {"text": other_text(subject.model(), subject.texts[:1, :PROMPT], prompt_lookup_num_tokens=4)}


def other_text(model: PreTrainedModel, ids: Tensor, **options: Any) -> float:
    """How many of the tokens written greedily differ from those without the options."""
    fixed = {"do_sample": False, "max_new_tokens": 30, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    return float((model.generate(ids, **fixed) != model.generate(ids, **fixed, **options)).sum())


def in_onnx(onnxruntime: Any, subject: Subject) -> Seen:
    """The file's graph, on texts of other lengths than the one that was traced."""
    model, path = subject.model(), subject.work / "model.onnx"
    export_onnx(model, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    parts = [subject.texts[:, :length].contiguous() for length in (5, 33, LENGTH)]
    found = [torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0]) for ids in parts]
    return {"logits": max(apart(each, logits(model, ids)) for each, ids in zip(found, parts, strict=True))}


ASSISTED = "variant.generate(ids, assistant_model=base); base.generate(ids, assistant_model=variant)"
TOOLS = {
    "lora": Tool("peft", "LoRA", PEFT, lora),
    "dora": Tool("peft", "DoRA", PEFT.replace('M")', 'M", use_dora=True)'), dora),
    "ia3": Tool("peft", "IA³", 'IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=[...])', ia3),
    "mechanism": Tool(
        "peft",
        "LoRA and the mechanisms, in full",
        'LoraConfig(task_type="CAUSAL_LM", modules_to_save=["mechanism"])',
        mechanism_saved,
    ),
    "trl": Tool("trl", "SFTTrainer", 'import attention; SFTTrainer(model="FOLDER", ...)', sft),
    "trainer": Tool("transformers", "Trainer, stopped and resumed", "train(resume_from_checkpoint=True)", resumed),
    "assisted": Tool("transformers", "assisted decoding, on either side", ASSISTED, assisted),
    "lookup": Tool("transformers", "prompt lookup", "generate(ids, prompt_lookup_num_tokens=4)", looked_up),
    "onnx": Tool("onnxruntime", "ONNX", "python -m attention.export FOLDER --output FILE.onnx", in_onnx),
    "auto": Tool("transformers", "AutoModel", 'import attention; AutoModel.from_pretrained("FOLDER")', auto_model),
    "lm_eval": Tool("lm_eval", "log-likelihoods", "HFLM(pretrained=model, tokenizer=tokenizer)", harness),
    "nnsight": Tool("nnsight", "a trace", "LanguageModel(model, tokenizer=tokenizer)", traced),
    "captum": Tool(
        "captum",
        "integrated gradients",
        "LayerIntegratedGradients(lambda ids: model(ids, use_cache=False)..., model.get_input_embeddings())",
        attributed,
    ),
    "bertviz": Tool(
        "bertviz", "head_view", "head_view(model(ids, output_attentions=True).attentions, tokens)", pictured
    ),
    "inseq": Tool("inseq", "saliency", 'inseq.load_model(model, "saliency", tokenizer=tokenizer)', explained),
    "torchao": Tool("torchao", "int8 weights", f"{INT8}; quantize_(model, Int8WeightOnlyConfig())", torchao_int8),
    "quanto": Tool(
        "optimum-quanto",
        "int8 weights, saved and loaded by its own `requantize`",
        f'{INT8}; quantize(model, weights=qint8, exclude="lm_head"); freeze(model)',
        quanto_int8,
    ),
}
MODULES = {"optimum-quanto": "optimum.quanto"}  # where a package is imported by another name than its own


def report(name: str, length: int) -> Report:
    """What was seen of a tool, by subject: whether it holds, values by name, and a sentence where it does not."""
    logging.disable(logging.WARNING)
    tool, results = TOOLS[name], {}
    module = import_module(MODULES.get(tool.package, tool.package))
    with tempfile.TemporaryDirectory() as work:
        for subject in subjects(Path(work)):
            subject.work.mkdir()
            try:
                results[subject.name] = judged(tool.seen(module, subject))
            except Exception as error:  # whatever a tool raises is what is to be reported
                results[subject.name] = {"holds": False, "seen": {}, "sentence": describe_error(error)}
    return {"name": name, "version": installed_version(tool.package), "results": results}


def judged(seen: Seen) -> dict[str, Any]:
    """What was seen, and whether no difference is more than rounding."""
    far = [name for name, value in seen.items() if isinstance(value, float) and not value <= ROUNDING]
    return {"holds": not far, "seen": seen, "sentence": f"apart: {', '.join(far)}" if far else ""}


def subjects(work: Path) -> list[Subject]:
    """The bundled variants and a converted Llama, in folders."""
    base = ROOT / "checkpoints" / "base"
    tokenizer = attention.load(base)[1]
    found = [Subject(name, ROOT / "checkpoints" / name, base, tokenizer, work / name) for name in BUNDLED]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(work / "llama")
    tokenizer.save_pretrained(work / "llama")
    small = {"compress_block": 8, "compress_stride": 4, "select_block": 8, "num_selected": 3, "window": 16}
    swapped = attention.convert(attention.load(work / "llama")[0], attention.NSAConfig(**small, select_every=8))
    attention.save(swapped, work / "llama-nsa", dtype=None)
    return [*found, Subject(LLAMA, work / "llama-nsa", work / "llama", tokenizer, work / "tried")]


# The page


def page(found: list[Report], left_out: list[str]) -> str:
    """docs/neighbours.md."""
    shown = [entry for entry in found if "results" in entry]
    lines = [
        "# Neighbours: tools around a model, tried with variants",
        "Written by `python -m benchmarks.neighbours`; nothing here was typed by hand.",
        INTRODUCTION,
        f"torch {torch.__version__}, transformers {transformers.__version__}, on the CPU, in float32.",
        "\n".join(["| tool | version | works | how |", "|---|---|---|---|", *map(row, shown)]),
        "## What was seen",
        "\n".join(map(details, shown)),
    ]
    if failed := [entry for entry in found if "problem" in entry]:
        lines += ["## Not tried", "\n".join(f"- {entry['name']}: {entry['problem']}" for entry in failed)]
    if left_out:
        lines += [f"Not installed, so not tried: {', '.join(left_out)}."]
    return "\n\n".join(lines) + "\n"


INTRODUCTION = f"""\
Each tool is used as on a model of transformers, on the bundled variants ({", ".join(BUNDLED)}) and on
{LLAMA}. Works means: nothing was raised, and what must be equal (cached and in one forward, merged and not,
saved and loaded, the tool's and a plain forward's) is so up to {ROUNDING:.0e} of the logits.

- `import attention` tells peft, where it is installed, which layers of a variant to adapt: those of its base. Tables
  in which families disagree (IA³'s, AdaLoRA's) have no entry for variants: give `target_modules` there.
  `target_parameters` reach parameters that lie in a mechanism itself; features of performer are tuned as
  `modules_to_save=["mechanism"]`.
- Adapters name the variant's folder; of what was converted and not saved they name nothing.
- Masks with `induction` look at tokens. Give `input_ids` beside `inputs_embeds`, to the model and to `generate`; tools
  that give embeddings alone are refused.
- A GPT-2's layers are `Conv1D`, which quantizers pass over without a word: `attention.conv1d_to_linear(model)` turns
  them into `nn.Linear` first. What is quantized is not a variant that `attention.save` could write, and is refused:
  keep the variant and quantize it where it is loaded, or save with the quantizer's own functions.
- By folder, lm_eval takes the dtype that each config names, which need not be one: give `dtype=float32` for base and
  variant, or use `trainer/tasks.py`, which measures both in the base's."""


def row(entry: Report) -> str:
    """A line of the table."""
    tool, results, wrong = TOOLS[entry["name"]], entry["results"], broken(entry)
    works = "all" if not wrong else f"{len(results) - len(wrong)} of {len(results)}: not {', '.join(wrong)}"
    return f"| {tool.package}: {tool.what} | {entry['version']} | {works} | `{tool.how}` |"


def details(entry: Report) -> str:
    """A tool's values, subject by subject."""
    tool = TOOLS[entry["name"]]
    lines = [f"- {tool.package} {entry['version']}: {tool.what}"]
    for name, result in entry["results"].items():
        values = [f"{key} {_value(value)}" for key, value in result["seen"].items()]
        lines.append(f"  - {name}: " + "; ".join([*values, *filter(None, [_value(result["sentence"])])]))
    return "\n".join(lines)


def _value(value: float | str) -> str:
    return f"{value:.1e}" if isinstance(value, float) else value.replace("\n", " ")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = f"of {', '.join(TOOLS)}; all by default"
    parser.add_argument("--only", nargs="+", choices=TOOLS, metavar="NAME", help=names)
    add_running(parser, "tool", 900, "neighbours.jsonl", "neighbours.md")
    options = parser.parse_args(argv)
    chosen = options.only or list(TOOLS)
    missing = {TOOLS[name].package for name in chosen if installed_version(TOOLS[name].package) is None}
    found = reports(report, [n for n in chosen if TOOLS[n].package not in missing], LENGTH, options, options.log)
    options.output.write_text(page(found, sorted(missing)), encoding="utf-8")
    print(options.output)


if __name__ == "__main__":
    main()
