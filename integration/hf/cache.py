"""A transformers `Cache` over paged layers: the memory behind attn_implementation="twilight"."""

from __future__ import annotations

import sys
import warnings
from abc import abstractmethod

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer, get_layer_types_and_kwargs
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from ..._settings import integer, refuse
from ...config import TwilightConfig
from ...layer import PagedKVLayer
from ...ops._checks import FLOAT_DTYPES, HEAD_DIMS, MAX_QUERY_TOKENS
from ...paged_kv_cache import PagedKVCache
from ...report import BudgetReport, budget_report
from .sequences import ROLLBACK, Recorder, Sequences, mark_static
from .windows import Ring, Window


class LayerKeys:
    """The keys of one layer's new tokens together with the layer they are for: what `TwilightCache.update` returns for K.

    An attention function is given its module, Q, K and V, and no cache, so K is the only thing that can bring the layer along. The append
    waits for that function, because only it knows which columns are padding. Any other attention takes this for a tensor, and is told so.
    """

    def __init__(self, layer: AttentionLayer, k: Tensor):
        self.layer, self.k = layer, k  # k [B, Hkv, T, D]

    def to(self, *args, **kwargs) -> LayerKeys:
        """Layers that attend to K and V of earlier ones ask for them on their own device, which the cache has checked."""
        return self

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


class AttentionLayer(CacheLayerMixin):
    """What transformers sees of a layer with K and V; hands itself to the attention function, which stores them."""

    is_compileable = True
    is_sliding = False
    is_croppable = True

    def __init__(self, sequences: Sequences, index: int):
        super().__init__()
        self.sequences, self.index = sequences, index

    # Without fullgraph the layer is allocated between two graphs; with it, the reason is what the user reads.
    @torch.compiler.disable(reason="TwilightCache: expected to be allocated before tracing: give it device and dtype")
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the layer for K [B, Hkv, T, D]; the head counts are this rank's under tensor parallelism."""
        paged, device = self.sequences.paged, key_states.device
        if (batch := key_states.shape[0]) > paged.max_batch_size:
            raise ValueError(f"TwilightCache: input_ids: expected at most max_batch_size = {paged.max_batch_size} sequences, got {batch}")
        if self.sequences.step_lens is not None and paged.page_table.device != device:
            raise ValueError(f"TwilightCache: layer {self.index}: expected device {paged.page_table.device}, got {device}")
        dtype = _cache_dtype(key_states, value_states)
        self._allocate(key_states, value_states, dtype, device)
        self.dtype, self.device, self.is_initialized = dtype, device, True

    @abstractmethod
    def _allocate(self, k: Tensor, v: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        """The layer's tensors, for K and V [B, Hkv, T, D] that come first."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[LayerKeys, Tensor]:
        """Hands the new K and V through, K with this layer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return LayerKeys(self, key_states), value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # transformers asks before the first layer of a forward.
        self.sequences.check_states()
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


class TwilightLayer(AttentionLayer):
    """A layer that sees every token: paged, pruned in decode steps."""

    def __init__(self, sequences: Sequences, index: int, num_qo_heads: int, num_kv_heads: int, place: int, warn_never_sparse: bool):
        super().__init__(sequences, index)
        self.place, self.warn_never_sparse = place, warn_never_sparse  # place: among the layers of `sequences.paged`
        self.num_qo_heads, self.num_kv_heads = num_qo_heads, num_kv_heads  # of the whole model
        self.paged: PagedKVLayer | None = None  # this layer of `sequences.paged`, once it is allocated

    @property
    def keys(self) -> Tensor | None:
        """None of its own, which Mllama asks an allocated layer since transformers 5.24: pages hold them."""
        return torch.empty(0) if self.is_initialized else None

    @keys.setter
    def keys(self, none: None) -> None:
        """For the base class's constructor."""

    def _allocate(self, k: Tensor, v: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        sequences, paged = self.sequences, self.sequences.paged
        kv_heads, head_dim = k.shape[1], k.shape[-1]
        if v.shape[-1] != head_dim:
            raise ValueError(
                f"TwilightCache: layer {self.index}: expected values of {head_dim} channels as keys have, got {v.shape[-1]} "
                "(multi-head latent attention is not supported)"
            )
        if head_dim not in HEAD_DIMS:
            raise ValueError(f"TwilightCache: head_dim: expected one of {HEAD_DIMS}, got {head_dim}")
        if self.place != len(paged.layers):
            sequences.refuse_order(self.index)
        heads = self.num_qo_heads * kv_heads // self.num_kv_heads
        self.paged = sequences.add_layer(heads, kv_heads, head_dim, dtype, device, index=self.index)
        if self.place == 0 and self.warn_never_sparse:
            kv_rows = paged.max_batch_size * kv_heads
            message = paged.config.never_sparse(self.index + 1, paged.max_cache_len, device.type, kv_rows)
            if message:
                warnings.warn(f"TwilightCache: {message}", stacklevel=3)


class WindowLayer(AttentionLayer):
    """A layer that sees the newest tokens alone: a ring of them, attended to as a whole.

    transformers' own layer for it counts its tokens in Python and moves them all at every step: neither a recorded graph nor sequences of
    unequal length can live with that.
    """

    is_sliding = True

    def __init__(self, sequences: Sequences, index: int, window: Window):
        super().__init__(sequences, index)
        self.window = window
        self.ring: Ring | None = None
        # Before it calls a model with a compileable cache, generate() makes the masks itself, which fails in transformers 5.17 for chunks.
        self.is_compileable = not window.chunked

    def _allocate(self, k: Tensor, v: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        self.sequences.allocate(device)
        rows = (self.sequences.paged.max_batch_size, k.shape[1], self.window.width + ROLLBACK + 1)
        with torch.inference_mode(False):
            self.keys, self.values = (torch.zeros(*rows, x.shape[-1], dtype=dtype, device=device) for x in (k, v))
        self.ring = Ring(self.window, self.keys, self.values)
        mark_static(self.keys, self.values)

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        if self.ring is not None:
            mark_static(self.keys, self.values)

    def nbytes(self) -> int:
        return 0 if self.ring is None else self.keys.nbytes + self.values.nbytes


class StateLayer(LinearAttentionLayer):
    """transformers' own layer for a state instead of tokens; it tells the cache when its state has moved.

    Args:
        leads: whether it comes before the last layer that calls attention, with which a forward counts.
        number_of_states: of transformers.
    """

    is_croppable = False

    def __init__(self, sequences: Sequences, leads: bool, number_of_states: int):
        super().__init__(number_of_states=number_of_states)
        self.sequences, self.leads = sequences, leads

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **kwargs) -> Tensor:
        self._move(conv_states, self.conv_states, self.is_conv_states_initialized, state_idx)
        return super().update_conv_state(conv_states, state_idx, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs) -> Tensor:
        self._move(recurrent_states, self.recurrent_states, self.is_recurrent_states_initialized, state_idx)
        return super().update_recurrent_state(recurrent_states, state_idx, **kwargs)

    def _move(self, new: Tensor, states: dict, initialized: dict, index: int) -> None:
        if self.leads:
            self.sequences.ahead = True
        if initialized[index] and states[index].shape[0] != new.shape[0]:  # after a reset, for another number of sequences
            initialized[index] = False

    def activate_past_recording(self) -> None:
        raise ValueError(
            "TwilightCache: assistant_model: expected a model whose layers can take tokens back, got one with "
            f"{self.sequences.states} layers"
        )

    def reset(self) -> None:
        super().reset()
        self.sequences.reset()

    def crop(self, tokens_to_remove: int) -> None:
        self.sequences.crop(tokens_to_remove)

    def nbytes(self) -> int:
        return sum(state.nbytes for states in (self.conv_states, self.recurrent_states) for state in states.values() if state is not None)


class HybridLayer(TwilightLayer, StateLayer):
    """A layer that sees every token and keeps a state too."""

    is_croppable = False
    activate_past_recording = StateLayer.activate_past_recording
    reset = StateLayer.reset

    def __init__(self, attention: tuple, state: tuple):
        TwilightLayer.__init__(self, *attention)
        StateLayer.__init__(self, *state)

    def lazy_initialization(self, *keys_and_values: Tensor, **states) -> None:
        """transformers allocates K and V by position, a state by name."""
        (AttentionLayer if keys_and_values else LinearAttentionLayer).lazy_initialization(self, *keys_and_values, **states)


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
            every layer of every decode step once its K and V are cached, with `softcap=` too in a model that caps its logits. It returns
            None, or the buffers (kept_indices [B, Hkv, M * S], kept_counts [B, Hkv], int32) that the step then writes its kept positions
            to, -1 behind the last. A compiled or recorded step traces it: then it returns the same buffers every time.

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
        if not isinstance(twilight, TwilightConfig | None):
            refuse("TwilightCache", "twilight", "a TwilightConfig", twilight)
        self.twilight = TwilightConfig() if twilight is None else twilight
        max_cache_len = config.max_position_embeddings if max_cache_len is None else max_cache_len
        max_batch_size = integer(1)("TwilightCache", "max_batch_size", max_batch_size)
        max_cache_len = integer(1)("TwilightCache", "max_cache_len", max_cache_len)
        step_tokens = integer(1, MAX_QUERY_TOKENS)("TwilightCache", "step_tokens", step_tokens)
        if (device is None) != (dtype is None):
            raise ValueError("TwilightCache: device: expected device and dtype together, got one without the other")
        if dtype is not None and dtype not in FLOAT_DTYPES:
            refuse("TwilightCache", "dtype", ", ".join(map(str, FLOAT_DTYPES)), dtype)
        self.kinds, callers, heads, kv_heads = read_layers(config, max_cache_len)
        self._check_overrides()
        self.paged = PagedKVCache.without_layers(self.twilight, max_batch_size, max_cache_len, len(self._paged_layers()))
        windows = [kind.width for kind in self.kinds if isinstance(kind, Window)]
        states = ", ".join(sorted({"linear_attention", "conv", HYBRID} & set(self.kinds))) or None
        slots = min(windows) + ROLLBACK if windows else None
        sharing = callers[-1] >= len(self.kinds)
        self.sequences = Sequences(self.paged, callers, step_tokens, recorder, slots, states, sharing, config.num_hidden_layers)
        self.max_batch_size, self.max_cache_len = max_batch_size, self.paged.max_cache_len
        layers: list = []
        for index, kind in enumerate(self.kinds):
            place = sum(isinstance(layer, TwilightLayer) for layer in layers)
            attention = (self.sequences, index, heads, kv_heads, place, warn_never_sparse)
            state = (self.sequences, index < callers[-1], getattr(config, "number_of_conv_states", 1))
            if isinstance(kind, Window):
                layers.append(WindowLayer(self.sequences, index, kind))
            elif kind in STATES:
                layers.append(StateLayer(*state))
            else:
                layers.append(HybridLayer(attention, state) if kind == HYBRID else TwilightLayer(*attention))
        super().__init__(layers=layers)
        if not self._paged_layers() and warn_never_sparse:
            warnings.warn(
                "TwilightCache: config: expected a model with layers of full attention, got none: nothing is pruned", stacklevel=2
            )
        if device is not None:
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
            self.early_initialization(max_batch_size, kv_heads, head_dim, dtype, torch.device(device))

    def _check_overrides(self) -> None:
        self.twilight.check_layers(len(self.kinds))
        others = [index for index in sorted(self.twilight.overrides) if index not in self._paged_layers()]
        if others:
            raise ValueError(f"TwilightCache: overrides: expected layers of full attention, {self._paged_layers()}, got {others[0]}")

    def _paged_layers(self) -> list[int]:
        return [index for index, kind in enumerate(self.kinds) if kind in (FULL, HYBRID)]

    @property
    def is_plain(self) -> bool:
        """Whether the model has nothing but layers that see every token."""
        return all(kind == FULL for kind in self.kinds) and not self.sequences.sharing

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
        for layer in self.layers:
            if isinstance(layer, StateLayer):
                layer.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest `-tokens_to_remove` tokens of every sequence; a positive number is the length to keep, as in transformers."""
        self.sequences.crop(tokens_to_remove)

    def reset_budget(self) -> None:
        """Starts the budget counters again."""
        self.paged.reset_budget()

    def budget_report(self) -> BudgetReport:
        """How many tokens each layer and KV head proposed and kept since the last reset, and which layers are not Twilight's; reads the
        device counters once."""
        others = {index: str(kind) for index, kind in enumerate(self.kinds) if kind not in (FULL, HYBRID)}
        return budget_report(self.paged.layers, others)

    def nbytes(self) -> dict[str, int]:
        """Bytes of plain K and V and of everything kept beside them; of K and V outside the device, and of layers that are not Twilight's,
        where there are any."""
        others = [layer.nbytes() for layer in self.layers if isinstance(layer, (WindowLayer, StateLayer))]
        return self.paged.nbytes() | ({"others": sum(others)} if others else {})

    def tensors(self) -> list[Tensor]:
        """Every tensor that a decode step reads or writes, once: what an export makes buffers. None before the cache is allocated.

        The states of other layers are transformers' own, and not among them.
        """
        paged, sequences = self.paged, self.sequences
        found = [tensor for layer in paged.layers for tensor in layer.tensors()]
        found += [tensor for layer in self.layers if getattr(layer, "ring", None) is not None for tensor in (layer.keys, layer.values)]
        if found:
            found += [paged.page_table, paged.seq_lens, sequences.step_lens, sequences.seen, sequences.reach]
        return list({id(tensor): tensor for tensor in found}.values())

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise NotImplementedError("TwilightCache: batch_repeat_interleave: repeating sequences is not supported")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise NotImplementedError("TwilightCache: batch_select_indices: choosing sequences is not supported")


def _cache_dtype(k: Tensor, v: Tensor) -> torch.dtype:
    """What attention runs in: under autocast its dtype, whatever the projections and the position encoding gave."""
    device = k.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.promote_types(k.dtype, v.dtype)


def read_layers(config, max_cache_len: int) -> tuple[list[str | Window], list[int], int, int]:
    """What a text configuration says of its layers.

    Returns:
        The kind of every layer with a place in the cache: `FULL`, a `Window`, or the name of a kind that keeps a state. The layers that
        call attention. Query heads, KV heads.

    Raises:
        ValueError: a model that this cache would get wrong, by name.
    """
    name = getattr(config, "model_type", type(config).__name__)

    def fail(argument: str, expected: str, got: object) -> None:
        raise ValueError(f"TwilightCache: {argument}: expected {expected}, got {got}")

    # The cache works through transformers' attention interface; a model with attention of its own would read K and V itself.
    model = MODEL_MAPPING.get(type(config), None) if type(config) in MODEL_MAPPING else None
    code = None if model is None else sys.modules[model.__module__]
    if code is not None and not hasattr(code, "ALL_ATTENTION_FUNCTIONS"):
        fail("config", "a model that calls transformers' attention interface", f"{name}, which has attention of its own")
    if any(isinstance(it, type) and issubclass(it, Cache) and it.__module__ == code.__name__ for it in vars(code or sys).values()):
        fail("config", "a model that takes every cache of transformers", f"{name}, which has a cache of its own")
    if name in OWN_MASKS:
        fail("config", "a model that takes transformers' masks", name)
    for field in ("num_hidden_layers", "num_attention_heads"):
        if not isinstance(size := getattr(config, field, None), int):
            fail(field, "one number for all layers", f"{size} in {name}")
    types, settings = get_layer_types_and_kwargs(config)
    if isinstance(settings, dict):  # transformers 5.24 has settings a layer, before it one for all
        settings = [settings] * len(types)
    # Since 5.24 also layers that attend to K and V of earlier ones have a type. Before, only those at the end could, and had none.
    shared = [mode == "reuse" for mode in getattr(config, "kv_sharing_modes", None) or ()][: len(types)]
    while shared and shared.pop():
        types = types[:-1]
    if any(shared):
        fail("kv_sharing_modes", "layers without K and V of their own at the end", f"{name}, which has them among others")
    unknown = sorted(set(types) - KINDS)
    if unknown:
        fail("layer_types", ", ".join(sorted(KINDS)), ", ".join(unknown))
    if getattr(config, "kv_lora_rank", None) is not None:
        fail("config", "K and V by head", f"{name} with multi-head latent attention")
    kinds: list[str | Window] = []
    for kind, setting in zip(types, settings, strict=False):
        width = setting.get("sliding_window")
        if kind in (FULL, HYBRID, *STATES):
            kinds.append(kind)
        elif kind in ("sliding_attention", "chunked_attention") and width is not None and width < max_cache_len:
            kinds.append(Window(width, kind == "chunked_attention"))
        else:  # a window at least as long as the cache never bites
            kinds.append(FULL)
    # Layers at the end may have no place in the cache, because they attend to K and V of earlier ones.
    every = getattr(config, "layer_types", None) or types
    callers = [index for index, kind in enumerate(every) if kind not in STATES]
    if not callers:
        fail("layer_types", "at least one layer of attention", ", ".join(sorted(set(types))))
    windows = [kind for kind in kinds if isinstance(kind, Window)]
    if windows and code is not None and not any(hasattr(code, f"create_{window}_causal_mask") for window in ("sliding_window", "chunked")):
        fail("sliding_window", f"none, or at least max_cache_len = {max_cache_len}", f"{windows[0].width} in {name}, which masks no window")
    heads = config.num_attention_heads
    return kinds, callers, heads, getattr(config, "num_key_value_heads", None) or heads


FULL = "full_attention"
# transformers' kinds of layers that keep a state of fixed size ("mlp" and "moe", since 5.24 "dummy": none).
STATES = ("linear_attention", "conv", "mlp", "moe", "dummy")
# They expand a mask [B, T] themselves, and fail on what generate() makes for a compileable cache. No mapping leads to their code.
OWN_MASKS = ("kosmos_2_text_model",)
HYBRID = "hybrid"  # attention to everything and a state, side by side
KINDS = {FULL, HYBRID, "sliding_attention", "chunked_attention", *STATES}
