"""The chunked losses against the formulas written out."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.losses import TERMS, TopTokens, vocabulary_loss


def plain(
    hidden: Tensor, weight: Tensor, terms: dict[str, float], labels: Tensor, teacher_logits: Tensor, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The definitions, on all logits at once."""
    log_q, log_p = (hidden @ weight.T).log_softmax(-1), teacher_logits.log_softmax(-1)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return F.kl_div(log_b, log_a, log_target=True, reduction="sum")

    every = {
        "kl": kl(log_p, log_q),
        "ce": F.nll_loss(log_q, labels, reduction="sum"),
        "reverse_kl": kl(log_q, log_p),
        "jsd": beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m),
    }
    return sum(terms[name] * every[name] for name in terms), every


@given(
    tokens=st.integers(1, 12),
    vocabulary=st.integers(2, 30),
    width=st.integers(1, 8),
    chunk=st.integers(1, 13),
    terms=st.dictionaries(st.sampled_from(TERMS), st.floats(0.1, 3), min_size=1),
    beta=st.floats(0.05, 0.95),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=60)
def test_values_and_gradients_are_those_of_the_definition(tokens, vocabulary, width, chunk, terms, beta, seed):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = random(tokens, width).requires_grad_(), random(vocabulary, width).requires_grad_()
    teacher_hidden, teacher_weight = random(tokens, width + 1), random(vocabulary, width + 1)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    loss, sums = vocabulary_loss(
        hidden,
        weight,
        terms,
        labels=labels,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        beta=beta,
        chunk_tokens=chunk,
    )
    gradients = torch.autograd.grad(2.5 * loss, (hidden, weight))
    wanted, every = plain(hidden, weight, terms, labels, teacher_hidden @ teacher_weight.T, beta)
    torch.testing.assert_close(loss, wanted)
    for gradient, expected in zip(gradients, torch.autograd.grad(2.5 * wanted, (hidden, weight)), strict=True):
        torch.testing.assert_close(gradient, expected)
    assert set(sums) == set(terms)
    for name, value in sums.items():
        torch.testing.assert_close(value, every[name])


def test_the_kl_to_itself_is_zero_with_zero_gradient():
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4)
    loss, _ = vocabulary_loss(hidden, weight, {"kl": 1.0}, teacher_hidden=hidden.detach(), teacher_weight=weight)
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden.grad, torch.zeros(5, 4), atol=1e-6, rtol=0)


def test_extreme_logits_stay_finite():
    hidden = torch.full((2, 1), 300.0, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]])
    terms = dict.fromkeys(TERMS, 1.0)
    teacher = torch.full((2, 1), -300.0)
    loss, sums = vocabulary_loss(
        hidden, weight, terms, labels=torch.tensor([1, 2]), teacher_hidden=teacher, teacher_weight=weight
    )
    loss.backward()
    assert torch.stack(list(sums.values())).isfinite().all()
    assert hidden.grad.isfinite().all()


def test_frozen_output_matrix_gets_no_gradient():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4)
    loss, _ = vocabulary_loss(hidden, weight, {"ce": 1.0}, labels=torch.tensor([0, 1, 2]))
    loss.backward()
    assert weight.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize(
    ("terms", "message"),
    [({}, "at least one"), ({"kl": 0.0}, "at least one"), ({"mse": 1.0}, "mse"), ({"kl": 1.0}, r"\['kl'\] need")],
)
def test_what_is_missing_is_said(terms, message):
    with pytest.raises(ValueError, match=message):
        vocabulary_loss(torch.randn(2, 3), torch.randn(5, 3), terms)


def test_ce_needs_labels():
    with pytest.raises(ValueError, match="ce needs labels"):
        vocabulary_loss(torch.randn(2, 3), torch.randn(5, 3), {"ce": 1.0})


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_divergence_that_is_always_zero_is_refused(beta):
    hidden, weight = torch.randn(2, 3), torch.randn(5, 3)
    with pytest.raises(ValueError, match="between 0 and 1"):
        vocabulary_loss(hidden, weight, {"jsd": 1.0}, teacher_hidden=hidden, teacher_weight=weight, beta=beta)


def top_of(log_p: Tensor, k: int) -> TopTokens:
    top = log_p.topk(k)
    return TopTokens(top.indices, top.values, log_p.scatter(1, top.indices, -torch.inf).logsumexp(-1))


@given(
    tokens=st.integers(1, 12),
    vocabulary=st.integers(2, 30),
    chunk=st.integers(1, 13),
    ce=st.sampled_from([0.0, 0.7]),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_the_likeliest_tokens_with_the_rest_as_one_event(tokens, vocabulary, chunk, ce, data):
    """Value, gradients, and what is lost: r · KL(p ‖ q | one of the rest)."""
    k = data.draw(st.integers(1, vocabulary - 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = random(tokens, 4).requires_grad_(), random(vocabulary, 4).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    log_p = random(tokens, vocabulary).mul(2).log_softmax(-1)
    top = top_of(log_p, k)
    terms = {"kl": 1.3, "ce": ce}
    loss, sums = vocabulary_loss(hidden, weight, terms, labels=labels, teacher_top=top, chunk_tokens=chunk)
    log_q = (hidden @ weight.T).log_softmax(-1)
    masked = torch.full_like(log_q, 0.0).scatter(1, top.tokens, -torch.inf)
    events_p = torch.cat([top.log_probs, top.log_rest[:, None]], 1)
    events_q = torch.cat([log_q.gather(1, top.tokens), (log_q + masked).logsumexp(-1, keepdim=True)], 1)
    kl = (events_p.exp() * (events_p - events_q)).sum()
    wanted = 1.3 * kl + ce * F.nll_loss(log_q, labels, reduction="sum")
    torch.testing.assert_close(loss, wanted)
    gradients = (torch.autograd.grad(value, (hidden, weight)) for value in (loss, wanted))
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected)
    whole = (log_p.exp() * (log_p - log_q)).sum(-1)
    inside = ((log_p + masked).log_softmax(-1), (log_q + masked).log_softmax(-1))
    lost = torch.where(masked == 0, inside[0].exp() * (inside[0] - inside[1]), 0).sum(-1)
    torch.testing.assert_close(sums["kl"] + (top.log_rest.exp() * lost).sum(), whole.sum())
    assert sums["kl"] <= whole.sum() + 1e-9


def test_the_likeliest_tokens_are_not_enough_for_every_term():
    hidden, weight = torch.randn(2, 3), torch.randn(5, 3)
    top = top_of(torch.randn(2, 5).log_softmax(-1), 2)
    with pytest.raises(ValueError, match=r"\['jsd'\] need all of the teacher's distribution"):
        vocabulary_loss(hidden, weight, {"kl": 1.0, "jsd": 1.0}, teacher_top=top)
