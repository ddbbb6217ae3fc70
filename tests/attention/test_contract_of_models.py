"""The contract as a command: sound models pass, each planted fault is found and named."""

import json
from contextlib import contextmanager

import pytest
import torch

from attention import contract
from attention.contract_checks import Subject, examine, parts_of, prefixes

from . import faults

SHORT = ["--length", "64"]
CACHED = {name for name in contract.MODEL_CHECKS if name.startswith("cached")}
FAULTS = {  # the checks that find a fault; every other one holds or does not apply
    "sound": set(),
    "divisor_leak": set(contract.MODEL_CHECKS) - {"repeated", "replaced_tokens", "batch", "sight", "running_mean"},
    "leak": set(contract.MODEL_CHECKS) - {"repeated", "batch", "sight", "running_mean"},
    "stale_cache": {*CACHED, "rollback", "generate", "generate_padded"},
    "stale_crop": {"rollback"},
    "no_crop": set(),
    "fresh_block": {"cached_in_blocks", "cached_without_position_ids", "rollback"},
    "lost_positions": {"cached_without_position_ids"},
    "reads_padding": {"padded_left", "generate_padded"},
    "mixed_rows": {"batch", "padded_left", "padded_right", "generate_padded", "beams"},
    "zero_gate": {*CACHED, "rollback", "generate", "generate_padded", "beams"},
    "old_name": {"generate", "generate_padded", "beams"},
    "forgetful": {"sight"},
    "running_mean": {"running_mean", "padded_left", "generate_padded"},
}


def run(capsys, *arguments):
    """Exit status, the JSON printed, and the errors."""
    status = contract.main([*arguments, "--json"])
    printed = capsys.readouterr()
    return status, json.loads(printed.out) if printed.out else None, printed.err


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_by_the_checks_that_it_breaks(capsys, fault):
    if fault == "old_name" and faults.CACHE != "cache":
        pytest.skip("the installed transformers still calls it that")
    status, report, _ = run(capsys, f"tests.attention.faults:{fault}", *SHORT)
    failed = {name for name, check in report["checks"].items() if check["holds"] is False}
    assert failed == FAULTS[fault]
    assert status == int(bool(failed))
    assert report["holds"] == (not failed)


def test_a_model_that_draws_random_numbers_is_called_that(capsys):
    status, report, _ = run(capsys, "tests.attention.faults:restless", *SHORT, "--only", "repeated")
    assert status == 1
    assert "random" in report["checks"]["repeated"]["sentence"]
    assert report["checks"]["precision"]["sentence"].startswith("two equal calls differ")


def test_what_hides_behind_zeros_is_said_to():
    model = faults.zero_gate()
    results = contract.check(model, length=64, only=["cached_one_by_one"])
    assert "stay zero" in results["cached_one_by_one"].sentence
    assert not model.gate.any(), "the model is left as it was"


def test_a_model_is_left_as_it_was():
    model = faults.sound().train()
    model.generation_config.max_length = 33
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    contract.check(model, length=32)
    assert model.training
    assert model.generation_config.max_length == 33
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == places
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_another_seed_gives_other_texts():
    first, second = (contract.texts(faults.sound(), 32, seed) for seed in (0, 1))
    assert not torch.equal(first[0][0], second[0][0])
    assert (first[0][0] != first[1][0]).all(), "what replaces a token is another token"


@pytest.mark.parametrize("name", ["base", "nsa"])
def test_bundled_models_keep_the_contract(capsys, name):
    """Long enough that nsa has more blocks than it selects."""
    assert contract.main([f"checkpoints/{name}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(contract.MODEL_CHECKS)
    assert sum(line.startswith("holds") for line in lines) == len(lines) - 1


@pytest.mark.long
@pytest.mark.parametrize("name", ["hybrid", "masks", "performer", "performer-window"])
def test_other_bundled_models_keep_the_contract(name):
    assert contract.main([f"checkpoints/{name}"]) == 0


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("no/such/folder/at/all", "no/such"),
        ("./nowhere", "there is no folder"),
        ("tests.attention.nowhere:model", "cannot be loaded"),
        ("tests.attention.faults:nothing", "no function 'nothing'"),
        ("tests.attention.faults:no_model", "gives a str"),
        ("tests.attention.faults:broken", "out of luck"),
        ("torch.nn:Identity", "no config.vocab_size"),
        ("tests", "config.json"),
    ],
)
def test_what_cannot_be_loaded_exits_with_2_and_says_why(capsys, spec, words):
    status, report, error = run(capsys, spec)
    assert status == 2
    assert report is None
    assert words in error
    assert "Traceback" not in error


def test_a_text_that_is_too_short_is_refused(capsys):
    assert contract.main(["tests.attention.faults:sound", "--length", "5"]) == 2
    assert "16 tokens or more" in capsys.readouterr().err


def test_checks_are_named_or_refused():
    with pytest.raises(ValueError, match="nonsense"):
        contract.check(faults.sound(), only=["nonsense"])


def test_a_difference_that_is_not_finite_is_null_in_json(capsys, monkeypatch):
    model = faults.sound()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("inf"))
    monkeypatch.setattr(faults, "sound", lambda: model)
    status, report, _ = run(capsys, "tests.attention.faults:sound", *SHORT, "--only", "repeated")
    assert status == 1
    assert report["checks"]["precision"]["difference"] is None


class Chooser(Subject):
    """Chooses by whether a number is above one half, off by a rounding that grows with the length."""

    dtype = torch.float32

    def run(self, inputs, memory=None, *, mask=None, positions=None):
        x = inputs[0].to(self.dtype)
        rounding = 10 * torch.finfo(self.dtype).eps * x.shape[1]
        return (x + rounding > 0.5)[..., None].to(self.dtype)

    @contextmanager
    def float64(self):
        self.dtype = torch.float64
        yield
        self.dtype = torch.float32


class LeakingChooser(Chooser):
    def run(self, inputs, **kwargs):
        return super().run(inputs, **kwargs) + inputs[0].shape[1]


def test_float64_tells_rounding_from_logic():
    inputs = torch.full((3, 64), 0.1, dtype=torch.float64)
    inputs[:, 5] = 0.5 - 2e-5  # above one half for a text of 17 tokens or more, in float32
    rounded = examine(Chooser(), (inputs,), (inputs + 0.01,), {"prefixes": prefixes})["prefixes"]
    assert rounded.holds
    assert "float32 rounds by 1" in rounded.sentence
    wrong = examine(LeakingChooser(), (inputs,), (inputs + 0.01,), {"prefixes": prefixes})["prefixes"]
    assert wrong.holds is False


def test_parts_make_up_a_text():
    assert parts_of(30, [9, 7, 10], iter([1] * 99)) == [9, 7, 10, 1, 1, 1, 1]
    assert parts_of(12, [9, 7, 10], iter([1] * 99)) == [9, 3]
    assert parts_of(3, [9], iter([])) == [3]
