"""The attention backend: prompts exactly, decode steps as `append_kv` and `decode_attention` on vLLM's own block table and lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import vllm
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from vllm.config import CUDAGraphMode, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
)

from twilight_ops._settings import refuse
from twilight_ops.config import BREAK_EVEN, TwilightConfig
from twilight_ops.decode_step import append, attend
from twilight_ops.layer import LayerPlan, PagedKVLayer
from twilight_ops.ops._checks import HEAD_DIMS, MAX_QUERY_TOKENS, PAGE_SIZES

from . import versions
from .metrics import LogLines
from .pages import carve_layer, page_pieces, ragged_rows, split_rows, token_bytes
from .settings import WHERE, Settings, check_engine, check_layer, check_spec, parse

LINE = versions.check(vllm.__version__)
QUERY_ROWS = 256  # of a prompt attend at a time on a CPU: the mask of a long one stays small

logger = init_logger(f"vllm.{__name__}")


class Engine:
    """What the layers of one engine have in common in this process: the settings, and which heads these are."""

    def __init__(self, vllm_config: Any) -> None:
        check_engine(vllm_config)
        # While a draft model is built, its configuration stands in the place of the model's.
        model = getattr(vllm_config.speculative_config, "target_model_config", None) or vllm_config.model_config
        self.parallel = vllm_config.parallel_config
        self.settings: Settings = parse(vllm_config.additional_config)
        self.num_layers: int = model.get_total_num_hidden_layers()
        self.settings.config.check_layers(self.num_layers)
        self.total_kv_heads: int = model.get_total_num_kv_heads()
        self.num_qo_heads: int = model.get_num_attention_heads(self.parallel)
        self.device_type: str = vllm_config.device_config.device_type
        self.max_seqs: int = vllm_config.scheduler_config.max_num_seqs
        never = self.settings.config.never_sparse(
            self.num_layers, model.max_model_len, self.device_type, self.max_seqs * model.get_num_kv_heads(self.parallel)
        )
        if never is not None:
            logger.warning_once("twilight: %s", never)

    def index(self, layer_name: str) -> int:
        """A layer's place in the whole model, whatever stage it is in; those of a draft model count on from there."""
        return extract_layer_index(layer_name) + (self.num_layers if layer_name.startswith("draft_model") else 0)

    def plan(self, config: TwilightConfig, index: int, kv_rows: int) -> LayerPlan:
        """Settings of one layer; a draft model is dense."""
        plan = config.layer_plan(index, self.device_type, kv_rows)
        return plan if index < self.num_layers else replace(plan, selector=None)

    def shard(self, num_kv_heads: int) -> int:
        """Which `num_kv_heads` of the model's heads this rank has: ranks that outnumber the heads share one."""
        shards = max(1, self.total_kv_heads // num_kv_heads)
        return get_tensor_model_parallel_rank() * shards // self.parallel.tensor_parallel_size

    def token_bytes(self, spec: Any) -> int:
        config = self.settings.config_of(spec.block_size)
        plans = {self.plan(config, index, 1) for index in range(self.num_layers)}
        return token_bytes(plans, self.num_qo_heads, spec.num_kv_heads, spec.head_size, spec.block_size, spec.dtype)


class TwilightBackend(AttentionBackend):
    """Select-then-Prune attention. K, V, the shadow and the bounds or means of a page are one block of vLLM's cache."""

    engine: ClassVar[Engine]  # of the model that this process has built last: a cache is laid out after its model is built
    forward_includes_kv_cache_update = True
    # The prompts of a GPU go to FlashAttention, which takes no fp32.
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16] + [torch.float32] * (not current_platform.is_cuda())
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[TwilightImpl]:
        return TwilightImpl

    @staticmethod
    def get_builder_cls() -> type[TwilightMetadataBuilder]:
        return TwilightMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return list(PAGE_SIZES)

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_DIMS)

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return capability.major >= 8

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        return versions.kv_layouts()

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """0.32: what a block of this spec holds."""
        check_spec(spec)
        return spec if spec.state_content_bytes is not None else versions.with_token_bytes(spec, cls.engine.token_bytes(spec))

    @classmethod
    def get_kv_cache_shape(
        cls, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """0.26: [P, Hkv, S, C] of the model's dtype, as large as the spec says."""
        return versions.kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size)


if LINE == "0.26":
    versions.account_for_pages(TwilightBackend)


@dataclass
class Prompts:
    """The rows of a batch that are still prompts, after its decode rows.

    Their tokens are appended page by page, one page of a request a sequence, so that each page's bounds are computed once, from all of it.
    """

    start: int  # first token in the batch
    block_table: Tensor  # [R, M] int32
    starts: list[int]  # R + 1, of the first token of each request among these tokens
    lens: list[int]  # R, tokens with this chunk
    query_start_loc: Tensor  # [R + 1] int32, `starts` on the device
    seq_lens: Tensor  # [R] int32, `lens` on the device
    # Pages that receive tokens, N of them.
    tokens: Tensor  # [N, S] int64, which token of the batch goes there; any where none does
    positions: Tensor  # [N, S] int32, its place in the page, -1 for none
    page_table: Tensor  # [N, 1] int32
    live: Tensor  # [N] int32, tokens in the page with this chunk


@dataclass
class Ragged:
    """Decode rows of different numbers of tokens: T each, the most of them, with a row's own tokens last."""

    tokens: Tensor  # [B, T] int64, which token of the batch stands there; any where none does
    positions: Tensor  # [B, T] int32, its position in the sequence, -1 for none
    places: Tensor  # [N] int64, where each token stands in B * T


@dataclass
class TwilightMetadata(AttentionMetadata):
    decodes: int  # rows of a decode step, which come first; rows of length 0 are padding
    query_tokens: int  # of each of them
    block_table: Tensor  # [B, M] int32
    seq_lens: Tensor  # [B] int32, this step's tokens included
    positions: Tensor | None  # [decodes, query_tokens] int32 in the sequence, -1 for padding; None where `ragged` has them
    ragged: Ragged | None
    prompts: Prompts | None


class TwilightMetadataBuilder(AttentionMetadataBuilder[TwilightMetadata]):
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.reorder_batch_threshold = min(self.reorder_batch_threshold, MAX_QUERY_TOKENS)
        self.layers = [vllm_config.compilation_config.static_forward_context[name] for name in layer_names]
        self.log = LogLines(vllm_config, layer_names, TwilightBackend.engine.settings.log_every)
        most = vllm_config.scheduler_config.max_num_seqs * MAX_QUERY_TOKENS
        self.positions = torch.empty(most, dtype=torch.int32, device=device)  # graphs read it, so its address stays

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> TwilightMetadata:
        self.log.step()
        return self._build(common_attn_metadata)

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> TwilightMetadata:
        # Nothing may be made, or copied from the host, while a graph is captured.
        for layer in self.layers:
            layer.impl.bound(layer, layer.kv_cache)
        self.log.forget()
        return self._build(common_attn_metadata)

    def _build(self, m: Any) -> TwilightMetadata:
        if m.causal is not True:
            refuse(WHERE, "causal", "True", "another mask")
        starts = m.query_start_loc_cpu[: m.num_reqs + 1].numpy()
        counts = np.diff(starts)
        # Only known once all layers have said what they support.
        replays = self.vllm_config.compilation_config.cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        decodes, query_tokens = split_rows(counts, m.is_prefilling, self.reorder_batch_threshold, m.num_actual_tokens, replays)
        ragged = self._ragged(m, counts[:decodes]) if decodes else None
        positions = self._positions(m, decodes, query_tokens) if decodes and ragged is None else None
        prompts = self._prompts(m, decodes, starts) if counts[decodes:].any() else None
        return TwilightMetadata(decodes, query_tokens, m.block_table_tensor, m.seq_lens, positions, ragged, prompts)

    def _positions(self, m: Any, decodes: int, query_tokens: int) -> Tensor:
        """Where vLLM gives no slot, nothing is written: a dummy run's block table is that of the step before."""
        slots = m.slot_mapping[: decodes * query_tokens].view(decodes, query_tokens)
        newest = torch.arange(1 - query_tokens, 1, dtype=torch.int32, device=slots.device)
        positions = self.positions[: slots.numel()].view_as(slots)
        return positions.copy_(torch.where(slots < 0, -1, m.seq_lens[:decodes, None] - 1 + newest))

    def _ragged(self, m: Any, counts: np.ndarray) -> Ragged | None:
        rows = ragged_rows(counts)
        if rows is None:
            return None
        device = m.seq_lens.device
        tokens, live, places = (_to_device(array, device) for array in rows)
        newest = torch.arange(1 - tokens.shape[1], 1, dtype=torch.int32, device=device)
        positions = torch.where(live, m.seq_lens[: len(counts), None] - 1 + newest, -1)
        return Ragged(tokens, positions, places)

    def _prompts(self, m: Any, decodes: int, starts: np.ndarray) -> Prompts:
        rows = slice(decodes, m.num_reqs)
        lens = m.seq_lens_cpu_upper_bound[rows].numpy()  # exact for prompts
        request, page, token, position, live = page_pieces(starts[decodes:], lens, self.kv_cache_spec.block_size)
        device, table = m.block_table_tensor.device, m.block_table_tensor[rows]
        request, page, token, position, live = (_to_device(array, device) for array in (request, page, token, position, live))
        position = torch.where(m.slot_mapping[token] < 0, -1, position)
        start = int(starts[decodes])
        local = starts[decodes:] - start
        return Prompts(
            start,
            table,
            local.tolist(),
            lens.tolist(),
            _to_device(local.astype(np.int32), device),
            m.seq_lens[rows],
            token,
            position,
            table[request, page][:, None],
            live,
        )


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class TwilightImpl(AttentionImpl[TwilightMetadata]):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        check_layer(
            kv_cache_dtype,
            attn_type,
            alibi_slopes=alibi_slopes,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name,
            **others,
        )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.engine = TwilightBackend.engine = Engine(get_current_vllm_config())
        self.attend_prompts: Callable[..., None] = _attend_on_cpu
        if self.engine.device_type == "cuda":
            self.attend_prompts = partial(_attend_on_gpu, *versions.flash_attention(head_size))
        self.paged: PagedKVLayer | None = None
        self._by_rows: dict[int, PagedKVLayer] = {}

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: TwilightMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query [N, Hq, D], key and value [N, Hkv, D], output [N, Hq, D], written in place; no metadata: a run that measures memory."""
        if attn_metadata is None:
            return output.fill_(0)
        paged = self.bound(layer, kv_cache)
        if attn_metadata.decodes:
            self._decode(query, key, value, paged, attn_metadata, output)
        if attn_metadata.prompts is not None:
            self._prompts(query, key, value, paged, attn_metadata.prompts, output)
        return output

    def bound(self, layer: Any, kv_cache: Tensor) -> PagedKVLayer:
        """The layer in this cache: made before a graph is captured or by its first forward, and again if vLLM gives it another."""
        if self.paged is None or self.paged.kv.k_cache.data_ptr() != kv_cache.data_ptr():
            index = self.engine.index(layer.layer_name)
            config = self.engine.settings.config_of(kv_cache.shape[2])
            plan = self.engine.plan(config, index, self.engine.max_seqs * self.num_kv_heads)
            # Graphs and the steps after an inference-mode one read these tensors.
            with torch.inference_mode(False):
                self.paged = carve_layer(plan, kv_cache, self.num_heads, self.head_size, index, self.engine.shard(self.num_kv_heads))
            self._by_rows.clear()
        return self.paged

    def _for_rows(self, paged: PagedKVLayer, rows: int) -> PagedKVLayer:
        """The layer with the break-even of a batch of `rows`, unless `dense_below` was asked for; a graph has a fixed number of them."""
        if self.engine.settings.config.dense_below is not None:
            return paged
        if rows not in self._by_rows:
            dense_below = BREAK_EVEN[self.engine.device_type].tokens(rows * self.num_kv_heads, paged.plan.selector)
            self._by_rows[rows] = replace(paged, policy=paged.policy._replace(dense_below=dense_below))
        return self._by_rows[rows]

    def _decode(self, query: Tensor, key: Tensor, value: Tensor, paged: PagedKVLayer, m: TwilightMetadata, output: Tensor) -> None:
        shape, ragged = (m.decodes, m.query_tokens), m.ragged
        if not ragged:
            tokens, positions = m.decodes * m.query_tokens, m.positions
            q, k, v = (x[:tokens].unflatten(0, shape) for x in (query, key, value))
        else:
            tokens, positions = len(ragged.places), ragged.positions
            q, k, v = (x[ragged.tokens] for x in (query, key, value))
        table, lens = m.block_table[: m.decodes], m.seq_lens[: m.decodes]
        paged = self._for_rows(paged, m.decodes)
        append(k, v, paged, table, lens, positions)
        into = None if ragged else output[:tokens].unflatten(0, shape)
        out, _ = attend(q, paged, table, lens, self.scale, out=into)
        if ragged:
            output[:tokens] = out.flatten(0, 1)[ragged.places]

    def _prompts(self, query: Tensor, key: Tensor, value: Tensor, paged: PagedKVLayer, prompts: Prompts, output: Tensor) -> None:
        append(key[prompts.tokens], value[prompts.tokens], paged, prompts.page_table, prompts.live, prompts.positions)
        here = slice(prompts.start, prompts.start + prompts.starts[-1])
        self.attend_prompts(query[here], paged, prompts, self.scale, output[here])


def _attend_on_cpu(q: Tensor, paged: PagedKVLayer, prompts: Prompts, scale: float, out: Tensor) -> None:
    """Exact causal attention of q [N, Hq, D], request by request, to all that the cache holds of it."""
    for row, length in enumerate(prompts.lens):
        first, last = prompts.starts[row : row + 2]
        pages = prompts.block_table[row, : -(-length // paged.page_size)].long()
        keys, values = (cache[pages].transpose(0, 1).flatten(1, 2) for cache in paged.kv)  # [Hkv, L, D]
        for start in range(first, last, QUERY_ROWS):
            end = min(start + QUERY_ROWS, last)
            seen = length - last + end  # tokens that the newest of these rows sees
            mask = torch.ones(end - start, seen, dtype=torch.bool).tril(seen - (end - start))
            rows = q[start:end].transpose(0, 1)[None]
            attended = scaled_dot_product_attention(rows, keys[None, :, :seen], values[None, :, :seen], mask, scale=scale, enable_gqa=True)
            out[start:end] = attended[0].transpose(0, 1)


def _attend_on_gpu(
    flash_attention: Callable[..., Tensor], version: int, q: Tensor, paged: PagedKVLayer, prompts: Prompts, scale: float, out: Tensor
) -> None:
    """The same in one call of the FlashAttention that comes with vLLM."""
    flash_attention(
        q=q,
        k=paged.kv.k_cache.transpose(1, 2),
        v=paged.kv.v_cache.transpose(1, 2),
        out=out,
        cu_seqlens_q=prompts.query_start_loc,
        max_seqlen_q=max(last - first for first, last in zip(prompts.starts, prompts.starts[1:], strict=False)),
        seqused_k=prompts.seq_lens,
        max_seqlen_k=max(prompts.lens),
        softmax_scale=scale,
        causal=True,
        block_table=prompts.block_table,
        fa_version=version,
    )
