"""olmoe-nano in llama.cpp against the same routing in transformers: counts, logits, statistics; and all that may go wrong."""

from __future__ import annotations

import ctypes
import math
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from bh_routing import BHRoutingIntegration
from bh_routing.engines.llama_cpp import structure
from bh_routing.engines.llama_cpp.compiled import LlamaCppError
from bh_routing.errors import (
    CalibrationMismatchError,
    InvalidParameterError,
    ModelLoadError,
    UnsupportedModelError,
)

# What float32 in another order of summing makes of olmoe-nano's logits, whose standard deviation is 3.3.
NEAR = 3e-4
WAYS = {
    "budget 4": {"experts_per_token": 4, "compensation": False},
    "budget 2, means": {"experts_per_token": 2, "compensation": "mean"},
    "linear, sizes of the token": {"experts_per_token": 3, "compensation": "linear", "size": "token"},
    "without an expert": {"experts_per_token": 1, "compensation": "linear", "min_k": 0},
    "step-down, at least 2, at most 5": {
        "alpha": 0.05,
        "procedure": "holm",
        "min_k": 2,
        "max_k": 5,
        "weights": "preserve",
    },
}


def perplexity(logits: torch.Tensor, ids: list[int]) -> float:
    return math.exp(torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(ids[1:])))


def same_figures(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Integers are equal, sums of float32 weights nearly."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name in ("router_calls", "total_forward_passes"):
            continue  # as many as there were batches
        if isinstance(value, float) or (isinstance(value, list) and value and isinstance(value[0], float)):
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
        else:
            assert found[name] == value, name


@pytest.mark.parametrize("way", WAYS)
def test_counts_and_logits_are_those_of_transformers(make_llama, logits_of, nano, followed, ids, way):
    """Many tokens at once, one at a time, and with dropped experts computed with weight 0."""
    integrator = BHRoutingIntegration(nano[0], calibration=followed, **WAYS[way])
    with integrator, torch.no_grad():
        expected = nano[0](torch.tensor([ids])).logits[0]
    told = integrator.telemetry.to_dict()
    assert 1.0 <= told["total"]["mean_experts"] + 0.5 < 6.5
    for skip, step in (("auto", 512), ("auto", 1), ("auto", 70), ("zero", 512), ("zero", 1)):
        llm = make_llama(followed, skip=skip, **WAYS[way])
        found = logits_of(llm, ids, step)
        assert float((found - expected).abs().max()) < NEAR
        assert perplexity(found, ids) == pytest.approx(perplexity(expected, ids), rel=1e-4)
        mine = llm.routing.telemetry.to_dict()
        for layer, theirs in zip(mine["layers"], told["layers"], strict=True):
            same_figures(layer, theirs)
        same_figures(mine["total"], told["total"])
        stats = llm.routing.get_routing_stats()
        assert set(stats) >= {
            "mode",
            "alpha",
            "min_k",
            "max_k",
            "mean_experts_per_token",
            "std_experts_per_token",
        }
        kept = sum(sum(layer["expert_load"]) for layer in told["layers"])
        assert llm.routing.stats()["pairs_computed"] == (
            kept if skip == "auto" else 8 * told["total"]["decisions"]
        )


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "bf16"])
def test_quantised_files_differ_by_their_quantisation(make_llama, logits_of, calibration, ids, kind):
    """The routed file is no further from the routed float32 file than the files are without routing; q4_0 is repacked."""
    far = {}
    for routed in (None, calibration):
        given = {} if routed is None else {"experts_per_token": 4}
        exact, found = (
            logits_of(make_llama(routed, kind=one, **given), ids).log_softmax(-1) for one in ("f32", kind)
        )
        far[routed is None] = float((exact.exp() * (exact - found)).sum(-1).mean())
    # 5e-5: where rounding moves a statistic over its threshold, which bfloat16's own noise is smaller than
    assert 0 < far[False] < 1.6 * far[True] + 5e-5


@pytest.mark.parametrize("step", [1, 64])
def test_skipping_is_bit_for_bit_zero_weights_where_kernels_do_not_depend_on_rows(
    make_llama, logits_of, calibration, ids, step
):
    """q4_0 is repacked by default; a row's result is its own there."""
    skipped, zeroed = (
        logits_of(make_llama(calibration, kind="q4_0", experts_per_token=3, skip=skip), ids, step)
        for skip in ("auto", "zero")
    )
    assert float((skipped - zeroed).abs().max()) < (1e-5 if step == 1 else 1e-4)


def test_analyze_changes_nothing(make_llama, logits_of, calibration, ids):
    plain = logits_of(make_llama(), ids)
    llm = make_llama(calibration, experts_per_token=4, mode="analyze")
    assert torch.equal(logits_of(llm, ids), plain)
    stats = llm.routing.get_routing_stats()
    assert 3.5 < stats["bh_would_select_mean"] < 4.5
    assert llm.routing.stats()["pairs_computed"] == 0


def test_a_level_is_changed_in_place(make_llama, logits_of, followed, ids):
    llm = make_llama(followed, experts_per_token=3)
    first = logits_of(llm, ids)
    llm.routing.set_level(experts_per_token=2)
    llm.routing.reset_stats()
    second = logits_of(llm, ids)
    assert not torch.equal(first, second)
    fresh = make_llama(followed, experts_per_token=2)
    assert torch.equal(logits_of(fresh, ids), second)
    assert llm.routing.get_routing_stats() == fresh.routing.get_routing_stats()
    with pytest.raises(InvalidParameterError, match="exactly one"):
        llm.routing.set_level()
    assert torch.equal(logits_of(llm, ids), second)


def test_a_certified_loss_is_said_to_be_certified_elsewhere(make_llama, calibration, caplog):
    """The certificate is of other weights in another engine."""
    if calibration.certificate is None:
        pytest.skip("the calibration that comes with olmoe-nano holds no certificate")
    make_llama(calibration, max_kl=0.05)
    assert "this is GGUF in llama.cpp: it is used, and the certificate does not speak of it" in caplog.text


def test_generation_is_that_of_transformers(make_llama, nano, calibration):
    model, tokenizer = nano
    prompt = "The old man walked to the"
    with BHRoutingIntegration(model, calibration=calibration, experts_per_token=4), torch.no_grad():
        x = tokenizer(prompt, return_tensors="pt")
        expected = tokenizer.decode(
            model.generate(**x, max_new_tokens=30, do_sample=False)[0][x["input_ids"].shape[1] :]
        )
    llm = make_llama(calibration, experts_per_token=4, logits_all=False)
    answer = llm.create_completion(prompt, max_tokens=30, temperature=0.0)
    assert answer["choices"][0]["text"] == expected
    state = llm.save_state()
    streamed = "".join(
        part["choices"][0]["text"]
        for part in llm.create_completion(prompt, max_tokens=30, temperature=0.0, stream=True)
    )
    assert streamed == expected
    llm.load_state(state)


def test_speculative_decoding(make_llama, calibration):
    """Drafted tokens come in batches; what is accepted is what would have come one by one."""
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    prompt = "the old man and the boy, the old man and the boy, the old man"
    plain = make_llama(calibration, experts_per_token=4)
    drafted = make_llama(
        calibration, experts_per_token=4, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=4)
    )
    texts = [
        llm.create_completion(prompt, max_tokens=20, temperature=0.0)["choices"][0]["text"]
        for llm in (plain, drafted)
    ]
    assert texts[0] == texts[1]


def test_sequences_side_by_side(make_llama, logits_of, followed, ids, monkeypatch):
    """Two sequences in one batch get what each gets alone."""
    import llama_cpp.llama_cpp as low

    original = low.llama_context_default_params

    def params() -> Any:
        made = original()
        made.n_seq_max, made.kv_unified = 2, True
        return made

    monkeypatch.setattr(low, "llama_context_default_params", params)
    llm = make_llama(followed, experts_per_token=3, compensation="linear")
    parts = (ids[:30], ids[50:80])
    alone = [logits_of(llm, part) for part in parts]
    llm._ctx.kv_cache_clear()
    batch = llm._batch.batch
    batch.n_tokens = 60
    for i in range(60):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = parts[i % 2][i // 2], i // 2, 1, 1
        batch.seq_id[i][0] = i % 2
    llm._ctx.decode(llm._batch)
    rows = ctypes.cast(llm._ctx.get_logits(), ctypes.POINTER(ctypes.c_float * (60 * llm.n_vocab())))
    found = torch.tensor(list(rows.contents)).view(60, -1)
    for i in range(2):
        assert float((found[i::2] - alone[i]).abs().max()) < NEAR


def test_after_an_abort_all_is_as_it_was(make_llama, logits_of, calibration, ids):
    """llama.cpp is stopped at different places of a graph whose nodes are shortened; the next decode is right."""
    import llama_cpp.llama_cpp as low

    llm = make_llama(calibration, experts_per_token=3)
    expected = logits_of(llm, ids), logits_of(llm, ids[:20], 1)
    for step, stops in ((512, range(5, 120, 9)), (1, range(3, 120, 13))):
        aborted = 0
        for stop in stops:
            left = [stop]

            @low.ggml_abort_callback
            def abort(_: Any, left: list[int] = left) -> bool:
                left[0] -= 1
                return left[0] <= 0

            low.llama_set_abort_callback(llm.ctx, abort, None)
            try:
                logits_of(llm, ids[:20], step)
            except RuntimeError:
                aborted += 1
            low.llama_set_abort_callback(llm.ctx, low.ggml_abort_callback(), None)
            found = logits_of(llm, ids), logits_of(llm, ids[:20], 1)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert aborted > 2


def test_an_error_in_the_callback_is_raised_after_the_decode(
    make_llama, logits_of, calibration, ids, monkeypatch
):
    """ctypes would print it and go on with nonsense."""
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.warns(UserWarning, match=r"no C compiler.*saves no time.*0\.2 ms more per layer"):
        llm = make_llama(calibration, experts_per_token=4)
    expected = logits_of(llm, ids)
    policy = llm.routing.policy

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("deliberate")

    monkeypatch.setattr(policy, "decide", broken, raising=False)
    with pytest.raises(ZeroDivisionError, match="deliberate"):
        llm.eval(ids[:5])
    monkeypatch.undo()
    assert torch.equal(logits_of(llm, ids), expected)


@pytest.mark.parametrize("way", ["budget 2, means", "without an expert"])
def test_python_is_the_same_callback(make_llama, logits_of, followed, ids, way, monkeypatch):
    compiled = make_llama(followed, skip="zero", **WAYS[way])
    expected = logits_of(compiled, ids)
    with monkeypatch.context() as patch:
        patch.setenv("CC", "no-such-compiler")
        with pytest.warns(UserWarning, match="no C compiler"):
            llm = make_llama(followed, **WAYS[way])
    assert float((logits_of(llm, ids) - expected).abs().max()) < NEAR
    same_figures(llm.routing.telemetry.to_dict()["total"], compiled.routing.telemetry.to_dict()["total"])


def test_an_error_in_c_is_raised(make_llama, calibration, ids):
    """More experts than the model has, to provoke one."""
    llm = make_llama(calibration, experts_per_token=4)
    llm.routing.router.config.experts = 63
    with pytest.raises(
        LlamaCppError, match=r"layer 0: a node has another shape than at start-up \(64, expected 63\)"
    ):
        llm.eval(ids[:5])
    llm.routing.router.config.experts = 64
    llm.eval(ids[:5])


def test_threads_share_one_llama_in_turn(make_llama, calibration, ids):
    """Statistics are read between decodes, never within one."""
    llm = make_llama(calibration, experts_per_token=4)
    seen: list[int] = []
    reader = threading.Thread(
        target=lambda: [seen.append(llm.routing.get_routing_stats()["total_tokens"]) for _ in range(20)]
    )
    reader.start()
    for _ in range(5):
        llm.reset()
        llm.eval(ids[:50])
    reader.join()
    assert all(count % 50 == 0 for count in seen)


def test_what_cannot_be_served_is_refused(make_llama, calibration, tmp_path, gguf_file):
    """Each in one sentence, before anything is routed."""
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(b"GGUF" + b"\0" * 100)
    text = tmp_path / "text.gguf"
    text.write_text("no model")
    other = replace(calibration, fingerprint_LD=-calibration.fingerprint_LD)
    given = {"experts_per_token": 4}
    for error, match, calibrated, more in (
        (
            UnsupportedModelError,
            "runs on the CPU: expected n_gpu_layers=0, got 1",
            calibration,
            {"n_gpu_layers": 1},
        ),
        (
            InvalidParameterError,
            "max_k must be at most 8, what this model selects itself",
            calibration,
            {"max_k": 9},
        ),
        (
            InvalidParameterError,
            "llama.cpp does not support p-values per token",
            calibration,
            {"procedure": "storey", "experts_per_token": None, "alpha": 0.1},
        ),
        (
            InvalidParameterError,
            "skip='compact' has no meaning in llama.cpp",
            calibration,
            {"skip": "compact"},
        ),
        (ModelLoadError, "which does not exist", calibration, {"path": str(tmp_path / "none.gguf")}),
        (ModelLoadError, "expected a GGUF file", calibration, {"path": str(text)}),
        (ModelLoadError, "llama.cpp cannot load", calibration, {"path": str(torn)}),
        (CalibrationMismatchError, "the router weights of layer blk.0 differ", other, {}),
    ):
        with pytest.raises(error, match=match) as caught:
            make_llama(calibrated, **(given | more))
        assert str(caught.value).count(". ") == 0


def test_a_file_whose_architecture_is_not_in_the_table_is_refused(make_llama, calibration, monkeypatch):
    """By name."""
    monkeypatch.delitem(structure.ARCHITECTURES, "olmoe")
    with pytest.raises(
        UnsupportedModelError,
        match="architecture 'olmoe' have not been compared with transformers: expected one of",
    ):
        make_llama(calibration, experts_per_token=4)
