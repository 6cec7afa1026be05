"""The runner, its results folder, and its figures against independent computations."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bh_routing import RoutingIntegration, TopKPolicy, is_patched
from bh_routing.calibration.passes import calibrate
from bh_routing.cli import main
from bh_routing.decision.compensation import Compensation
from bh_routing.errors import DatasetError, InvalidInputError, InvalidParameterError, ResultsError
from bh_routing.evaluation import RoutingExperimentRunner, expert_usage, plot_usage
from bh_routing.evaluation.figures import costs
from bh_routing.evaluation.paired import block_sums, pareto_front, perplexity_change, perplexity_interval
from bh_routing.evaluation.results import ResultsFolder, ResultsWarning
from bh_routing.evaluation.scoring import _guessed, score_text
from bh_routing.evaluation.summary import by_arithmetic, summarise
from bh_routing.patching import make_plan
from bh_routing.text import spans
from olmoe_routing_experiments import RoutingStrategy, load_dataset
from report_cases import make_result


class Letters:
    """A tokenizer of single characters, for the tiny models (256 tokens)."""

    class Encoded:
        def __init__(self, ids: list[int], tensor: bool) -> None:
            self.input_ids: Any = torch.tensor([ids]) if tensor else ids

        def __getitem__(self, name: str) -> Any:
            return getattr(self, name)

    def __call__(self, text: str, **settings: Any) -> Any:
        return self.Encoded([min(ord(c), 255) for c in text], settings.get("return_tensors") == "pt")

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


TEXT = "It was a dark and stormy night; <b>the rain</b> fell in torrents & so on. " * 12


@pytest.fixture
def make_runner(tiny_olmoe: Any, tmp_path: Path) -> Any:
    model = tiny_olmoe()

    def make(policies: Any, data: Any = None, folder: str = "results", **settings: Any) -> Any:
        settings = {"window": 64, "batch_tokens": 256} | settings
        where = tmp_path / folder
        return RoutingExperimentRunner(
            settings.pop("model", model), Letters(), policies, data or {"night": TEXT}, where, **settings
        )

    return make


def plain_loss(model: Any, ids: torch.Tensor, length: int, stride: int) -> tuple[float, int]:
    """The loop of the transformers documentation: labels of -100 where a token was scored before."""
    total, scored, done = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + length, ids.shape[1])
        window, target = ids[:, begin:end], ids[:, begin:end].clone()
        target[:, : -(end - done)] = -100
        with torch.no_grad():
            loss = float(model(window, labels=target).loss)
        count = int((target[:, 1:] != -100).sum())
        if count:
            total, scored = total + loss * count, scored + count
        done = end
        if end == ids.shape[1]:
            break
    return total, scored


@pytest.mark.parametrize("stride", [64, 40, 7])
def test_perplexity_equals_a_plain_loop(make_runner: Any, stride: int) -> None:
    runner = make_runner(["topk:k=3"], stride=stride)
    full, cut = runner.run()
    ids = Letters()(TEXT, return_tensors="pt").input_ids
    total, scored = plain_loss(runner.model, ids, 64, stride)
    assert full["scored_tokens"] == scored
    assert full["perplexity"] == pytest.approx(math.exp(total / scored), rel=1e-4)
    with RoutingIntegration(runner.model, TopKPolicy(3)):
        total, scored = plain_loss(runner.model, ids, 64, stride)
    assert cut["perplexity"] == pytest.approx(math.exp(total / scored), rel=1e-4)
    assert abs(full["perplexity"] - cut["perplexity"]) > 1e-2
    assert cut["word_perplexity"] == pytest.approx(math.exp(cut["loss"] * len(TEXT) / len(TEXT.split())))


def test_accuracy_and_divergence(make_runner: Any) -> None:
    runner = make_runner(["topk:k=2"], kl=True)
    full, cut = runner.run()
    ids = Letters()(TEXT, return_tensors="pt").input_ids
    hits: list[torch.Tensor] = []
    kl: list[torch.Tensor] = []
    for window in ids.split(64, 1):
        with torch.no_grad():
            own = runner.model(window).logits[0, :-1].double().log_softmax(-1)
            with RoutingIntegration(runner.model, TopKPolicy(2)):
                other = runner.model(window).logits[0, :-1].double().log_softmax(-1)
        hits.append(other.argmax(-1) == window[0, 1:])
        kl.append((own.exp() * (own - other)).sum(-1))
    assert full["kl"] == pytest.approx(0.0, abs=1e-6)
    assert cut["kl"] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
    assert cut["token_accuracy"] == pytest.approx(float(torch.cat(hits).double().mean()))


def test_record_keys_counts_and_costs(make_runner: Any) -> None:
    runner = make_runner(["topk:k=2", "topp:p=0.4"])
    full, cut, top_p = runner.run()
    assert [r["policy"] for r in (full, cut, top_p)] == ["full", "topk:k=2", "topp:p=0.4"]
    assert (full["mean_experts_per_token"], cut["mean_experts_per_token"]) == (6.0, 2.0)
    assert 1 < top_p["mean_experts_per_token"] < 6
    model = runner.model
    expert = sum(p.numel() for p in model.model.layers[0].mlp.experts.parameters()) / 16
    total = sum(p.numel() for p in model.parameters())
    assert cut["active_parameters"] == pytest.approx(total - 2 * expert * (16 - 2))
    embedding = model.get_input_embeddings().weight.numel()
    assert cut["flops_per_token"] == pytest.approx(2 * (cut["active_parameters"] - embedding))
    assert cut["arithmetic_per_token"] == pytest.approx(2.0)
    assert cut["bytes_per_token"] == pytest.approx(2 * expert * 2 * 4)  # two layers, two experts, float32
    # the counts that the report shows are those of the telemetry
    shown = torch.tensor(top_p["shown_counts"])
    assert shown.shape == (2, 64)
    assert 1 <= int(shown.min()) <= int(shown.max()) <= 6
    assert torch.tensor(cut["shown_counts"]).unique().tolist() == [2]
    lines = (runner.folder.path / "results.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert {"policy", "perplexity", "mean_experts_per_token", "versions", "seed", "settings"} <= set(
        json.loads(lines[0])
    )
    assert not is_patched(model)


def test_a_run_is_resumed(make_runner: Any) -> None:
    first = make_runner(["topk:k=2"]).run()
    steps: list[tuple[int, int, str]] = []
    runner = make_runner(["topk:k=2", "topk:k=3"], step=lambda *s: steps.append(s))
    records = runner.run()
    assert records[:2] == first
    assert {label for _, _, label in steps} == {"topk:k=3"}
    assert steps[-1][0] == steps[-1][1]
    assert [done for done, _, _ in steps] == sorted(done for done, _, _ in steps)
    # other settings are other experiments
    again = make_runner(["topk:k=2"], stride=32).run()
    assert again[1]["perplexity"] != first[1]["perplexity"]
    assert len(runner.folder.results()) == 5


def test_an_interruption_keeps_what_is_done(make_runner: Any) -> None:
    def interrupt(_done: int, _total: int, label: str) -> None:
        if label == "topk:k=3":
            raise KeyboardInterrupt

    runner = make_runner(["topk:k=2", "topk:k=3"], step=interrupt)
    with pytest.raises(KeyboardInterrupt):
        runner.run()
    assert not is_patched(runner.model)
    assert [r["policy"] for r in runner.folder.results()] == ["full", "topk:k=2"]


def test_a_folder_of_another_model_is_refused(make_runner: Any, tiny_olmoe: Any) -> None:
    make_runner([]).run()
    with pytest.raises(ResultsError, match="holds results of another model"):
        make_runner([], model=tiny_olmoe(seed=1)).run()


def test_damaged_records_are_skipped(make_runner: Any) -> None:
    runner = make_runner(["topk:k=2"])
    runner.run()
    path = runner.folder.results_path
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(
        lines[0] + b'{"key": 1, "broken\n' + lines[1][:40]
    )  # cut off in the middle, no end of line
    with pytest.warns(ResultsWarning) as caught:
        assert [r["policy"] for r in runner.folder.results()] == ["full"]
    told = [str(w.message) for w in caught]
    assert [f"line {n} of" in message for n, message in zip((2, 3), told, strict=True)] == [True, True]
    with pytest.warns(ResultsWarning, match="line [23] of"):
        assert [r["policy"] for r in runner.run()] == ["full", "topk:k=2"]
    assert json.loads(path.read_bytes().splitlines()[-1])["policy"] == "topk:k=2"


def test_a_full_disk_leaves_whole_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ResultsFolder(tmp_path)
    folder.append(make_result("full", 8.0, 0.0, 1, key="a", x=float("nan")))
    before = folder.results_path.read_bytes()

    def full(_file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        folder.append(make_result("full", 8.0, 0.0, 1, key="b"))
    assert folder.results_path.read_bytes() == before
    assert [(r["key"], r["x"]) for r in folder.results()] == [("a", None)]


def test_strategies_of_the_original_form(make_runner: Any) -> None:
    class Two(RoutingStrategy):
        name = "two"

        def route(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            weights, indices = logits.softmax(-1).topk(2)
            return indices, weights

    class Wide(RoutingStrategy):
        name = "wide"
        max_k = 9

        def route(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            weights, indices = logits.softmax(-1).topk(9)
            return indices.masked_fill(weights < 0.01, -1), weights

    _, two, wide, cut = make_runner([Two(), Wide(), "topk:k=2"]).run()
    assert two["perplexity"] == pytest.approx(cut["perplexity"], rel=1e-5)
    assert two["mean_experts_per_token"] == 2.0
    assert 6 < wide["mean_experts_per_token"] <= 9

    class Wrong(RoutingStrategy):
        name = "wrong"

        def route(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            weights, indices = logits.softmax(-1).topk(9)
            return indices, weights

    with pytest.raises(InvalidInputError, match="returned 9 slots, more than 6; set max_k"):
        make_runner([Wrong()]).run()


def test_labels(make_runner: Any) -> None:
    records = make_runner({"mine": "topk:k=2", "yours": TopKPolicy(3)}).run()
    assert [r["policy"] for r in records] == ["full", "mine", "yours"]
    with pytest.raises(InvalidParameterError, match="policy 'topk:k=2' is there twice"):
        make_runner(["topk:k=2", "topk: k=2"])


def test_calibrated_budgets(make_runner: Any) -> None:
    ids = [Letters()(TEXT).input_ids]
    runner = make_runner([])
    calibration = calibrate(runner.model, None, ids, window=64, progress=False)
    runner = make_runner(
        ["bh:experts=3", "allocmoe:experts=3", "random:k=3"], calibration=calibration, solve_text=TEXT
    )
    full, *others = runner.run()
    for record in others:
        assert record["mean_experts_per_token"] == pytest.approx(3.0, rel=0.05)
        assert record["perplexity"] != full["perplexity"]
    assert others[0]["budget"] == 3.0
    assert 0 < others[0]["alpha"] < 1
    assert not others[1]["causal"]


def test_the_frame(make_runner: Any) -> None:
    frame = make_runner(["topk:k=2"]).run_all_experiments()
    assert frame["policy"].tolist() == ["full", "topk:k=2"]
    assert frame["mean_experts_per_token"].tolist() == [6.0, 2.0]


def test_a_policy_that_draws_starts_anew_with_each_text(make_runner: Any) -> None:
    records = make_runner(["random:k=2"], {"one": TEXT, "two": TEXT}).run()
    one, two = (r for r in records if r["policy"] == "random:k=2")
    assert one["blocks"] == two["blocks"]


def test_texts_to_measure_on(make_runner: Any) -> None:
    with pytest.raises(InvalidInputError, match="expected text in data set night, got none"):
        make_runner([], {"night": " "})
    with pytest.raises(
        DatasetError, match=r"data set 'lambada' is not loaded here any more: run its task with"
    ):
        load_dataset("lambada", limit=3)


# ---------------------------------------------------------------------------------------------- usage


def test_usage_per_layer_and_domain(tiny_olmoe: Any) -> None:
    model, texts = tiny_olmoe(), {"night": TEXT[:200], "letters": "abc def " * 30}
    integration = RoutingIntegration(model, TopKPolicy(3))
    usage = expert_usage(integration, Letters(), texts, window=64)
    assert not is_patched(model)
    for name, text in texts.items():
        seen: dict[str, torch.Tensor] = {}

        def watch(router: Any, context: Any, decision: Any, logits_TE: Any, seen: Any = seen) -> None:
            for row in decision.experts_TK.tolist():
                for expert in row:
                    if expert != context.empty:
                        seen.setdefault(context.path, torch.zeros(16))[expert] += 1

        integration.watchers.append(watch)
        with integration, torch.no_grad():
            for window in Letters()(text, return_tensors="pt").input_ids.split(64, 1):
                model(window)
        integration.watchers.remove(watch)
        expected = torch.stack(list(seen.values())).double() / len(text)
        torch.testing.assert_close(usage[name], expected, rtol=0, atol=1e-6)  # float32 shares
    figure = plot_usage(usage)
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title(loc="left") for axes in shown] == [
        "night: 3.00 experts per token",
        "letters: 3.00 experts per token",
    ]
    assert shown[0].images[0].get_array().data == pytest.approx(100 * usage["night"].numpy())


# ---------------------------------------------------------------------------------------------- statistics


def test_windows_score_every_token_once() -> None:
    for num, length, stride in ((10, 4, 4), (10, 4, 1), (33, 8, 3), (5, 8, 8), (8, 8, 2)):
        windows = spans(num, length, stride)
        scored = [t for w in windows for t in range(w.score, w.end)]
        expected = range(1, num) if stride < length else [t for t in range(num) if t % length]
        assert scored == list(expected)
    with pytest.raises(InvalidParameterError, match="got 4 and 5"):
        spans(10, 4, 5)
    with pytest.raises(InvalidInputError, match="at least two tokens, got 1"):
        spans(1, 4)


def test_batches_change_no_figure(tiny_olmoe: Any) -> None:
    model, ids = tiny_olmoe(), torch.randint(3, 250, (1000,))
    windows = spans(1000, 64, 48)
    one = score_text(model, ids, windows, batch_tokens=1)
    many = score_text(model, ids, windows, batch_tokens=4096)
    assert torch.allclose(one.losses_C, many.losses_C, atol=1e-4)  # float32 sums in another order


def test_streams_are_scored_in_step(make_runner: Any) -> None:
    """The same windows in other batches; what is shared is shared by the windows of one column."""
    policies = ["topk:k=2", "batchtopk:loads=4"]
    apart = make_runner(["topk:k=2"], folder="apart", max_tokens=768, kl=True).run()
    full, few, shared = make_runner(policies, streams=3, kl=True).run()
    for one, other in zip(apart, (full, few), strict=True):
        for name in ("perplexity", "kl", "mean_experts_per_token"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-7)  # products of other batches
        assert torch.allclose(torch.tensor(one["blocks"]), torch.tensor(other["blocks"]))
        assert (one["steps"], one["mean_loads"], other["tokens"]) == (0, None, 768)
    assert full["steps"] == 2 * 4 * 64  # layers, batches, columns
    assert full["mean_loads"] == full["own_mean_loads"] > few["mean_loads"] > shared["mean_loads"]
    assert 3.5 < shared["mean_loads"] <= 4
    with pytest.raises(InvalidParameterError, match="streams are windows that do not overlap, got stride 32"):
        make_runner(policies, streams=3, stride=32)
    with pytest.raises(
        InvalidInputError, match="64 streams of windows of 64 need a text of at least 4096 tokens, got 888"
    ):
        make_runner(policies, streams=64)


def test_bootstrap_covers_the_truth() -> None:
    """Mean differences with known truth: the 95 % interval holds it in about 95 % of 300 repetitions."""
    generator, covered, truth = np.random.default_rng(0), 0, math.expm1(0.02)
    for repetition in range(300):
        base = generator.normal(3.0, 1.0, (100, 512))
        ours = base + generator.normal(0.02, 0.3, (100, 512)) + generator.normal(0, 0.02, (100, 1))
        change = perplexity_change(
            block_sums(ours.ravel()), block_sums(base.ravel()), resamples=400, seed=repetition
        )
        covered += change.low <= truth <= change.high
    # four standard errors of 0.95 over 300, and a percentile interval's small shortfall
    assert covered / 300 > 0.95 - 4 * (0.95 * 0.05 / 300) ** 0.5 - 0.01


def test_intervals() -> None:
    blocks = block_sums(np.full(1030, 2.0))
    assert blocks == [[1024.0, 512], [1024.0, 512], [12.0, 6]]
    whole = perplexity_interval(blocks)
    assert whole.value == pytest.approx(math.exp(2.0))
    assert not whole.known  # three blocks are too few to draw from
    blocks *= 4
    whole = perplexity_interval(blocks)
    assert (whole.low, whole.high) == pytest.approx((whole.value, whole.value))
    assert perplexity_change(blocks, blocks).within_noise
    with pytest.raises(InvalidInputError, match="only routings of the same tokens"):
        perplexity_change(blocks, blocks[:2])


def test_pareto_front_by_hand() -> None:
    assert pareto_front([(1, 5), (2, 4), (2, 5), (3, 4), (1, 5), (float("nan"), 0)]) == [0, 1, 4]


def test_summary(make_runner: Any) -> None:
    policies = ["topk:k=3", "random:k=3", "uniform:k=2", "topk:k=2,weights=sum"]
    short = make_runner(policies, folder="short").run()
    assert all(not row["verdict"] for row in summarise(short, "night"))  # too few blocks for a verdict
    records = make_runner(policies, {"night": TEXT * 7}).run()
    rows = {row["result"]["policy"]: row for row in summarise(records, "night")}
    assert rows["full"]["change"] is None
    assert rows["topk:k=3"]["against"] is None
    assert rows["random:k=3"]["against"] == "topk:k=3"
    assert rows["uniform:k=2"]["against"] is None  # no plain top-2 was run
    assert rows["random:k=3"]["verdict"] in ("better", "worse", "within noise")
    change = rows["random:k=3"]["change"]
    expected = records[2]["perplexity"] / records[0]["perplexity"] - 1
    assert change.value == pytest.approx(expected)
    assert change.low <= change.value <= change.high


# -------------------------------------------------------------------------------------------- command line


def test_evaluate_and_record_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "night.txt"
    text.write_text(TEXT)
    config = tmp_path / "run.yaml"
    config.write_text(f"policy: [topk:k=4, 'topp:p=0.3']\ntext: {text}\nmax-tokens: 200\nwindow: 64\n")
    asked = [
        "evaluate",
        "olmoe-nano",
        "--config",
        str(config),
        "--calibration",
        "none",
        "-o",
        str(tmp_path / "r"),
    ]
    assert main(asked) == 0
    printed = capsys.readouterr().out
    assert "Pareto front (*): " in printed
    assert "topk:k=4" in printed
    assert len(ResultsFolder(tmp_path / "r").results()) == 3

    log = tmp_path / "log.safetensors"
    assert main(["record", "olmoe-nano", "--text", str(text), "-o", str(log), "--max-tokens", "100"]) == 0
    from bh_routing.evaluation.routing_log import RoutingLog

    held = RoutingLog.load(log)
    assert 50 <= held.num <= 100
    assert held.logits_NLE.shape[1:] == (4, 64)
    own = held.logits_NLE.float().topk(8).indices.sort(-1).values
    # float16 logits may tie where float32 ones did not
    assert float((own == held.experts_NLK.long().sort(-1).values).float().mean()) > 0.99


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "topq"], "did you mean 'topp'?"),
        ([], "evaluate needs --policy"),
        (["--policy", "topk:k=4"], "evaluate needs --text FILE to measure on"),
    ],
)
def test_evaluate_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = [] if "--text" in message else ["--text", "x.txt"]
    assert main(["evaluate", "olmoe-nano", "-o", "nowhere", *text, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_policies_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--policies"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "topp: the fewest experts" in printed
    assert "inspired by Huang et al. 2024" in printed


def _result(name: str, experts: float, loss: float, **settings: Any) -> dict[str, Any]:
    """What `summarise` needs of one policy's result: 40 blocks whose losses all share, but for ``loss`` and a wobble."""
    wobble = 0.001 if name == "mine" else 0.0
    return {
        "dataset": "night",
        "policy": name,
        "settings": {"weights": "model", **settings},
        "mean_experts_per_token": experts,
        "perplexity": 1.0 + loss,
        "blocks": [[512 * (3.0 + i % 7 + loss + wobble * (i % 5 - 2)), 512] for i in range(40)],
    }


@pytest.mark.parametrize(
    ("experts", "loss", "word"),
    [
        (4.05, -0.1, "better"),
        (3.95, 0.1, "worse"),
        (4.05, 0.0, "within noise"),
        (3.7, -0.1, "better"),  # with fewer experts
        (4.3, 0.1, "worse"),  # with more
        (4.3, -0.1, ""),  # more experts bought it
        (3.7, 0.1, ""),  # fewer experts cost it
        (3.7, 0.0, ""),
        (3.3, -0.1, ""),  # too far from top-4 to say anything
    ],
)
def test_the_verdict_against_top_k_at_about_the_same_number_of_experts(experts, loss, word):
    cut = _result("topk:k=4", 4.0, 0.0, policy="topk", k=4)
    rows = summarise([cut, _result("mine", experts, loss)], "night")
    (row,) = [row for row in rows if row["result"]["policy"] == "mine"]
    assert row["verdict"] == word
    assert (row["against"] is None) == (word == "")


def test_a_guess_is_the_first_largest_logit() -> None:
    logits_SV = torch.tensor([[0.0, 2.0, 2.0], [0.0, 2.0, 2.0], [3.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    targets_S = torch.tensor([1, 2, 1, 0])
    expected_S = logits_SV.argmax(-1) == targets_S
    assert expected_S.tolist() == [True, False, False, True]
    assert torch.equal(_guessed(logits_SV, targets_S), expected_S)
    logits_SV = torch.randn(500, 20, generator=torch.Generator().manual_seed(0)).bfloat16()  # ties
    targets_S = logits_SV.float().topk(2).indices[:, 1]
    assert 0 < int((logits_SV.argmax(-1) == targets_S).sum()) < 500
    assert torch.equal(_guessed(logits_SV, targets_S), logits_SV.argmax(-1) == targets_S)


def test_costs_of_compensations(make_runner: Any) -> None:
    """By hand: a linear one costs its map per dropped pair and its coordinates once; the mean's matrix, once."""
    model = make_runner(["topk:k=2"]).model
    hidden, experts = model.config.hidden_size, 16
    paths = [layer.path for layer in make_plan(model).layers]
    linear = Compensation.linear(
        center_D=torch.zeros(experts),
        low_D=torch.zeros(experts),
        high_D=torch.ones(experts),
        whiten_DR=torch.zeros(experts, 5),
        mean_EH=torch.zeros(experts, hidden),
        slope_ERH=torch.zeros(experts, 5, hidden),
    )
    mean = Compensation.mean(torch.zeros(experts, hidden), torch.zeros(experts, hidden))
    expert = sum(p.numel() for p in model.model.layers[0].mlp.experts.parameters()) / experts
    plain: dict[str, Any] = {}
    for kind, found in {
        "none": {},
        "linear": dict.fromkeys(paths, linear),
        "mean": dict.fromkeys(paths, mean),
    }.items():
        integration = RoutingIntegration(model, TopKPolicy(2), compensations=found)
        with integration, torch.no_grad():
            model(torch.arange(3, 43).unsqueeze(0))
        got = costs(model, integration, integration.telemetry.to_dict()["layers"])
        if kind == "none":
            plain = got
            continue
        dropped = 6 - 2
        multiplied = {"linear": experts * 6 + dropped * 6 * hidden, "mean": 2 * experts * hidden}[kind]
        read = {"linear": experts * 6 * 8 + dropped * 6 * hidden * 2, "mean": 2 * experts * hidden * 4}[kind]
        assert got["arithmetic_per_token"] == pytest.approx(2.0 + multiplied / expert)
        assert got["bytes_per_token"] - plain["bytes_per_token"] == pytest.approx(2 * read)
        assert got["flops_per_token"] - plain["flops_per_token"] == pytest.approx(2 * 2 * multiplied)
        assert got["active_parameters"] == plain["active_parameters"]


def test_by_arithmetic() -> None:
    results = [
        make_result("full", 8.0, 0.0, 1, arithmetic_per_token=8.0),
        make_result("topk:k=4", 4.0, 0.05, 2, arithmetic_per_token=4.0),
        make_result("bh:experts=4", 4.0, 0.02, 3, arithmetic_per_token=5.0),
        make_result("bh:experts=3", 3.0, 0.2, 4, arithmetic_per_token=4.5),
        make_result("old", 2.0, 0.3, 5, arithmetic_per_token=None),
    ]
    ranked = by_arithmetic(summarise(results, "night"))
    assert [row["result"]["policy"] for row in ranked] == ["full", "bh:experts=4", "bh:experts=3", "topk:k=4"]
    assert [row["arithmetic_front"] for row in ranked] == [True, True, False, True]
