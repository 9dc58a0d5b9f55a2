"""A selector of one's own, with a Triton kernel of its own: a ball around each page's keys. Run: python examples/custom_selector.py

Everything it needs is here; no file of the package is touched. Its methods are tensor code of fixed shape and one operator, which runs a
Triton kernel on a GPU and plain PyTorch elsewhere, so eager, compiled and CUDA-graph decoding all take it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton
from transformers import LlamaConfig, LlamaForCausalLM

from twilight_ops import Candidates, Selector, TwilightConfig
from twilight_ops.integration import generate

BLOCK = 64  # pages a program


@triton.jit
def page_scores_kernel(
    q,  # [B, T, Hq, D]
    centers,  # [P + 1, Hkv, D]
    radii,  # [P + 1, Hkv]
    page_table,  # [B, M]
    seq_lens,  # [B]
    scores,  # [B, Hkv, M]
    reach,
    num_pages,
    max_pages,
    KV_HEADS: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (B * Hkv, blocks): BLOCK pages of one sequence and KV head, for every query row of the group."""
    batch = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    head = tl.program_id(0) % KV_HEADS
    page = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = (page < max_pages) & (page * PAGE < tl.load(seq_lens + batch))
    physical = tl.load(page_table + batch * max_pages + page, mask=live, other=-1)
    ball = tl.where(physical < 0, num_pages, physical).to(tl.int64) * KV_HEADS + head
    d = tl.arange(0, DIM_PAD)
    center = tl.load(centers + ball[:, None] * HEAD_DIM + d, mask=live[:, None] & (d < HEAD_DIM), other=0.0).to(tl.float32)
    radius = tl.load(radii + ball, mask=live, other=0.0)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    for row in range(QUERY_TOKENS * GROUP):
        at = (batch * QUERY_TOKENS + row // GROUP) * (KV_HEADS * GROUP) + head * GROUP + row % GROUP
        query = tl.load(q + at * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
        bound = (tl.sum(center * query, 1) + reach * tl.sqrt(tl.sum(query * query)) * radius).to(tl.float32)  # reach may be fp64
        best = tl.maximum(best, bound, propagate_nan=tl.PropagateNan.ALL)
    out = scores + tl.program_id(0).to(tl.int64) * max_pages + page
    tl.store(out, tl.where(live, best, -float("inf")), mask=page < max_pages)


def launch(kernel, q: Tensor, centers: Tensor, radii: Tensor, page_table: Tensor, seq_lens: Tensor, page_size: int, reach: float) -> Tensor:
    batch, query_tokens, heads, head_dim = q.shape
    kv_heads, max_pages = centers.shape[1], page_table.shape[1]
    scores = q.new_empty((batch, kv_heads, max_pages), dtype=torch.float32)
    kernel[batch * kv_heads, triton.cdiv(max_pages, BLOCK)](
        *(q.contiguous(), centers, radii, page_table, seq_lens, scores, reach, centers.shape[0] - 1, max_pages),
        KV_HEADS=kv_heads,
        QUERY_TOKENS=query_tokens,
        GROUP=heads // kv_heads,
        HEAD_DIM=head_dim,
        DIM_PAD=triton.next_power_of_2(head_dim),
        PAGE=page_size,
        BLOCK=BLOCK,
    )
    return scores


def plain(q: Tensor, centers: Tensor, radii: Tensor, page_table: Tensor, seq_lens: Tensor, page_size: int, reach: float) -> Tensor:
    table = page_table.long()  # an entry of -1 reads the spare page, the last one
    query = q.float().unflatten(2, (centers.shape[1], -1))  # [B, T, Hkv, G, D]
    around = query.norm(dim=-1, keepdim=True) * radii[table].transpose(1, 2)[:, None, :, None]  # [B, T, Hkv, G, M]
    bounds = torch.einsum("bthgd,bmhd->bthgm", query, centers[table].float()) + reach * around
    starts = torch.arange(table.shape[1], device=q.device) * page_size
    return bounds.amax((1, 3)).where(starts < seq_lens[:, None, None], -torch.inf)


@triton_op("custom_selector::page_scores", mutates_args=())
def page_scores(q: Tensor, centers: Tensor, radii: Tensor, page_table: Tensor, seq_lens: Tensor, page_size: int, reach: float) -> Tensor:
    """Largest q . center + reach |q| radius of each page over the group's rows, fp32 [B, Hkv, M]; -inf behind the last page."""
    if q.is_cuda:
        return launch(wrap_triton(page_scores_kernel), q, centers, radii, page_table, seq_lens, page_size, reach)
    return plain(q, centers, radii, page_table, seq_lens, page_size, reach)


@dataclass(frozen=True)
class PageBalls(Selector):
    """Ranks pages by how far a query reaches into the ball around their keys; reads half of what bounds in K's dtype take.

    Args:
        reach: of the radius, 0..1. With 1 a score bounds every logit of its page; 0.2 is about what the best of 16 random directions
            reaches in 128 dimensions.
    """

    token_budget: int = 128
    reach: float = 0.2
    name: ClassVar[str] = "page_balls"

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.reach <= 1:
            raise ValueError(f"PageBalls: reach: expected 0..1, got {self.reach}")

    def allocate(self, layer, previous):
        k_cache = layer.kv.k_cache
        rows = (k_cache.shape[0] + 1, layer.num_kv_heads)  # the last page takes what belongs nowhere, so that shapes are fixed
        return {
            "centers": k_cache.new_zeros(*rows, layer.head_dim, dtype=layer.dtype),
            "radii": k_cache.new_zeros(rows, dtype=torch.float32),
        }

    def append(self, k, layer, page_table, seq_lens, positions):
        # append_kv has stored the new rows: only the newest pages of each sequence, which hold them, have changed.
        k_cache, size = layer.kv.k_cache, layer.page_size
        spare, newest = k_cache.shape[0], min(page_table.shape[1], (k.shape[1] - 1) // size + 2)
        pages = (seq_lens[:, None] - 1).div(size, rounding_mode="floor") - torch.arange(newest, device=k.device)  # [B, N]
        physical = page_table.gather(1, pages.clamp(0, page_table.shape[1] - 1).long())
        physical = torch.where((pages >= 0) & (physical >= 0), physical, spare).long()
        slots = pages[..., None] * size + torch.arange(size, device=k.device)
        live = (slots < seq_lens[:, None, None])[:, :, None, :, None]
        stored = k_cache[physical.clamp(max=spare - 1)]  # [B, N, Hkv, S, D]
        keys = stored.float() if layer.scales is None else layer.scales.keys(stored, torch.float32)
        centers = (keys.where(live, 0.0).sum(3) / live.sum(3).clamp(min=1)).to(layer.dtype)
        distances = (keys - centers[..., None, :].float()).norm(dim=-1).where(live[..., 0], 0.0)
        layer.selector_state["centers"][physical] = centers
        layer.selector_state["radii"][physical] = distances.amax(-1)

    def select(self, q, layer, page_table, seq_lens, sm_scale):
        centers, radii = layer.selector_state["centers"], layer.selector_state["radii"]
        size, limits = layer.page_size, layer.limits(page_table, q.shape[1])
        scores = page_scores(q, centers, radii, page_table, seq_lens, size, self.reach)
        scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        # The first and the newest tokens that the configuration keeps come before everything else.
        starts = torch.arange(page_table.shape[1], device=q.device) * size
        lens = seq_lens[:, None, None]
        forced = (starts < lens) & ((starts < limits.sink_tokens) | (starts + size > lens - limits.recent_tokens))
        order = scores.masked_fill(forced, torch.inf).sort(dim=-1, descending=True, stable=True).indices

        tokens = (seq_lens[:, None] * limits.budget_fraction).ceil().clamp(min=limits.token_budget)
        if layer.policy.budget.head_token_budget is not None:
            tokens = layer.policy.budget.head_token_budget
        capacity, used = limits.page_capacity(size), (starts < lens).sum(-1)
        counts = torch.minimum(torch.maximum((tokens / size).ceil(), forced.sum(-1)), used).clamp(max=capacity)
        counts = counts.int().expand(scores.shape[:2]).contiguous()
        listed = torch.arange(capacity, device=q.device) < counts[..., None]
        indices = torch.where(listed, order[..., :capacity], len(starts)).sort(dim=-1).values
        return Candidates(torch.where(listed, indices, -1).int(), counts, size)

    def scan_bytes(self, layer, tokens):
        return [(2 * layer.head_dim + 4) / layer.page_size] * layer.num_kv_heads


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=1000
    )
    shape._attn_implementation = "twilight"
    return LlamaForCausalLM(shape).eval().to("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    model = tiny_model()
    prompt = torch.randint(0, 1000, (1, 600), device=model.device)
    config = TwilightConfig(selector=PageBalls(token_budget=128), top_p=0.9, dense_below=0)
    result = generate(model, prompt, config, max_new_tokens=16, capture="eager")
    print(result.tokens.tolist())
    print(result.budget)


if __name__ == "__main__":
    main()
