"""lm-evaluation-harness under a policy, on local tasks, against this library's own figures."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bh_routing import is_patched
from bh_routing.cli import main
from bh_routing.errors import InvalidParameterError, MissingDependencyError
from bh_routing.evaluation import Dataset, RoutingExperimentRunner
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


@needs_harness
@pytest.mark.slow  # importing the harness takes most of a minute
@pytest.mark.filterwarnings("ignore")
def test_figures_equal_the_harness(
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
        return [row["results"][task] for row in found]

    choices, words = harness("register", TASKS), harness("words", tmp_path)
    data = [Dataset.from_choices("register", rows), Dataset.from_passages("words", passages)]
    records = RoutingExperimentRunner(nano_model, nano_tokenizer, POLICIES, data, tmp_path / "r").run()
    ours = {(r["policy"], r["dataset"]): r for r in records}
    for policy, choice, word in zip(POLICIES, choices, words, strict=True):
        mine = ours[policy, "register"]
        assert (mine["choice_accuracy"], mine["choice_accuracy_normalised"]) == (
            choice["acc"],
            choice["acc_norm"],
        )
        mine = ours[policy, "words"]
        assert mine["last_word_accuracy"] == word["acc"]
        assert mine["last_word_perplexity"] == pytest.approx(word["perplexity"], rel=1e-4)
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
