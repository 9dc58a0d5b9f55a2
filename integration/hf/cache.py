"""A transformers `Cache` over paged layers: the memory behind attn_implementation="twilight"."""

from __future__ import annotations

import sys
import warnings

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from ... import calibration
from ...config import TwilightConfig
from ...ops._checks import HEAD_DIMS, MAX_QUERY_TOKENS
from ...paged_kv_cache import PagedKVLayer, allocate_layer
from ...report import BudgetReport, budget_report
from .sequences import Sequences
from .sequences import _read_prompt_rows as _read_prompt_rows


class LayerKeys:
    """What `TwilightCache.update` returns for the keys: the layer and its new K, for attn_implementation="twilight" alone.

    Any other attention takes it for a tensor, and is told so.
    """

    def __init__(self, layer: TwilightLayer, k: Tensor):
        self.layer, self.k = layer, k

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
    """One layer of a `TwilightCache`; hands itself to the attention function, which does the append."""

    is_compileable = True
    is_sliding = False
    is_croppable = True

    def __init__(
        self, sequences: Sequences, index: int, twilight: TwilightConfig, num_qo_heads: int, num_kv_heads: int, warn_never_sparse: bool
    ):
        super().__init__()
        self.warn_never_sparse = warn_never_sparse
        self.sequences, self.index, self.twilight = sequences, index, twilight
        self.num_qo_heads, self.num_kv_heads = num_qo_heads, num_kv_heads  # of the whole model

    @property
    def paged(self) -> PagedKVLayer | None:
        return self.sequences.layers[self.index]

    # Without fullgraph the layer is allocated between two graphs; with it, the reason is what the user reads.
    @torch.compiler.disable(reason="TwilightCache: expected to be allocated before tracing: give it device and dtype")
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the layer for K [B, Hkv, T, D]; the head counts are this rank's under tensor parallelism."""
        batch, kv_heads, _, head_dim = key_states.shape
        sequences, device = self.sequences, key_states.device
        plan = self.twilight.layer_plan(self.index, device.type, sequences.max_batch_size * kv_heads)  # refuses a device without kernels
        dtype = _cache_dtype(key_states, value_states)
        if value_states.shape[-1] != head_dim:
            raise ValueError(
                f"TwilightCache: layer {self.index}: expected values of {head_dim} channels as keys have, got {value_states.shape[-1]} "
                "(multi-head latent attention is not supported)"
            )
        if head_dim not in HEAD_DIMS:
            raise ValueError(f"TwilightCache: head_dim: expected one of {HEAD_DIMS}, got {head_dim}")
        if batch > sequences.max_batch_size:
            raise ValueError(
                f"TwilightCache: input_ids: expected at most max_batch_size = {sequences.max_batch_size} sequences, got {batch}"
            )
        # Tensors made under inference mode could not be written by a graph compiled outside it.
        with torch.inference_mode(False), torch.no_grad():
            if sequences.page_table is None:
                sequences.allocate(device)
                kv_rows = sequences.max_batch_size * kv_heads
                message = self.twilight.never_sparse(sequences.num_layers, sequences.max_cache_len, device.type, kv_rows)
                if message and self.warn_never_sparse:
                    warnings.warn(f"TwilightCache: {message}", stacklevel=2)
            elif sequences.page_table.device != device:
                raise ValueError(f"TwilightCache: layer {self.index}: expected device {sequences.page_table.device}, got {device}")
            paged = allocate_layer(
                plan,
                sequences.max_batch_size * sequences.max_pages,
                self.num_qo_heads * kv_heads // self.num_kv_heads,
                kv_heads,
                head_dim,
                sequences.page_size,
                dtype,
                device,
                sequences.layers[self.index - 1] if self.index > 0 else None,
            )
            calibration.initialise(paged)
        for tensor in paged.tensors():
            torch._dynamo.mark_static_address(tensor)
        sequences.layers[self.index] = paged
        self.dtype, self.device, self.is_initialized = dtype, device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[LayerKeys, Tensor]:
        """Hands the new K through with this layer: only the attention function knows which columns are padding."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return LayerKeys(self, key_states), value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.sequences.max_cache_len, 0

    def get_seq_length(self) -> Tensor | int:
        return self.sequences.seen if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.sequences.max_cache_len

    def activate_past_recording(self) -> None:
        """transformers calls this before it decodes speculatively: forwards of several tokens are then decode steps."""
        self.sequences.announced = True

    def reset(self) -> None:
        self.sequences.reset()
        self.forget()

    def forget(self) -> None:
        """The layer's own part of a reset: budget counters, and a calibration that came from the prompt."""
        if self.is_initialized:
            self.paged.budget_counters.zero_()
            calibration.initialise(self.paged)

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
        pages = -(-max_cache_len // self.twilight.page_size)
        self.sequences = Sequences(layers, max_batch_size, pages, self.twilight.page_size, step_tokens)
        self.max_batch_size, self.max_cache_len = max_batch_size, self.sequences.max_cache_len
        shared = (self.twilight, heads, kv_heads, warn_never_sparse)
        super().__init__(layers=[TwilightLayer(self.sequences, index, *shared) for index in range(layers)])
        if device is not None:
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
            self.early_initialization(max_batch_size, kv_heads, head_dim, dtype, torch.device(device))

    @property
    def filled(self) -> bool:
        return self.sequences.filled

    @property
    def live_seq_lens(self) -> Tensor:
        """[B] int32, tokens cached of each sequence in use."""
        return self.sequences.live_seq_lens

    @property
    def live_page_table(self) -> Tensor:
        """[B, M] int32."""
        return self.sequences.live_page_table

    def reset(self) -> None:
        """Forgets every sequence, the budget counters and a calibration that came from the prompt; addresses stay."""
        self.sequences.reset()
        for layer in self.layers:
            layer.forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest `-tokens_to_remove` tokens of every sequence; a positive number is the length to keep, as in transformers."""
        self.sequences.crop(tokens_to_remove)

    def reset_budget(self) -> None:
        """Starts the budget counters again."""
        for layer in self._allocated():
            layer.budget_counters.zero_()

    def budget_report(self) -> BudgetReport:
        """How many tokens each layer and KV head proposed and kept since the last reset; reads the device counters once."""
        return budget_report(self._allocated())

    def nbytes(self) -> dict[str, int]:
        """Bytes of plain K and V, and of everything kept beside them."""
        sizes = [layer.nbytes() for layer in self._allocated()]
        return {name: sum(size[name] for size in sizes) for name in ("kv", "extra")}

    def _allocated(self) -> list[PagedKVLayer]:
        return [layer for layer in self.sequences.layers if layer is not None]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError("TwilightCache: reorder_cache: beam search is not supported; use greedy decoding or sampling")

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
