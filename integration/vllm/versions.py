"""The lines of vLLM that this backend was made for, and everything that differs between them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from twilight_ops._settings import refuse

from .settings import KEY, WHERE, check_spec

SUPPORTED = ("0.26", "0.32")  # with PyTorch 2.11 and 2.13
BACKEND = "twilight_ops.integration.vllm.backend.TwilightBackend"


def check(version: str) -> str:
    """The supported line that a version of vLLM belongs to.

    Raises:
        ValueError: it belongs to none.
    """
    line = re.match(r"\d+\.\d+(?=\.)", version)
    if line is None or line.group() not in SUPPORTED:
        refuse(WHERE, "version", " or ".join(f"{line}.x" for line in SUPPORTED), version)
    return line.group()


def register_backend() -> None:
    """Names our class as CUSTOM. It is imported, and the version checked, where CUSTOM is asked for."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends import registry

    custom = registry.AttentionBackendEnum.CUSTOM
    registry.register_backend(custom, BACKEND)
    _refuse_idle_settings(EngineArgs, custom)
    if current_platform.is_cpu():
        _let_cpu_choose(type(current_platform), custom)


def _refuse_idle_settings(arguments: Any, custom: Any) -> None:
    """Settings of ours beside another backend would be read by nobody."""
    built_in = arguments.create_engine_config
    if hasattr(built_in, "twilight"):
        return

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = built_in(self, *args, **kwargs)
        chosen, by_kind = config.attention_config.backend, getattr(config.attention_config, "backend_per_kind", None) or {}
        idle = custom not in (chosen, *by_kind.values())
        if idle and isinstance(config.additional_config, dict) and KEY in config.additional_config:
            refuse(WHERE, "attention_backend", f'CUSTOM, because additional_config has "{KEY}"', getattr(chosen, "name", chosen))
        return config

    create_engine_config.twilight = True  # type: ignore[attr-defined]
    arguments.create_engine_config = create_engine_config


def _let_cpu_choose(platform: Any, custom: Any) -> None:
    """The CPU platform answers every choice with its own backend: it obeys CUSTOM from here on."""
    built_in = platform.get_attn_backend_cls
    if hasattr(built_in, "twilight"):
        return

    def get_attn_backend_cls(cls: Any, selected_backend: Any, *args: Any, **kwargs: Any) -> str:
        return custom.get_path() if selected_backend == custom else built_in(selected_backend, *args, **kwargs)

    get_attn_backend_cls.twilight = True  # type: ignore[attr-defined]
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def kv_layouts() -> tuple[Any, ...]:
    """0.32: layers apart, and heads before tokens in a block."""
    from vllm.v1.kv_cache_interface import KVCacheLayout

    return (KVCacheLayout.LBHNC,)


def with_token_bytes(spec: Any, token_bytes: int) -> Any:
    """0.32: a spec whose tokens take `token_bytes` bytes a KV head."""
    return replace(spec, state_content_bytes=token_bytes)


_elements: dict[tuple[int, int, int], int] = {}  # of a token and KV head, by block size, KV heads and head size


def account_for_pages(backend: Any) -> None:
    """0.26 asks no backend what its blocks hold: its Attention layer is told, once a process."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.kv_cache_interface import TQFullAttentionSpec

    built_in = Attention.get_kv_cache_spec
    if hasattr(built_in, "twilight"):
        return

    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        spec = built_in(self, vllm_config)
        if spec is None or not issubclass(self.attn_backend, backend):
            return spec
        check_spec(spec)
        size = backend.engine.token_bytes(spec)
        _elements[spec.block_size, spec.num_kv_heads, spec.head_size] = size // spec.dtype.itemsize
        kept = {name: getattr(spec, name) for name in ("block_size", "num_kv_heads", "head_size", "head_size_v", "dtype")}
        return TQFullAttentionSpec(**kept, tq_slot_size=size)

    get_kv_cache_spec.twilight = True  # type: ignore[attr-defined]
    Attention.get_kv_cache_spec = get_kv_cache_spec


def kv_cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_size: int) -> tuple[int, ...]:
    """0.26: [P, Hkv, S, C] elements; vLLM also asks with numbers that stand for none, to find the dimension of the blocks."""
    return num_blocks, num_kv_heads, block_size, _elements.get((block_size, num_kv_heads, head_size), 2 * head_size)


def flash_attention(head_size: int) -> tuple[Any, int]:
    """vLLM's FlashAttention over a paged cache, and the version of it that this GPU runs."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    return flash_attn_varlen_func, get_flash_attn_version(head_size=head_size)
