"""What a variant's drafts are worth to its base: counted by hand, and against transformers' assisted decoding."""

import numpy as np
import pytest
import torch
from transformers.generation.candidate_generator import AssistedCandidateGenerator

import attention
from trainer.drafting import count_drafts, measure_drafting


def test_rounds_counted_by_hand():
    agreed = np.array([[1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1], [0] * 12]).astype(bool)
    # The first text grows by 3, as two hold, and by 5, as all four hold; there is no room for another draft and the
    # token after it. The second grows by 1 in each of 8 rounds.
    found = count_drafts(agreed)
    assert found.tokens_a_round == pytest.approx((8 + 8) / (2 + 8))
    assert found.error == pytest.approx(np.std([8 / 2, 8 / 8]))
    assert (found.draft, found.prompts, found.length) == (4, 2, 12)
    assert count_drafts(agreed[:1], draft=1).tokens_a_round == pytest.approx(12 / 7)
    assert count_drafts(agreed[:1]).error is None


def test_a_model_that_drafts_for_itself_is_always_right(workplace):
    base = attention.load(workplace / "base")[0]
    (found,) = measure_drafting([base], base, torch.arange(6).view(3, 2), 23)
    assert (found.tokens_a_round, found.error) == (5.0, 0.0)


@pytest.mark.parametrize("method", ["masks", "performer"])
def test_as_many_rounds_as_assisted_decoding_takes(workplace, method, monkeypatch):
    base, length, drafts = attention.load(workplace / "base")[0], 41, []
    student = attention.convert(base, attention.config_from_dict({"method": method}))
    generator = torch.Generator().manual_seed(4)
    for parameter in student.parameters():  # or it would be right, or wrong, all the time
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    get_candidates = AssistedCandidateGenerator.get_candidates

    def noting(self, input_ids, **kwargs):
        drafts.append(input_ids.shape[1])
        return get_candidates(self, input_ids, **kwargs)

    monkeypatch.setattr(AssistedCandidateGenerator, "get_candidates", noting)
    student.generation_config.num_assistant_tokens = 4
    student.generation_config.num_assistant_tokens_schedule = "constant"
    student.generation_config.assistant_confidence_threshold = 0.0
    prompt = torch.tensor([[5, 9]])
    options = {"max_new_tokens": length, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    base.generate(prompt, assistant_model=student, **options)
    (found,) = measure_drafting([student], base, prompt, length)
    starts = [start - 2 for start in drafts if start - 2 + 4 < length]  # whose whole draft fits
    end = next(start - 2 for start in [*drafts, length + 2] if start - 2 > starts[-1])
    assert found.tokens_a_round == pytest.approx(end / len(starts))
    assert 1 < found.tokens_a_round < 5
