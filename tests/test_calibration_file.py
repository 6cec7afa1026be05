"""The file: what comes back, what is refused, and the check against a model."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bh_routing._files import write_atomically
from bh_routing._files.tensors import tensors_digest
from bh_routing.calibration.calibration import Calibration
from bh_routing.calibration.fingerprint import (
    EXPERT_TOLERANCE,
    PROJECTIONS,
    ROUTER_TOLERANCE,
    ROWS,
    distance,
    fingerprint,
    matrix_differs,
    weight_projections,
)
from bh_routing.calibration.passes import calibrate
from bh_routing.errors import CalibrationFileError, CalibrationMismatchError, CalibrationWarning
from bh_routing.patching import make_plan


@pytest.fixture
def saved(synthetic_calibration, tmp_path):
    path = tmp_path / "calib.safetensors"
    calibration = synthetic_calibration()
    calibration.save(path)
    return calibration, path


def metadata_of(path) -> dict[str, str]:
    with safe_open(str(path), framework="pt") as file:
        return file.metadata()


def test_round_trip(saved):
    calibration, path = saved
    loaded = Calibration.load(path)
    for name in ("model_id", "layers", "num_experts", "temperature", "trim", "tokens", "documents", "window"):
        assert getattr(loaded, name) == getattr(calibration, name)
    for kind, sets in calibration.histograms.items():
        for name, held in sets.items():
            ours, theirs = held.trimmed_to_use(), loaded.histograms[kind][name].trimmed_to_use()
            assert ours.start == theirs.start
            assert torch.equal(ours.counts_LEB, theirs.counts_LEB)
    for name in ("tokens_LE", "square_LE", "mean_square_LE", "sensitivity_LE", "sensitivity_tokens_LE"):
        assert torch.equal(getattr(loaded.moments, name), getattr(calibration.moments, name))
    assert torch.equal(loaded.moments.mean_LEH, calibration.moments.mean_LEH.float().double())
    for name in ("hash_N", "logits_NLE", "experts_NLK"):
        assert torch.equal(getattr(loaded.reservoir, name), getattr(calibration.reservoir, name))
    assert torch.equal(loaded.fingerprint_LD, calibration.fingerprint_LD)
    assert torch.equal(loaded.table(0.1).thresholds_LE, calibration.table(0.1).thresholds_LE)
    assert loaded.solve(2.5).alpha == calibration.solve(2.5).alpha


def test_writing_twice_gives_the_same_bytes(saved, tmp_path):
    _, path = saved
    Calibration.load(path).save(tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert {key: value.dtype for key, value in again.items()} == {
        k: v.dtype for k, v in load_file(path).items()
    }
    assert metadata_of(tmp_path / "again.safetensors")["digest"] == metadata_of(path)["digest"]


@pytest.mark.parametrize("statistic", ["logit", "logprob", "contribution"])
def test_a_loaded_calibration_decides_as_the_fresh_one(saved, statistic):
    """Also beyond the samples, where the null's last grid point matters."""
    calibration, path = saved
    loaded = Calibration.load(path)
    for settings in ({}, {"extended": True}, {"estimator": "kde"}):
        fresh, again = (
            c.table(0.1, statistic=statistic, scope="layer", **settings) for c in (calibration, loaded)
        )
        assert torch.equal(fresh.thresholds_LE, again.thresholds_LE)
    assert loaded.solve(1.3, statistic=statistic).alpha == calibration.solve(1.3, statistic=statistic).alpha


def test_the_file_is_small(saved):
    """Counts take the narrowest integer type, per layer over the used bins only."""
    _, path = saved
    counts = {key: value for key, value in load_file(path).items() if key.startswith("hist.")}
    assert len(counts) == 2 * 3 * 2
    assert {value.dtype for value in counts.values()} <= {torch.uint8, torch.int16}
    assert all(bool((value[:, 0] > 0).any()) and bool((value[:, -1] > 0).any()) for value in counts.values())


def test_without_means_and_without_outputs(synthetic_calibration, tmp_path):
    for name, calibration in (
        ("bare", synthetic_calibration(moments=False, reservoir=0)),
        ("dropped", synthetic_calibration().without_means()),
    ):
        calibration.save(tmp_path / name)
        loaded = Calibration.load(tmp_path / name)
        assert loaded.compensations() == {}
        assert (loaded.moments is None) == (calibration.moments is None)
        assert (loaded.reservoir is None) == (calibration.reservoir is None)


def test_missing_empty_and_foreign_files(tmp_path):
    with pytest.raises(
        CalibrationFileError, match=r"there is no calibration file .*none\.safetensors; make one"
    ):
        Calibration.load(tmp_path / "none.safetensors")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(
        CalibrationFileError, match=r"cannot be read as a calibration file \(damaged or truncated"
    ):
        Calibration.load(tmp_path / "empty")
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(
        CalibrationFileError, match=r"is not a calibration: expected metadata format='bh-routing"
    ):
        Calibration.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_truncated_file(saved, share):
    _, path = saved
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(
        CalibrationFileError, match=r"cannot be read as a calibration file \(damaged or truncated"
    ):
        Calibration.load(path)


def rewrite(path, change_tensors=None, **metadata) -> None:
    tensors, held = load_file(path), metadata_of(path)
    if change_tensors is not None:
        change_tensors(tensors)
    save_file(tensors, path, held | metadata)


def test_edited_tensor(saved):
    _, path = saved

    def edit(tensors):
        tensors["hist.logit.unselected.1"][3, 20] += 1

    rewrite(path, edit)
    with pytest.raises(
        CalibrationFileError, match="was changed after it was written: its digest does not match"
    ):
        Calibration.load(path)


def test_edited_header(saved):
    _, path = saved
    header = json.loads(metadata_of(path)["header"]) | {"temperature": 2.0}
    rewrite(path, header=json.dumps(header))
    with pytest.raises(CalibrationFileError, match="was changed after it was written"):
        Calibration.load(path)


def test_newer_format(saved):
    _, path = saved
    rewrite(path, format_version="3")
    with pytest.raises(
        CalibrationFileError, match="has calibration format version 3, this library reads version 1 and 2"
    ):
        Calibration.load(path)


def test_words_of_older_files(saved):
    """Files say what they said when they were written; the bundled one is of that time."""
    calibration, path = saved
    header = json.loads(metadata_of(path)["header"])
    header["compensation_strength"] = header.pop("compensation_scale") / 2
    for layer in header["layers"]:
        layer["score"], layer["convention"] = layer.pop("score_func"), "raw"
        assert layer.pop("route_norm") == "none"
    text = json.dumps(header, sort_keys=True)
    rewrite(path, header=text, digest=tensors_digest(text, load_file(path)))
    loaded = Calibration.load(path)
    assert loaded.layers == calibration.layers
    assert loaded.compensation_scale == calibration.compensation_scale / 2


def test_nothing_half_written(saved, tmp_path, monkeypatch):
    _, path = saved
    before = path.read_bytes()

    def fails(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", fails)  # the content is written by then, under another name
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"half")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# -- against a model ---------------------------------------------------------------------------------------


@pytest.fixture
def calibrated(tiny_olmoe):
    model = tiny_olmoe()
    ids = torch.randint(3, 250, (400,), generator=torch.Generator().manual_seed(1)).tolist()
    return model, calibrate(model, None, [ids], outputs=False, window=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copies_in_other_dtypes_fit(calibrated, dtype):
    model, calibration = calibrated
    calibration.check(make_plan(copy.deepcopy(model).to(dtype)))


def test_fingerprints_tell_models_apart(tiny_olmoe):
    gate = [m.model.layers[0].mlp.gate for m in (tiny_olmoe(seed=0), tiny_olmoe(seed=1))]
    prints = [weight_projections(g) for g in gate]
    assert float((prints[0] - prints[1]).norm() / prints[0].norm()) > 0.5
    rounded = weight_projections(copy.deepcopy(gate[0]).to(torch.bfloat16))
    # one rounding error is at most 2^-9 of a weight; they add up like the weights do
    assert float((prints[0] - rounded).norm() / prints[0].norm()) < 5e-3


def test_other_weights(calibrated, tiny_olmoe):
    _, calibration = calibrated
    plan = make_plan(tiny_olmoe(seed=5))
    with pytest.raises(
        CalibrationMismatchError, match=r"router weights of layer model\.layers\.0\.mlp\.gate differ"
    ):
        calibration.check(plan)
    with pytest.warns(CalibrationWarning, match=r"layer model\.layers\.[01]\.mlp\.gate differ") as caught:
        calibration.check(plan, strict=False)
    assert len(caught) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, r"it has no layer 'model\.layers\.2\.mlp\.gate'"),
        ({"num_hidden_layers": 1}, r"it has a layer 'model\.layers\.1\.mlp\.gate' that this model has not"),
        (
            {"num_experts": 12},
            r"does not fit layer model\.layers\.0\.mlp\.gate: num_experts was 16 .* has 12",
        ),
        ({"num_experts_per_tok": 4}, "top_k was 6 when it was made, the model has 4"),
        ({"norm_topk_prob": True}, "route_norm was 'none' when it was made, the model has 'renormalised'"),
    ],
)
def test_other_shapes(calibrated, tiny_olmoe, changes, message):
    _, calibration = calibrated
    for strict in (True, False):
        with pytest.raises(CalibrationMismatchError, match=message):
            calibration.check(make_plan(tiny_olmoe(**changes)), strict=strict)


def test_other_score(calibrated):
    model, calibration = calibrated
    layers = tuple(replace(layer, score_func="sigmoid") for layer in calibration.layers)
    with pytest.raises(
        CalibrationMismatchError, match="score_func was 'sigmoid' when it was made, the model has 'softmax'"
    ):
        replace(calibration, layers=layers).check(make_plan(model))


# -- weights that are elsewhere --------------------------------------------------------------------------------


def test_offloaded_weights_are_brought_back(calibrated, tiny_olmoe):
    """As accelerate offloads: on the meta device but while their module runs; nothing of it is changed."""
    from accelerate import cpu_offload

    model, calibration = calibrated
    away = copy.deepcopy(model)
    cpu_offload(away, execution_device="cpu")
    calibration.check(make_plan(away))
    assert all(parameter.is_meta for parameter in away.model.layers[0].mlp.gate.parameters())
    ids = torch.randint(3, 250, (400,), generator=torch.Generator().manual_seed(1)).tolist()
    again = calibrate(away, None, [ids], outputs=False, window=32)
    assert torch.equal(again.fingerprint_LD, calibration.fingerprint_LD)
    assert torch.equal(again.table(0.3).thresholds_LE, calibration.table(0.3).thresholds_LE)
    other = tiny_olmoe(seed=5)
    cpu_offload(other, execution_device="cpu")
    with pytest.raises(CalibrationMismatchError, match="router weights of layer"):
        calibration.check(make_plan(other))


@pytest.fixture
def process_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sharded_weights_are_gathered(calibrated, process_group):
    """FSDP2: the fingerprint is that of the whole weight, and what the first forward makes serves later ones."""
    from torch.distributed.fsdp import fully_shard

    model, calibration = calibrated
    sharded = copy.deepcopy(model)
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    calibration.check(make_plan(sharded))
    ids = torch.randint(3, 250, (400,), generator=torch.Generator().manual_seed(1)).tolist()
    again = calibrate(sharded, None, [ids], outputs=False, window=32)
    assert torch.equal(again.fingerprint_LD, calibration.fingerprint_LD)
    assert torch.equal(again.table(0.3).thresholds_LE, calibration.table(0.3).thresholds_LE)
    loss = sharded(input_ids=torch.tensor([ids[:32]]), labels=torch.tensor([ids[:32]])).loss
    loss.backward()


def test_what_cannot_be_compared_is_said(calibrated):
    """A quantised router: integers and scales of somebody's own, from which no weights can be read."""
    model, calibration = calibrated
    plan = make_plan(copy.deepcopy(model))
    gate = plan.layers[1].router
    gate.weight = torch.nn.Parameter((gate.weight * 1000).to(torch.int8), requires_grad=False)
    older = replace(calibration, fingerprint_LD=torch.zeros(2, PROJECTIONS, dtype=torch.float64))
    older.fingerprint_LD[0] = weight_projections(plan.layers[0].router)
    for held, sentence in (
        (
            calibration,
            r"gate cannot be run by itself: whether it is the one that was calibrated is not known",
        ),
        (older, r"cannot be compared with a calibration's: .* got torch\.int8; pass"),
        (replace(calibration, fingerprint_LD=torch.zeros(2, 0)), "holds no fingerprint: whether it was made"),
    ):
        with pytest.raises(CalibrationMismatchError, match=sentence):
            held.check(plan)
        with pytest.warns(CalibrationWarning, match=sentence):
            held.check(plan, strict=False)


def test_an_integration_made_in_inference_mode_works_outside(synthetic_calibration, tiny_olmoe):
    from bh_routing import BHRoutingIntegration

    model = tiny_olmoe()
    ids = torch.randint(3, 250, (1, 400), generator=torch.Generator().manual_seed(1))
    calibration = calibrate(model, None, [ids[0].tolist()], window=32)
    with torch.inference_mode():
        integrator = BHRoutingIntegration(model, calibration=calibration, experts_per_token=3.0)
    with integrator, torch.no_grad():
        model(input_ids=ids)
        integrator.set_level(experts_per_token=2.0)
        held = integrator.alpha, integrator.budget
        before = [tuple(b.clone() for b in row) for row in integrator.policy._rows.values()]
        with pytest.raises(ValueError, match="experts"):
            integrator.set_level(experts_per_token=400.0)
        assert (integrator.alpha, integrator.budget) == held
        for row, kept in zip(integrator.policy._rows.values(), before, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(row, kept, strict=True))
        integrator.reset_stats()
        model(input_ids=ids)
        assert integrator.telemetry.mean_experts_per_token == pytest.approx(2.0, abs=0.15)


# -- the fingerprint is a function of the model ------------------------------------------------------------------


class Int8(torch.nn.Module):
    """Weights held as int8 with a scale per row, multiplied out when they are read: as quantised kernels answer."""

    def forward(self, q, scale):
        return q.float() * scale

    def right_inverse(self, weight):
        scale = weight.abs().amax(-1, keepdim=True) / 127
        return (weight / scale).round().to(torch.int8), scale


def in_int8(model):
    from torch.nn.utils.parametrize import register_parametrization

    quantised = copy.deepcopy(model)
    for layer in quantised.model.layers:
        for module, name in (
            (layer.mlp.gate, "weight"),
            (layer.mlp.experts, "gate_up_proj"),
            (layer.mlp.experts, "down_proj"),
        ):
            getattr(module, name).requires_grad_(False)
            register_parametrization(module, name, Int8())
    return quantised


def test_a_copy_in_8_bits_fits(calibrated):
    model, calibration = calibrated
    quantised = in_int8(model)
    assert quantised.model.layers[0].mlp.gate.parametrizations.weight.original0.dtype == torch.int8
    calibration.check(make_plan(quantised))
    prints = [weight_projections(layer.mlp.gate) for layer in model.model.layers]
    older = replace(calibration, fingerprint_LD=torch.stack(prints))
    with pytest.raises(CalibrationMismatchError, match="int8"):  # weights would not tell
        older.check(make_plan(quantised))


def permuted_router(model):
    weight = model.model.layers[1].mlp.gate.weight
    weight.copy_(weight.roll(1, 0))


def two_experts_swapped_in_the_router(model):
    weight = model.model.layers[1].mlp.gate.weight
    weight[:2] = weight[:2].flip(0)


def experts_moved(model):
    weight = model.model.layers[1].mlp.experts.down_proj
    weight.add_(0.5 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (permuted_router, "router weights"),
        (two_experts_swapped_in_the_router, "router weights"),
        (experts_moved, "experts' weights"),
    ],
)
def test_other_models_do_not(calibrated, change, what):
    model, calibration = calibrated
    changed = copy.deepcopy(model)
    with torch.no_grad():
        change(changed)
    with pytest.raises(
        CalibrationMismatchError, match=rf"the {what} of layer model\.layers\.1\.mlp.* differ"
    ):
        calibration.check(make_plan(changed))


def test_distances_are_the_stated_ones(calibrated):
    """docs/calibration.md: what rounding does stays well below the tolerances, what another model is well above."""
    model, calibration = calibrated
    num = ROWS * calibration.num_experts
    for copied, router, expert in (
        (copy.deepcopy(model).bfloat16(), 5e-3, 1e-2),
        (in_int8(model), 1.5e-2, 3e-2),
    ):
        found_LD, expected_LD = fingerprint(make_plan(copied).layers), calibration.fingerprint_LD
        assert 1e-4 < distance(found_LD[:, :num], expected_LD[:, :num]) < router < ROUTER_TOLERANCE
        assert 1e-4 < distance(found_LD[:, num:], expected_LD[:, num:]) < expert < EXPERT_TOLERANCE


def test_experts_that_cannot_be_run_are_said(calibrated):
    model, calibration = calibrated
    packed = copy.deepcopy(model)
    for layer in packed.model.layers:
        layer.mlp.experts.down_proj = torch.nn.Parameter(torch.zeros(3))
    with pytest.warns(
        CalibrationWarning, match="experts of model.layers.0.mlp.gate, model.layers.1.* not known"
    ):
        calibration.check(make_plan(packed))


def test_a_router_that_is_one_matrix(calibrated, tiny_olmoe):
    """For engines that hold other modules: the same verdict from the weights [E, H] alone, by either fingerprint."""
    model, calibration = calibrated
    gates = [layer.mlp.gate for layer in model.model.layers]
    older = replace(calibration, fingerprint_LD=torch.stack([weight_projections(g) for g in gates]))
    other = tiny_olmoe(seed=5).model.layers[1].mlp.gate.weight
    for held in (calibration, older):
        for weight in (gates[1].weight, gates[1].weight.half()):
            assert matrix_differs(held, 1, weight, "blk.1", "pass strict=False") is None
        for weight in (other, gates[0].weight):
            sentence = matrix_differs(held, 1, weight, "blk.1", "pass strict=False")
            assert sentence.startswith(
                "the router weights of layer blk.1 differ from those that were calibrated"
            )


def test_files_of_both_kinds_are_read(calibrated, tmp_path):
    """Format 2 held projections of weights at first; such files still are of the models they were made for."""
    model, calibration = calibrated
    routers = [layer.mlp.gate for layer in model.model.layers]
    older = replace(calibration, fingerprint_LD=torch.stack([weight_projections(r) for r in routers]))
    for name, held in (("new", calibration), ("old", older)):
        held.save(tmp_path / name)
        loaded = Calibration.load(tmp_path / name)
        assert torch.equal(loaded.fingerprint_LD, held.fingerprint_LD)
        loaded.check(make_plan(copy.deepcopy(model).bfloat16()))
        changed = copy.deepcopy(model)
        with torch.no_grad():
            permuted_router(changed)
        with pytest.raises(CalibrationMismatchError, match=r"router weights of layer model\.layers\.1"):
            loaded.check(make_plan(changed))
