"""A base is given more positions, and learns far ones on short sequences."""

import json

import pydantic
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import attention
from attention.variant import position_table
from tests.attention.families import tiny
from tests.trainer.conftest import recipe, write_recipe
from tests.trainer.test_resume import outcome
from trainer import train
from trainer.config import PretrainConfig, load_config
from trainer.loop import Loop
from trainer.optim import build_optimizers
from trainer.positions import extend_positions, interpolated, repeated, skipping_positions, stretched
from trainer.setup import check_sizes
from trainer.stages import build_learner


@pytest.fixture
def base(workplace):
    return AutoModelForCausalLM.from_pretrained(workplace / "base").eval()


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=30)
    )


def test_rows_between_are_on_straight_lines_and_the_ends_stay():
    rows = torch.tensor([[0.0, 4.0], [2.0, 0.0], [6.0, 1.0]])
    wanted = torch.tensor([[0.0, 4.0], [1.0, 2.0], [2.0, 0.0], [4.0, 0.5], [6.0, 1.0]])
    torch.testing.assert_close(interpolated(rows, 5), wanted)
    torch.testing.assert_close(interpolated(rows, 3), rows)


def test_rows_beyond_repeat_the_last_half():
    rows = torch.arange(4.0)[:, None]
    assert repeated(rows, 9)[:, 0].tolist() == [0, 1, 2, 3, 2, 3, 2, 3, 2]
    assert repeated(rows, 4)[:, 0].tolist() == [0, 1, 2, 3]


def test_the_last_half_is_stretched_and_the_first_stays():
    rows = torch.tensor([7.0, 3.0, 1.0, 5.0])[:, None]
    assert stretched(rows, 7)[:, 0].tolist() == [7, 3, 1, 2, 3, 4, 5]
    assert stretched(rows, 4)[:, 0].tolist() == rows[:, 0].tolist()


@pytest.mark.parametrize(("start", "kept"), [("repeat", 64), ("stretch", 32)])
def test_with_its_old_rows_kept_a_base_reads_as_before(base, start, kept):
    ids = torch.randint(0, 300, (1, kept), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = base(ids).logits
        extend_positions(base, 200, start)
        assert (base(ids).logits == before).all()
        assert base(ids.repeat(1, 3)).logits.isfinite().all()
    assert position_table(base).weight.shape == (200, 32)
    assert base.config.max_position_embeddings == base.config.n_positions == 200


def test_rows_that_a_family_keeps_before_its_positions_stay():
    base = tiny("opt")
    table, ids = position_table(base).weight.detach().clone(), torch.arange(1, 31)[None]
    with torch.no_grad():
        before = base(ids).logits
        extend_positions(base, 96, "repeat")
        assert (base(ids).logits == before).all()
        assert base(ids.repeat(1, 3)).logits.isfinite().all()
    rows = position_table(base).weight
    assert (rows[: len(table)] == table).all()
    assert len(rows) == len(table) + 96 - 48


def test_what_cannot_be_extended_is_said(base):
    with pytest.raises(ValueError, match="not be fewer than the model's 64; got 32"):
        extend_positions(base, 32, "interpolate")
    with pytest.raises(ValueError, match="learned table of positions, which llama has not"):
        extend_positions(llama(), 4096, "interpolate")


def test_stages_that_need_a_table_are_named(workplace, tmp_path):
    stages = [{"stage": "pretrain", "steps": 1, "context": 16, "skip_positions": True, "position_lr": 1e-3}] * 2
    config = load_config(write_recipe(tmp_path, recipe(workplace, stages=stages, attention=None, output="o")))
    with pytest.raises(ValueError, match=r"(?s)stages\.0\.position_lr needs a .*stages\.1\.skip_positions needs a"):
        check_sizes(config, llama())


def test_positions_skip_once_and_reach_the_last():
    torch.manual_seed(0)
    positions = skipping_positions(torch.zeros(2000, 10), 40)
    steps = positions.diff(dim=1)
    assert positions.shape == (2000, 10)
    assert (positions[:, 0] == 0).all()
    assert (steps >= 1).all()
    assert ((steps > 1).sum(1) <= 1).all()
    assert set(positions.unique().tolist()) == set(range(40))
    assert torch.bincount((steps > 1).nonzero()[:, 1], minlength=9).min() > 100  # every place of the skip


def test_a_skip_changes_positions_alone(base):
    """Not which tokens are seen: transformers takes positions that skip for several sequences side by side."""
    ids = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    learner = build_learner(PretrainConfig(steps=1, skip_positions=True), base, None).eval()
    torch.manual_seed(5)
    loss = learner(ids).loss
    torch.manual_seed(5)
    positions = skipping_positions(ids, 64)
    assert (positions.diff() > 1).any()
    with torch.no_grad():
        table = position_table(base).weight
        inputs = base.transformer.wte(ids) + table[positions] - table[:20]  # the model adds the last by itself
        logits = base(inputs_embeds=inputs).logits[:, :-1]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss.detach(), wanted)


def test_position_embeddings_have_a_rate_of_their_own(base):
    stage = PretrainConfig(steps=1, muon=True, lr=1e-3, position_lr=4e-3)
    learner = build_learner(stage, base, None)
    groups = [group for optimizer in build_optimizers(stage, learner) for group in optimizer.param_groups]
    named = {group["name"]: group for group in groups}
    assert [each is position_table(base).weight for each in named["position_lr"]["params"]] == [True]
    assert named["position_lr"]["lr"] == 4e-3
    counted = sum(len(group["params"]) for group in groups)
    assert counted == len(list(base.parameters()))


def test_some_sequences_are_read_in_pieces(base):
    """Each piece is a text of its own, and a forward pass weighs the same whichever way it reads."""
    ids = torch.randint(0, 300, (2, 48), generator=torch.Generator().manual_seed(0))

    def losses(**options: object) -> list[float]:
        learner = build_learner(PretrainConfig(steps=1, context=48, **options), base, None).eval()
        torch.manual_seed(0)
        return [learner(ids).loss.item() for _ in range(40)]

    with torch.no_grad():
        logits = base(ids.view(6, 16)).logits[:, :-1]
    pieces = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.view(6, 16)[:, 1:].flatten())
    whole, short = losses()[0], 2 * 47 * float(pieces)
    assert abs(whole - short) > 1e-3
    assert losses(short_context=16, short_share=1.0) == pytest.approx([short] * 40)
    with torch.no_grad():
        first, last = (base(part).logits[:, :-1].flatten(0, 1) for part in (ids[:1].view(3, 16), ids[1:]))
    each = [
        47 * float(torch.nn.functional.cross_entropy(logits, labels.flatten()))
        for logits, labels in ((first, ids[:1].view(3, 16)[:, 1:]), (last, ids[1:, 1:]))
    ]
    assert losses(short_context=16) == pytest.approx([sum(each)] * 40)  # half of two are one, and no chance
    some = losses(short_context=16, short_share=0.25)
    assert {round(loss, 2) for loss in some} == {round(whole, 2), round(sum(each), 2)}
    assert 10 <= [round(loss, 2) for loss in some].count(round(whole, 2)) <= 30
    with pytest.raises(pydantic.ValidationError, match=r"short_context must divide the contexts \[48, 60\]"):
        PretrainConfig(steps=1, batch_size=5, context=48, final_context=60, short_context=16)


class Killed(BaseException):
    """Ends a run where it stands."""


def test_a_run_with_more_positions_died_and_ends_the_same(workplace, tmp_path, monkeypatch):
    short = {"stage": "pretrain", "steps": 4, "batch_size": 4, "context": 32, "skip_positions": True, "muon": True}
    long = {"stage": "pretrain", "steps": 2, "batch_size": 1, "context": 128, "position_lr": 1e-2, "short_context": 32}
    options = recipe(workplace, stages=[short, long], attention=None, positions=128, output=str(tmp_path / "whole"))
    path = write_recipe(tmp_path, options)
    assert train.main(["--config", str(path)]) == 0
    config = json.loads((tmp_path / "whole/model/config.json").read_text())
    assert config["n_positions"] == 128
    original = Loop.train_step

    def dies(self: Loop, *given: object) -> None:
        original(self, *given)
        if self.step == 3:
            raise Killed

    arguments = ["--config", str(path), "--output", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "train_step", dies)
        with pytest.raises(Killed):
            train.main(arguments)
    assert train.main([*arguments, "--resume"]) == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_mistake_in_positions_is_a_sentence(workplace, tmp_path, capsys):
    with pytest.raises(attention.ConfigError, match="a variant has its base's"):
        load_config(write_recipe(tmp_path, recipe(workplace, positions=128, output="o")))
    stages = [{"stage": "pretrain", "steps": 1, "context": 16}]
    path = write_recipe(tmp_path, recipe(workplace, stages=stages, attention=None, output=str(tmp_path / "run")))
    assert train.main(["--config", str(path), "--positions", "32"]) == 2
    assert "must not be fewer than the model's 64; got 32" in capsys.readouterr().err
