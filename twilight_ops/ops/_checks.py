"""Argument checks shared by the fakes, the Triton launchers and the PyTorch fallback.

`csrc/checks.h` is the C++ twin: same checks, same words. A message always reads
`twilight::<op>: <argument>: expected <what>, got <what>`.
"""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ..capacity import MAX_TABLE_TOKENS

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 96, 128, 256)
PAGE_SIZES = (16, 32, 64)
MAX_QUERY_TOKENS = 8
# Expected and got.
NO_BACKWARD = ("a tensor that needs no gradient (there is no backward: call under torch.no_grad())", "requires_grad=True")


class Checker:
    """Binds the size symbols (B, Hkv, D, ...) of one call and raises on the first argument that disagrees."""

    def __init__(self, op: str, like: Tensor):
        self.op = op
        self.device = like.device
        self.sizes: dict[str, int] = {}
        # An exported program is for inference, whatever its parameters ask for; the kernels look again when it runs.
        self.grad_enabled = torch.is_grad_enabled() and not torch.compiler.is_exporting()
        self.differentiable: str | None = None  # the first argument that asks for a gradient

    def fail(self, argument: str, expected: str, got: object) -> NoReturn:
        raise RuntimeError(f"twilight::{self.op}: {argument}: expected {expected}, got {got}")

    def require(self, ok: bool, argument: str, expected: str, got: object) -> None:
        if not ok:
            self.fail(argument, expected, got)

    def tensor(
        self,
        argument: str,
        tensor: Tensor | None,
        dims: Sequence[str | int],
        dtypes: Sequence[torch.dtype] | torch.dtype,
        contiguous: bool = True,
    ) -> None:
        """Checks device, dtype, rank and sizes; a symbol seen for the first time is bound, later ones must agree."""
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
        if contiguous:
            self.require(tensor.is_contiguous(), argument, "a contiguous tensor", f"strides {list(tensor.stride())}")
        else:
            self.require(tensor.stride(-1) == 1, argument, "stride 1 in the last dimension", f"strides {list(tensor.stride())}")

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
            self.require(
                kv_heads > 0 and heads % kv_heads == 0 and heads > 0,
                "q",
                f"num_qo_heads a multiple of num_kv_heads = {kv_heads}",
                heads,
            )

    def query(self, q: Tensor) -> None:
        self.tensor("q", q, ("B", "T", "Hq", "D"), FLOAT_DTYPES, contiguous=False)
        tokens = self.sizes["T"]
        self.require(1 <= tokens <= MAX_QUERY_TOKENS, "q", f"1 to {MAX_QUERY_TOKENS} query tokens", tokens)

    def paging(self, page_table: Tensor, seq_lens: Tensor) -> None:
        self.tensor("page_table", page_table, ("B", "M"), torch.int32)
        self.tensor("seq_lens", seq_lens, ("B",), torch.int32)
        pages, page_size = page_table.shape[1], self.sizes["S"]
        # A symbolic size would become a guard; the kernel checks the real one.
        if isinstance(pages, int) and isinstance(page_size, int):
            most = MAX_TABLE_TOKENS // page_size
            self.require(pages <= most, "page_table", f"at most {most} pages of {page_size} tokens", pages)

    def cache(self, k_cache: Tensor, v_cache: Tensor, dtype: torch.dtype) -> None:
        self.tensor("k_cache", k_cache, ("P", "Hkv", "S", "D"), dtype)
        self.tensor("v_cache", v_cache, ("P", "Hkv", "S", "D"), dtype)

    def shadow(
        self,
        k_quant: Tensor | None,
        k_scale: Tensor | None,
        channel_order: Tensor | None,
        prefix_channels: Tensor | None,
    ) -> None:
        """The four shadow tensors come together; `S` and `D` must already be bound or are taken from k_scale."""
        parts = {
            "k_quant": k_quant,
            "k_scale": k_scale,
            "channel_order": channel_order,
            "prefix_channels": prefix_channels,
        }
        for name, part in parts.items():
            self.require(part is not None, name, "a tensor (k_quant, k_scale, channel_order and prefix_channels come together)", None)
        self.tensor("k_scale", k_scale, ("P", "Hkv", "S", 2), torch.bfloat16)
        self.tensor("channel_order", channel_order, ("Hkv", "D"), torch.int32)
        self.tensor("prefix_channels", prefix_channels, ("Hkv",), torch.int32)
        self.tensor("k_quant", k_quant, ("P", "Hkv", self.sizes["S"] * self.sizes["D"] // 2), torch.uint8)

    def bounds(self, page_bounds: Tensor, bounds_scale: Tensor | None, dtype: torch.dtype) -> None:
        self.tensor("page_bounds", page_bounds, ("P", "Hkv", 2, "D"), (dtype, torch.uint8))
        if page_bounds.dtype == torch.uint8:
            self.require(bounds_scale is not None, "bounds_scale", "a tensor, because page_bounds is uint8", None)
            self.tensor("bounds_scale", bounds_scale, ("P", "Hkv", 2), torch.bfloat16)
        else:
            self.require(
                bounds_scale is None, "bounds_scale", f"None, because page_bounds is {str(dtype).removeprefix('torch.')}", "a tensor"
            )

    def candidates(self, indices: Tensor | None, counts: Tensor | None, tokens_per_index: int, page_size: int | None) -> None:
        self.require((indices is None) == (counts is None), "counts", "given exactly when indices is given", "one without the other")
        if page_size is None:
            self.one_of("tokens_per_index", tokens_per_index, (1, *PAGE_SIZES))
        else:
            self.one_of("tokens_per_index", tokens_per_index, (1, page_size))
        if indices is not None:
            self.tensor("indices", indices, ("B", "Hkv", "C"), torch.int32)
            self.tensor("counts", counts, ("B", "Hkv"), torch.int32)

    def budget(
        self,
        token_budget: int,
        budget_fraction: float,
        sink_tokens: int,
        recent_tokens: int,
        head_token_budget: Tensor | None,
    ) -> None:
        self.at_least("token_budget", token_budget, 1)
        self.require(0.0 <= budget_fraction <= 1.0, "budget_fraction", "0 <= budget_fraction <= 1", budget_fraction)
        self.at_least("sink_tokens", sink_tokens, 0)
        self.at_least("recent_tokens", recent_tokens, 0)
        if head_token_budget is not None:
            self.tensor("head_token_budget", head_token_budget, ("Hkv",), torch.int32)

    def top_p(self, top_p: float, top_p_per_head: Tensor | None) -> None:
        self.require(0.0 < top_p <= 1.0, "top_p", "0 < top_p <= 1", top_p)
        if top_p_per_head is None:
            return
        p = top_p_per_head
        self.watch("top_p_per_head", p)
        batch, heads = self.sizes["B"], self.sizes["Hq"]
        self.require(p.device == self.device, "top_p_per_head", f"device {self.device}", p.device)
        self.require(p.dtype == torch.float32, "top_p_per_head", "dtype float32", str(p.dtype).removeprefix("torch."))
        self.require(p.dim() == 2, "top_p_per_head", f"shape [B or 1, Hq or 1] with B = {batch}, Hq = {heads}", list(p.shape))
        self.require(
            (p.shape[0] == 1 or p.shape[0] == batch) and (p.shape[1] == 1 or p.shape[1] == heads),
            "top_p_per_head",
            f"shape [B or 1, Hq or 1] with B = {batch}, Hq = {heads}",
            list(p.shape),
        )

    def scale(self, sm_scale: float) -> None:
        self.require(sm_scale > 0.0 and sm_scale < float("inf"), "sm_scale", "a positive finite number", sm_scale)
