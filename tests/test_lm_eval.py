"""lm-evaluation-harness under a policy, on local tasks, against figures computed one by one."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from bh_routing import is_patched
from bh_routing.cli import main
from bh_routing.errors import InvalidParameterError, MissingDependencyError
from bh_routing.evaluation import Workbench, make_routing
from bh_routing.evaluation.lm_eval import evaluate, register

ROOT = Path(__file__).parent.parent
TASKS = ROOT / "examples" / "lm_eval_tasks"
POLICIES = ["full", "topk:k=3", "topp:p=0.2"]

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed (pip install 'lm_eval[hf]')"
)

LAST_WORD = """\
task: words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def log_likelihood(model: Any, tokenizer: Any, context: str, ending: str) -> tuple[float, bool]:
    """Of an ending that begins with a blank, one by one and without padding; and whether greedy decoding gives it."""
    both, head = (tokenizer(text, add_special_tokens=False).input_ids for text in (context + ending, context))
    with torch.no_grad():
        logs = model(torch.tensor([both])).logits[0, :-1].double().log_softmax(-1)[len(head) - 1 :]
    target = torch.tensor(both[len(head) :])
    return float(logs.gather(-1, target[:, None]).sum()), bool((logs.argmax(-1) == target).all())


@needs_harness
@pytest.mark.slow  # importing the harness takes most of a minute
@pytest.mark.filterwarnings("ignore")
def test_figures_are_those_of_the_patched_model(
    nano_model: Any, nano_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # the task file names its data from there
    rows = [json.loads(line) for line in (TASKS / "register.jsonl").read_text().splitlines()]
    passages = [f"{row['query']} {row['endings'][row['label']].rstrip('.')}" for row in rows]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in passages))
    (tmp_path / "words.yaml").write_text(LAST_WORD.format(path=tmp_path / "words.jsonl"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def harness(task: str, folder: Path) -> list[dict[str, Any]]:
        found = evaluate(nano_model, nano_tokenizer, POLICIES, [task], include_path=str(folder))
        assert not is_patched(nano_model)
        assert found[0]["against_full"][task]["acc"] == {"only_here": 0, "only_full": 0, "p": 1.0}
        for row in found:
            told = row["against_full"][task]["acc"]
            more = row["results"][task]["acc"] - found[0]["results"][task]["acc"]
            assert told["only_here"] - told["only_full"] == round(more * len(rows))
            assert told["p"] == binomtest(
                told["only_here"], max(1, told["only_here"] + told["only_full"])
            ).pvalue or not (told["only_here"] + told["only_full"])
        return [row["results"][task] for row in found]

    choices, words = harness("register", TASKS), harness("words", tmp_path)
    for policy, choice, word in zip(POLICIES, choices, words, strict=True):
        with make_routing(policy, Workbench(nano_model)):
            right = by_length = 0
            for row in rows:
                endings = [" " + ending for ending in row["endings"]]
                values = [log_likelihood(nano_model, nano_tokenizer, row["query"], e)[0] for e in endings]
                right += int(np.argmax(values)) == row["label"]
                scaled = [value / len(ending) for value, ending in zip(values, row["endings"], strict=True)]
                by_length += int(np.argmax(scaled)) == row["label"]
            split = [passage.rpartition(" ") for passage in passages]
            last = [log_likelihood(nano_model, nano_tokenizer, head, " " + end) for head, _, end in split]
        assert (choice["acc"], choice["acc_norm"]) == (right / len(rows), by_length / len(rows))
        assert word["acc"] == sum(hit for _, hit in last) / len(last)
        mean = sum(value for value, _ in last) / len(last)
        assert word["perplexity"] == pytest.approx(math.exp(-mean), rel=1e-4)
    assert len({(c["acc"], c["acc_norm"], w["perplexity"]) for c, w in zip(choices, words, strict=True)}) == 3


@needs_harness
@pytest.mark.slow  # importing the harness takes most of a minute
@pytest.mark.filterwarnings("ignore")
def test_the_name_for_simple_evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    register()
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = lm_eval.simple_evaluate(
        "bh-routing",
        model_args={"pretrained": "olmoe-nano", "policy": "topk:k=3", "calibration": "none"},
        tasks=["register"],
        task_manager=TaskManager(include_path=str(TASKS)),
        limit=4,
        bootstrap_iters=0,
    )
    assert found["results"]["register"]["acc,none"] >= 0.25
    assert found["config"]["routing"]["mean_experts_per_token"] == 3.0


@needs_harness
@pytest.mark.slow  # importing the harness takes most of a minute
@pytest.mark.filterwarnings("ignore")
def test_an_unknown_task(nano_model: Any, nano_tokenizer: Any) -> None:
    with pytest.raises(InvalidParameterError, match="lm-evaluation-harness knows no task 'nosuchtask'"):
        evaluate(nano_model, nano_tokenizer, ["full"], ["nosuchtask"])


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    register.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.models", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(
        MissingDependencyError, match=r"lm-evaluation-harness is needed and cannot be imported"
    ):
        register()
    assert main(["lm-eval", "olmoe-nano", "--tasks", "register"]) == 2
    assert "pip install 'lm_eval[hf]'" in capsys.readouterr().err
