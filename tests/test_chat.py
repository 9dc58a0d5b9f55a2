"""`twilight chat`: turns share a cache, and a turn that fails leaves nothing behind."""

import io

import pytest
import torch

pytest.importorskip("transformers")

from twilight_ops import TwilightConfig  # noqa: E402
from twilight_ops import __main__ as command_line  # noqa: E402
from twilight_ops.cli.chat import Conversation  # noqa: E402
from twilight_ops.cli.models import ByteTokenizer, random_tiny  # noqa: E402
from twilight_ops.integration import Decoder, TwilightCache  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return random_tiny(torch.device("cpu"), torch.float32)


class LineTokenizer(ByteTokenizer):
    """Answers of random bytes are no text: a template that leaves them out keeps turns comparable."""

    chat_template = "lines"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return (
            "".join(f"<{message['role']}>{message['content'].encode('ascii', 'ignore').decode()}\n" for message in messages) + "<assistant>"
        )


def conversation(model, context=512, new_tokens=6):
    config = TwilightConfig(top_p=1.0, dense_layers=1 << 20)
    cache = TwilightCache(model.config, config, max_cache_len=context, device=model.device, dtype=model.dtype, warn_never_sparse=False)
    return Conversation(Decoder(model, cache, capture="eager"), LineTokenizer(), context, new_tokens)


def test_a_later_turn_answers_as_if_all_had_been_read_at_once(model):
    talk = conversation(model)
    talk.ask("The lamp was lit at dusk, as every evening.")
    before = list(talk.cached)
    second = talk.ask("And who lit it, and when was it put out?")
    ids = talk.cached[: len(talk.cached) - len(second.tokens[0]) + 1]
    fresh = conversation(model)
    expected = fresh.decoder.generate(torch.tensor([ids]), max_new_tokens=6)
    assert second.tokens.tolist() == expected.tokens.tolist()
    assert ids[:40] == before[:40] and int(talk.decoder.cache.live_seq_lens[0]) == len(talk.cached)


@pytest.mark.parametrize("stops", [KeyboardInterrupt, RuntimeError])
def test_a_turn_that_ends_early_is_as_if_it_had_not_been(model, stops):
    def stop(tokens):
        raise stops

    talk = conversation(model)
    talk.ask("The lamp was lit at dusk.")
    messages = list(talk.messages)
    with pytest.raises(stops):
        talk.ask("Who lit it?", on_tokens=stop)
    assert talk.messages == messages and talk.cached == []
    again, whole = talk.ask("Who lit it?"), conversation(model)
    whole.messages = messages
    assert again.tokens.tolist() == whole.ask("Who lit it?").tokens.tolist()


def test_a_turn_that_does_not_fit_says_how_much_would(model):
    with pytest.raises(ValueError, match=r"context: expected at least \d+ tokens for this turn and 6 new ones, got 64"):
        conversation(model, context=64).ask("The lamp was lit at dusk. " * 4)


def test_turns_come_from_standard_input_and_answers_alone_go_to_standard_output(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("The lamp was lit.\nWho lit it?\n\nnever read\n"))
    options = ["--random-tiny", "--device", "cpu", "--capture", "eager", "--max-new-tokens", "8", "--dense-below", "0"]
    assert command_line.main(["chat", *options]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("of them read now") == 2 and "read now" not in captured.out
