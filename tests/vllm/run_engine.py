"""One vLLM engine in a process of its own: a job as JSON on stdin, what it answered as JSON in the file of argv[1].

A job has ``engine`` (arguments of `vllm.LLM`) and ``steps``: ["generate", {"prompts": [token ids, ...], "max_tokens": n}],
with ``extra_args``, one for each prompt; ["reset_prefix_cache", {}]; or [method of collective_rpc, keyword arguments]. The
answer has one result per step, where a request was refused {"error": sentence}.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def generate(
    llm: Any,
    prompts: list[list[int]],
    max_tokens: int,
    extra_args: Any = None,
    prompt_logprobs: int | None = 0,
) -> Any:
    """Greedy continuations with the log-probabilities of prompt and continuation."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError

    asked = [
        SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            prompt_logprobs=prompt_logprobs,
            logprobs=0,
            detokenize=False,
            ignore_eos=True,
            extra_args=extra,
        )
        for extra in extra_args or [None] * len(prompts)
    ]
    try:
        answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
    except VLLMClientError as error:
        return {"error": str(error)}
    return [
        {
            "tokens": list(answer.outputs[0].token_ids),
            "logprobs": _of(answer.outputs[0].logprobs, answer.outputs[0].token_ids),
            "prompt_logprobs": _of((answer.prompt_logprobs or [])[1:], answer.prompt_token_ids[1:]),
            "cached": answer.num_cached_tokens,
        }
        for answer in answers
    ]


def _of(steps: Any, tokens: Any) -> list[float]:
    return [step[token].logprob for step, token in zip(steps, tokens, strict=True)] if steps else []


def main() -> None:
    job = json.load(sys.stdin)
    from vllm import LLM

    llm = LLM(**job["engine"])
    results: list[Any] = []
    for name, arguments in job["steps"]:
        if name == "generate":
            results.append(generate(llm, **arguments))
        elif name == "reset_prefix_cache":
            results.append(llm.reset_prefix_cache())
        else:
            results.append(llm.collective_rpc(name, kwargs=arguments))
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main()
