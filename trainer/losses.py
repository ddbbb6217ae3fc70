"""Losses over a vocabulary, from hidden states: the logits of all tokens never exist at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

TERMS = ("kl", "ce", "reverse_kl", "jsd")
CHUNK_TOKENS = 512  # fewer make narrow products, which are slow; more do not fit a CPU's caches
CHUNK_LOGITS = 1 << 25  # of a chunk on an accelerator, where small kernels cost more than memory


class TopTokens(NamedTuple):
    """A teacher's distributions in short: the k likeliest of V > k tokens, and all others as one event.

    Attributes:
        tokens: (N, k), no token twice in a row.
        log_probs: (N, k) theirs.
        log_rest: (N,) of the mass of all others; with `log_probs`, that of 1 in sum.
    """

    tokens: Tensor
    log_probs: Tensor
    log_rest: Tensor

    def part(self, rows: slice) -> TopTokens:
        """Some of the N rows."""
        return TopTokens(*(tensor[rows] for tensor in self))


def last_hidden(model: PreTrainedModel, input_ids: Tensor, **inputs: Tensor) -> Tensor:
    """(B, T, E) what the output matrix is applied to."""
    return model.base_model(input_ids, use_cache=False, **inputs).last_hidden_state


def output_matrix(model: PreTrainedModel) -> Tensor:
    """(V, E)."""
    return model.get_output_embeddings().weight


def vocabulary_loss(
    hidden: Tensor,
    weight: Tensor,
    terms: Mapping[str, float],
    *,
    labels: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_top: TopTokens | None = None,
    beta: float = 0.5,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sums, over tokens, a weighted sum of losses between the student's distribution q and the teacher's p.

    With logits s = hidden @ weightᵀ and q = softmax(s), the gradients of the terms with respect to s are

    - kl, KL(p ‖ q): q − p
    - ce, −log q[label]: q − onehot(label)
    - reverse_kl, KL(q ‖ p): q · (log(q/p) − KL(q ‖ p))
    - jsd, β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = β p + (1 − β) q (arXiv 2306.13649, eq. 1):
      (1 − β) q · (log(q/m) − KL(q ‖ m))

    and are carried to `hidden` and `weight` chunk by chunk while the value is computed, so that the logits are made
    once and at most `chunk_tokens` × V of them exist. Differentiable once.

    Args:
        hidden: (N, E), the student's last hidden states.
        weight: (V, E), the student's output matrix.
        terms: weight of each term, by a name of `TERMS`; terms of weight 0 are neither computed nor returned.
        labels: (N,) next tokens, for ce.
        teacher_hidden: (N, E'), for all other terms; no gradient flows to the teacher.
        teacher_weight: (V, E').
        teacher_top: in place of both, with kl and ce only. Then kl is the divergence with all tokens outside a row's k
            as one event: a lower bound of the true one, which is larger by r · KL(p ‖ q | one of these), r being the
            teacher's mass there (the chain rule of relative entropy). No gradient tells these tokens apart.
        beta: β of jsd, above 0 and below 1: near 0 it pulls like kl, near 1 like reverse_kl.
        chunk_tokens: tokens whose logits exist at a time; None: `chunk_size`.

    Returns:
        The loss (a scalar), and each term without its weight, summed over tokens, without gradient.

    Raises:
        ValueError: for unknown terms, none, missing inputs, or a β out of range.
    """
    active = {name: factor for name, factor in terms.items() if factor}
    needs_teacher = any(name != "ce" for name in active)
    if not active or set(active) - set(TERMS):
        raise ValueError(f"terms must be among {TERMS}, at least one with a weight other than 0; got {dict(terms)}")
    if "ce" in active and labels is None:
        raise ValueError("ce needs labels")
    if teacher_top is not None and (set(active) - {"kl", "ce"}):
        raise ValueError(f"{sorted(set(active) - {'kl', 'ce'})} need all of the teacher's distribution")
    if needs_teacher and teacher_top is None and (teacher_hidden is None or teacher_weight is None):
        raise ValueError(f"{sorted(set(active) - {'ce'})} need teacher_hidden and teacher_weight")
    if "jsd" in active and not 0 < beta < 1:
        raise ValueError(f"beta must lie between 0 and 1, where jsd is 0 for any q; got {beta}")
    chunk = chunk_tokens or chunk_size(weight)
    if not needs_teacher:
        teacher_hidden = teacher_top = None
    loss, sums = _VocabularyLoss.apply(
        hidden, weight, labels, teacher_hidden, teacher_weight, teacher_top, active, beta, chunk
    )
    return loss, dict(zip(active, sums, strict=True))


def chunk_size(weight: Tensor) -> int:
    """How many tokens' logits, with an output matrix (V, E), suit its device at a time."""
    return CHUNK_TOKENS if weight.device.type == "cpu" else max(CHUNK_TOKENS, CHUNK_LOGITS // weight.shape[0])


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor | None,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        teacher_top: TopTokens | None,
        terms: dict[str, float],
        beta: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
        sums = hidden.new_zeros(len(terms), dtype=dtype)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            student = (hidden[part] @ weight.t()).to(dtype)
            teacher: Tensor | TopTokens | None = None
            if teacher_top is not None:
                teacher = teacher_top.part(part)
            elif teacher_hidden is not None:
                teacher = (teacher_hidden[part] @ teacher_weight.t()).to(dtype)
            values, grad = _chunk_terms(student, teacher, None if labels is None else labels[part], terms, beta)
            sums += values
            if needs_hidden:
                grad_hidden[part] = grad.to(weight.dtype) @ weight
            if needs_weight:
                grad_weight.addmm_(grad.t(), hidden[part].to(dtype))
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(sums)
        return sums @ sums.new_tensor(list(terms.values())), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, *[None] * 7


def _chunk_terms(
    student: Tensor,
    teacher: Tensor | TopTokens | None,
    labels: Tensor | None,
    terms: dict[str, float],
    beta: float,
) -> tuple[Tensor, Tensor]:
    """Sums (len(terms),) over a chunk's tokens, and the gradient (C, V) of the weighted sum. Overwrites its logits."""
    log_q = student.sub_(student.logsumexp(-1, keepdim=True))
    log_p = teacher.sub_(teacher.logsumexp(-1, keepdim=True)) if isinstance(teacher, Tensor) else None
    q = log_q.exp()
    p = None if log_p is None else log_p.exp()
    grad: Tensor | None = None
    values = []
    for name, factor in terms.items():
        if name == "kl" and isinstance(teacher, TopTokens):
            value, term_grad = _kl_of_top(teacher, log_q, q)
            values.append(value)
        elif name == "kl":
            log_ratio = log_p - log_q
            values.append(torch.dot(p.flatten(), log_ratio.flatten()))
            term_grad = torch.sub(q, p, out=log_ratio)
        elif name == "ce":
            picked = labels[:, None]
            values.append(-log_q.gather(1, picked).sum())
            term_grad = q.scatter_add(1, picked, torch.full_like(picked, -1, dtype=q.dtype))
        elif name == "reverse_kl":
            log_ratio = log_q - log_p
            each = (q * log_ratio).sum(-1, keepdim=True)
            values.append(each.sum())
            term_grad = log_ratio.sub_(each).mul_(q)
        else:
            log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
            log_ratio = log_q - log_m
            each = (q * log_ratio).sum(-1, keepdim=True)
            forward = torch.dot(p.flatten(), (log_p - log_m).flatten())
            values.append(beta * forward + (1 - beta) * each.sum())
            term_grad = log_ratio.sub_(each).mul_(q).mul_(1 - beta)
        grad = term_grad.mul_(factor) if grad is None else grad.add_(term_grad, alpha=factor)
    return torch.stack(values), grad


def _kl_of_top(top: TopTokens, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p ‖ q) with the rest as one event, summed over C tokens, and its gradient (C, V) at the logits.

    That is q − p at the k tokens, and q · (1 − r / q(rest)) at the others.
    """
    log_q_top = log_q.gather(1, top.tokens)
    log_q_rest = log_q.scatter(1, top.tokens, -torch.inf).logsumexp(-1)
    p, r = top.log_probs.exp(), top.log_rest.exp()
    value = torch.sum(p * (top.log_probs - log_q_top)) + torch.dot(r, top.log_rest - log_q_rest)
    grad = q - (log_q + (top.log_rest - log_q_rest)[:, None]).exp()
    return value, grad.scatter_(1, top.tokens, log_q_top.exp() - p)
