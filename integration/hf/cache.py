"""A transformers `Cache` over paged layers: the memory behind attn_implementation="twilight"."""

from __future__ import annotations

import sys
import warnings

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from ...config import TwilightConfig
from ...layer import PagedKVLayer
from ...ops._checks import HEAD_DIMS, MAX_QUERY_TOKENS
from ...paged_kv_cache import PagedKVCache
from ...report import BudgetReport, budget_report
from .sequences import Recorder, Sequences


class LayerKeys:
    """The keys of one layer's new tokens together with the layer they are for: what `TwilightCache.update` returns for K.

    An attention function is given its module, Q, K and V, and no cache, so K is the only thing that can bring the layer along. The append
    waits for that function, because only it knows which columns are padding. Any other attention takes this for a tensor, and is told so.
    """

    def __init__(self, layer: TwilightLayer, k: Tensor):
        self.layer, self.k = layer, k  # k [B, Hkv, T, D]

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(_FOREIGN_ATTENTION)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(_FOREIGN_ATTENTION)


_FOREIGN_ATTENTION = (
    'TwilightCache: attn_implementation: expected "twilight" (model.set_attn_implementation("twilight"), or attn_implementation="twilight" '
    "in from_pretrained), got a model whose attention reads the cached keys itself"
)


class TwilightLayer(CacheLayerMixin):
    """What transformers sees of one layer; hands itself to the attention function, which does the append."""

    is_compileable = True
    is_sliding = False
    is_croppable = True

    def __init__(self, sequences: Sequences, index: int, num_qo_heads: int, num_kv_heads: int, warn_never_sparse: bool):
        super().__init__()
        self.sequences, self.index, self.warn_never_sparse = sequences, index, warn_never_sparse
        self.num_qo_heads, self.num_kv_heads = num_qo_heads, num_kv_heads  # of the whole model
        self.paged: PagedKVLayer | None = None  # this layer of `sequences.paged`, once it is allocated

    # Without fullgraph the layer is allocated between two graphs; with it, the reason is what the user reads.
    @torch.compiler.disable(reason="TwilightCache: expected to be allocated before tracing: give it device and dtype")
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the layer for K [B, Hkv, T, D]; the head counts are this rank's under tensor parallelism."""
        batch, kv_heads, _, head_dim = key_states.shape
        sequences, paged, device = self.sequences, self.sequences.paged, key_states.device
        dtype = _cache_dtype(key_states, value_states)
        if value_states.shape[-1] != head_dim:
            raise ValueError(
                f"TwilightCache: layer {self.index}: expected values of {head_dim} channels as keys have, got {value_states.shape[-1]} "
                "(multi-head latent attention is not supported)"
            )
        if head_dim not in HEAD_DIMS:
            raise ValueError(f"TwilightCache: head_dim: expected one of {HEAD_DIMS}, got {head_dim}")
        if batch > paged.max_batch_size:
            raise ValueError(f"TwilightCache: input_ids: expected at most max_batch_size = {paged.max_batch_size} sequences, got {batch}")
        if self.index != len(paged.layers):
            sequences.refuse_order(self.index)
        if self.index > 0 and paged.page_table.device != device:
            raise ValueError(f"TwilightCache: layer {self.index}: expected device {paged.page_table.device}, got {device}")
        heads = self.num_qo_heads * kv_heads // self.num_kv_heads
        self.paged = sequences.add_layer(heads, kv_heads, head_dim, dtype, device)
        self.dtype, self.device, self.is_initialized = dtype, device, True
        if self.index == 0 and self.warn_never_sparse:
            kv_rows = paged.max_batch_size * kv_heads
            message = paged.config.never_sparse(sequences.num_layers, paged.max_cache_len, device.type, kv_rows)
            if message:
                warnings.warn(f"TwilightCache: {message}", stacklevel=2)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[LayerKeys, Tensor]:
        """Hands the new K and V through, K with this layer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return LayerKeys(self, key_states), value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.sequences.paged.max_cache_len, 0

    def get_seq_length(self) -> Tensor | int:
        return self.sequences.seen if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.sequences.paged.max_cache_len

    def activate_past_recording(self) -> None:
        """transformers calls this before it decodes speculatively: forwards of several tokens are then decode steps."""
        self.sequences.announced = True

    def reset(self) -> None:
        """Of the whole cache: its layers hold the same sequences."""
        self.sequences.reset()

    def crop(self, tokens_to_remove: int) -> None:
        self.sequences.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError("TwilightCache: reorder_cache: beam search is not supported; use greedy decoding or sampling")

    def offload(self) -> None:
        raise NotImplementedError("TwilightCache: offload: moving pages to the host is not supported")

    prefetch = offload


class TwilightCache(Cache):
    """Paged K and V, their 4-bit shadow and the selectors' data for one model.

    A slot is the number of tokens before a token in its sequence, so padding takes no room and ragged batches stay packed. Tensors are
    allocated once, at the first forward or at once where `device` and `dtype` are given, and only ever written in place. A forward counts
    when its last layer is done: one that fails or is refused leaves the cache as it was.

    Args:
        config: the model's configuration.
        twilight: selector, p, page size.
        max_batch_size: sequences.
        max_cache_len: tokens a sequence, prompt and new tokens together; rounded up to whole pages. None: the model's own maximum.
        device, dtype: of K and V; give both to allocate before a compiled prefill or an export.
        step_tokens: forwards of up to so many tokens on a filled cache are decode steps, pruned; longer ones are prompts, exact. 1 to 8.
            transformers' speculative decoding needs no setting here.
        warn_never_sparse: say once where every length that fits is attended to whole, because reading everything is faster.
        recorder: for inspection: called as recorder(q, layer, page_table, seq_lens, sm_scale), the arguments of `decode_step.attend`, by
            every layer of every decode step once its K and V are cached. It returns None, or the buffers (kept_indices [B, Hkv, M * S],
            kept_counts [B, Hkv], int32) that the step then writes its kept positions to, -1 behind the last. A compiled or recorded step
            traces it: then it returns the same buffers every time.

    Raises:
        ValueError: a bad size, or a model with layers that this cache would get wrong.
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
        step_tokens: int = 1,
        warn_never_sparse: bool = True,
        recorder: Recorder | None = None,
    ):
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError("TwilightCache: config: expected a decoder, got an encoder-decoder model")
        config = config.get_text_config(decoder=True)
        self.twilight = TwilightConfig() if twilight is None else twilight
        max_cache_len = config.max_position_embeddings if max_cache_len is None else max_cache_len
        for name, value in (("max_batch_size", max_batch_size), ("max_cache_len", max_cache_len)):
            if value < 1:
                raise ValueError(f"TwilightCache: {name}: expected >= 1, got {value}")
        if not 1 <= step_tokens <= MAX_QUERY_TOKENS:
            raise ValueError(f"TwilightCache: step_tokens: expected 1 to {MAX_QUERY_TOKENS}, got {step_tokens}")
        if (device is None) != (dtype is None):
            raise ValueError("TwilightCache: device: expected device and dtype together, got one without the other")
        layers, heads, kv_heads = read_layers(config, max_cache_len)
        self.twilight.check_layers(layers)
        self.paged = PagedKVCache.without_layers(self.twilight, max_batch_size, max_cache_len)
        self.sequences = Sequences(self.paged, layers, step_tokens, recorder)
        self.max_batch_size, self.max_cache_len = max_batch_size, self.paged.max_cache_len
        super().__init__(layers=[TwilightLayer(self.sequences, index, heads, kv_heads, warn_never_sparse) for index in range(layers)])
        if device is not None:
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
            self.early_initialization(max_batch_size, kv_heads, head_dim, dtype, torch.device(device))

    @property
    def filled(self) -> bool:
        return self.sequences.filled

    @property
    def live_seq_lens(self) -> Tensor:
        """[B] int32, tokens cached of each sequence in use; from the first forward on."""
        return self.paged.live_seq_lens

    @property
    def live_page_table(self) -> Tensor:
        """[B, M] int32; from the first forward on."""
        return self.paged.live_page_table

    def reset(self) -> None:
        """Forgets every sequence, the budget counters and a calibration that came from the prompt; addresses stay."""
        self.sequences.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest `-tokens_to_remove` tokens of every sequence; a positive number is the length to keep, as in transformers."""
        self.sequences.crop(tokens_to_remove)

    def reset_budget(self) -> None:
        """Starts the budget counters again."""
        self.paged.reset_budget()

    def budget_report(self) -> BudgetReport:
        """How many tokens each layer and KV head proposed and kept since the last reset; reads the device counters once."""
        return budget_report(self.paged.layers)

    def nbytes(self) -> dict[str, int]:
        """Bytes of plain K and V, and of everything kept beside them."""
        return self.paged.nbytes()

    def tensors(self) -> list[Tensor]:
        """Every tensor that a decode step reads or writes, once: what an export makes buffers. None before the cache is allocated."""
        paged, sequences = self.paged, self.sequences
        found = [tensor for layer in paged.layers for tensor in layer.tensors()]
        if found:
            found += [paged.page_table, paged.seq_lens, sequences.step_lens, sequences.seen]
        return list({id(tensor): tensor for tensor in found}.values())

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise NotImplementedError("TwilightCache: batch_repeat_interleave: repeating sequences is not supported")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise NotImplementedError("TwilightCache: batch_select_indices: choosing sequences is not supported")


def _cache_dtype(k: Tensor, v: Tensor) -> torch.dtype:
    """What attention runs in: under autocast its dtype, whatever the projections and the position encoding gave."""
    device = k.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.promote_types(k.dtype, v.dtype)


def read_layers(config, max_cache_len: int) -> tuple[int, int, int]:
    """Layers, query heads and KV heads of a text configuration.

    Raises:
        ValueError: a model that this cache would get wrong, by name.
    """
    name = getattr(config, "model_type", type(config).__name__)

    def fail(argument: str, expected: str, got: object) -> None:
        raise ValueError(f"TwilightCache: {argument}: expected {expected}, got {got}")

    kinds = getattr(config, "layer_types", None)
    unknown = sorted(set(kinds or ()) - {"full_attention", "sliding_attention"})
    if unknown:
        fail("layer_types", "full_attention in every layer", ", ".join(unknown))
    # A window at least as long as the cache never bites.
    window = getattr(config, "sliding_window", None)
    if window is not None and window < max_cache_len and (kinds is None or "sliding_attention" in kinds):
        fail("sliding_window", f"none, or at least max_cache_len = {max_cache_len}", window)
    if getattr(config, "attention_chunk_size", None) is not None and kinds is None:
        fail("attention_chunk_size", "none", config.attention_chunk_size)
    if getattr(config, "kv_lora_rank", None) is not None:
        fail("config", "K and V by head", f"{name} with multi-head latent attention")
    # The cache works through transformers' attention interface; a model with attention of its own would read K and V itself.
    model = MODEL_MAPPING.get(type(config), None) if type(config) in MODEL_MAPPING else None
    if model is not None and not hasattr(sys.modules[model.__module__], "ALL_ATTENTION_FUNCTIONS"):
        fail("config", "a model that calls transformers' attention interface", f"{name}, which has attention of its own")
    sizes = []
    for field in ("num_hidden_layers", "num_attention_heads"):
        if not isinstance(size := getattr(config, field, None), int):
            fail(field, "one number for all layers", f"{size} in {name}")
        sizes.append(size)
    layers, heads = sizes
    return layers, heads, getattr(config, "num_key_value_heads", None) or heads
