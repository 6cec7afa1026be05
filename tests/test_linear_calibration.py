"""What a calibration holds of the linear compensation: collected, chosen, shrunk, resumed, and read back from its file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bh_routing._files.tensors import tensors_digest
from bh_routing.calibration import checkpoint, third_pass
from bh_routing.calibration.calibration import Calibration
from bh_routing.calibration.dropping import Dropping, dropping_policy
from bh_routing.calibration.forwards import frozen
from bh_routing.calibration.linear_fit import LinearSums
from bh_routing.calibration.linear_maps import ChosenFit, LinearMaps, choose_fit, largest_rank, shrunk
from bh_routing.calibration.moments import ENOUGH
from bh_routing.calibration.passes import calibrate
from bh_routing.calibration.second_pass import SecondPass, mean_addition, mean_logits, strange_windows
from bh_routing.calibration.token_sizes import Residuals, fit_slopes, fit_token_sizes
from bh_routing.decision.compensation import lost_and_kept
from bh_routing.errors import (
    CalibrationError,
    CalibrationFileError,
    CalibrationMismatchError,
    CalibrationWarning,
    InvalidParameterError,
)
from bh_routing.patching import make_plan
from bh_routing.stats.statistic import full_statistic, token_size
from bh_routing.text import TextStream
from bh_routing.text.hashing import document_digest
from test_linear_fit import E, H, sums_of, tokens

FIXTURES = Path(__file__).parent / "fixtures"


def documents(num: int = 24, length: int = 96) -> list[list[int]]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(3, 250, (length,), generator=generator).tolist() for _ in range(num)]


SETTINGS = {"window": 32, "batch_tokens": 128, "reservoir": 256, "sensitivity": True, "progress": False}


HELD: list[Calibration] = []


@pytest.fixture
def calibrated(tiny_olmoe):
    """One calibration for all tests of this file."""
    if not HELD:
        HELD.append(calibrate(tiny_olmoe(), None, documents(), rank=16, **SETTINGS))
    return HELD[0]


def second_pass(model, calibration, **changes):
    plan = make_plan(model)
    second = SecondPass(model, plan, calibration, linear=True, **changes)
    with frozen(model):
        for batch in TextStream(documents(), None, window=32, batch_tokens=128, seed=0):
            second.add(batch)
    return second


# -- the second pass -------------------------------------------------------------------------------------------


def test_sums_are_those_of_the_dropped_pairs(tiny_olmoe, calibrated):
    """Without the robust fit every window that is not held out counts, and nothing else."""
    model = tiny_olmoe()
    plain = second_pass(model, calibrated, robust=False)
    plan, seen = (
        make_plan(model),
        {
            path: LinearSums(16, origin, 32)
            for path, origin in zip(calibrated.paths, mean_logits(calibrated), strict=True)
        },
    )
    additions = {
        path: mean_addition(mean_EH.float())
        for path, mean_EH in zip(calibrated.paths, calibrated.moments.mean_LEH, strict=True)
    }
    dropping = Dropping(model, plan, dropping_policy(calibrated), additions)
    pairs = 0
    for batch in TextStream(documents(), None, window=32, batch_tokens=128, seed=0):
        dropping.forward(batch, lambda path, one: seen[path].take(one))
    for path, sums in plain.linear.items():
        pairs += int(sums.pairs_E.sum())
        assert torch.equal(sums.pairs_E, seen[path].pairs_E)
        # float32 sums of a few hundred terms, in two orders
        torch.testing.assert_close(sums.cross_EJH, seen[path].cross_EJH, rtol=1e-4, atol=1e-4)
    assert pairs > 1000


def test_held_out_windows_are_in_none_of_the_sums(tiny_olmoe, calibrated):
    """They and the others together are all there are."""
    model = tiny_olmoe()
    everything = second_pass(model, calibrated, robust=False)
    without = second_pass(model, calibrated, robust=False, held_out=[0, 8])
    plan = make_plan(model)
    held = {path: LinearSums(16, one.origin_D, 32) for path, one in everything.linear.items()}
    dropping = Dropping(model, plan, everything.dropping.policy, everything.dropping.additions)
    for batch in TextStream(documents(), None, window=32, batch_tokens=128, seed=0):
        if batch.index in (0, 8):
            dropping.forward(batch.windows([0]), lambda path, one: held[path].take(one))
    for path, sums in without.linear.items():
        assert int(held[path].pairs_E.sum()) > 0
        assert torch.equal(sums.pairs_E + held[path].pairs_E, everything.linear[path].pairs_E)
    for path, sums in without.layers.items():  # sensitivities and fixed vectors keep them
        assert torch.equal(sums.square_E, everything.layers[path].square_E)
        assert torch.equal(sums.gram_JJ, everything.layers[path].gram_JJ)


def test_the_robust_fit_takes_as_many_tokens_half_of_them_strange(tiny_olmoe, calibrated):
    model = tiny_olmoe()
    plain, robust = (second_pass(model, calibrated, robust=r) for r in (False, True))
    for path in calibrated.paths:
        assert torch.equal(plain.layers[path].square_E, robust.layers[path].square_E)
        assert not torch.equal(plain.linear[path].pairs_E, robust.linear[path].pairs_E)
        # about as many pairs are dropped: the text is random here as well
        assert int(robust.linear[path].pairs_E.sum()) == pytest.approx(
            int(plain.linear[path].pairs_E.sum()), rel=0.1
        )


def test_strange_windows_are_shuffled_and_random_and_seeded():
    batch = next(iter(TextStream(documents(), None, window=32, batch_tokens=128, seed=0)))
    part_B = torch.tensor([0, 1, 2, 3])
    found, again = (strange_windows(batch, part_B, torch.arange(250), 7) for _ in range(2))
    assert torch.equal(found.input_ids, again.input_ids)
    assert not torch.equal(found.input_ids, strange_windows(batch, part_B, torch.arange(250), 8).input_ids)
    assert found.input_ids.shape == (2, 32)
    shuffled, text = found.input_ids[0], batch.input_ids[2]
    assert torch.equal(shuffled.sort().values, text.sort().values)
    assert not torch.equal(shuffled, text)
    assert not torch.equal(found.input_ids[1].sort().values, batch.input_ids[3].sort().values)
    assert found.hashes.tolist() == batch.hashes[64:128].tolist()


def test_the_fixed_vectors_stay_as_they_are(tiny_olmoe, calibrated):
    old = calibrate(tiny_olmoe(), None, documents(), linear=False, **SETTINGS)
    for name in ("sensitivity_LE", "gram_LJJ", "cross_LJH", "mean_LEH"):
        assert torch.equal(getattr(old.moments, name), getattr(calibrated.moments, name))
    assert old.compensation_scale == calibrated.compensation_scale
    assert old.linear is None
    assert old.forms == ("none", "mean")


# -- rank, ridge, shrinking ------------------------------------------------------------------------------------


def test_a_layer_keeps_the_mean_where_a_map_does_not_pay():
    noise, judge = tokens(0, slope=0.0), tokens(1, slope=0.0)
    found = choose_fit(sums_of(noise), sums_of(judge), None, E)
    assert found.fit.rank == 0
    assert found.r2 == found.mean_r2 > 0.9
    linear = choose_fit(sums_of(tokens(0)), sums_of(tokens(1)), None, E)
    assert linear.fit.rank == E
    assert linear.r2 > linear.mean_r2 + 0.1
    assert choose_fit(sums_of(tokens(0)), sums_of(tokens(1)), 3, E).fit.rank == 3


def test_the_default_rank_takes_three_percent_of_the_experts_or_sixteen():
    assert largest_rank(3 * 2048 * 1024, 2048) == 92
    assert largest_rank(3 * 2048 * 768, 2048) == 69
    assert largest_rank(3 * 128 * 64, 128) == 16  # 3 % would be 5
    assert largest_rank(0, 128) == 16


@pytest.mark.parametrize("pairs", [0, 1, 2, 16, ENOUGH, 1000])
def test_a_rarely_dropped_expert_leans_on_its_mean_output(pairs):
    fit = choose_fit(sums_of(tokens(0)), sums_of(tokens(1)), E, E)
    pairs_E = torch.full((E,), 500)
    pairs_E[2] = pairs
    mean_EH = torch.full((E, H), 7.0, dtype=torch.float64)
    found = shrunk(replace(fit, pairs_E=pairs_E), mean_EH).fit
    share = min(1.0, pairs / ENOUGH)
    torch.testing.assert_close(found.mean_EH[2], share * fit.fit.mean_EH[2] + (1 - share) * mean_EH[2])
    torch.testing.assert_close(found.slope_ERH[2], share * fit.fit.slope_ERH[2])
    assert torch.equal(found.mean_EH[3], fit.fit.mean_EH[3])


def test_layers_of_several_ranks_are_stacked():
    fits = [choose_fit(sums_of(tokens(0)), sums_of(tokens(1)), rank, E) for rank in (3, 5)]
    fits.append(
        ChosenFit(
            replace(
                fits[0].fit, whiten_DR=fits[0].fit.whiten_DR[:, :0], slope_ERH=fits[0].fit.slope_ERH[:, :0]
            ),
            0.1,
            0.1,
            fits[0].pairs_E,
        )
    )
    maps = LinearMaps.stack(fits, [1000, 1000, 0])
    assert maps.rank_L.tolist() == [3, 5, 0]
    assert maps.slope_LERH.dtype == torch.bfloat16
    assert maps.slope_LERH.shape == (3, E, 5, H)
    for index, one in enumerate(fits):
        layer = maps.layer(index)
        torch.testing.assert_close(layer.whiten_DR, one.fit.whiten_DR.float())
        assert torch.equal(layer.slope_ERH, one.fit.slope_ERH.to(torch.bfloat16))
    assert maps.share(1) == pytest.approx(5 * H / 1000)


def test_the_addition_is_the_definition():
    """w (m + A W' (z - mu)) over the dropped slots, logits clamped to their range and -inf at mu."""
    fit = choose_fit(sums_of(tokens(0)), sums_of(tokens(1)), 4, E).fit
    fit = type(fit)(**{name: x.float() for name, x in vars(fit).items()})
    logits_TD, _, experts_TK, weights_TK, dropped_TK = tokens(2, 40)
    logits_TD[3, 1], logits_TD[5, 2] = -torch.inf, 1e4
    found_TH = third_pass.linear_addition(fit)(logits_TD, weights_TK, dropped_TK, experts_TK)
    for token in range(40):
        z = torch.where(torch.isinf(logits_TD[token]), fit.center_D, logits_TD[token])
        white = fit.whiten_DR.T @ (z.clamp(fit.low_D, fit.high_D) - fit.center_D)
        expected = sum(
            (
                weights_TK[token, slot] * (fit.mean_EH[expert] + white @ fit.slope_ERH[expert])
                for slot, expert in enumerate(experts_TK[token].tolist())
                if dropped_TK[token, slot]
            ),
            torch.zeros(H),
        )
        torch.testing.assert_close(found_TH[token], expected, rtol=1e-4, atol=1e-5)


# -- calibrate -------------------------------------------------------------------------------------------------


def test_it_brings_the_layers_nearer_than_the_mean(calibrated):
    assert calibrated.forms == ("none", "mean", "linear")
    assert calibrated.linear.rank_L.tolist() == [16, 16]
    assert bool((calibrated.linear.r2_L > calibrated.linear.mean_r2_L).all())
    assert 0.0 < calibrated.linear_scale <= 1.0
    assert calibrated.token_sizes.slope_LDE.shape == (2, 16, 16)
    assert "linear compensation in 2 layers" in repr(calibrated)
    assert "sizes from the token (null of 5,120 samples: p-values from 0.0002)" in repr(calibrated)


def test_the_forms(calibrated):
    mean = calibrated.compensation("mean", 0.5)
    assert {p: c.vectors_JH.shape for p, c in mean.items()} == {
        p: torch.Size([32, 32]) for p in calibrated.paths
    }
    assert calibrated.compensation("none") == calibrated.compensation("linear", 0.0) == {}
    with pytest.raises(
        CalibrationMismatchError, match="'linear' needs a calibration that holds it, this one"
    ):
        replace(calibrated, linear=None).compensation("linear")
    with pytest.raises(
        InvalidParameterError, match="compensation must be 'none', 'mean' or 'linear', got 'l'"
    ):
        calibrated.compensation("l")
    assert calibrated.without_means().forms == ("none",)
    with pytest.warns(CalibrationWarning, match="cannot be merged from files, .* add up the sums exactly"):
        assert calibrated.merge(replace(calibrated, text_digest="1" * 32)).forms == ("none", "mean")


def test_one_rank_for_all_layers_and_none(tiny_olmoe):
    with pytest.raises(InvalidParameterError, match="rank must be an integer of at least 1, got 0"):
        calibrate(tiny_olmoe(), None, documents(), rank=0, **SETTINGS)
    assert calibrate(tiny_olmoe(), None, documents(), means=False, **SETTINGS).linear is None


def test_the_reservoir_knows_its_documents(calibrated):
    """Tokens of one document share a number, and documents are told apart."""
    stream = TextStream(documents(), None, window=32, batch_tokens=128, seed=0)
    held = {}
    for batch in stream:
        held |= dict(zip(batch.hashes.tolist(), batch.documents.tolist(), strict=True))
    kept = calibrated.reservoir
    assert [held[h] for h in kept.hash_N.tolist()] == kept.document_N.tolist()
    assert len(set(held.values())) == 24
    assert min(held.values()) >= 0


def test_the_text_is_known_by_its_documents(calibrated):
    """Whatever the seed; a merged calibration knows the documents of both."""
    expected = sorted(document_digest(torch.tensor(ids).numpy().tobytes()) for ids in documents())
    assert calibrated.document_digests_C.tolist() == expected
    assert 0 <= expected[0] < expected[-1] < 2**63
    half = replace(calibrated, document_digests_C=calibrated.document_digests_C[:12])
    assert (calibrated + half).document_digests_C.tolist() == expected
    assert (half + replace(calibrated, document_digests_C=None)).document_digests_C is None
    assert document_digest("as it\n was ") == document_digest("as it was") != document_digest("as it is")


def digest_of(path) -> str:
    """Of everything that the file holds."""
    with safe_open(str(path), framework="pt") as file:
        return file.metadata()["digest"]


# -- file ------------------------------------------------------------------------------------------------------


def test_round_trip(calibrated, tmp_path):
    calibrated.save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors")
    for part in ("linear", "token_sizes"):
        for name, value in vars(getattr(calibrated, part)).items():
            assert torch.equal(value, getattr(getattr(loaded, part), name)), name
    assert loaded.linear_scale == calibrated.linear_scale
    assert torch.equal(loaded.reservoir.document_N, calibrated.reservoir.document_N)
    assert torch.equal(loaded.document_digests_C, calibrated.document_digests_C)
    settings = calibrated.settings()
    assert settings.size == "token"
    assert loaded.solve(3.0).alpha == calibrated.solve(3.0).alpha
    (tmp_path / "again").mkdir()
    loaded.save(tmp_path / "again" / "c.safetensors")
    assert digest_of(tmp_path / "again" / "c.safetensors") == digest_of(tmp_path / "c.safetensors")


def test_half_of_a_part_is_refused(calibrated, tmp_path):
    calibrated.save(tmp_path / "c.safetensors")
    tensors = load_file(tmp_path / "c.safetensors")
    with safe_open(str(tmp_path / "c.safetensors"), framework="pt") as file:
        metadata = file.metadata()

    def rewritten(changed):
        held = metadata | {"digest": tensors_digest(metadata["header"], changed)}
        save_file(changed, tmp_path / "d.safetensors", held)
        return tmp_path / "d.safetensors"

    with pytest.raises(CalibrationFileError, match=r"linear\.center and .* must be there together"):
        Calibration.load(rewritten({k: v for k, v in tensors.items() if k != "linear.low"}))
    with pytest.raises(
        CalibrationFileError, match=r"linear\.rank must be at most the width of linear\.whiten"
    ):
        Calibration.load(rewritten(tensors | {"linear.rank": tensors["linear.rank"] + 1}))
    with pytest.raises(CalibrationFileError, match=r"document_digests must ascend, each of them once"):
        Calibration.load(rewritten(tensors | {"document_digests": torch.tensor([3, 3])}))


def test_files_of_format_1_decide_bit_for_bit_as_before(sha256_of):
    """Hashes taken before format 2 was there, of the calibration that shipped then."""
    loaded = Calibration.load(FIXTURES / "olmoe-nano-format-1.safetensors")
    assert loaded.forms == ("none", "mean")
    assert sha256_of(loaded.table(0.05).thresholds_LE, loaded.table(0.05).offset_LE) == "ae93c3076d097061"
    for budget, expected in ((4.0, "38d620ceb9cb38ac"), (3.0, "48249b1676e91fef"), (2.0, "5927596c32d4ed6d")):
        assert sha256_of(loaded.solve(budget).table.thresholds_LE) == expected
    assert loaded.reservoir.document_N is None
    assert loaded.document_digests_C is None


# -- resuming --------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def texts_until(number: int | None):
    """A function of documents that is cut off after so many in all, over every reading."""
    left = [number]

    def texts():
        for document in documents():
            if left[0] is not None:
                left[0] -= 1
                if left[0] < 0:
                    raise Interrupted
            yield document

    return texts


@pytest.mark.parametrize("after", [10, 35], ids=["first pass", "second pass"])
def test_an_interrupted_calibration_goes_on(tiny_olmoe, calibrated, tmp_path, monkeypatch, after):
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    folder = tmp_path / "c.parts"
    settings = SETTINGS | {"rank": 16, "resume": folder}
    with pytest.raises(Interrupted):
        calibrate(tiny_olmoe(), None, texts_until(after), **settings)
    assert {path.name for path in folder.iterdir()} == {
        "first.0.pt",
        *(["second.0.pt"] if after > 24 else []),
    }
    found = calibrate(tiny_olmoe(), None, texts_until(None), **settings)
    found.save(tmp_path / "c.safetensors")
    calibrated.save(tmp_path / "d.safetensors")
    assert digest_of(tmp_path / "c.safetensors") == digest_of(tmp_path / "d.safetensors")
    assert not folder.exists()


def test_going_on_needs_the_same_arguments_and_text(tiny_olmoe, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    settings = SETTINGS | {"resume": tmp_path / "parts"}
    with pytest.raises(Interrupted):
        calibrate(tiny_olmoe(), None, texts_until(10), **settings)
    with pytest.raises(
        CalibrationError, match="holds the sums of a calibration with seed=0, got seed=1; go on"
    ):
        calibrate(tiny_olmoe(), None, documents(), seed=1, **settings)
    with pytest.raises(
        CalibrationError, match="the text is not the one that the interrupted calibration read"
    ):
        calibrate(tiny_olmoe(), None, documents()[::-1], **settings)
    (tmp_path / "parts" / "first.0.pt").write_bytes(b"no")
    with pytest.raises(CalibrationError, match=r"first\.0\.pt cannot be read as the sums of a calibration"):
        calibrate(tiny_olmoe(), None, documents(), **settings)


# -- rare experts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["output", "deviation", "sensitivity"])
def test_sizes_of_rarely_chosen_experts_lean_on_the_median(synthetic_calibration, kind):
    """0, 1, 2 tokens: the median, nearly; from `ENOUGH` on the expert's own."""
    moments = synthetic_calibration().moments
    counts = [0, 1, 2, ENOUGH - 1, ENOUGH, 400]
    own = 0 if kind == "output" else 1
    tokens_LE = torch.full_like(moments.tokens_LE, 500)
    tokens_LE[0, : len(counts)] = torch.tensor(counts)
    square_LE = torch.full_like(moments.square_LE, 4.0)
    square_LE[0, : len(counts)] = 16.0
    square_LE[0, 0] = 0.0
    if own:
        square_LE[0, 1] = 0.0  # one output does not deviate from its mean
    found = replace(
        moments,
        tokens_LE=tokens_LE,
        square_LE=square_LE,
        mean_square_LE=torch.zeros_like(square_LE),
        sensitivity_tokens_LE=tokens_LE,
        sensitivity_LE=square_LE,
    ).size(kind)
    usual = 4.0  # the median's square
    rest = ENOUGH - own
    for place, count in enumerate(counts):
        if count == 0 or (own and count == 1):
            expected = usual
        elif count < ENOUGH:
            expected = (16.0 * count + usual * (rest - (count - own))) / rest
        else:
            expected = 16.0
        assert float(found[0, place]) == pytest.approx(expected**0.5), count
    assert bool((found[1] == 2.0).all())


def test_mean_outputs_of_rarely_chosen_experts_lean_on_the_layers(synthetic_calibration):
    moments = synthetic_calibration().moments
    tokens_LE = moments.tokens_LE.clone()
    tokens_LE[0, :3] = torch.tensor([0, 8, ENOUGH])
    rare = replace(moments, tokens_LE=tokens_LE, gram_LJJ=None, cross_LJH=None)
    found = rare.shrunk_means()
    weights_E1 = tokens_LE[0].double().unsqueeze(1)
    layer_H = (moments.mean_LEH[0] * weights_E1).sum(0) / weights_E1.sum()
    torch.testing.assert_close(found[0, 0], layer_H)
    torch.testing.assert_close(found[0, 1], 0.25 * moments.mean_LEH[0, 1] + 0.75 * layer_H)
    assert torch.equal(found[0, 2:], moments.mean_LEH[0, 2:])
    assert torch.equal(rare.compensation()[0].dropped_EH, found[0])


def test_too_little_text_is_said(tiny_olmoe):
    with pytest.warns(
        CalibrationWarning, match=r"\d+ of 32 experts were chosen by fewer than 32 tokens.*: their sizes"
    ):
        found = calibrate(tiny_olmoe(), None, documents(2), window=32)
    rarest = int(found.moments.tokens_LE[found.moments.tokens_LE > 0].min())
    with pytest.warns(
        CalibrationWarning, match=f"about {max(-(-192 * ENOUGH // rarest), 384):,} tokens of such text"
    ):
        calibrate(tiny_olmoe(), None, documents(2), window=32)


def test_lost_and_kept_is_what_the_means_are_added_by():
    weights_TK = torch.tensor([[0.5, 0.3]])
    dropped_TK, experts_TK = torch.tensor([[True, False]]), torch.tensor([[2, 0]])
    mean_EH = torch.arange(6.0).view(3, 2)
    added = mean_addition(mean_EH)(torch.zeros(1, 3), weights_TK, dropped_TK, experts_TK)
    assert torch.equal(added, 0.5 * mean_EH[2:3])
    assert torch.equal(lost_and_kept(weights_TK, dropped_TK, experts_TK, 3)[:, :3] @ mean_EH, added)


# -- sizes from the token --------------------------------------------------------------------------------------


def residuals(seed: int, num: int = 4000, experts: int = 8, noise: float = 0.3):
    """Tokens whose |r| follows the logits with a slope of each expert's own, and (g . r)^2 a share of |r|^2."""
    g = torch.Generator().manual_seed(seed)
    truth_DE = 0.4 * torch.randn(experts, experts, generator=torch.Generator().manual_seed(5))
    logits_ND = torch.randn(num, experts, generator=g) + 1.0
    experts_NK = logits_ND.topk(3, -1).indices
    log_NE = (logits_ND - 1.0) @ truth_DE + torch.arange(experts) / 4
    log_NK = log_NE.gather(1, experts_NK) + noise * torch.randn(num, 3, generator=g)
    return truth_DE, Residuals(
        logits_ND=logits_ND,
        experts_NK=experts_NK,
        size_NK=(2 * log_NK).exp(),
        effect_NK=0.25 * (2 * log_NK).exp(),
        window_N=torch.arange(num) // 100,
    )


def test_slopes_are_found_and_said_to_hold():
    truth_DE, held = residuals(0)
    center_D = torch.ones(8)
    found = fit_token_sizes([held], [center_D], 8)
    assert 0.5 < float(found.r2_L[0]) < 1.0
    # shrunk by the ridge, 2e-2 of the pairs; the noise of 1500 pairs an expert
    assert float((found.slope_LDE[0] - truth_DE).abs().max()) < 0.1
    assert found.tokens_LE.sum() == 12000


def test_sizes_match_what_the_loss_feels_on_average():
    """sum (g . r)^2 = sum exp(2 (a + clamp(...))) for every expert."""
    _, held = residuals(1)
    center_D = torch.ones(8)
    found = fit_token_sizes([held], [center_D], 8)
    told_NE = found.offset_LE[0] + token_size(held.logits_ND, found.slope_LDE[0], center_D)
    for expert in range(8):
        at_NK = held.experts_NK == expert
        told = (2 * told_NE[:, expert : expert + 1].expand(-1, 3)[at_NK]).double().exp().sum()
        assert float(told) == pytest.approx(float(held.effect_NK[at_NK].sum()), rel=1e-4)


def test_where_the_token_tells_nothing_sizes_are_constants():
    _, held = residuals(2)
    shuffled = replace(held, size_NK=torch.rand(4000, 3, generator=torch.Generator().manual_seed(0)))
    found = fit_token_sizes([shuffled], [torch.ones(8)], 8)
    assert float(found.r2_L[0]) < 0.02
    if float(found.r2_L[0]) <= 0.0:
        assert not bool(found.slope_LDE.any())


def test_an_expert_with_few_pairs_has_the_shared_slope():
    _, held = residuals(3)
    rare_NK = held.experts_NK == 7
    seen_NK = rare_NK.flatten().cumsum(0).view_as(rare_NK)
    few = replace(held, experts_NK=torch.where(rare_NK & (seen_NK > 10), 0, held.experts_NK))
    slope_DE = fit_slopes(few, torch.ones(8), 8)
    none = replace(held, experts_NK=torch.where(rare_NK, 0, held.experts_NK))
    shared_D = fit_slopes(none, torch.ones(8), 8)[:, 7]
    assert int((few.experts_NK == 7).sum()) < 20
    torch.testing.assert_close(slope_DE[:, 7], shared_D, rtol=0.1, atol=0.02)  # ten pairs more


def test_budgets_and_nulls_come_from_the_reservoirs_tokens(calibrated):
    """The budget is met where it was solved, and passed-over experts there have uniform p-values."""
    solution = calibrated.solve(3.0, size="token")
    assert solution.table.follows_token
    kept, reservoir = [], calibrated.reservoir
    for index, layer in enumerate(calibrated.layers):
        logits_NE, own_NK = reservoir.logits_NLE[:, index].float(), reservoir.experts_NLK[:, index].long()
        statistic_NE = full_statistic(
            logits_NE,
            calibrated.token_sizes.offset_LE[index],
            "contribution",
            layer.score_func,
            slope_DE=calibrated.token_sizes.slope_LDE[index],
            center_D=calibrated.token_sizes.center_LD[index],
        )
        own = statistic_NE.gather(1, own_NK).sort(-1, descending=True).values
        passes = own >= solution.table.thresholds_LE[index, :6]
        ranks = torch.arange(1, 7)
        kept.append((passes * ranks).amax(-1).clamp_min(1).double().mean())
        p_NE = calibrated.p_values(logits_NE, index, size="token", scope="layer")
        passed = p_NE[torch.ones_like(p_NE, dtype=torch.bool).scatter(1, own_NK, False)].sort().values
        uniform = torch.arange(1, len(passed) + 1) / len(passed)
        assert float((passed - uniform).abs().max()) < 1 / 128  # what one bin of 1/64 holds, at most
    assert float(torch.stack(kept).mean()) == pytest.approx(solution.mean_experts, abs=1e-9)
    assert calibrated.settings(compensated="mean").size == "sensitivity"
    assert calibrated.settings(compensated="linear").size == "token"
    assert calibrated.settings(compensated=False).size == "sensitivity"
    bare = replace(calibrated, reservoir=None)
    with pytest.raises(CalibrationError, match="size='token' takes its null from the calibration's tokens"):
        bare.table(0.1, size="token")
    with pytest.raises(CalibrationMismatchError, match="size='token' needs the sizes that follow the token"):
        replace(calibrated, token_sizes=None).table(0.1, size="token")
