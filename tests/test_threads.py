"""Threads on one patched model: each gets what it gets alone, statistics are exact, unpatching waits for whole forwards."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM

from bh_routing import BHRoutingIntegration, RoutingIntegration, TopKPolicy, is_patched, unpatch
from bh_routing.errors import PatchError
from bh_routing.models import bundled_calibration, bundled_path

VOCABULARY = 4000


@pytest.fixture(params=["eager", "grouped_mm", "batched_mm"])
def nano(request):
    return AutoModelForCausalLM.from_pretrained(
        bundled_path("olmoe-nano"), dtype=torch.float32, experts_implementation=request.param
    ).eval()


@pytest.fixture
def impatient():
    """The interpreter changes threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def logits_of(model, call):
    with torch.no_grad():
        return model(**call).logits


def together(jobs, threads):
    """Run jobs, in turn over the threads; their results in order."""
    results, failures, start = [None] * len(jobs), [], threading.Barrier(threads)

    def work(first):
        start.wait()
        for n in range(first, len(jobs), threads):
            try:
                results[n] = jobs[n]()
            except Exception as error:  # shown below
                failures.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures
    return results


def in_background(function):
    worker = threading.Thread(target=function)
    worker.start()
    return worker


def calls(lengths, padded):
    generator = torch.Generator().manual_seed(0)
    made = []
    for n, length in enumerate(lengths):
        ids = torch.randint(5, VOCABULARY, (2, length), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[0, : 1 + n % 5] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def counted(integrator):
    found = integrator.telemetry.to_dict()
    exact = ("tokens", "padding_tokens", "router_calls", "decisions", "count_histogram", "fallback_tokens")
    lists = ("expert_load", "dropped_load", "own_expert_load")
    return [found["total"][name] for name in exact], [[layer[x] for x in lists] for layer in found["layers"]]


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("lengths", [[24] * 16, [24 + n % 7 for n in range(16)], [1, 9] * 8])
def test_every_thread_gets_what_it_gets_alone(nano, impatient, threads, padded, lengths):
    wanted = calls(lengths, padded and min(lengths) > 5)
    with BHRoutingIntegration(nano, calibration=bundled_calibration(), experts_per_token=3.0) as integrator:
        alone = [logits_of(nano, call) for call in wanted]
        statistics = counted(integrator)
        integrator.reset_stats()
        found = together([lambda call=call: logits_of(nano, call) for call in wanted], threads)
        assert counted(integrator) == statistics
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))


def test_generation_in_four_threads(impatient):
    model = AutoModelForCausalLM.from_pretrained(bundled_path("olmoe-nano"), dtype=torch.float32).eval()
    prompts = [call["input_ids"] for call in calls([6 + n % 4 for n in range(8)], False)]
    with BHRoutingIntegration(model, calibration=bundled_calibration(), experts_per_token=3.0) as integrator:

        def said(ids):
            return model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)

        alone = [said(ids) for ids in prompts]
        statistics = counted(integrator)
        integrator.reset_stats()
        found = together([lambda ids=ids: said(ids) for ids in prompts], 4)
        assert counted(integrator) == statistics
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))


def test_reading_and_resetting_while_others_count(tiny_olmoe, token_ids, impatient):
    model = tiny_olmoe()
    with RoutingIntegration(model, TopKPolicy(2)) as integrator:
        stop = threading.Event()

        def read():
            while not stop.is_set():
                integrator.telemetry.to_dict()

        reader = in_background(read)
        together([lambda: logits_of(model, {"input_ids": token_ids})] * 40, 2)
        stop.set()
        reader.join()
        assert integrator.telemetry.num_tokens == 40 * token_ids.numel()
        integrator.reset_stats()
        assert integrator.telemetry.total_forward_passes == 0


def at_layer(integrator, index, action):
    """Run an action once, in the middle of a forward."""
    done = []

    def watcher(router, context, decision, logits_TE):
        if context.index == index and not done:
            done.append(True)
            action()

    integrator.watchers.append(watcher)


@pytest.mark.parametrize("how", ["integration", "function"])
def test_a_forward_under_way_stays_whole(tiny_olmoe, token_ids, how):
    model = tiny_olmoe()
    call = {"input_ids": token_ids}
    integrator = BHRoutingIntegration(model, alpha=0.05)
    plain = logits_of(model, call)
    with integrator:
        routed = logits_of(model, call)
    seen = {}

    def unpatched_elsewhere():
        undo = integrator.unpatch_model if how == "integration" else lambda: unpatch(model)
        in_background(undo).join()
        seen["patched"] = is_patched(model)
        in_background(lambda: seen.update(new=logits_of(model, call))).join()

    integrator.patch_model()
    at_layer(integrator, 1, unpatched_elsewhere)
    assert torch.equal(logits_of(model, call), routed)
    assert not seen["patched"]
    assert torch.equal(seen["new"], plain)  # a forward that begins afterwards is the unpatched model's
    assert "forward" not in model.model.layers[0].mlp.gate.__dict__
    assert "forward" not in model.model.__dict__
    assert torch.equal(logits_of(model, call), plain)


def test_patching_again_while_an_old_forward_runs(tiny_olmoe, token_ids):
    model = tiny_olmoe()
    call = {"input_ids": token_ids}
    integrator = BHRoutingIntegration(model, alpha=0.05)
    with integrator:
        routed = logits_of(model, call)
    seen = {}

    def again():
        in_background(integrator.unpatch_model).join()
        with pytest.raises(PatchError, match="A forward that began before unpatching"):
            BHRoutingIntegration(model, alpha=0.5).patch_model()
        in_background(integrator.patch_model).join()
        seen["applied"] = integrator.is_patched

    integrator.patch_model()
    at_layer(integrator, 0, again)
    assert torch.equal(logits_of(model, call), routed)
    assert seen["applied"]
    assert integrator.is_patched
    assert torch.equal(logits_of(model, call), routed)
    integrator.unpatch_model()
    assert not is_patched(model)


def test_unpatching_from_within_a_forward_is_one_sentence(tiny_olmoe, token_ids):
    model = tiny_olmoe()
    integrator = BHRoutingIntegration(model, alpha=0.05)
    integrator.patch_model()
    at_layer(integrator, 0, integrator.unpatch_model)
    with pytest.raises(PatchError, match="cannot be unpatched from within its own forward"):
        logits_of(model, {"input_ids": token_ids})
    assert integrator.is_patched
    integrator.unpatch_model()
    assert not is_patched(model)


def test_an_interrupted_forward_counts_as_ended(tiny_olmoe, token_ids):
    model = tiny_olmoe()
    plain = logits_of(model, {"input_ids": token_ids})

    def interrupt():
        raise KeyboardInterrupt

    def interrupted():
        with BHRoutingIntegration(model, alpha=0.05) as integrator:
            at_layer(integrator, 1, interrupt)
            logits_of(model, {"input_ids": token_ids})

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not is_patched(model)
    assert torch.equal(logits_of(model, {"input_ids": token_ids}), plain)


def test_a_lone_block_is_a_forward_too(tiny_olmoe):
    block = tiny_olmoe().model.layers[0].mlp
    x = torch.randn(1, 9, block.gate.weight.shape[1], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = block(x)
        integrator = BHRoutingIntegration(block, alpha=0.05)
        with integrator:
            routed = block(x)
        integrator.patch_model()
        at_layer(integrator, 0, lambda: in_background(integrator.unpatch_model).join())
        assert torch.equal(block(x), routed)
        assert torch.equal(block(x), plain)
    assert not torch.equal(routed, plain)
    assert not is_patched(block)


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_forward_that_began_before_the_patch_stays_plain(tiny_olmoe, token_ids, elsewhere):
    """Patched in mid-forward, by another thread or by a hook of its own: the next forward is the first routed one."""
    model = tiny_olmoe()
    call = {"input_ids": token_ids}
    plain = logits_of(model, call)
    integrator = BHRoutingIntegration(model, alpha=0.05)
    with integrator:
        routed = logits_of(model, call)
    integrator.reset_stats()
    handles = []

    def patch(*_):
        handles.pop().remove()
        in_background(integrator.patch_model).join() if elsewhere else integrator.patch_model()

    handles.append(model.model.layers[0].register_forward_hook(patch))
    assert torch.equal(logits_of(model, call), plain)
    assert integrator.is_patched
    assert integrator.telemetry.num_tokens == 0
    assert torch.equal(logits_of(model, call), routed)
    integrator.unpatch_model()
    assert torch.equal(logits_of(model, call), plain)


def test_patching_while_another_thread_runs_its_own_forwards(tiny_olmoe, token_ids, impatient):
    """Probing calls are the probing thread's alone."""
    model = tiny_olmoe()
    call = {"input_ids": token_ids}
    alone = logits_of(model, call)
    results, stop = [], threading.Event()

    def run():
        while not stop.is_set():
            results.append(logits_of(model, call))

    worker = in_background(run)
    for _ in range(5):
        BHRoutingIntegration(model, alpha=0.05)
    stop.set()
    worker.join()
    assert results
    assert all(torch.equal(found, alone) for found in results)
