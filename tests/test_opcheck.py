"""torch.library.opcheck on every operator: schema, aliasing, fakes and tracing with dynamic shapes."""

import pytest
import torch
from inputs import BY_MEANS, Shape, make_inputs, random_candidates

from twilight_ops import Shadow, backends
from twilight_ops.capacity import COUNTER_COLUMNS

DEVICES = ["cpu"] + (["cuda"] if backends.CUDA.name != "none" and torch.cuda.is_available() else [])
PLAIN = Shape((40, 0, 17), 4, 2, 64, 16, 1, torch.bfloat16)
SPECULATIVE = Shape((50, 3), 3, 1, 96, 32, 4, torch.float16)


def samples(device: str) -> list[tuple[str, str, dict]]:
    """(operator, what is special, keyword arguments): the only list of samples."""
    x = make_inputs(PLAIN, device=device)
    y = make_inputs(SPECULATIVE, device=device, bounds_dtype="uint8")
    # opcheck compares results with ==, so nothing in a sample may be NaN.
    for inputs in (x, y):
        for tensor in inputs.tensors().values():
            if tensor.is_floating_point():
                tensor.nan_to_num_(0.0)
        inputs.page_table.clamp_(0, inputs.k_cache.shape[0] - 1)
    tokens, token_counts = random_candidates(x, 1)
    pages, page_counts = random_candidates(y, 32)
    listed = {"indices": tokens, "counts": token_counts}
    paged = {"indices": pages, "counts": page_counts, "tokens_per_index": 32}
    half = torch.full((1, 4), 0.5, device=device)
    budgets = torch.tensor([8, 24], dtype=torch.int32, device=device)
    weights = torch.softmax(torch.randn(3, 1, 4, x.max_tokens, device=device), -1)
    counters = torch.zeros(2, COUNTER_COLUMNS, dtype=torch.int64, device=device)
    kept = torch.zeros(3, 2, x.max_tokens, dtype=torch.int32, device=device)
    kept_counts = torch.zeros(3, 2, dtype=torch.int32, device=device)
    positions = torch.tensor([[3], [-1], [5]], dtype=torch.int32, device=device)
    bare = dict.fromkeys((*Shadow._fields, "page_bounds"), None)
    return [
        ("append_kv", "everything", x.arguments("append_kv", k=x.keys[:, :2], v=x.values[:, :2])),
        ("append_kv", "positions", x.arguments("append_kv", k=x.keys[:, :1], v=x.values[:, :1], positions=positions)),
        ("append_kv", "uint8 bounds", y.arguments("append_kv", k=y.keys[:, :3], v=y.values[:, :3])),
        ("append_kv", "no shadow, no bounds", x.arguments("append_kv", k=x.keys[:, :1], v=x.values[:, :1], **bare)),
        ("select_pages", "bounds in q's dtype", x.arguments("select_pages", token_budget=32)),
        ("select_pages", "uint8 bounds, fraction", y.arguments("select_pages", token_budget=1, budget_fraction=0.5)),
        ("select_pages", "head budgets", x.arguments("select_pages", head_token_budget=budgets, sink_tokens=2, recent_tokens=3)),
        ("select_pages", "means", x.arguments("select_pages", token_budget=32, **BY_MEANS)),
        ("select_tokens", "fixed budget", x.arguments("select_tokens", token_budget=16)),
        ("select_tokens", "fraction", y.arguments("select_tokens", token_budget=1, budget_fraction=0.3)),
        ("select_tokens", "two levels", x.arguments("select_tokens", token_budget=4, page_fraction=0.5)),
        ("select_tokens", "head budgets", x.arguments("select_tokens", head_token_budget=budgets, sink_tokens=2, recent_tokens=3)),
        ("estimate_weights", "every token", x.arguments("estimate_weights")),
        ("estimate_weights", "a token list", x.arguments("estimate_weights", **listed)),
        ("estimate_weights", "a page list", y.arguments("estimate_weights", **paged)),
        ("estimate_weights", "capped", x.arguments("estimate_weights", softcap=30.0)),
        ("prune_top_p", "every token", {**x.arguments("prune_top_p", weights=weights), "top_p": 0.8}),
        ("prune_top_p", "tensor p", x.arguments("prune_top_p", weights=weights, head_top_p=half, sink_tokens=1)),
        ("attend_sparse", "dense", x.arguments("attend_sparse")),
        ("attend_sparse", "a token list", x.arguments("attend_sparse", **listed)),
        ("attend_sparse", "a page list", y.arguments("attend_sparse", **paged)),
        ("attend_sparse", "capped", x.arguments("attend_sparse", softcap=30.0)),
        ("decode_attention", "dense", x.arguments("decode_attention", selector="dense", top_p=1.0)),
        ("decode_attention", "full", x.arguments("decode_attention", selector="full", head_top_p=half)),
        ("decode_attention", "full, capped", x.arguments("decode_attention", selector="full", softcap=30.0)),
        (
            "decode_attention",
            "quest and every output",
            x.arguments(
                "decode_attention", selector="quest", token_budget=16, budget_counters=counters, kept_indices=kept, kept_counts=kept_counts
            ),
        ),
        ("decode_attention", "quest, uint8 bounds", y.arguments("decode_attention", selector="quest", token_budget=32)),
        ("decode_attention", "streaming", x.arguments("decode_attention", selector="streaming", token_budget=16, sink_tokens=2)),
        ("decode_attention", "page mean", x.arguments("decode_attention", selector="page_mean", token_budget=32)),
        (
            "decode_attention",
            "shadow prefix",
            x.arguments("decode_attention", selector="shadow_prefix", token_budget=4, budget_fraction=0.3, dense_below=20),
        ),
        (
            "decode_attention",
            "shadow prefix into a tensor of the caller",
            y.arguments(
                "decode_attention", selector="shadow_prefix", token_budget=20, out=torch.zeros(y.q.shape, dtype=y.q.dtype, device=device)
            ),
        ),
        (
            "decode_attention",
            "two levels",
            x.arguments("decode_attention", selector="shadow_prefix", token_budget=4, budget_fraction=0.1, page_fraction=0.5),
        ),
        (
            "decode_attention",
            "given",
            x.arguments("decode_attention", selector="given", indices=tokens, counts=token_counts),
        ),
    ]


NAMES = [f"{op}-{what}" for op, what, _ in samples("cpu")]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_opcheck(device, index):
    op, _, arguments = samples(device)[index]
    torch.library.opcheck(getattr(torch.ops.twilight, op).default, (), arguments)


def test_opcheck_samples_cover_every_operator():
    assert {op for op, _, _ in samples("cpu")} == set(backends.OPS)
