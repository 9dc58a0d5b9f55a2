"""lm-evaluation-harness on a model with sparse decode attention: prompts attend exactly, every token after them decodes with a method.

    python -m twilight_ops.evaluation.lm_eval --model twilight --model_args pretrained=PATH,method=shadow_prefix:.95 --tasks TASK ...

is `lm_eval` with one model more; everything else is its own. Needs `pip install 'twilight_ops[lm-eval]'`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from ..cli.models import context_of, load_model
from .decoding import Stepper, teacher_forced
from .methods import parse_method
from .prefill import Prefill, attention, cache_of, record


@register_model("twilight")
class TwilightLM(LM):
    """Every token of a continuation is a decode step, so that what is scored is what a user of the method would see.

    Args:
        pretrained: folder of a Llama-family model, a .gguf file, smollm2, or random-tiny.
        method: as `python -m twilight_ops eval --methods` spells it, e.g. quest:n/4:.95; "dense" for exact attention.
        device, dtype: of the model; None: the command's defaults.
        max_length: most tokens of prompt and continuation; longer prompts lose their beginning. None: the model's own.
        max_gen_toks: new tokens where a task names no number.
        batch_size, max_batch_size: taken and ignored: requests run one after the other.

    Raises:
        ValueError: a method, model or setting that does not exist.
    """

    def __init__(
        self,
        pretrained: str,
        method: str = "shadow_prefix:.95",
        device: str | None = None,
        dtype: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        random_tiny = pretrained == "random-tiny"
        self.method = parse_method(method, "method")
        self.method.check_files("method")
        model = None if random_tiny else pretrained
        self.model, self.tokenizer = load_model(argparse.Namespace(model=model, random_tiny=random_tiny, device=device, dtype=dtype))
        self._device = self.model.device
        self.max_length, self.max_gen_toks = int(max_length or context_of(self.model)), int(max_gen_toks)
        self._last: tuple[tuple[int, ...], Prefill] | None = None

    @property
    def tokenizer_name(self) -> str:
        return str(getattr(self.tokenizer, "name_or_path", type(self.tokenizer).__name__)).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        told = {"tokenize": False, "add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return self.tokenizer.apply_chat_template(chat_history, **told)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        found = []
        for context, continuation in (request.args for request in requests):
            # Spaces between the two belong to the continuation: they are part of its first token.
            spaces = len(context) - len(context.rstrip())
            if spaces:
                context, continuation = context[:-spaces], context[-spaces:] + continuation
            whole = self._encode(context + continuation)
            head = self._encode(context) if context else [self._prefix]
            tail = whole[len(head) :] if context else whole
            found.append(self._score(head, tail))
            self.cache_hook.add_partial("loglikelihood", (context, continuation), found[-1])
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        found = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self._encode(text), prefix_token=self._prefix, max_seq_len=self.max_length - 1, context_len=1
            )
            found.append(sum(self._score(*make_disjoint_window(window))[0] for window in windows))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        found = []
        for context, settings in (request.args for request in requests):
            if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
                raise ValueError(f"TwilightLM: do_sample: expected greedy decoding, got {settings}")
            until = settings.get("until") or []
            stops = [until] if isinstance(until, str) else list(until)
            most = int(settings.get("max_gen_toks", self.max_gen_toks))
            if not 0 < most < self.max_length:
                raise ValueError(f"TwilightLM: max_gen_toks: expected 1 to {self.max_length - 1}, got {most}")
            text, tokens = "", []
            for token in self._greedy(self._encode(context)[-(self.max_length - most) :], most):
                if token in self._ends:
                    break
                tokens.append(token)
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                if any(stop in text for stop in stops):
                    break
            found.append(min((text.split(stop)[0] for stop in stops), key=len, default=text))
            self.cache_hook.add_partial("generate_until", (context, settings), found[-1])
        return found

    @property
    def _prefix(self) -> int:
        """What stands before a text that has no context."""
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(self.tokenizer, name, None)
            if token is not None:
                return token
        return 0

    @property
    def _ends(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends}

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _prefilled(self, ids: Sequence[int]) -> Prefill:
        """The prompt after exact attention; the choices of one question share it."""
        key = tuple(ids)
        if self._last is None or self._last[0] != key:
            self._last = (key, record(self.model, torch.tensor(ids)))
        return self._last[1]

    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """Sum of log-probabilities of the continuation, and whether it is what greedy decoding gives."""
        context = list(context)[-(self.max_length - len(continuation)) :]
        prefill = self._prefilled(context)
        target = torch.tensor(continuation, device=self._device)
        cache = cache_of(self.model, self.method.config(), [prefill], len(continuation))
        steps: Iterator[Tensor] = teacher_forced(self.model, cache, target[None, :-1])
        logits = torch.stack([prefill.last_logits, *(step[0].clone() for step in steps)]).log_softmax(-1)
        return logits.gather(1, target[:, None]).sum().item(), bool((logits.argmax(-1) == target).all())

    @torch.no_grad()
    def _greedy(self, ids: Sequence[int], most: int) -> Iterator[int]:
        prefill = self._prefilled(ids)
        cache = cache_of(self.model, self.method.config(), [prefill], most)
        token = prefill.last_logits.argmax(-1, keepdim=True)
        with attention(self.model, "twilight"):
            step = Stepper(self.model, cache)
            for last in range(most):
                yield int(token)
                if last + 1 < most:
                    token = step(token).argmax(-1)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
