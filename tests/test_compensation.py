"""What stands in for dropped experts: the regressors, the fit, and that it vanishes where nothing is dropped."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bh_routing import RoutingIntegration, TopKPolicy
from bh_routing.calibration.moments import Moments
from bh_routing.calibration.passes import calibrate
from bh_routing.decision import linear_products
from bh_routing.decision.compensation import Compensation, lost_and_kept, with_addition
from bh_routing.decision.types import RoutingDecision
from bh_routing.errors import InvalidInputError

E, K, H = 6, 3, 5


def decision(weights_TK, experts_TK, dropped_TK) -> RoutingDecision:
    return RoutingDecision(
        weights_TK=weights_TK.masked_fill(dropped_TK, 0.0),
        experts_TK=experts_TK.masked_fill(dropped_TK, E),
        counts_T=(~dropped_TK).sum(-1),
        raw_counts_T=(~dropped_TK).sum(-1),
        dropped_TK=dropped_TK,
        own_weights_TK=weights_TK,
        own_experts_TK=experts_TK,
        empty=E,
    )


@pytest.fixture
def routed():
    weights_TK = torch.rand(40, K) + 0.1
    experts_TK = torch.rand(40, E).topk(K, -1).indices
    dropped_TK = torch.rand(40, K) < 0.5
    return weights_TK, experts_TK, dropped_TK


@pytest.mark.parametrize("form", ["mean", "fitted"])
def test_by_a_loop(routed, form):
    weights_TK, experts_TK, dropped_TK = routed
    M, N = torch.randn(2, E, H)
    compensation = Compensation.mean(M, N if form == "fitted" else None)
    expected_TH = torch.zeros(40, H)
    for t in range(40):
        lost = sum(float(weights_TK[t, k]) for k in range(K) if dropped_TK[t, k])
        for k in range(K):
            expert, weight = int(experts_TK[t, k]), weights_TK[t, k]
            if dropped_TK[t, k]:
                expected_TH[t] += weight * M[expert]
            elif form == "fitted":
                expected_TH[t] += weight * lost * N[expert]
    torch.testing.assert_close(compensation.addition(decision(*routed)), expected_TH, rtol=1e-5, atol=1e-5)


def test_nothing_dropped_adds_exactly_nothing(routed):
    weights_TK, experts_TK, dropped_TK = routed
    kept = decision(weights_TK, experts_TK, torch.zeros_like(dropped_TK))
    assert torch.equal(Compensation.mean(*torch.randn(2, E, H)).addition(kept), torch.zeros(40, H))


def test_empty_slots_carry_nothing():
    weights_TK = torch.tensor([[0.5, 0.0]])
    experts_TK = torch.tensor([[2, E]])
    features = lost_and_kept(weights_TK, torch.tensor([[True, True]]), experts_TK, E)
    assert features.tolist() == [[0.0, 0.0, 0.5, 0.0, 0.0, 0.0] + [0.0] * E]


def test_the_fit_finds_what_generated_the_data(routed):
    generator = torch.Generator().manual_seed(3)
    weights_TK = torch.rand(4000, K, generator=generator) + 0.1
    experts_TK = torch.rand(4000, E, generator=generator).topk(K, -1).indices
    dropped_TK = torch.rand(4000, K, generator=generator) < 0.5
    truth = torch.randn(2, E, H, dtype=torch.float64, generator=generator)
    z_TJ = lost_and_kept(weights_TK, dropped_TK, experts_TK, E).double()
    lost_TH = z_TJ @ truth.flatten(0, 1)
    ones = torch.ones(1, E)
    moments = Moments(
        tokens_LE=ones.long(),
        square_LE=ones.double(),
        mean_square_LE=ones.double(),
        mean_LEH=torch.zeros(1, E, H, dtype=torch.float64),
        gram_LJJ=(z_TJ.T @ z_TJ).unsqueeze(0),
        cross_LJH=(z_TJ.T @ lost_TH).unsqueeze(0),
    )
    # the ridge of 2 % draws the coefficients towards the prior (0 here) by about as much
    torch.testing.assert_close(moments.compensation()[0].vectors_JH, truth.flatten(0, 1), rtol=0.1, atol=0.1)
    untouched = replace(moments, gram_LJJ=torch.zeros(1, 2 * E, 2 * E), cross_LJH=torch.zeros(1, 2 * E, H))
    assert torch.allclose(
        untouched.compensation()[0].dropped_EH, moments.mean_LEH[0]
    )  # nothing seen: the prior


def test_sums_add_up(routed):
    weights_TK, experts_TK, dropped_TK = routed
    z_TJ = lost_and_kept(weights_TK, dropped_TK, experts_TK, E).double()
    ones = torch.ones(1, E)
    part = Moments(
        tokens_LE=ones.long(),
        square_LE=ones.double(),
        mean_square_LE=ones.double(),
        mean_LEH=torch.ones(1, E, H, dtype=torch.float64),
        sensitivity_tokens_LE=ones.long(),
        sensitivity_LE=ones.double(),
        gram_LJJ=(z_TJ.T @ z_TJ).unsqueeze(0),
        cross_LJH=(z_TJ.T @ torch.ones(40, H).double()).unsqueeze(0),
    )
    both = part + part
    assert torch.equal(both.gram_LJJ, 2 * part.gram_LJJ)
    torch.testing.assert_close(
        both.compensation()[0].vectors_JH, part.compensation()[0].vectors_JH, rtol=1e-9, atol=1e-9
    )


def test_it_brings_the_layers_output_nearer(tiny_olmoe, token_ids):
    """On the text it was fitted to: no compensation > mean outputs > fit, in squared error of the last hidden state."""
    model = tiny_olmoe()
    generator = torch.Generator().manual_seed(5)
    documents = [torch.randint(3, 250, (128,), generator=generator).tolist() for _ in range(40)]
    calibration = calibrate(model, None, documents, sensitivity=True, window=128)
    plain = replace(calibration, moments=replace(calibration.moments, gram_LJJ=None, cross_LJH=None))
    ids = torch.tensor(documents[:8])
    with torch.no_grad():
        full = model.model(ids).last_hidden_state
    errors = []
    for held in ({}, plain.compensations(), calibration.compensations()):
        with torch.no_grad(), RoutingIntegration(model, TopKPolicy(2), compensations=held):
            errors.append(float((model.model(ids).last_hidden_state - full).square().mean()))
    assert errors[0] > errors[1] > errors[2]
    with torch.no_grad(), RoutingIntegration(model, TopKPolicy(6), compensations=calibration.compensations()):
        torch.testing.assert_close(model.model(ids).last_hidden_state, full, rtol=1e-5, atol=1e-5)


# -- the linear form ------------------------------------------------------------------------------------------


def linear_parts(rank=4, experts=E, hidden=H, seed=11) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "center_D": normal(experts),
        "low_D": torch.full((experts,), -2.0),
        "high_D": torch.full((experts,), 2.5),
        "whiten_DR": 0.5 * normal(experts, rank),
        "mean_EH": normal(experts, hidden),
        "slope_ERH": normal(experts, rank, hidden),
    }


def by_definition(parts, scale, logits_TD, routed) -> torch.Tensor:
    """scale * sum over dropped pairs of w (m + A' W' (z' - mu)), in Python's order and float64."""
    weights_TK, experts_TK, dropped_TK = routed
    mean_EH, slope_ERH = (parts[n].bfloat16().double() for n in ("mean_EH", "slope_ERH"))
    tokens = len(logits_TD)
    out_TH = torch.zeros(tokens, mean_EH.shape[1], dtype=torch.float64)
    for t in range(tokens):
        z = [
            min(max(x, low), high) - center if abs(x) < float("inf") else 0.0
            for x, low, high, center in zip(
                logits_TD[t].tolist(),
                *(parts[n].tolist() for n in ("low_D", "high_D", "center_D")),
                strict=True,
            )
        ]
        coordinates_R = torch.tensor(z, dtype=torch.float64) @ parts["whiten_DR"].double()
        for k in range(weights_TK.shape[1]):
            if dropped_TK[t, k]:
                e = int(experts_TK[t, k])
                out_TH[t] += float(weights_TK[t, k]) * (mean_EH[e] + coordinates_R @ slope_ERH[e])
    return scale * out_TH


def with_logits(routed, logits_TD) -> RoutingDecision:
    return replace(decision(*routed), logits_TE=logits_TD)


@pytest.fixture
def logits_TD(routed):
    return 2.0 * torch.randn(40, E)


def assert_rounded(found_TH, expected_TH):
    """Equal but for regressors of 16 bits, each of which is off by at most 2^-9 of it; up to twenty terms are added."""
    torch.testing.assert_close(
        found_TH.double(), expected_TH, rtol=0, atol=0.01 * float(expected_TH.abs().max())
    )


@pytest.mark.parametrize("rank", [0, 4, 6])
def test_linear_is_its_definition(routed, logits_TD, rank):
    parts = linear_parts(rank)
    made = Compensation.linear(**parts, scale=0.8)
    assert made.form == "linear"
    assert made.maps_EQH.dtype == torch.bfloat16
    expected_TH = by_definition(parts, 0.8, logits_TD, routed)
    assert float(expected_TH.abs().mean()) > 0.2
    added_TH = made.addition(with_logits(routed, logits_TD))
    torch.testing.assert_close(added_TH.double(), expected_TH, rtol=1e-5, atol=1e-5)
    dropped_TK = routed[2]
    for t in range(12):  # alone
        one = with_logits([x[t : t + 1] for x in routed], logits_TD[t : t + 1])
        alone_1H = made.addition(one)
        if not dropped_TK[t].any():
            assert alone_1H is None
        else:
            torch.testing.assert_close(alone_1H.double(), expected_TH[t : t + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [3, 40])  # few take one weighted sum over rows, many a product per expert
def test_linear_in_a_16_bit_model_is_rounded_once(routed, logits_TD, tokens):
    """Of one token as of several: the sum of float32, rounded to the dtype of what it is added to."""
    hidden = 512
    made = Compensation.linear(**linear_parts(hidden=hidden))
    routed[2][:, 0] = True
    several = with_logits([x[:tokens] for x in routed], logits_TD[:tokens])
    assert (int(several.dropped_TK.sum()) <= linear_products.FEW * E) == (tokens == 3)
    exact_TH = made.addition(several)
    together_TH = made.addition(several, torch.bfloat16).bfloat16()
    alone_TH = torch.cat(
        [
            made.addition(with_logits([x[t : t + 1] for x in routed], logits_TD[t : t + 1]), torch.bfloat16)
            for t in range(tokens)
        ]
    )
    assert alone_TH.dtype == torch.bfloat16
    for found_TH in (together_TH, alone_TH):
        # A unit in the last place where float32 sums of another order lie about the middle between two numbers.
        torch.testing.assert_close(found_TH, exact_TH.bfloat16(), rtol=2**-7, atol=1e-5)
        assert float((found_TH == exact_TH.bfloat16()).double().mean()) > 0.99


def test_linear_in_grouped_products(routed, logits_TD, monkeypatch):
    """What a GPU runs, here with a grouped product that leaves rows behind the last offset as NaN."""

    def grouped(x_PQ, maps_EQH, *, offs):
        out = torch.full((len(x_PQ), maps_EQH.shape[2]), float("nan"), dtype=x_PQ.dtype)
        for e, (a, b) in enumerate(zip([0, *offs.tolist()], offs.tolist(), strict=False)):
            out[a:b] = x_PQ[a:b] @ maps_EQH[e]
        return out

    monkeypatch.setattr("bh_routing.decision.linear_products.grouped_mm", grouped)
    parts = linear_parts()
    made = Compensation.linear(**parts)
    found = with_logits(routed, logits_TD)
    added_TH = linear_products.grouped(made.maps_EQH, made.regressors(logits_TD), found)
    assert_rounded(added_TH.double(), by_definition(parts, 1.0, logits_TD, routed))
    kept = replace(found, dropped_TK=torch.zeros_like(found.dropped_TK))
    assert torch.equal(
        linear_products.grouped(made.maps_EQH, made.regressors(logits_TD), kept), torch.zeros(40, H)
    )


def test_linear_compiled(routed, logits_TD):
    torch._dynamo.reset()
    parts = linear_parts()
    made = Compensation.linear(**parts)

    def step(weights_TK, experts_TK, dropped_TK, logits_TD):
        return made.addition(with_logits((weights_TK, experts_TK, dropped_TK), logits_TD))

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert_rounded(compiled(*routed, logits_TD).double(), by_definition(parts, 1.0, logits_TD, routed))
    torch._dynamo.reset()


def test_linear_is_finite_outside_of_what_was_seen(routed, logits_TD):
    """Masked experts, and logits far outside the calibrated range."""
    parts, dropped_TK = linear_parts(), routed[2]
    made = Compensation.linear(**parts)
    logits_TD[0], logits_TD[1] = 1e30, -1e30
    logits_TD[2, 1], logits_TD[3, 4] = float("-inf"), float("nan")
    dropped_TK[:4] = True
    expected_TH = by_definition(parts, 1.0, logits_TD, routed)
    assert bool(expected_TH.isfinite().all())
    torch.testing.assert_close(
        made.addition(with_logits(routed, logits_TD)).double(), expected_TH, rtol=1e-5, atol=1e-5
    )
    assert_rounded(
        linear_products.weighted_rows(
            made.maps_EQH, made.regressors(logits_TD), with_logits(routed, logits_TD)
        ).double(),
        expected_TH,
    )
    for t in range(4):
        one = with_logits([x[t : t + 1] for x in routed], logits_TD[t : t + 1])
        torch.testing.assert_close(made.addition(one).double(), expected_TH[t : t + 1], rtol=1e-5, atol=1e-5)


def test_linear_gradients(routed, logits_TD):
    """To the weights and to the logits; finite beside masked experts, zero outside the calibrated range."""
    weights_TK, experts_TK, dropped_TK = routed
    dropped_TK[:2] = True
    made = Compensation.linear(**linear_parts())
    logits_TD[0, 1], logits_TD[1, 2] = float("-inf"), 50.0
    gradients = []
    for way in (
        made.addition,
        lambda d: linear_products.weighted_rows(made.maps_EQH, made.regressors(d.logits_TE), d),
    ):
        weights = weights_TK.clone().requires_grad_()
        logits = logits_TD.clone().requires_grad_()
        way(with_logits((weights, experts_TK, dropped_TK), logits)).square().sum().backward()
        assert bool(weights.grad.isfinite().all())
        assert bool(logits.grad.isfinite().all())
        assert torch.equal(weights.grad == 0, ~dropped_TK)
        assert float(logits.grad[0, 1]) == float(logits.grad[1, 2]) == 0.0
        assert float(logits.grad[0].abs().max()) > 0
        gradients.append((weights.grad, logits.grad))
    one = [x[:1] for x in (weights_TK.requires_grad_(), experts_TK, dropped_TK)]
    assert made.addition(with_logits(one, logits_TD[:1])).requires_grad  # not the host's way
    for rounded, exact in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(rounded, exact, rtol=0, atol=0.03 * float(exact.abs().max()))


def test_linear_under_autocast(routed, logits_TD):
    made = Compensation.linear(**linear_parts())
    expected_TH = made.addition(with_logits(routed, logits_TD))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made.addition(with_logits(routed, logits_TD)), expected_TH)


def test_linear_where_nothing_is_dropped(routed, logits_TD):
    weights_TK, experts_TK, dropped_TK = routed
    made = Compensation.linear(**linear_parts())
    kept = with_logits((weights_TK, experts_TK, torch.zeros_like(dropped_TK)), logits_TD)
    assert made.addition(kept) is None
    out_TH = torch.randn(40, H)
    assert with_addition(out_TH, made.addition(kept)) is out_TH
    with pytest.raises(InvalidInputError, match="expected a decision with logits_TE, got None"):
        made.addition(decision(*routed))


def test_linear_skips_empty_slots_of_the_own_choice(routed, logits_TD):
    weights_TK, experts_TK, dropped_TK = routed
    dropped_TK[:, 0] = True
    made = Compensation.linear(**linear_parts())
    shorter = [x[:, 1:] for x in routed]
    experts_TK[:, 0], weights_TK[:, 0] = E, 0.0
    for t in (slice(40), slice(1)):
        found, expected = (
            made.addition(with_logits([x[t] for x in parts], logits_TD[t])) for parts in (routed, shorter)
        )
        assert torch.equal(found, expected)


def test_linear_is_rewritten_in_place(routed, logits_TD):
    one, other = (Compensation.linear(**linear_parts(seed=seed)) for seed in (1, 2))
    held = one.to(torch.device("cpu"), torch.float32)
    single = [with_logits([x[:1] for x in routed], logits_TD[:1]), with_logits(routed, logits_TD)]
    routed[2][0] = True
    before = [held.addition(x) for x in single]
    assert held.fits(other)
    assert not held.fits(Compensation.linear(**linear_parts(rank=3)))
    assert not held.fits(Compensation.mean(torch.zeros(E, H)))
    assert not Compensation.mean(torch.zeros(E, H)).fits(held)
    buffers = [t.data_ptr() for t in held._tensors]
    held.copy_(other.scaled(0.5))
    assert [t.data_ptr() for t in held._tensors] == buffers
    for x, old in zip(single, before, strict=True):
        assert torch.equal(held.addition(x), other.scaled(0.5).addition(x))
        assert not torch.allclose(held.addition(x), old, atol=0.1)
    torch.testing.assert_close(
        other.scaled(0.5).addition(single[1]), 0.5 * other.addition(single[1]), rtol=1e-6, atol=1e-7
    )


def test_a_model_with_a_linear_compensation(tiny_olmoe, token_ids):
    """All experts dropped but the first: the layer's output gets the definition; a token with no expert gets it alone."""
    model = tiny_olmoe()
    experts = model.model.layers[0].mlp.experts
    hidden, num = experts.down_proj.shape[1], experts.num_experts
    paths = [f"model.layers.{i}.mlp.gate" for i in range(len(model.model.layers))]
    parts = {path: linear_parts(4, num, hidden, seed=i) for i, path in enumerate(paths)}
    found = {path: Compensation.linear(**part) for path, part in parts.items()}
    seen = {}

    def look(router, context, decision, logits_TE):
        seen[context.path] = (decision, logits_TE)

    outputs = {}
    hook = experts.register_forward_hook(lambda module, args, output: outputs.update(last=output))
    with torch.no_grad(), RoutingIntegration(model, TopKPolicy(1), compensations=found) as integrator:
        integrator.watchers.append(look)
        for ids in (token_ids, token_ids[:1, :1]):
            model(input_ids=ids)
            made, logits = seen[paths[0]]
            routed = (made.own_weights_TK, made.own_experts_TK, made.dropped_TK)
            added = by_definition(parts[paths[0]], 1.0, logits, routed)
            assert int(made.dropped_TK.sum()) == made.dropped_TK.numel() - len(made.counts_T)
            compensated = outputs["last"].clone()
            for piece in integrator._patch._pieces:
                if getattr(piece, "compensation", None) is not None:
                    piece.compensation, kept = None, piece.compensation
                    model(input_ids=ids)
                    bare = outputs["last"]
                    piece.compensation = kept
                    break
            torch.testing.assert_close(
                (compensated - bare).double().flatten(0, -2),
                added,
                rtol=0,
                atol=0.03 * float(added.abs().max()),
            )
    hook.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_of_one_is_a_batch_of_many(tiny_olmoe, dtype):
    """What one token gets by itself is what it gets beside others, to the rounding of the model's dtype."""
    model = tiny_olmoe().to(dtype)
    experts = model.model.layers[0].mlp.experts
    hidden, num = experts.down_proj.shape[1], experts.num_experts
    found = {
        f"model.layers.{i}.mlp.gate": Compensation.linear(**linear_parts(4, num, hidden, seed=i))
        for i in range(len(model.model.layers))
    }
    ids = torch.arange(10, 26).unsqueeze(-1)
    with torch.no_grad(), RoutingIntegration(model, TopKPolicy(2), compensations=found):
        many = model(input_ids=ids).logits
        ones = torch.cat([model(input_ids=row.unsqueeze(0)).logits for row in ids])
    with torch.no_grad(), RoutingIntegration(model, TopKPolicy(2)):
        bare = model(input_ids=ids).logits
    assert float((many - bare).abs().max()) > 0.1 * float(bare.abs().max())
    rounding = torch.finfo(dtype).eps * float(many.abs().max())
    assert float((many - ones).double().square().mean().sqrt()) < 2 * rounding
