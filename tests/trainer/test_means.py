"""Gates on a text, not at an input of zero."""

import torch

import attention
from trainer.means import text_means


def variant(workplace, **options):
    base, _ = attention.load(workplace / "base")
    return attention.convert(base, attention.config_from_dict(options)).eval()


NSA = {"method": "nsa", "compress_block": 8, "compress_stride": 4, "select_block": 8, "num_selected": 3, "window": 8,
       "select_every": 4}  # fmt: skip


def test_means_are_those_of_all_tokens_that_were_read(workplace):
    model = variant(workplace, **NSA)
    mechanism = model.mechanisms[1]
    torch.manual_seed(0)
    mechanism.gate_weight.data.normal_(std=2)
    texts = [torch.randint(1, 300, (2, 20)), torch.randint(1, 300, (1, 7))]
    with torch.no_grad(), text_means(model) as means:
        for ids in texts:
            model(ids, use_cache=False)
    gates = []
    for ids in texts:
        for row in ids:
            _, q, k, x = attention.mechanism_inputs(model, row[None])[1]
            gates.append(mechanism.attention_parts(q, k, x)["gates"][0].transpose(0, 1))  # (T, H, 3)
    expected = torch.cat(gates).mean(0)
    for branch, name in enumerate(mechanism.branches):
        found = torch.tensor(means[1][f"{name}_gate"])
        torch.testing.assert_close(found, expected[:, branch].double(), atol=1e-5, rtol=1e-5, check_dtype=False)
        assert not torch.allclose(found.float(), torch.tensor(mechanism.summary()[f"{name}_gate"]), atol=0.01)


def test_nothing_is_recorded_where_no_layer_depends_on_the_text(workplace):
    model = variant(workplace, method="masks", candidates=["window(4)"])
    with torch.no_grad(), text_means(model) as means:
        model(torch.randint(1, 300, (1, 9)), use_cache=False)
    assert means == []
    assert not any(mechanism._forward_pre_hooks for mechanism in model.mechanisms)
