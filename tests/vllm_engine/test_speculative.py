"""Speculative decoding; last of all, because vLLM starts no other engine in a process that has imported what drafts from the prompt."""

from __future__ import annotations

import pytest
from engines import REQUESTS

from twilight_ops.integration.vllm import backend


def test_speculative_rows_are_decode_steps_of_up_to_8_tokens(engine, expected):
    """Drafts from the prompt itself, so rows of one batch have one token or several; at p = 1 nothing they decode may change."""
    rows = set()
    speculative = {"method": "ngram", "num_speculative_tokens": 7, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    exact = engine({"selector": {"name": "quest", "token_budget": 4096}, "top_p": 1.0, "dense_below": 0}, speculative_config=speculative)
    build = backend.TwilightMetadataBuilder._build

    def watched(self, m):
        metadata = build(self, m)
        rows.add((metadata.query_tokens, metadata.ragged is not None))
        return metadata

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend.TwilightMetadataBuilder, "_build", watched)
        expected["repeating"].check(exact.generate(*REQUESTS["repeating"]))
    assert max(rows)[0] == 8 and any(ragged for _, ragged in rows)
