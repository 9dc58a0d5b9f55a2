"""Twilight as the attention of vLLM. Run: python examples/vllm_offline.py --model MODEL --prompt-file book.txt

What a prompt would teach a selector comes from a file here, which `twilight calibrate` writes: --twilight '{"calibration": "FILE"}'.
Prints each answer; vLLM's log says every so many steps what was kept.
"""

import argparse
import json
from pathlib import Path

from vllm import LLM, SamplingParams


def run(args: argparse.Namespace) -> None:
    llm = LLM(
        args.model,
        attention_backend="CUSTOM",
        block_size=16,
        max_model_len=args.max_model_len,
        enforce_eager=args.enforce_eager,
        additional_config={"twilight": {"log_every": 32} | args.twilight},
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=args.new_tokens, ignore_eos=args.ignore_eos)
    answers = llm.generate([path.read_text() for path in args.prompt_file], greedy, use_tqdm=False)
    for path, answer in zip(args.prompt_file, answers, strict=True):
        print(f"{path.name}: {answer.outputs[0].text!r}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--prompt-file", type=Path, nargs="+", required=True, help="one sequence each, decoded together")
    parser.add_argument("--twilight", type=json.loads, default={}, help="fields of TwilightConfig as JSON")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--enforce-eager", action="store_true")
    run(parser.parse_args())
