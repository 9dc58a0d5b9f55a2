"""A tiny model with a tokenizer, a calibration of it, and what vLLM's own attention gives for it."""

from __future__ import annotations

import gc

import pytest
import torch
from engines import REQUESTS, Engine, Expected, numbers
from torch import set_num_threads  # vLLM replaces it with one that does nothing

from twilight_ops import ShadowPrefix, TwilightConfig, calibration
from twilight_ops.cli.models import random_tiny
from twilight_ops.integration import TwilightCache


def byte_tokenizer():
    """A token a byte, in the form that engines load."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    """Four layers of 4 and 2 heads of 64 channels, random weights, in fp32."""
    path = tmp_path_factory.mktemp("tiny")
    model = random_tiny(torch.device("cpu"), torch.float32)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    cache = TwilightCache(model.config, TwilightConfig(ShadowPrefix(), dense_below=0, sink_tokens=0, recent_tokens=0), max_cache_len=512)
    with torch.no_grad():
        model(torch.tensor([numbers(512, seed=99)]), past_key_values=cache)
    calibration.save([layer.paged.shadow for layer in cache.layers], path.with_suffix(".safetensors"), {})
    return path


@pytest.fixture(scope="session")
def calibrated(model_path):
    """The selector setting that needs a file."""
    return {"name": "shadow_prefix", "token_budget": 48, "calibration": str(model_path.with_suffix(".safetensors"))}


@pytest.fixture(scope="session")
def expected(model_path):
    """What vLLM's own attention gives for all requests. Its engine is gone before others come: engines of one process share state."""
    engine = Engine(model_path, None, enable_prefix_caching=False)
    expected = {name: Expected(*engine.margins(*request)) for name, request in REQUESTS.items()}
    engine.close()
    del engine
    gc.collect()
    return expected


@pytest.fixture
def engine(model_path):
    """Makes engines that are gone when the test is."""
    made, threads = [], torch.get_num_threads()

    def make(twilight, **options) -> Engine:
        made.append(Engine(model_path, twilight, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()
    made.clear()
    gc.collect()
    set_num_threads(threads)  # drafting from the prompt changes it
