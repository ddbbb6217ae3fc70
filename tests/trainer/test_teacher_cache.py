"""What the base expects, stored: what is read is what was computed, and a fit that finds it needs no base."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

import attention
from tests.trainer.conftest import recipe, write_recipe
from tests.trainer.test_resume import outcome
from trainer import teacher_cache, train
from trainer.config import load_config
from trainer.loop import Loop
from trainer.stages import Distil
from trainer.teacher_cache import TeacherCache, decoded, encoded, open_cache, rest_mass


@pytest.fixture
def base(workplace):
    return AutoModelForCausalLM.from_pretrained(workplace / "base").eval().requires_grad_(False)


@pytest.fixture
def ids():
    return torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(0))


def log_probs(base: GPT2LMHeadModel, ids: torch.Tensor) -> torch.Tensor:
    return base(ids, use_cache=False).logits[:, :-1].flatten(0, 1).log_softmax(-1)


def test_it_gives_the_likeliest_tokens_and_a_rest_that_makes_one(base, ids, tmp_path):
    top = TeacherCache(tmp_path / "cache", base, k=48)(ids)
    expected = log_probs(base, ids).topk(48)
    assert (top.tokens.sort(-1).values == expected.indices.sort(-1).values).all()
    torch.testing.assert_close(top.log_probs, expected.values, atol=6e-4, rtol=0)
    torch.testing.assert_close(top.log_probs.exp().sum(-1) + top.log_rest.exp(), torch.ones(57), atol=1e-6, rtol=0)


def test_what_was_stored_comes_back_to_the_bit_and_without_the_base(base, ids, tmp_path, monkeypatch):
    cache = TeacherCache(tmp_path / "cache", base, k=16)
    computed, short = cache(ids), cache(ids[:, :9])
    cache.store()
    again = TeacherCache(tmp_path / "cache", base, k=16)
    monkeypatch.setattr(base, "forward", None)
    monkeypatch.setattr(teacher_cache, "last_hidden", None)
    for old, new in zip(computed, again(ids), strict=True):
        assert (old == new).all()
    assert (again(ids[[2, 0]]).tokens == torch.cat([computed.tokens[38:], computed.tokens[:19]])).all()
    assert (again(ids[:, :9]).log_rest == short.log_rest).all()
    assert (cache.computed, cache.found, again.computed, again.found) == (6, 0, 0, 8)


def test_the_smallest_and_the_largest_probability_can_be_stored():
    top = teacher_cache.TopTokens(torch.tensor([[65_535, 3]]), torch.tensor([[0.0, -90.0]]), torch.tensor([-torch.inf]))
    arrays = encoded(top, 65_536)
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.uint16)}
    back = decoded(arrays, torch.device("cpu"))
    assert back.tokens.tolist() == [[65_535, 3]]
    torch.testing.assert_close(back.log_probs[0, 0], torch.tensor(0.0), atol=1e-6, rtol=0)
    assert all(tensor.isfinite().all() for tensor in back[1:])
    assert encoded(top, 65_537)["tokens"].dtype == np.int32


def test_k_is_the_smallest_that_keeps_the_error(base, tmp_path):
    text = np.random.default_rng(0).integers(0, 300, 5000).astype(np.int32)
    rest = rest_mass(base, text)
    k = open_cache(tmp_path / "cache", base, text, error=0.35).k
    assert k % 16 == 0
    assert rest[k - 1] <= 0.35 < rest[k - 17]
    starts = np.linspace(0, 5000 - 64, 8).astype(int)
    blocks = torch.from_numpy(np.stack([text[start : start + 64] for start in starts]).astype(np.int64))
    probs = base(blocks).logits.softmax(-1).sort(-1, descending=True).values
    assert rest[k - 1] == pytest.approx(float(1 - probs[..., :k].sum(-1).mean()), abs=1e-5)
    assert open_cache(tmp_path / "cache", base, text[:100], error=0.35).k == k
    with pytest.raises(ValueError, match="more than half of the"):
        open_cache(tmp_path / "other", base, text, error=1e-6)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_damaged_file_is_computed_again(damage, base, ids, tmp_path, caplog):
    cache = TeacherCache(tmp_path / "cache", base, k=16)
    first = cache(ids)
    cache.store()
    (path,) = (tmp_path / "cache").glob("*.safetensors")
    again = TeacherCache(tmp_path / "cache", base, k=16) if damage == "gone" else None
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[: 100 if damage == "cut" else 0])
    with caplog.at_level(logging.WARNING):
        again = again or TeacherCache(tmp_path / "cache", base, k=16)
        found = again(ids)
    assert "computed again" in caplog.text
    assert all((old == new).all() for old, new in zip(first, found, strict=True))
    again.store()
    assert path.read_bytes() == content


def test_a_full_disk_does_not_end_the_run(base, ids, tmp_path, monkeypatch, caplog):
    cache = TeacherCache(tmp_path / "cache", base, k=16)
    top = cache(ids)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(teacher_cache, "_write", full)
    cache.store()
    assert "No space left on device" in caplog.text
    assert (cache(ids).tokens == top.tokens).all()


def cached(workplace: Path, folder: Path) -> dict[str, object]:
    options = recipe(workplace, output=str(folder / "run"))
    options["data"] |= {"cache": str(folder / "cache"), "teacher_cache": True, "teacher_error": 0.35}
    return options


def test_a_second_fit_finds_all_and_ends_the_same(workplace, tmp_path, monkeypatch):
    path = write_recipe(tmp_path, cached(workplace, tmp_path))
    caches = []
    original = Distil.close
    monkeypatch.setattr(Distil, "close", lambda self: (original(self), caches.append(self.cache))[0])
    for run in ("first", "second"):
        assert train.main(["--config", str(path), "--output", str(tmp_path / run)]) == 0
    assert [(each.found, each.computed) for each in caches] == [(0, 18), (18, 0)]
    assert outcome(tmp_path / "first") == outcome(tmp_path / "second")


class Killed(BaseException):
    """Ends a run where it stands."""


@pytest.mark.parametrize("buffered", [1, 10**6])
def test_a_run_that_died_ends_the_same_whatever_it_had_stored(buffered, workplace, tmp_path, monkeypatch):
    path = write_recipe(tmp_path, cached(workplace, tmp_path))
    monkeypatch.setattr(teacher_cache, "BUFFERED_TOKENS", buffered)
    original = Loop.train_step

    def dies(self: Loop, *given: object) -> None:
        original(self, *given)
        if self.step == 7:
            raise Killed

    arguments = ["--config", str(path), "--output", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "train_step", dies)
        with pytest.raises(Killed):
            train.main(arguments)
    assert train.main([*arguments, "--resume"]) == 0
    elsewhere = ["--output", str(tmp_path / "whole"), "--data.cache", str(tmp_path / "other")]
    assert train.main(["--config", str(path), *elsewhere]) == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"stage": "transfer", "steps": 1}], "for a stage distil, and there is none"),
        ([{"stage": "distil", "steps": 1, "objective": {"jsd": 1.0}}], "and jsd need all: leave one out"),
        ([{"stage": "distil", "steps": 1, "short_context": 64}], "leave out short_context"),
    ],
)
def test_what_a_cache_cannot_serve_is_refused(stages, message, workplace, tmp_path):
    with pytest.raises(attention.ConfigError, match=message):
        load_config(write_recipe(tmp_path, cached(workplace, tmp_path) | {"stages": stages}))
