"""Argument checks shared by the fakes, the Triton launchers and the PyTorch fallback.

`csrc/checks.h` is the C++ twin: same checks, same words. A message always reads
`twilight::<op>: <argument>: expected <what>, got <what>`.
"""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..arguments import (
    FP8,
    KV,
    Always,
    Budget,
    Candidates,
    Observation,
    PageBounds,
    PageLevel,
    PageMeans,
    Paging,
    Pruning,
    Scales,
    Shadow,
)
from ..capacity import MAX_TABLE_TOKENS

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 96, 128, 256)
PAGE_SIZES = (16, 32, 64)
MAX_QUERY_TOKENS = 8
PAGE_ALIGNMENT = 16  # bytes: what vector loads need
MAX_PAGE_STRIDE = 1 << 32  # bytes
# Expected and got.
NO_BACKWARD = ("a tensor that needs no gradient (there is no backward: call under torch.no_grad())", "requires_grad=True")


class Checker:
    """Binds the size symbols (B, Hkv, D, ...) of one call and raises on the first argument that disagrees.

    Args:
        like: the first tensor that the operator checks, which refuses a None in its place.
    """

    def __init__(self, op: str, like: Tensor | None):
        self.op = op
        self.device = None if like is None else like.device
        self.sizes: dict[str, int] = {}
        # An exported program is for inference, whatever its parameters ask for; the kernels look again when it runs.
        self.grad_enabled = torch.is_grad_enabled() and not torch.compiler.is_exporting()
        self.differentiable: str | None = None  # the first argument that asks for a gradient

    def fail(self, argument: str, expected: str, got: object) -> NoReturn:
        raise RuntimeError(f"{add_op_namespace_prefix(self.op)}: {argument}: expected {expected}, got {got}")

    def require(self, ok: bool, argument: str, expected: str, got: object) -> None:
        if not ok:
            self.fail(argument, expected, got)

    def tensor(
        self,
        argument: str,
        tensor: Tensor | None,
        dims: Sequence[str | int],
        dtypes: Sequence[torch.dtype] | torch.dtype,
        layout: str = "contiguous",
    ) -> None:
        """Checks device, dtype, rank, sizes and strides; a symbol seen for the first time is bound, later ones must agree.

        Args:
            layout: "contiguous", "rows" (any strides but the last) or "paged" ([P, Hkv, ..] with any strides of pages and heads).
        """
        if isinstance(dtypes, torch.dtype):
            dtypes = (dtypes,)
        if tensor is None:
            self.fail(argument, "a tensor", None)
        self.watch(argument, tensor)
        self.require(tensor.device == self.device, argument, f"device {self.device}", tensor.device)
        wanted_dtypes = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        self.require(tensor.dtype in dtypes, argument, f"dtype {wanted_dtypes}", str(tensor.dtype).removeprefix("torch."))
        shape = "[" + ", ".join(str(d) for d in dims) + "]"
        got = "[" + ", ".join(str(s) for s in tensor.shape) + "]"
        self.require(tensor.dim() == len(dims), argument, f"shape {shape}", got)
        for dim, size in zip(dims, tensor.shape, strict=True):
            if isinstance(dim, str):
                known = self.sizes.setdefault(dim, size)
                self.require(size == known, argument, f"shape {shape} with {dim} = {known}", got)
            else:
                self.require(size == dim, argument, f"shape {shape}", got)
        if layout == "rows":
            self.require(tensor.stride(-1) == 1, argument, "stride 1 in the last dimension", f"strides {list(tensor.stride())}")
        elif not tensor.is_contiguous():
            self.require(layout == "paged", argument, "a contiguous tensor", f"strides {list(tensor.stride())}")
            self._page_strides(argument, tensor)

    def paged(self, argument: str, tensor: Tensor | None, dims: Sequence[str | int], dtypes: Sequence[torch.dtype] | torch.dtype) -> None:
        """A tensor of the cache, [P, Hkv, ..]: contiguous in each (page, head); pages and heads lie any multiple of 16 bytes apart."""
        self.tensor(argument, tensor, dims, dtypes, layout="paged")

    def _page_strides(self, argument: str, tensor: Tensor) -> None:
        sizes, strides, itemsize = tensor.shape, tensor.stride(), tensor.itemsize
        size = 1  # elements of a (page, head)
        for i in reversed(range(2, tensor.dim())):
            fits = sizes[i] == 1 or strides[i] == size
            self.require(fits, argument, "contiguous dimensions behind pages and heads", f"strides {list(strides)}")
            size *= sizes[i]
        for i in range(2):
            stride = strides[i] * itemsize
            self.require(
                sizes[i] == 1 or (stride % PAGE_ALIGNMENT == 0 and size * itemsize <= stride < MAX_PAGE_STRIDE),
                argument,
                f"page and head strides that are multiples of 16 bytes, from {size * itemsize} bytes to 4 GiB",
                f"strides {list(strides)} of {itemsize} bytes",
            )
        offset = tensor.storage_offset() * itemsize
        self.require(offset % PAGE_ALIGNMENT == 0, argument, "a view that starts at a multiple of 16 bytes", f"byte {offset}")

    def watch(self, argument: str, tensor: Tensor) -> None:
        """Notes a tensor that asks for a gradient; `no_gradients` refuses it."""
        if self.grad_enabled and self.differentiable is None and tensor.requires_grad:
            self.differentiable = argument

    def no_gradients(self) -> None:
        """The last check of every operator.

        It refuses at the call, not in the backward pass: operators that write their arguments can have no autograd formula, and an
        autograd kernel written in Python costs every call under `torch.no_grad` more than its own dispatch.
        """
        if self.differentiable is not None:
            self.fail(self.differentiable, *NO_BACKWARD)

    def one_of(self, argument: str, value: object, allowed: Sequence[object]) -> None:
        self.require(value in allowed, argument, "one of " + ", ".join(str(a) for a in allowed), value)

    def at_least(self, argument: str, value: int, minimum: int) -> None:
        self.require(value >= minimum, argument, f">= {minimum}", value)

    def geometry(self) -> None:
        """Checks head_dim, page_size, group size and number of query tokens, whichever are bound."""
        if "D" in self.sizes:
            self.one_of("head_dim", self.sizes["D"], HEAD_DIMS)
        if "S" in self.sizes:
            self.one_of("page_size", self.sizes["S"], PAGE_SIZES)
        if "Hq" in self.sizes and "Hkv" in self.sizes:
            heads, kv_heads = self.sizes["Hq"], self.sizes["Hkv"]
            fits = kv_heads > 0 and heads % kv_heads == 0 and heads > 0
            self.require(fits, "q", f"num_qo_heads a multiple of num_kv_heads = {kv_heads}", heads)

    def query(self, q: Tensor) -> None:
        self.tensor("q", q, ("B", "T", "Hq", "D"), FLOAT_DTYPES, layout="rows")
        tokens = self.sizes["T"]
        self.require(1 <= tokens <= MAX_QUERY_TOKENS, "q", f"1 to {MAX_QUERY_TOKENS} query tokens", tokens)

    def paging(self, paging: Paging) -> None:
        page_table, seq_lens = paging
        self.tensor("page_table", page_table, ("B", "M"), torch.int32)
        self.tensor("seq_lens", seq_lens, ("B",), torch.int32)
        pages, page_size = page_table.shape[1], self.sizes["S"]
        # A symbolic size would become a guard; the kernel checks the real one.
        if isinstance(pages, int) and isinstance(page_size, int):
            most = MAX_TABLE_TOKENS // page_size
            self.require(pages <= most, "page_table", f"at most {most} pages of {page_size} tokens", pages)

    def cache(self, kv: KV, dtype: torch.dtype) -> None:
        self.paged("k_cache", kv.k_cache, ("P", "Hkv", "S", "D"), (dtype, FP8))
        self.paged("v_cache", kv.v_cache, ("P", "Hkv", "S", "D"), kv.k_cache.dtype)

    def scales(self, scales: Scales | None, kv: KV) -> None:
        dims: tuple[tuple[str | int, ...], ...] = (("Hkv",), ("Hkv",), ("Hkv", "D"))
        stored = str(kv.k_cache.dtype).removeprefix("torch.")
        for name, tensor, shape in zip(Scales._fields, scales or Scales(), dims, strict=True):
            if tensor is not None:
                self.require(kv.is_fp8, name, f"None, because k_cache is {stored}", "a tensor")
                self.tensor(name, tensor, shape, torch.float32)

    def shadow(self, shadow: Shadow | None) -> None:
        """All of a shadow but its centre comes together; `S` and `D` must already be bound or are taken from k_scale."""
        for name in Shadow._fields[:4]:
            together = "a tensor (k_quant, k_scale, channel_order and prefix_channels come together)"
            self.require(getattr(shadow, name, None) is not None, name, together, None)
        assert shadow is not None
        self.paged("k_scale", shadow.k_scale, ("P", "Hkv", "S", 2), torch.bfloat16)
        self.tensor("channel_order", shadow.channel_order, ("Hkv", "D"), torch.int32)
        self.tensor("prefix_channels", shadow.prefix_channels, ("Hkv",), torch.int32)
        self.paged("k_quant", shadow.k_quant, ("P", "Hkv", self.sizes["S"] * self.sizes["D"] // 2), torch.uint8)
        if shadow.k_center is not None:
            self.tensor("k_center", shadow.k_center, ("Hkv", "D"), torch.float32)

    def bounds(self, bounds: PageBounds | None, dtype: torch.dtype, needed: str | None = None) -> None:
        """`needed` says why there must be some, in the words of a message."""
        page_bounds, bounds_scale = (None, None) if bounds is None else bounds
        if page_bounds is None:
            self.require(needed is None, "page_bounds", str(needed), None)
            self.require(bounds_scale is None, "bounds_scale", "None, because page_bounds is None", "a tensor")
            return
        self.paged("page_bounds", page_bounds, ("P", "Hkv", 2, "D"), (dtype, torch.uint8))
        if page_bounds.dtype == torch.uint8:
            self.require(bounds_scale is not None, "bounds_scale", "a tensor, because page_bounds is uint8", None)
            self.paged("bounds_scale", bounds_scale, ("P", "Hkv", 2), torch.bfloat16)
        else:
            self.require(
                bounds_scale is None, "bounds_scale", f"None, because page_bounds is {str(dtype).removeprefix('torch.')}", "a tensor"
            )

    def means(self, means: PageMeans | None, needed: str | None = None) -> None:
        """`needed` says why there must be some, in the words of a message."""
        page_means, means_scale = means or (None, None)
        if page_means is None and means_scale is None:
            self.require(needed is None, "page_means", str(needed), None)
            return
        self._together("means_scale", means_scale, "page_means", page_means)
        self.paged("means_scale", means_scale, ("P", "Hkv", 2), torch.bfloat16)
        self.paged("page_means", page_means, ("P", "Hkv", self.sizes["D"] // 2), torch.uint8)

    def candidates(self, candidates: Candidates, page_size: int | None) -> None:
        indices, counts, tokens_per_index = candidates
        self._together("counts", counts, "indices", indices)
        self.one_of("tokens_per_index", tokens_per_index, (1, *PAGE_SIZES) if page_size is None else (1, page_size))
        if indices is not None:
            self.tensor("indices", indices, ("B", "Hkv", "C"), torch.int32)
            self.tensor("counts", counts, ("B", "Hkv"), torch.int32)

    def observation(self, observe: Observation, max_tokens: int, counter_columns: int) -> None:
        if observe.budget_counters is not None:
            self.tensor("budget_counters", observe.budget_counters, ("Hkv", counter_columns), torch.int64)
        self._together("kept_counts", observe.kept_counts, "kept_indices", observe.kept_indices)
        if observe.kept_indices is not None:
            self.tensor("kept_indices", observe.kept_indices, ("B", "Hkv", max_tokens), torch.int32)
            self.tensor("kept_counts", observe.kept_counts, ("B", "Hkv"), torch.int32)

    def _together(self, argument: str, tensor: Tensor | None, other: str, other_tensor: Tensor | None) -> None:
        self.require((tensor is None) == (other_tensor is None), argument, f"given exactly when {other} is given", "one without the other")

    def budget(self, budget: Budget, always: Always) -> None:
        self.at_least("token_budget", budget.token_budget, 1)
        fraction = budget.budget_fraction
        self.require(0.0 <= fraction <= 1.0, "budget_fraction", "0 <= budget_fraction <= 1", fraction)
        self.always(always)
        if budget.head_token_budget is not None:
            self.tensor("head_token_budget", budget.head_token_budget, ("Hkv",), torch.int32)

    def level(self, level: PageLevel) -> None:
        self.require(0.0 < level.page_fraction <= 1.0, "page_fraction", "0 < page_fraction <= 1", level.page_fraction)
        self.at_least("min_scored_tokens", level.min_scored_tokens, 0)

    def always(self, always: Always) -> None:
        self.at_least("sink_tokens", always.sink_tokens, 0)
        self.at_least("recent_tokens", always.recent_tokens, 0)

    def pruning(self, pruning: Pruning) -> None:
        top_p, p = pruning
        self.require(0.0 < top_p <= 1.0, "top_p", "0 < top_p <= 1", top_p)
        if p is None:
            return
        self.watch("head_top_p", p)
        batch, heads = self.sizes["B"], self.sizes["Hq"]
        self.require(p.device == self.device, "head_top_p", f"device {self.device}", p.device)
        self.require(p.dtype == torch.float32, "head_top_p", "dtype float32", str(p.dtype).removeprefix("torch."))
        fits = p.dim() == 2 and p.shape[0] in (1, batch) and p.shape[1] in (1, heads)
        self.require(fits, "head_top_p", f"shape [B or 1, Hq or 1] with B = {batch}, Hq = {heads}", list(p.shape))

    def scale(self, sm_scale: float) -> None:
        self.require(sm_scale > 0.0 and sm_scale < float("inf"), "sm_scale", "a positive finite number", sm_scale)

    def softcap(self, softcap: float | None) -> None:
        if softcap is not None:
            self.require(1e-30 <= softcap <= 1e30, "softcap", "None or a number from 1e-30 to 1e30", softcap)
