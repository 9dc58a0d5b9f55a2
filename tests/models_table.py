"""Every decoder family of transformers as a tiny random model, judged: equal to transformers' own attention, or refused with a reason.

`python tests/models_table.py` judges families and prints the rows; `--write` puts them into docs/models.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from twilight_ops import Full, ShadowPrefix, TwilightConfig
from twilight_ops.integration import Decoder, TwilightCache

VOCABULARY = 99
WINDOW = 16
IMAGE_TOKEN = 98
IMAGE_COLUMNS = slice(20, 22)
DOCS = Path(__file__).parents[1] / "docs" / "models.md"

# What a field of a configuration becomes, by its name. A field whose default is None, 0 or no number stays as it is.
SMALL: dict[str, int] = {
    name: value
    for value, names in (
        (VOCABULARY, "vocab_size decoder_vocab_size vocab_size_per_layer_input audio_vocab_size pronunciation_vocab_size shape_vocab_size"),
        (256, "hidden_size n_embd d_model embed_dim dim embedding_size word_embed_proj_dim encoder_hidden_size emb_dim"),
        (256, "backbone_hidden_size projection_dim projector_hidden_size lru_width mamba_d_ssm attention_hidden_size"),
        (256, "projection_hidden_size alignment_intermediate_size out_hidden_size input_embedding_size output_embedding_size"),
        (4, "num_attention_heads n_head num_heads n_heads attention_heads decoder_attention_heads encoder_attention_heads"),
        (4, "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads"),
        (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads num_global_key_value_heads"),
        (64, "head_dim d_head kv_channels dim_head attention_head_size swa_head_dim global_head_dim d_kv"),
        (128, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dim_ff dff d_inner d_ff n_inner mlp_dim"),
        (64, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size intermediate_size_mlp feed_forward_size"),
        (64, "shared_intermediate_size moe_shared_expert_intermediate_size dense_intermediate_size q_lora_rank index_head_dim"),
        (2, "num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers num_decoder_layers num_encoder_layers depth"),
        (4, "num_experts n_routed_experts num_local_experts moe_num_experts index_n_heads"),
        (2, "num_experts_per_tok moe_topk moe_k"),
        (16, "mamba_d_state mamba_chunk_size"),
        (256, "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions"),
        (WINDOW, "sliding_window window_size attention_window_size attention_chunk_size local_attention sliding_window_size"),
        (0, "pad_token_id"),
        (1, "bos_token_id decoder_start_token_id"),
        (2, "eos_token_id forced_eos_token_id sep_token_id"),
    )
    for name in names.split()
}
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")

# What a family needs beside that, by dotted field: `text_config.` reaches into a part. The reason stands beside each.
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
HALVES = ["sliding_attention", "full_attention"]  # the kinds of its checkpoints; its default knows one of them only
SPECIAL: dict[str, dict] = {
    # The defaults lack what the model reads.
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "layer_types": ["full_attention"] * 2},
    "ministral": {"rope_parameters": ROPE, "head_dim": 64},
    "hunyuan_v1_dense": {"rope_parameters": ROPE, "head_dim": 64},
    "hunyuan_v1_moe": {"rope_parameters": ROPE, "head_dim": 64, "num_experts": 4, "moe_topk": 2},
    "hunyuan_vl": {"text_config.rope_parameters": {**ROPE, "mrope_section": [8, 8, 8, 8]}, "text_config.head_dim": 64},
    "cohere_compass": {"text_config.rope_parameters": {"full_attention": {**ROPE, "mrope_section": [12, 10, 10]}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {**ROPE, "mrope_section": [12, 10, 10]}}},
    "granite4_vision": {
        "text_config": lambda: shrink(CONFIG_MAPPING["granite4_vision_text"]()),
        "deepstack_layer_map": [],
        "spatial_target_layers": [],
        "downsample_rate": "4/8",
    },
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"], "text_config.num_experts_per_tok": 2},
    "xmod": {"default_language": "en_XX"},
    "chameleon": {"vocabulary_map": {"<image>": 98}},
    "reformer": {"attn_layers": ["local", "local"], "axial_pos_embds": False},
    "step3p7": {"text_config.sliding_window": lambda: SMALL["sliding_window"], "text_config.layer_types": HALVES},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 95},
    # The kinds of layer stand elsewhere than in a list as long as the model.
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "lfm2_vl": {"text_config.layer_types": ["conv", "full_attention"], "text_config.num_hidden_layers": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2, "mamba_n_heads": 8},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 32},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "attention_hidden_size": 512},
    "nemotron_h": {"mamba_num_heads": 8, "ssm_state_size": 16, "chunk_size": 16},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "gemma3n_text": {
        "layer_types": HALVES * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "laguna": {"layer_types": HALVES},
    "minimax_m3_vl": {"text_config.layer_types": ["full_attention", "minimax_m3_sparse"]},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "mellum": {"layer_types": HALVES},
    # Vision towers of timm would be one more package for a tower that no test looks through.
    "fast_vlm": {"vision_config": lambda: _vision_tower()},
    "perception_lm": {"vision_config": lambda: _vision_tower()},
    # They need an image with every prompt: a small one, which few tokens stand for.
    "blip": {"vision_config.image_size": 32, "vision_config.patch_size": 16},
    "blip-2": {"vision_config.image_size": 28, "num_query_tokens": 2, "image_token_index": IMAGE_TOKEN},
    "instructblip": {"vision_config.image_size": 28, "num_query_tokens": 2, "image_token_index": IMAGE_TOKEN},
    "instructblipvideo": {"vision_config.image_size": 28, "num_query_tokens": 2, "video_token_index": IMAGE_TOKEN},
    "kosmos-2": {"vision_config.image_size": 28, "latent_query_num": 2},
    "idefics": {"vision_config.image_size": 28},
    # An image of two tokens.
    "llava": {
        "vision_config.image_size": 14,
        "vision_config.patch_size": 14,
        "vision_feature_select_strategy": "full",
        "image_token_index": IMAGE_TOKEN,
    },
    # Sizes that have to agree.
    "mamba2": {"num_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
    "glm5_next": {"text_config.num_key_value_heads": 4},
    # Sections of the rotary dimensions, for a head of 64.
    "cosmos3_edge": {"text_config.rope_parameters": {**ROPE, "mrope_section": [12, 10, 10]}},
    "ernie4_5_vl_moe": {"text_config.rope_parameters": {**ROPE, "mrope_section": [11, 11, 10]}},
    "glm4v_moe": {"text_config.rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [4, 6, 6]}},
    "qwen2_vl": {
        "text_config.rope_parameters": {**ROPE, "mrope_section": [8, 12, 12]},
        "vision_config.hidden_size": 256,
        "image_token_id": IMAGE_TOKEN,
    },
    "qwen2_5_vl": {"text_config.rope_parameters": {**ROPE, "mrope_section": [8, 12, 12]}},
    "paddleocr_vl": {"text_config.rope_parameters": {**ROPE, "mrope_section": [8, 12, 12]}},
    "qwen2_5_omni_thinker": {"text_config.rope_parameters": {**ROPE, "mrope_section": [8, 12, 12]}, "vision_start_token_id": 95},
}


def _vision_tower() -> PreTrainedConfig:
    config = shrink(CONFIG_MAPPING["clip_vision_model"]())
    config.model_args = {"embed_dim": config.hidden_size}
    return config


def shrink(default: PreTrainedConfig, special: dict | None = None) -> PreTrainedConfig:
    """A tiny configuration of the same class with as many layers as it takes to have each kind once, and at least 2."""
    special = dict(special or {})
    default.allow_global_per_layer_attribute_access = True
    values = {f.name: getattr(default, f.name, None) for f in dataclasses.fields(default)}
    layers = next((values[name] for name in LAYERS if isinstance(values.get(name), int)), None)
    per_layer = {n: list(v) for n, v in values.items() if isinstance(v, (list, tuple)) and layers and len(v) == layers > 4}
    kept = [0, 1]
    if per_layer:
        kinds = list(zip(*(map(repr, v) for v in per_layer.values()), strict=True))
        kept = sorted({kinds.index(kind) for kind in kinds})[:4]
        kept = kept if len(kept) > 1 else [0, 1]
    small = {}
    for name, value in values.items():
        if name in special:
            continue
        if name in per_layer:
            small[name] = [per_layer[name][i] for i in kept]
        elif name in SMALL and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            small[name] = len(kept) if name in LAYERS else SMALL[name]
        elif name == "num_key_value_heads" and value is None:
            small[name] = 2
        elif name == "is_decoder":
            small[name] = True
        elif isinstance(value, PreTrainedConfig):
            inner = {k.split(".", 1)[1]: v for k, v in special.items() if k.startswith(name + ".")}
            small[name] = shrink(type(value)(), inner)
    small.update({k: v() if callable(v) else v for k, v in special.items() if "." not in k})
    return type(default)(**small)


# Models that take an image where there is one.
IMAGES: dict[str, Callable[[], dict]] = {
    "llava": lambda: {"pixel_values": _images(3, 14, 14)},
    "qwen2_vl": lambda: {"pixel_values": _images(8, 3 * 2 * 14 * 14).flatten(0, 1), "image_grid_thw": torch.tensor([[1, 2, 4]] * 2)},
}

# Not judged, and why.
LEFT_OUT = {
    "musicgen": "audio codes in several streams, with a generation loop of its own",
    "musicgen_melody": "audio codes in several streams, with a generation loop of its own",
    "diffusion_gemma": "it denoises whole blocks",
    "gemma3n": "its vision tower needs timm; gemma3n_text is judged",
    "gemma4_assistant": "it reads K and V of another model",
    "gemma4_unified_assistant": "it reads K and V of another model",
}


def _images(*shape: int) -> torch.Tensor:
    return torch.randn(len(LENGTHS), *shape, generator=torch.Generator().manual_seed(4))


def _image_columns(ids: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros_like(ids)
    mask[:, IMAGE_COLUMNS] = 1
    return mask


# What generate() needs beside the prompt; our own loop takes text alone, so it is not asked there.
INPUTS: dict[str, Callable[[torch.Tensor], dict]] = {
    "blip": lambda ids: {"pixel_values": _images(3, 32, 32)},
    "blip-2": lambda ids: {"pixel_values": _images(3, 28, 28)},
    "instructblip": lambda ids: {"pixel_values": _images(3, 28, 28), "qformer_input_ids": ids},
    "instructblipvideo": lambda ids: {"pixel_values": _images(1, 3, 28, 28), "qformer_input_ids": ids},
    "kosmos-2": lambda ids: {"pixel_values": _images(3, 28, 28), "image_embeds_position_mask": _image_columns(ids)},
    "idefics": lambda ids: {"pixel_values": _images(1, 3, 28, 28), "image_attention_mask": torch.ones(*ids.shape, 1, dtype=torch.long)},
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model type of transformers and the class that runs it."""

    name: str
    model_class: str

    def config(self) -> PreTrainedConfig:
        if self.name == "vision-encoder-decoder":
            parts = shrink(CONFIG_MAPPING["vit"]()), shrink(CONFIG_MAPPING["gpt2"]())
            return CONFIG_MAPPING[self.name].from_encoder_decoder_configs(*parts)
        config = shrink(CONFIG_MAPPING[self.name](), SPECIAL.get(self.name))
        # As AutoModelForCausalLM does for a composite model whose text part is a model of its own.
        text = config.get_text_config(decoder=True)
        wanted = getattr(transformers, self.model_class).config_class
        return text if isinstance(text, wanted) and not isinstance(config, wanted) else config


def families() -> dict[str, Family]:
    """Every model type that transformers maps to a causal language model, or to a model of images and text."""
    causal, multimodal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    names = sorted({*causal, *multimodal} - LEFT_OUT.keys())
    return {name: Family(name, causal.get(name) or multimodal[name]) for name in names}


OURS = re.compile(r'^(TwilightCache|attn_implementation="twilight"|generate|Decoder|twilight::\w+): ', re.S)
CONFIGS = {
    "full": TwilightConfig(Full(), top_p=1.0, dense_below=0),
    "shadow_prefix": TwilightConfig(ShadowPrefix(token_budget=1024), top_p=1.0, dense_below=0),
}
LENGTHS = (24, 15)
NEW_TOKENS = 4
MAX_CACHE_LEN = 128
WORKS, EAGER, REFUSED = "works", "works, step not compiled", "refused"


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of a family.

    Args:
        verdict: `WORKS`; `EAGER`, where transformers' own step cannot be traced as one graph either; `REFUSED`. Anything else is a fault:
            "wrong", "dies" (with an error that is not ours), "not run" (transformers itself fails).
        reason: of anything that does not work.
    """

    family: str
    model_class: str
    verdict: str
    reason: str = ""


class _OracleFailed(Exception):
    pass


def make_model(family: Family, attention: str | dict[str, str]):
    model_class = getattr(transformers, family.model_class)
    torch.manual_seed(1)
    try:
        model = model_class._from_config(family.config(), attn_implementation=attention)
    except KeyError as error:
        # Some classes look their attention up by name and know no registered one. Where it is only the vision tower, name the text part.
        if error.args != ("twilight",):
            raise
        try:
            model = model_class._from_config(family.config(), attn_implementation=_text_alone(family.config()))
        except KeyError:
            model = model_class._from_config(family.config(), attn_implementation="eager")
    generator = torch.Generator().manual_seed(2)
    # Wide weights give logits apart from each other, so that equal tokens mean equal attention.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.1, generator=generator)
    # Tokens come from logits alone.
    model.generation_config.eos_token_id = None
    model.generation_config.forced_eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.float().eval()


def _text_alone(config: PreTrainedConfig) -> dict[str, str]:
    """attn_implementation of a model that is to see an image: its vision tower keeps an attention of its own."""
    if "text_config" in config.sub_configs:
        return {"": "eager", "text_config": "twilight"}
    return {"": "twilight", **dict.fromkeys(config.sub_configs, "eager")}


def make_prompt(image: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [2, 24], the second row padded on the left; with an image of two tokens in each row."""
    ids = torch.randint(10, 90, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(3))
    if image:
        ids[:, IMAGE_COLUMNS] = IMAGE_TOKEN
    mask = torch.ones_like(ids)
    for row, length in enumerate(LENGTHS):
        mask[row, : max(LENGTHS) - length] = 0
    return ids * mask, mask


def run_generate(model, ids: torch.Tensor, mask: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens [B, N] and their logits [N, B, V] from model.generate."""
    out = model.generate(
        input_ids=ids.clone(),
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    return out.sequences[:, -NEW_TOKENS:], torch.stack(out.logits)


def _config_of_model(family: Family, config: PreTrainedConfig) -> PreTrainedConfig:
    """What a user hands to the cache: the decoder of an encoder-decoder model changes its configuration when it is made."""
    try:
        with torch.device("meta"):
            return getattr(transformers, family.model_class)._from_config(config, attn_implementation="eager").config
    except Exception:  # whatever it is, making the model with weights meets it again
        return config


def make_cache(config: PreTrainedConfig, selector: str) -> TwilightCache:
    return TwilightCache(config, CONFIGS[selector], max_batch_size=len(LENGTHS), max_cache_len=MAX_CACHE_LEN)


@contextlib.contextmanager
def traced_only() -> Iterator[None]:
    """`capture="compile"` traces as ever but runs the graph as it is: inductor would take seconds a family."""
    module = importlib.import_module("twilight_ops.integration.hf.generate")
    before = module.lookup_backend
    module.lookup_backend = lambda name: lambda graph, inputs: graph.forward
    try:
        yield
    finally:
        module.lookup_backend = before
        torch._dynamo.reset()


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_):
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judge(family: Family, compiled: bool = True, seconds: int = 300) -> Row:
    """Runs a family in every way that the table speaks of; without `compiled`, the compiled step is left out."""

    def row(verdict: str, reason: object = "") -> Row:
        text = " ".join(str(reason).split()).replace("|", "/").replace("`", "'")  # one cell of the page
        return Row(family.name, family.model_class, verdict, text[:300].strip())

    with warnings.catch_warnings(), time_limit(seconds), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            return row(*_run(family, compiled))
        except _OracleFailed as failed:
            return row("not run", f"{type(failed.__cause__).__name__}: {failed.__cause__}")
        except AssertionError as error:
            return row("wrong", error)
        except Exception as error:
            refusal = _refusal(error)
            if refusal is not None:
                return row(REFUSED, refusal)
            frame = traceback.extract_tb(error.__traceback__)[-1]
            return row("dies", f"{type(error).__name__} at {os.path.basename(frame.filename)}:{frame.lineno}: {error}")


def _refusal(error: BaseException | None) -> BaseException | None:
    """The error of ours that `error` is, or that the compiler wrapped into it."""
    while error is not None and not OURS.match(str(error)):
        error = error.__cause__
    return error


def _run(family: Family, compiled: bool) -> tuple[str, str]:
    try:
        config = family.config()
    except Exception as error:
        raise _OracleFailed from error
    make_cache(_config_of_model(family, config), "full")
    ids, mask = make_prompt(image=family.name in INPUTS)
    inputs = INPUTS[family.name](ids) if family.name in INPUTS else {}
    try:
        # transformers' sdpa leaves out what caps the logits.
        capped = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None
        sdpa = getattr(transformers, family.model_class)._supports_sdpa and not capped
        dense = make_model(family, "sdpa" if sdpa else "eager")
        expected = run_generate(dense, ids, mask, **inputs)
    except Exception as error:
        expected, oracle_error = None, error
    model = make_model(family, _text_alone(config) if inputs else "twilight")
    for selector in CONFIGS:
        try:
            got = run_generate(model, ids, mask, past_key_values=make_cache(model.config, selector), **inputs)
        except Exception as error:
            if expected is None and _refusal(error) is None:
                raise _OracleFailed from oracle_error
            raise
        if expected is None:
            raise _OracleFailed from oracle_error
        compare(f"model.generate, {selector}", got, expected)
    if inputs:
        return WORKS, ""
    captures = ("eager", "compile") if compiled else ("eager",)
    for capture in captures:
        with traced_only():
            decoder = Decoder(model, make_cache(model.config, "full"), len(LENGTHS), eos_token_ids=(), pad_token_id=0, capture=capture)
            try:
                tokens = decoder.generate(ids, mask, NEW_TOKENS).tokens
            except Exception as error:
                if capture == "compile" and "capture: expected" in str(_refusal(error)):
                    return EAGER, ""
                raise
        # A model that numbers padding too gives padded sequences other tokens than it gives them alone; our loop has no padding to number.
        if not torch.equal(tokens, expected[0]):
            alone = _alone(dense, ids, mask)
            assert torch.equal(tokens, alone), f"own loop, {capture}: tokens {tokens.tolist()} instead of {alone.tolist()}"
    return WORKS, ""


def _alone(model, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """New tokens [B, N] of every sequence by itself, without padding."""
    rows = [(row[None, -length:], live[None, -length:]) for row, live, length in zip(ids, mask, LENGTHS, strict=True)]
    return torch.cat([run_generate(model, *row)[0] for row in rows])


def compare(where: str, got: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits = expected[1]
    error = (got[1] - logits).abs().amax((1, 2)) / logits[logits.isfinite()].std()
    steps = ", ".join(f"{step:.2g}" for step in error)
    assert (error < 1e-3).all(), f"{where}: logits are off by {steps} of their standard deviation"
    assert torch.equal(got[0], expected[0]), f"{where}: tokens {got[0].tolist()} instead of {expected[0].tolist()}"


def judge_apart(family: Family, compiled: bool = True) -> Row:
    """`judge` in a process of its own, which may die."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(judge(family, compiled)))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return Row(family.name, family.model_class, "dies", f"exit code {process.exitcode}")
    finally:
        process.join()


HEADER = """# Models

Every decoder of transformers {version}, as a tiny random model. Of {families} families {works} work and {refused} are refused by name.
A test judges each anew.

*Works*: logits and greedy tokens are those of transformers' own attention for a left-padded batch of two, p = 1, through
`model.generate` (`Full` and `ShadowPrefix`), our own loop, and our own loop with its step traced as one graph. *Step not compiled*:
transformers' code for it is no single graph, so use `capture="eager"`. *Refused*: the error that a user gets.

Layers of full attention are Twilight's. Beside them the same cache serves, exactly, layers with a window or in chunks (shorter here than
the prompt), layers that keep a state, and layers that attend to K and V of earlier ones; `budget_report()` names them. Attention sinks
take their share after pruning: p is a share of the tokens' weight. Where a model caps its attention logits, estimates and attention cap
them too; prompts, and layers with a window, do so in plain PyTorch.

Models of images and text run on text; the few that need an image get one, through `model.generate` alone and with their vision tower left
as it is: `attn_implementation={{"text_config": "twilight"}}`. Where tokens of an image see each
other (Gemma 3), they do so in a cache's first prompt.

Written by `python tests/models_table.py --write`.
"""


def render(rows: list[Row], version: str) -> str:
    """docs/models.md."""
    works = [row for row in rows if row.verdict in (WORKS, EAGER)]
    rest = [row for row in rows if row not in works]
    counts = {"families": len(rows), "works": len(works), "refused": len(rest)}
    lines = [HEADER.format(version=version, **counts)]
    lines += ["## Works", "", "| family | class | |", "|---|---|---|"]
    lines += [f"| {row.family} | {row.model_class} | {'' if row.verdict == WORKS else 'step not compiled'} |" for row in works]
    lines += ["", "## Refused", "", "| family | class | error |", "|---|---|---|"]
    lines += [f"| {row.family} | {row.model_class} | `{row.reason}` |" for row in rest]
    lines += ["", "## Left out", "", *(f"- {family}: {reason}." for family, reason in LEFT_OUT.items())]
    return "\n".join(lines) + "\n"


def parse(text: str) -> tuple[str, dict[str, Row]]:
    """The version of transformers and the rows of a rendered page."""
    version = re.search(r"transformers (\S+),", text).group(1)
    rows, refused = {}, False
    for line in text.splitlines():
        refused |= line == "## Refused"
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| ") or cells[0] == "family":
            continue
        family, model_class, last = cells
        verdict = REFUSED if refused else EAGER if last else WORKS
        rows[family] = Row(family, model_class, verdict, last[1:-1] if refused else "")
    return version, rows


def main() -> int:
    parser = argparse.ArgumentParser(description="Judges model families and prints what became of them.")
    parser.add_argument("families", nargs="*", help="model types; none: all")
    parser.add_argument("--write", action="store_true", help="put all rows into docs/models.md")
    parser.add_argument("--untraced", action="store_true", help="trace no step: rows say of it what docs/models.md says")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if arguments.write and arguments.families:
        parser.error("--write: expected no names, because the page lists every family")
    known = families()
    before = parse(DOCS.read_text())[1] if arguments.untraced else {}
    rows = []
    for name in arguments.families or known:
        start = time.perf_counter()
        row = judge_apart(known[name], not arguments.untraced)
        if row.verdict == WORKS and name in before and before[name].verdict == EAGER:
            row = dataclasses.replace(row, verdict=EAGER)
        rows.append(row)
        print(f"{name:36} {row.verdict:24} {time.perf_counter() - start:6.1f} s  {row.reason}", flush=True)
    faults = [row.family for row in rows if row.verdict not in (WORKS, EAGER, REFUSED)]
    if faults:
        print(f"neither works nor refused: {', '.join(faults)}", file=sys.stderr)
    if arguments.write and not faults:
        DOCS.parent.mkdir(exist_ok=True)
        DOCS.write_text(render(rows, transformers.__version__))
    return len(faults) > 0


if __name__ == "__main__":
    sys.exit(main())
