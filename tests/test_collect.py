"""The pass over text: what it counts, what it leaves alone, and that the split over processes does not matter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bh_routing
from bh_routing.calibration.accumulate import LayerCounts, ReservoirSampler, trimmed_range
from bh_routing.calibration.calibration import Calibration
from bh_routing.calibration.passes import calibrate, default_window
from bh_routing.errors import CalibrationError, DatasetError, InvalidParameterError, InvalidTypeError
from bh_routing.patching import RoutingPatch, make_plan
from bh_routing.policies import TopKPolicy
from bh_routing.text import TextFile, TextStream

E, K, L, H = 16, 6, 2, 32
PLAIN = {"outputs": False, "window": 32, "batch_tokens": 128, "reservoir": 64}


def documents(seed: int = 3, sizes=(70, 31, 5, 200, 64)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 250, (size,), generator=generator).tolist() for size in sizes]


def by_hand(model, docs, window=32):
    """Router logits, choices and expert outputs of every token, [L, T, ...], one unpadded window at a time."""
    logits, own, hidden = ([[] for _ in range(L)] for _ in range(3))
    hooks = []
    for index, layer in enumerate(model.model.layers):

        def keep(module, inputs, output, index=index):
            logits[index].append(output[0])
            own[index].append(output[2])
            hidden[index].append(inputs[0].reshape(-1, H))

        hooks.append(layer.mlp.gate.register_forward_hook(keep))
    with torch.no_grad():
        for doc in docs:
            for begin in range(0, len(doc), window):
                model(input_ids=torch.tensor([doc[begin : begin + window]]))
    for hook in hooks:
        hook.remove()
    return tuple(torch.stack([torch.cat(part) for part in parts]) for parts in (logits, own, hidden))


def expert_output(model, layer: int, expert: int, hidden_TH):
    experts = model.model.layers[layer].mlp.experts
    gate, up = (hidden_TH @ experts.gate_up_proj[expert].T).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up) @ experts.down_proj[expert].T


def same_counts(a: Calibration, b: Calibration) -> bool:
    return all(
        ours.trimmed_to_use().start == b.histograms[kind][name].trimmed_to_use().start
        and torch.equal(
            ours.trimmed_to_use().counts_LEB, b.histograms[kind][name].trimmed_to_use().counts_LEB
        )
        for kind, sets in a.histograms.items()
        for name, ours in sets.items()
    )


def test_counts_are_those_of_every_real_token(tiny_olmoe):
    """Documents of uneven length: padding would show as extra counts."""
    model, docs = tiny_olmoe(), documents()
    calibration = calibrate(model, None, docs, **PLAIN)
    logits_LTE, own_LTK, _ = by_hand(model, docs)
    assert calibration.tokens == logits_LTE.shape[1] == 370
    assert calibration.documents == 5
    selected_LTE = torch.zeros_like(logits_LTE, dtype=torch.bool).scatter(-1, own_LTK, True)
    for kind, value_LTE in (("logit", logits_LTE), ("logprob", logits_LTE.log_softmax(-1))):
        for name, members_LTE in (("selected", selected_LTE), ("unselected", ~selected_LTE)):
            held = calibration.histograms[kind][name]
            assert torch.equal(held.counts_LEB.sum(-1), members_LTE.sum(1))
            centres = torch.from_numpy((held.edges[1:] + held.edges[:-1]) / 2)
            mean_LE = (held.counts_LEB.double() @ centres) / held.counts_LEB.sum(-1).clamp_min(1)
            exact_LE = (value_LTE.double() * members_LTE).sum(1) / members_LTE.sum(1).clamp_min(1)
            # every value is at most half a bin from its bin's centre
            assert float((mean_LE - exact_LE).abs().max()) <= 1 / 128 + 1e-6


def test_moments_are_those_of_the_routed_tokens(tiny_olmoe):
    model, docs = tiny_olmoe(), documents()
    moments = calibrate(model, None, docs, window=32, batch_tokens=128).moments
    _, own_LTK, hidden_LTH = by_hand(model, docs)
    for layer in range(L):
        for expert in range(E):
            routed_T = (own_LTK[layer] == expert).any(-1)
            outputs_TH = expert_output(model, layer, expert, hidden_LTH[layer][routed_T]).double()
            assert moments.tokens_LE[layer, expert] == routed_T.sum()
            # float32 sums of at most a few hundred terms
            torch.testing.assert_close(
                moments.mean_LEH[layer, expert], outputs_TH.mean(0), rtol=1e-4, atol=1e-5
            )
            square = outputs_TH.square().sum(-1).mean()
            torch.testing.assert_close(moments.square_LE[layer, expert], square, rtol=1e-5, atol=1e-8)


def test_collecting_outputs_does_not_change_what_is_counted(tiny_olmoe):
    model, docs = tiny_olmoe(), documents()
    plain = calibrate(model, None, docs, **PLAIN)
    full = calibrate(model, None, docs, **(PLAIN | {"outputs": True}))
    moved = sum(
        int(a.counts_LEB.sum() - torch.minimum(a.counts_LEB, b.counts_LEB).sum())
        for a, b in (
            (plain.histograms[kind]["unselected"], full.histograms[kind]["unselected"])
            for kind in ("logit", "logprob")
        )
        if a.counts_LEB.shape == b.counts_LEB.shape
    )
    # the layer's output is summed in another order: a few logits cross a bin's edge
    assert moved <= 0.001 * 370 * (E - K) * L * 2 + 5


def test_padding_never_enters(tiny_olmoe):
    model, docs = tiny_olmoe(), documents()
    together = calibrate(model, None, docs, **PLAIN)
    alone = [calibrate(model, None, [doc], **PLAIN) for doc in docs]
    merged = alone[0].merge(*alone[1:])
    assert (merged.tokens, merged.text_digest) == (together.tokens, together.text_digest)
    for kind, sets in together.histograms.items():
        for name, held in sets.items():
            assert torch.equal(merged.histograms[kind][name].counts_LEB.sum(-1), held.counts_LEB.sum(-1)), (
                kind
            )
    assert torch.equal(merged.reservoir.hash_N, together.reservoir.hash_N)
    assert torch.equal(merged.reservoir.experts_NLK, together.reservoir.experts_NLK)


def test_reservoir_does_not_depend_on_order(tiny_olmoe):
    model, docs = tiny_olmoe(), documents()
    forward = calibrate(model, None, docs, **PLAIN).reservoir
    backward = calibrate(model, None, docs[::-1], **PLAIN).reservoir
    assert forward.num == 64
    assert torch.equal(forward.hash_N, backward.hash_N)
    assert torch.equal(forward.experts_NLK, backward.experts_NLK)
    torch.testing.assert_close(forward.logits_NLE, backward.logits_NLE, rtol=1e-3, atol=1e-3)  # float16
    other = calibrate(model, None, docs, **(PLAIN | {"seed": 1})).reservoir
    assert not torch.equal(forward.hash_N, other.hash_N)


def test_reservoir_holds_the_models_own_logits_and_choice(tiny_olmoe):
    model, docs = tiny_olmoe(), documents()
    reservoir = calibrate(model, None, docs, **(PLAIN | {"reservoir": 1000})).reservoir
    assert reservoir.num == 370
    logits_LTE, own_LTK, _ = by_hand(model, docs)
    held = {tuple(row.tolist()) for row in reservoir.experts_NLK[:, 0]}
    assert held == {tuple(row.tolist()) for row in own_LTK[0]}
    total = reservoir.logits_NLE.double().sum()
    assert float(total) == pytest.approx(float(logits_LTE.double().sum()), rel=1e-3)


def test_sampler_keeps_the_smallest_hashes_in_constant_memory():
    sampler = ReservoirSampler(50, 1, 4, 2)
    generator = torch.Generator().manual_seed(0)
    everything = []
    for _ in range(40):
        hashes = torch.randint(2**60, (30,), generator=generator)
        everything.append(hashes)
        rows = sampler.admit(hashes.numpy())
        sampler.add(hashes[rows], torch.zeros(len(rows), 1, 4), torch.zeros(len(rows), 1, 2))
        assert sampler.held < 100
    assert torch.equal(sampler.result().hash_N, torch.cat(everything).sort().values[:50])


def test_range_of_bins_grows():
    counts = LayerCounts("gate", 4, "softmax", 1.0, 1)
    own = torch.tensor([[0]])
    for value in (0.0, 5.0, -7.3, 200.0, -200.0):
        counts.update(torch.full((1, 4), value), own)
    held = counts.histograms()["logit"]["unselected"]
    used = (held.counts_LEB[0].sum(0).nonzero().flatten() + held.start).tolist()
    assert used == [-4096, int(-7.3 * 64) - 1, 0, 320, 4095]  # beyond +-64: the outermost bins
    assert int(held.counts_LEB.sum()) == 15


def test_trimmed_range_by_sorting():
    x_TE = torch.randn(200, 16).mul(4).round() / 4  # ties
    low_T1, high_T1 = trimmed_range(x_TE, 3)
    sorted_TE = x_TE.sort(-1).values
    assert torch.equal(low_T1, sorted_TE[:, 3:4])
    assert torch.equal(high_T1, sorted_TE[:, 12:13])
    low_T1, high_T1 = trimmed_range(x_TE, 8)
    assert bool((low_T1 > high_T1).all())


def test_max_tokens_and_window(tiny_olmoe):
    model = tiny_olmoe()
    calibration = calibrate(model, None, documents(), max_tokens=83, **PLAIN)
    assert (calibration.tokens, calibration.documents) == (83, 2)
    assert default_window(model) == 128


def test_text_and_tokenizer(nano_model, nano_tokenizer):
    text = "It was a bright cold day in April. " * 40
    calibration = calibrate(nano_model, nano_tokenizer, text, **PLAIN)
    assert calibration.tokens == len(nano_tokenizer(text)["input_ids"])
    assert calibration.documents == 1


def test_temperature_divides_the_logits(tiny_olmoe):
    model, docs = tiny_olmoe(), documents()
    warm = calibrate(model, None, docs, temperature=2.0, **PLAIN)
    logits_LTE, own_LTK, _ = by_hand(model, docs)
    value_LTE = (logits_LTE / 2.0).log_softmax(-1)
    members_LTE = torch.ones_like(value_LTE, dtype=torch.bool).scatter(-1, own_LTK, False)
    held = warm.histograms["logprob"]["unselected"]
    centres = torch.from_numpy((held.edges[1:] + held.edges[:-1]) / 2)
    mean = float((held.counts_LEB.sum((0, 1)).double() @ centres) / held.counts_LEB.sum())
    assert mean == pytest.approx(float(value_LTE[members_LTE].double().mean()), abs=1 / 64)


# -- what it leaves alone ----------------------------------------------------------------------------------


def state(model):
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [p.requires_grad for p in model.parameters()],
        [p.grad for p in model.parameters()],
        [m.training for m in model.modules()],
        [sorted(m.__dict__) for m in model.modules()],
        model.config.to_dict(),
    )


def assert_untouched(before, model) -> None:
    after = state(model)
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
    assert before[1:] == after[1:]


@pytest.mark.parametrize("sensitivity", [False, True])
def test_the_model_is_left_as_it_was(tiny_olmoe, token_ids, sensitivity):
    model = tiny_olmoe()
    model.train()
    model.model.layers[0].eval()
    next(model.parameters()).requires_grad_(False)
    before = state(model)
    with torch.no_grad():
        logits = model(token_ids).logits
    calibrate(model, None, documents(), sensitivity=sensitivity, **(PLAIN | {"outputs": True}))
    assert_untouched(before, model)
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, logits)


@pytest.mark.parametrize("sensitivity", [False, True])
def test_also_after_an_exception(tiny_olmoe, sensitivity):
    model = tiny_olmoe()
    model.train()
    before = state(model)

    class Interrupted:
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield documents()[0]
            if self.passes > sensitivity:
                raise KeyboardInterrupt
            yield documents()[1]

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, None, Interrupted(), sensitivity=sensitivity, **(PLAIN | {"outputs": True}))
    assert_untouched(before, model)


def test_memory_does_not_grow_with_the_text(tiny_olmoe):
    """What the collector holds after ten times the text is what it held after one."""
    model = tiny_olmoe()

    def held_bytes(repeats):
        calibration = calibrate(model, None, documents() * repeats, **PLAIN)
        tensors = [h.counts_LEB for sets in calibration.histograms.values() for h in sets.values()]
        tensors += [calibration.reservoir.logits_NLE, calibration.reservoir.experts_NLK]
        return sum(t.numel() * t.element_size() for t in tensors), calibration.tokens

    (once, tokens), (ten, more) = held_bytes(1), held_bytes(10)
    assert (once, tokens * 10) == (ten, more)


# -- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [[], [[]], "", "   \n"])
def test_empty_text(nano_model, nano_tokenizer, texts):
    with pytest.raises(
        CalibrationError, match="the text is empty: expected at least one token to calibrate on"
    ):
        calibrate(nano_model, nano_tokenizer, texts, **PLAIN)


def test_patched_model(tiny_olmoe):
    model = tiny_olmoe()
    patch = RoutingPatch(make_plan(model), TopKPolicy(2))
    patch.policy.bind(patch.plan.contexts)
    patch.apply()
    with pytest.raises(CalibrationError, match="the model is patched, so that its routers would not show"):
        calibrate(model, None, documents(), **PLAIN)
    patch.remove()


def test_logits_that_are_not_finite(tiny_olmoe):
    model = tiny_olmoe()
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[3] = float("nan")
    with pytest.raises(
        CalibrationError, match=r"router model\.layers\.1\.mlp\.gate gave NaN or infinite logits"
    ):
        calibrate(model, None, documents(), **PLAIN)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_tokens": 0}, InvalidParameterError, "max_tokens must be an integer of at least 1, got 0"),
        ({"window": 1}, InvalidParameterError, "window must be an integer of at least 2, got 1"),
        ({"reservoir": -1}, InvalidParameterError, "reservoir must be an integer of at least 0, got -1"),
        ({"trim": 1.5}, InvalidParameterError, r"trim must be an integer of at least 0, got 1\.5"),
        ({"temperature": 0.0}, InvalidParameterError, "temperature must be a finite number above 0"),
        ({"sensitivity": True}, InvalidParameterError, "sensitivity=True needs the experts' outputs"),
    ],
)
def test_parameters_out_of_range(tiny_olmoe, changes, error, message):
    with pytest.raises(error, match=message):
        calibrate(tiny_olmoe(), None, documents(), **(PLAIN | changes))


def test_wrong_documents(tiny_olmoe):
    with pytest.raises(InvalidTypeError, match="texts are strings but no tokenizer was given"):
        calibrate(tiny_olmoe(), None, ["text"], **PLAIN)
    with pytest.raises(
        InvalidTypeError, match="each document must be a string or a flat sequence of token ids"
    ):
        calibrate(tiny_olmoe(), None, [[[1, 2]]], **PLAIN)
    with pytest.raises(InvalidTypeError, match="sensitivity=True reads the texts twice, got an iterator"):
        calibrate(tiny_olmoe(), None, iter(documents()), sensitivity=True)


def test_text_files(tmp_path):
    import gzip
    import lzma

    text = "".join(f"line {i} of the text\n" for i in range(1000))
    for name, opener in (("a.txt", open), ("a.txt.xz", lzma.open), ("a.txt.gz", gzip.open)):
        with opener(tmp_path / name, "wt", encoding="utf-8") as file:
            file.write(text)
        pieces = TextFile(tmp_path / name, piece=5000)
        assert "".join(pieces) == "".join(pieces) == text  # twice
        assert max(len(piece) for piece in pieces) < 5100
        assert all(piece.endswith("\n") for piece in pieces)
    (tmp_path / "books.txt").write_text("one\ntwo\n\nthree\n \n\nfour")
    books = TextFile(tmp_path / "books.txt", None)
    assert [book.split() for book in books] == [["one", "two"], ["three"], [], ["four"]]
    with pytest.raises(DatasetError, match="there is no text file"):
        TextFile(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(
        DatasetError, match=r"expected UTF-8 text in .*latin\.txt, got other bytes; convert the file\.$"
    ):
        list(TextFile(tmp_path / "latin.txt"))


@pytest.mark.parametrize(
    ("length", "most", "expected"),
    [
        (320, None, range(0, 320, 32)),  # all
        (320, 96, (0, 96, 192)),  # three windows of ten, evenly
        (330, 330, range(0, 320, 32)),  # the eleventh, of 10 tokens, is one window too many
        (320, 5, (0,)),  # one window at least
        (20, 96, (0,)),
    ],
)
def test_document_tokens_takes_windows_evenly(length, most, expected):
    stream = TextStream([], None, window=32, batch_tokens=128, seed=0, document_tokens=most)
    starts = stream._starts(length)
    assert starts[: len(expected)] == list(expected)[: len(starts)]
    assert len(starts) == (-(-length // 32) if most is None else max(1, min(-(-length // 32), most // 32)))


def test_document_tokens_lets_no_document_outweigh_the_others(tiny_olmoe):
    model, docs = tiny_olmoe(), documents(sizes=(640, 64, 64))
    calibration = calibrate(model, None, docs, document_tokens=64, **PLAIN)
    by_hand_docs = [docs[0][:32] + docs[0][320:352], docs[1], docs[2]]
    assert calibration.tokens == 192
    assert same_counts(calibration, calibrate(model, None, by_hand_docs, **PLAIN))
    with pytest.raises(
        InvalidParameterError, match="document_tokens must be an integer of at least 1, got 0"
    ):
        calibrate(model, None, docs, document_tokens=0, **PLAIN)


# -- several processes -------------------------------------------------------------------------------------

WORKER = """
import sys
from pathlib import Path
import torch
from bh_routing.calibration.forwards import distributed
from bh_routing.calibration.passes import calibrate
from bh_routing.text import TextFile
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
torch.set_num_threads(1)
logging.disable_progress_bar()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
result = calibrate(model, tokenizer, TextFile(sys.argv[2], piece=4000), window=64, batch_tokens=512,
                   max_tokens=2000, reservoir=300, sensitivity=True, sensitivity_tokens=1000, model_id="nano")
rank, world = distributed()
result.save(Path(sys.argv[3]) / f"{world}-{rank}.safetensors")
if world > 1:
    torch.distributed.destroy_process_group()
"""


def test_two_processes_write_what_one_writes(tmp_path):
    """torchrun with two processes over gloo: counts and reservoir equal, thresholds within 1e-4."""
    nano = Path(bh_routing.__file__).parent / "models" / "olmoe-nano"
    sample = Path(bh_routing.__file__).parent / "data" / "sample.jsonl"
    (tmp_path / "worker.py").write_text(WORKER)
    arguments = [str(tmp_path / "worker.py"), str(nano), str(sample), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("WORLD_SIZE", None)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command in ([sys.executable], run):
        done = subprocess.run(
            command + arguments, env=environment, capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, first, second = (Calibration.load(tmp_path / f"{n}.safetensors") for n in ("1-0", "2-0", "2-1"))
    assert same_counts(first, second)
    assert same_counts(one, first)
    assert (one.tokens, one.documents, one.text_digest) == (first.tokens, first.documents, first.text_digest)
    for name in ("hash_N", "logits_NLE", "experts_NLK"):
        assert torch.equal(getattr(one.reservoir, name), getattr(first.reservoir, name))
    torch.testing.assert_close(one.moments.mean_LEH, first.moments.mean_LEH, rtol=1e-6, atol=1e-7)
    assert 0.0 < one.compensation_scale < 1.0
    assert abs(one.compensation_scale - first.compensation_scale) <= 0.01  # sums in another order
    assert first.compensation_scale == second.compensation_scale
    for size in ("sensitivity", "deviation"):
        a, b = one.table(0.1, size=size), first.table(0.1, size=size)
        torch.testing.assert_close(a.thresholds_LE, b.thresholds_LE, atol=1e-4, rtol=0)
        torch.testing.assert_close(a.offset_LE, b.offset_LE, atol=1e-4, rtol=0)


def test_masked_experts_are_not_counted():
    """Logits of -inf are of experts that a router cannot choose: the null is that of the others, whatever their number."""
    logits_TE = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    masked_TE = logits_TE.clone()
    masked_TE[:, 8:] = float("-inf")
    own_TK = masked_TE.topk(3).indices
    all_of_them = LayerCounts("gate", 12, "softmax", 1.0, 2)
    all_of_them.update(masked_TE, own_TK)
    fewer = LayerCounts("gate", 8, "softmax", 1.0, 2)
    fewer.update(logits_TE[:, :8].contiguous(), own_TK)
    for kind, sets in all_of_them.histograms().items():
        for name in ("selected", "unselected"):
            found, expected = sets[name], fewer.histograms()[kind][name]
            assert found.start == expected.start
            assert torch.equal(found.counts_LEB[:, :8], expected.counts_LEB)
            assert int(found.counts_LEB[:, 8:].sum()) == 0
    few = LayerCounts(
        "gate", 12, "softmax", 1.0, 2
    )  # fewer experts than slots: the choice is counted all the same
    masked_TE[:, 2:] = float("-inf")
    few.update(masked_TE, masked_TE.topk(3).indices)
    assert int(few.histograms()["logit"]["selected"].counts_LEB.sum()) == 150
