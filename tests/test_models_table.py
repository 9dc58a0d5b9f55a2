"""docs/models.md says what becomes of every decoder of transformers: judged anew here, family by family."""

import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

import models_table  # noqa: E402
import transformers  # noqa: E402
from models_table import EAGER, REFUSED, WORKS, Row  # noqa: E402

VERSION, ROWS = models_table.parse(models_table.DOCS.read_text())
FAMILIES = models_table.families()
SAME_VERSION = transformers.__version__ == VERSION
# Tracing a step takes longer than all the rest, so every eighth of the families that work is traced here; `--write` traces all.
TRACED = [name for name, row in ROWS.items() if row.verdict == WORKS][:: 1 if "TWILIGHT_TRACE_ALL_MODELS" in os.environ else 8]


# Families that this version of transformers adds are judged too, and those that it lacks are not.
@pytest.mark.parametrize("title", FAMILIES)
def test_models_table_a_family_works_or_is_refused_as_the_page_says(title):
    row = models_table.judge(FAMILIES[title], compiled=title in TRACED)
    if row.verdict == "not run" and not SAME_VERSION:
        pytest.skip(f"{title}: transformers {transformers.__version__} itself does not run the tiny model: {row.reason}")
    assert row.verdict in (WORKS, EAGER, REFUSED), f"{title}: {row.verdict}: {row.reason}"
    if not SAME_VERSION:
        return
    expected = ROWS[title]
    if expected.verdict == EAGER:
        expected = replace(expected, verdict=WORKS)
    assert row == expected, "python tests/models_table.py --write"


@pytest.mark.skipif(not SAME_VERSION, reason=f"docs/models.md is of transformers {VERSION}, not {transformers.__version__}")
def test_models_table_the_page_lists_every_family_and_nothing_else():
    assert sorted(ROWS) == sorted(FAMILIES)


def test_models_table_the_page_is_what_its_rows_render_to():
    assert models_table.render(list(ROWS.values()), VERSION) == models_table.DOCS.read_text()


@pytest.mark.parametrize("verdict, reason", [(WORKS, ""), (EAGER, ""), (REFUSED, "TwilightCache: x: expected none, got 'a'")])
def test_models_table_rows_survive_the_page(verdict, reason):
    row = Row("llama", "LlamaForCausalLM", verdict, reason)
    assert models_table.parse(models_table.render([row], "5.17.0")) == ("5.17.0", {"llama": row})


@pytest.mark.parametrize("name", models_table.IMAGES)
def test_models_table_an_image_in_the_prompt_gives_the_logits_of_sdpa(name):
    family = FAMILIES[name]
    ids, mask = models_table.make_prompt(image=True)
    image = models_table.IMAGES[name]()
    with torch.no_grad():
        expected = models_table.run_generate(models_table.make_model(family, "sdpa"), ids, mask, **image)
        model = models_table.make_model(family, "twilight")
        cache = models_table.make_cache(model.config, "shadow_prefix")
        models_table.compare("image", models_table.run_generate(model, ids, mask, past_key_values=cache, **image), expected)


def test_models_table_image_tokens_see_each_other_as_in_sdpa():
    """In layers with and without a window; one sequence is padded, and the prompt has images of several tokens."""
    family = FAMILIES["gemma3"]
    ids, mask = models_table.make_prompt(image=True)
    kinds = torch.zeros_like(ids)
    kinds[:, -20:-14] = kinds[:, -9:-3] = 1
    with torch.no_grad():
        expected = models_table.run_generate(models_table.make_model(family, "sdpa"), ids, mask, token_type_ids=kinds)
        causal = models_table.run_generate(models_table.make_model(family, "sdpa"), ids, mask)
        model = models_table.make_model(family, "twilight")
        cache = models_table.make_cache(model.config, "shadow_prefix")
        found = models_table.run_generate(model, ids, mask, past_key_values=cache, token_type_ids=kinds)
        models_table.compare("image", found, expected)
        with pytest.raises(AssertionError):
            models_table.compare("image", causal, expected)
        cache.reset()
        model(ids[:, :4], past_key_values=cache)
        mask = torch.full((2, 20, 1, 24), 3, dtype=torch.int8)
        with pytest.raises(RuntimeError, match="later ones in a cache's first prompt alone, got another mask"):
            model(ids[:, 4:], past_key_values=cache, attention_mask={"full_attention": mask, "sliding_attention": mask})
