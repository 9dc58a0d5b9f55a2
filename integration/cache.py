"""A transformers `Cache` over paged layers: the memory behind attn_implementation="twilight"."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .. import calibration
from ..config import TwilightConfig
from ..ops._checks import MAX_QUERY_TOKENS
from ..paged_kv_cache import PagedKVLayer, allocate_layer
from ..report import BudgetReport, budget_report


class PromptRow:
    """Where one sequence's tokens lie in a prompt chunk: columns `column .. column + count - 1`, positions `start` onwards."""

    __slots__ = ("column", "count", "start")

    def __init__(self, column: int, count: int, start: int):
        self.column, self.count, self.start = column, count, start

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass
class PromptChunk:
    """What the layers of one prompt forward share.

    `rows` is None while a graph is traced, where nothing can be read on the host; `positions` None stands for no padding.
    """

    rows: list[PromptRow] | None
    positions: Tensor | None  # [B, T] int32, -1 where a column is padding
    fills_empty_cache: bool


class TwilightLayer(CacheLayerMixin):
    """One layer of a `TwilightCache`; hands itself to the attention function, which does the append."""

    is_compileable = True
    is_sliding = False
    is_croppable = True

    def __init__(self, cache: TwilightCache, index: int):
        super().__init__()
        self.cache = cache
        self.index = index
        self.paged: PagedKVLayer | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.cache._allocate(self, key_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Returns ((layer, keys), values): the positions are known only to the attention function."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return (self, key_states), value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.max_cache_len, 0

    def get_seq_length(self) -> Tensor | int:
        return self.cache.seen if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.cache.max_cache_len

    def reset(self) -> None:
        self.cache.reset()

    def crop(self, tokens_to_remove: int) -> None:
        self.cache.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.cache.reorder_cache(beam_idx)

    def offload(self) -> None:
        raise NotImplementedError("TwilightCache: offload: moving pages to the host is not supported")

    prefetch = offload


class TwilightCache(Cache):
    """Paged K and V, their 4-bit shadow and the selectors' data for one model.

    A slot is a token's logical position, so padding takes no room and ragged batches stay packed. Tensors are allocated once, at the first
    forward or at once where `device` and `dtype` are given, and only ever written in place.

    Args:
        config: the model's configuration.
        twilight: selector, p, page size.
        max_batch_size: sequences.
        max_cache_len: tokens a sequence, prompt and new tokens together; rounded up to whole pages. None: the model's own maximum.
        device, dtype: of K and V; give both to allocate before a compiled prefill or an export.

    Raises:
        ValueError: a bad size, or a model with sliding-window layers shorter than the cache.
    """

    # Properties of the base class, deprecated there; plain numbers here.
    max_batch_size = 0
    max_cache_len = 0

    def __init__(
        self,
        config,
        twilight: TwilightConfig | None = None,
        max_batch_size: int = 1,
        max_cache_len: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        config = config.get_text_config(decoder=True)
        self.twilight = TwilightConfig() if twilight is None else twilight
        max_cache_len = config.max_position_embeddings if max_cache_len is None else max_cache_len
        for name, value in (("max_batch_size", max_batch_size), ("max_cache_len", max_cache_len)):
            if value < 1:
                raise ValueError(f"TwilightCache: {name}: expected >= 1, got {value}")
        self.max_batch_size = max_batch_size
        self.max_pages = -(-max_cache_len // self.twilight.page_size)
        self.max_cache_len = self.max_pages * self.twilight.page_size
        self.num_qo_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        _refuse_sliding_window(config, max_cache_len)

        self.page_table: Tensor | None = None  # [max_batch_size, M] int32
        self.seq_lens: Tensor | None = None  # [max_batch_size] int32
        self.seen: Tensor | int = 0  # columns forwarded so far, padding included: what generate() slices its inputs with
        self.live_page_table: Tensor | None = None  # [B, M], the rows in use
        self.live_seq_lens: Tensor | None = None  # [B]
        self.filled = False
        self.prompt: PromptChunk | None = None  # None while decoding
        self.step_positions: Tensor | None = None
        super().__init__(layers=[TwilightLayer(self, i) for i in range(config.num_hidden_layers)])
        if (device is None) != (dtype is None):
            raise ValueError("TwilightCache: device: expected device and dtype together, got one without the other")
        if device is not None:
            self.early_initialization(max_batch_size, self.num_kv_heads, self.head_dim, dtype, torch.device(device))

    def _allocate(self, layer: TwilightLayer, k: Tensor) -> None:
        """Allocates one layer for k [B, Hkv, T, D]; the head counts are this rank's under tensor parallelism."""
        if torch.compiler.is_compiling():
            raise RuntimeError("TwilightCache: expected to be allocated before tracing: give it device and dtype, or early_initialization")
        batch, kv_heads, _, head_dim = k.shape
        if batch > self.max_batch_size:
            raise ValueError(f"TwilightCache: input_ids: expected at most max_batch_size = {self.max_batch_size} sequences, got {batch}")
        # Tensors made under inference mode could not be written by a graph compiled outside it.
        with torch.inference_mode(False), torch.no_grad():
            if self.page_table is None:
                self._allocate_shared(k.device)
            elif self.page_table.device != k.device:
                raise ValueError(f"TwilightCache: layer {layer.index}: expected device {self.page_table.device}, got {k.device}")
            layer.paged = allocate_layer(
                self.twilight.layer_plan(layer.index, k.device.type, self.max_batch_size * kv_heads),
                self.max_batch_size * self.max_pages,
                self.num_qo_heads * kv_heads // self.num_kv_heads,
                kv_heads,
                head_dim,
                self.twilight.page_size,
                k.dtype,
                k.device,
                self.layers[layer.index - 1].paged if layer.index > 0 else None,
            )
            calibration.initialise(layer.paged)
        for tensor in layer.paged.tensors():
            torch._dynamo.mark_static_address(tensor)
        layer.dtype, layer.device, layer.is_initialized = k.dtype, k.device, True

    def _allocate_shared(self, device: torch.device) -> None:
        pages = torch.arange(self.max_batch_size * self.max_pages, dtype=torch.int32, device=device)
        self.page_table = pages.view(self.max_batch_size, self.max_pages)
        self.seq_lens = torch.zeros(self.max_batch_size, dtype=torch.int32, device=device)
        self.seen = torch.zeros((), dtype=torch.int64, device=device)
        for tensor in (self.page_table, self.seq_lens, self.seen):
            torch._dynamo.mark_static_address(tensor)
        self._use_rows(self.max_batch_size)

    def _use_rows(self, batch: int) -> None:
        """Points the live views at the first `batch` sequences; the views are made here because a graph holds their addresses."""
        if self.live_seq_lens is not None and self.live_seq_lens.shape[0] == batch:
            return
        if not 1 <= batch <= self.max_batch_size:
            raise ValueError(f"TwilightCache: input_ids: expected 1 to max_batch_size = {self.max_batch_size} sequences, got {batch}")
        with torch.inference_mode(False):
            self.live_page_table = self.page_table[:batch]
            self.live_seq_lens = self.seq_lens[:batch]
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.live_page_table)
            torch._dynamo.mark_static_address(self.live_seq_lens)

    def begin_step(self, batch: int, tokens: int, position_ids: Tensor | None) -> None:
        """Called by the first layer: checks the step, then updates what all layers share. A refused step changes nothing."""
        if position_ids is None:
            raise ValueError("TwilightCache: position_ids: expected a tensor [B or 1, T], got None")
        positions = position_ids.expand(batch, -1)  # [B, T]
        if self.filled and tokens <= MAX_QUERY_TOKENS:
            if batch != self.live_seq_lens.shape[0]:
                self._fail_batch(batch)
            self._begin_decode(positions, tokens)
        else:
            if self.filled and batch != self.live_seq_lens.shape[0]:
                self._fail_batch(batch)
            self._begin_prompt(positions, batch, tokens)
        self.seen.add_(tokens)

    def _fail_batch(self, batch: int) -> None:
        in_use = self.live_seq_lens.shape[0]
        raise ValueError(f"TwilightCache: input_ids: expected the {in_use} sequences already cached (or reset()), got {batch}")

    def _begin_decode(self, positions: Tensor, tokens: int) -> None:
        new_lens = positions[:, -1] + 1  # [B]
        fits = (new_lens <= self.max_cache_len) & (new_lens - tokens <= self.live_seq_lens)
        explicit = None
        if tokens > 1:
            explicit, padded_left = _left_padded_positions(positions, new_lens)
            fits &= padded_left
        # No host read in a decode step: on a GPU this is an assertion of the device.
        torch._assert_async(
            fits.all(), f"TwilightCache: position_ids: expected new tokens that follow the cached ones and fit {self.max_cache_len} tokens"
        )
        self.live_seq_lens.copy_(new_lens)
        self.prompt, self.step_positions = None, explicit

    def _begin_prompt(self, positions: Tensor, batch: int, tokens: int) -> None:
        fresh = not self.filled
        if torch.compiler.is_compiling():
            rows, new_lens = None, positions.amax(1) + 1
            explicit, padded_left = _left_padded_positions(positions, new_lens)
            fits = padded_left & (new_lens <= self.max_cache_len)
            torch._assert_async(fits.all(), f"TwilightCache: position_ids: expected left-padded prompts within {self.max_cache_len} tokens")
        else:
            cached = [0] * batch if fresh else self.live_seq_lens.tolist()
            rows, explicit = _read_prompt_rows(positions, cached, self.max_cache_len)
            ends = [row.end if row.count else length for row, length in zip(rows, cached, strict=True)]
            new_lens = torch.tensor(ends, dtype=torch.int32).to(positions.device)
        self._use_rows(batch)
        self.live_seq_lens.copy_(new_lens)
        self.prompt, self.step_positions = PromptChunk(rows, explicit, fresh), explicit
        self.filled = True

    def reset(self) -> None:
        """Forgets every sequence, the budget counters and a calibration that came from the prompt; addresses stay."""
        self.filled, self.prompt, self.step_positions = False, None, None
        if self.page_table is None:
            return
        self.seq_lens.zero_()
        self.seen.zero_()
        for layer in self.layers:
            if layer.is_initialized:
                layer.paged.budget_counters.zero_()
                calibration.initialise(layer.paged)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest `-tokens_to_remove` tokens of every sequence; a positive number is the length to keep, as in transformers."""
        seen = int(self.seen)
        removed = max(0, seen - tokens_to_remove) if tokens_to_remove > 0 else -tokens_to_remove
        if removed > seen:
            raise ValueError(f"TwilightCache: tokens_to_remove: expected at most the {seen} cached tokens, got {removed}")
        if removed:
            self.seq_lens.sub_(removed).clamp_(min=0)
            self.seen.sub_(removed)

    def reset_budget(self) -> None:
        """Starts the budget counters again."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.paged.budget_counters.zero_()

    def budget_report(self) -> BudgetReport:
        """How many tokens each layer and KV head proposed and kept since the last reset; reads the device counters once."""
        return budget_report([layer.paged for layer in self.layers if layer.is_initialized])

    def nbytes(self) -> dict[str, int]:
        """Bytes of plain K and V, and of everything kept beside them."""
        sizes = [layer.paged.nbytes() for layer in self.layers if layer.is_initialized]
        return {name: sum(size[name] for size in sizes) for name in ("kv", "extra")}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError("TwilightCache: reorder_cache: beam search is not supported; use greedy decoding or sampling")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise NotImplementedError("TwilightCache: batch_repeat_interleave: repeating sequences is not supported")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise NotImplementedError("TwilightCache: batch_select_indices: choosing sequences is not supported")


def _refuse_sliding_window(config, max_cache_len: int) -> None:
    """A window at least as long as the cache never bites; a shorter one would be ignored silently."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = window is not None and (kinds is None or "sliding_attention" in kinds)
    if slides and window < max_cache_len:
        raise ValueError(f"TwilightCache: sliding_window: expected none, or at least max_cache_len = {max_cache_len}, got {window}")
    unknown = sorted(set(kinds or ()) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(f"TwilightCache: layer_types: expected full_attention in every layer, got {', '.join(unknown)}")


def _left_padded_positions(positions: Tensor, new_lens: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [B, T] int32 with -1 for padding, and whether each row is padding followed by consecutive tokens."""
    tokens = positions.shape[1]
    expected = new_lens[:, None] - tokens + torch.arange(tokens, device=positions.device)
    live = (positions == expected) & (positions >= 0)
    return torch.where(live, positions, -1).int(), (live | (positions <= 0)).all(1)


def _read_prompt_rows(positions: Tensor, cached: list[int], max_cache_len: int) -> tuple[list[PromptRow], Tensor | None]:
    """Finds each sequence's run of consecutive positions, with padding (position 0 or -1) on either side. Reads the host once."""
    host = positions.cpu()
    tokens = host.shape[1]
    rows, explicit = [], torch.full(host.shape, -1, dtype=torch.int32)
    for b, length in enumerate(cached):
        line = host[b]
        newest = int(line.max())
        if newest < 0 or (newest == 0 and length > 1):
            rows.append(PromptRow(0, 0, length))
            continue
        last = tokens - 1 - int(line.flip(0).argmax())
        # A run ends where going left stops counting down by one, or reaches padding.
        counts_down = (line[: last + 1] == newest - last + torch.arange(last + 1)) & (line[: last + 1] >= 0)
        breaks = (~counts_down).nonzero()
        column = int(breaks[-1]) + 1 if len(breaks) else 0
        row = PromptRow(column, last + 1 - column, newest - (last - column))
        outside = torch.cat([line[:column], line[last + 1 :]])
        if (outside > 0).any():
            raise ValueError(
                "TwilightCache: position_ids: expected one run of consecutive positions a sequence, got several (packed sequences "
                "are not supported)"
            )
        # A chunk of nothing but zeros may have been padding or one token: the next chunk of that sequence may start again.
        if row.start != length and not (row.start == 0 and length == 1):
            raise ValueError(f"TwilightCache: position_ids: expected sequence {b} to go on at {length}, got {row.start}")
        if row.end > max_cache_len:
            raise ValueError(f"TwilightCache: input_ids: expected at most max_cache_len = {max_cache_len} tokens a sequence, got {row.end}")
        explicit[b, column : last + 1] = line[column : last + 1]
        rows.append(row)
    if all(row.count == tokens for row in rows):
        return rows, None
    return rows, explicit.to(positions.device)
