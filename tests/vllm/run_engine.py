"""One vLLM engine in a process of its own: a job as JSON on stdin, what it answered as JSON in the file of argv[1].

A job has ``engine`` (arguments of `vllm.LLM`) and ``steps``: ["generate", {"prompts": [token ids, ...], "max_tokens": n}]
or [method of collective_rpc, keyword arguments]; the answer has one result per step.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def generate(llm: Any, prompts: list[list[int]], max_tokens: int) -> list[dict[str, Any]]:
    """Greedy continuations with the log-probabilities of prompt and continuation."""
    from vllm import SamplingParams

    asked = SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        prompt_logprobs=0,
        logprobs=0,
        detokenize=False,
        ignore_eos=True,
    )
    answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
    return [
        {
            "tokens": list(answer.outputs[0].token_ids),
            "logprobs": _of(answer.outputs[0].logprobs, answer.outputs[0].token_ids),
            "prompt_logprobs": _of(answer.prompt_logprobs[1:], answer.prompt_token_ids[1:]),
        }
        for answer in answers
    ]


def _of(steps: Any, tokens: Any) -> list[float]:
    return [step[token].logprob for step, token in zip(steps, tokens, strict=True)]


def main() -> None:
    job = json.load(sys.stdin)
    from vllm import LLM

    llm = LLM(**job["engine"])
    results: list[Any] = []
    for name, arguments in job["steps"]:
        if name == "generate":
            results.append(generate(llm, **arguments))
        else:
            results.append(llm.collective_rpc(name, kwargs=arguments))
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main()
