"""Dense attention of the kernel is PyTorch's, and pruning to all of the weight is dense. Run in kernel-builder's test shell."""

import pytest
import torch

import twilight_ops as ops


@pytest.mark.kernels_ci
@pytest.mark.parametrize("selector, top_p", [("dense", 1.0), ("full", 1.0), ("full", 0.9999)])
def test_attention_over_a_paged_cache_is_that_of_pytorch(selector, top_p):
    torch.manual_seed(0)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    tokens, heads, dim, page = 500, 2, 64, 16
    pages = -(-tokens // page)

    def zeros(*shape, dtype=dtype):
        return torch.zeros(shape, dtype=dtype, device=device)

    kv = ops.KV(zeros(pages, heads, page, dim), zeros(pages, heads, page, dim))
    order, prefix = (zeros(heads, dim) + torch.arange(dim, device=device)).int(), zeros(heads, dtype=torch.int32) + 16
    shadow = ops.Shadow(
        zeros(pages, heads, page * dim // 2, dtype=torch.uint8), zeros(pages, heads, page, 2, dtype=torch.bfloat16), order, prefix
    )
    paging = ops.Paging(torch.randperm(pages, device=device).int().view(1, -1), torch.tensor([tokens], dtype=torch.int32, device=device))
    k, v = torch.randn(2, 1, tokens, heads, dim, device=device).to(dtype)
    ops.append_kv(k, v, kv, paging, shadow=shadow)
    q = torch.randn(1, 1, 4 * heads, dim, device=device).to(dtype)
    policy = ops.Policy(selector, ops.Budget(tokens, 1.0), ops.Pruning(top_p), ops.Always(1, 1))
    out, _ = ops.decode_attention(q, kv, paging, policy, dim**-0.5, shadow)
    dense = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), enable_gqa=True)
    torch.testing.assert_close(out, dense.transpose(1, 2), atol=2e-2, rtol=2e-2)
