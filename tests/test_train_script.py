"""scripts/train_olmoe_nano.py and its modules: the forward pass is the model's, runs repeat and resume exactly, a decayed
branch leaves the run alone, its export loads, and nano_report.py says what was measured."""

import importlib
import json
import lzma
import math
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

transformers = pytest.importorskip("transformers")
SCRIPTS = Path(__file__).parents[1] / "scripts"
SETTINGS = {
    "mixture": "tales=3,code=1",
    "window": 16,
    "micro-windows": 2,
    "log-every": 2,
    "valid-every": 2,
    "valid-tokens": 64,
    "warmup": 2,
    "vocab": 300,
    "hidden": 16,
    "layers": 2,
    "heads": 2,
    "experts": 8,
    "top-k": 2,
    "expert-width": 8,
}
README = """# Texts

## Sources

### tales

| source | licence | train | valid | test |
|---|---|---|---|---|
| existing tales.txt (Old Tales) | public domain | 4 / 1 kB |  |  |
| New Tales | CC0 |  | 1 / 1 kB |  |

### code

| source | licence | train | valid | test |
|---|---|---|---|---|
| some/code | MIT | 4 / 1 kB |  |  |
| more/code | MIT | 4 / 1 kB |  |  |
"""


@pytest.fixture(scope="module")
def script():
    """The script as a module; its folder is on the path only while it is imported."""
    if not SCRIPTS.is_dir():
        pytest.skip("the scripts are not part of an installed package")
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module("train_olmoe_nano")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def nano_forward(script):
    return sys.modules["nano_forward"]


@pytest.fixture(scope="module")
def nano_data(script):
    return sys.modules["nano_data"]


@pytest.fixture(scope="module")
def nano_optimiser(script):
    return sys.modules["nano_optimiser"]


@pytest.fixture(scope="module")
def nano_report(script):
    return sys.modules["nano_report"]


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_model(script):
    """Hidden 16, 8 experts, with router and experts scaled up so that a wrong weight or slot cannot hide."""
    torch.manual_seed(3)
    config = transformers.OlmoeConfig(
        vocab_size=97, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts=8, num_experts_per_tok=3, max_position_embeddings=64,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.OlmoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp" in name:
                parameter.mul_(20)
    return model


def write_texts(folder):
    """Two domains with words of their own; several documents in each file."""
    folder.mkdir()
    words = {
        "tales": ["the", "sea", "ship", "old", "man", "said", "that", "was", "dark", "letter", "opened"],
        "code": ["def", "return", "self", "for", "in", "range", "x", "=", "0", "+", "(", ")", "[", "]", ":"],
    }
    generator = random.Random(5)
    for domain, of_domain in words.items():
        for split, documents in (("train", 8), ("valid", 3), ("test", 3)):
            texts = [" ".join(generator.choices(of_domain, k=120)) + ".\n" for _ in range(documents)]
            with lzma.open(folder / f"{domain}-{split}.jsonl.xz", "wt", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "README.md").write_text(README, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "mixed")


def arguments(texts, work, *more):
    sizes = [part for name, value in SETTINGS.items() for part in (f"--{name}", str(value))]
    paths = ["--data", str(texts), "--work", str(work)]
    return [*paths, *sizes, "--no-compile", "--no-progress", *map(str, more)]


def state_of(work, name="checkpoint.pt"):
    """All of a checkpoint but the seconds it took."""
    saved = torch.load(work / name, weights_only=True)
    earlier, first, done, decay, _, curve = saved["run"]
    curve = [{k: v for k, v in point.items() if k != "seconds"} for point in curve]
    return {**saved, "run": (earlier, first, done, decay, curve)}


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def stop_at(script, monkeypatch, step):
    """SIGTERM in the middle of a step, as a machine that is switched off sends it."""
    original = script.Run.step

    def interrupted(run):
        if run.done == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        original(run)

    monkeypatch.setattr(script.Run, "step", interrupted)


def test_forward_and_gradients_are_those_of_the_modules(nano_forward, small_model):
    # not token 0: torch gives no gradient to the embedding of the padding token, which here is an end of text like any
    windows = torch.randint(1, 97, (4, 13), generator=torch.Generator().manual_seed(0))
    loss, _, _, experts = nano_forward.losses(small_model, windows, torch.float32)
    loss.backward()
    found = {name: p.grad.clone() for name, p in small_model.named_parameters()}
    small_model.zero_grad()
    output = small_model(windows[:, :-1], output_router_logits=True)
    expected = F.cross_entropy(output.logits.flatten(0, 1), windows[:, 1:].flatten())
    expected.backward()
    # two orders of float32 summation over at most 100 terms of size 1
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert len(experts) == len(output.router_logits) == 2
    for experts_TK, logits_TE in zip(experts, output.router_logits, strict=True):
        assert torch.equal(experts_TK, logits_TE.softmax(dim=-1).topk(3, dim=-1).indices)
    for name, p in small_model.named_parameters():
        assert p.grad.abs().max() > 0, name
        torch.testing.assert_close(
            found[name], p.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_bfloat16_forward_is_near_float32(nano_forward, small_model):
    windows = torch.randint(0, 97, (4, 13), generator=torch.Generator().manual_seed(1))
    exact, rounded = (
        nano_forward.losses(small_model, windows, d)[0] for d in (torch.float32, torch.bfloat16)
    )
    assert exact != rounded
    # a loss near log 97, with 8 bits of mantissa in each of about ten rounded steps
    torch.testing.assert_close(rounded, exact, rtol=0.03, atol=0)


def test_balancing_loss_is_of_each_layer_and_one_when_uniform(nano_forward):
    x_TD = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    weight_ED = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    _, experts_TK, balance, z = nano_forward.router(x_TD, weight_ED, 2)
    logits_TE = x_TD @ weight_ED.t()
    by_hand = 0.0
    for expert in range(5):
        share = sum(expert in row for row in experts_TK.tolist()) / (50 * 2)
        by_hand += 5 * share * logits_TE.softmax(dim=-1)[:, expert].mean().item()
    assert balance.item() == pytest.approx(by_hand, rel=1e-5)
    assert z.item() == pytest.approx((logits_TE.logsumexp(dim=-1) ** 2).mean().item(), rel=1e-5)
    cyclic = torch.eye(5).repeat(4, 1) + torch.eye(5).roll(1, 1).repeat(4, 1)
    assert nano_forward.router(cyclic, torch.eye(5), 2)[2].item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalise_brings_singular_values_near_one(nano_optimiser, dtype):
    stack = torch.randn(3, 24, 10, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(nano_optimiser.orthogonalise(stack, dtype))
    assert singular.shape == (3, 10)
    # the five steps of these coefficients are made to end anywhere in about 0.7 to 1.2
    assert 0.6 < singular.min() < singular.max() < 1.3


def test_batches_visit_every_window_of_an_epoch_once(nano_data):
    ids = np.arange(1000, dtype=np.uint16)
    seen = np.concatenate([nano_data.windows_of_step(ids, step, 3, 16, [7]) for step in range(20)])
    assert seen.shape == (60, 17)
    assert np.array_equal(seen[:, 1:], seen[:, :-1] + 1)
    starts = seen[:, 0].tolist()
    assert len(set(starts)) == 60
    assert len({start % 16 for start in starts}) == 1
    assert not np.array_equal(nano_data.windows_of_step(ids, 20, 3, 16, [7]), seen[:3])
    with pytest.raises(
        ValueError, match="expected a text of at least 101 windows of 16 tokens, got 1000 tokens"
    ):
        nano_data.windows_of_step(ids, 0, 100, 16, [7])


def test_a_batch_has_the_windows_of_its_mixture(nano_data):
    streams = {"a": np.arange(1000, dtype=np.uint16), "b": np.arange(2000, 3000, dtype=np.uint16)}
    batch = nano_data.batch_of_step(streams, {"a": 3, "b": 2}, 4, 16, 7)
    assert (batch >= 2000).all(dim=1).tolist() == [False, False, False, True, True]
    assert torch.equal(batch, nano_data.batch_of_step(streams, {"a": 3, "b": 2}, 4, 16, 7))
    assert not torch.equal(batch[:2], batch[3:] - 2000)  # each domain has an order of its own
    assert not torch.equal(batch, nano_data.batch_of_step(streams, {"a": 3, "b": 2}, 4, 16, 8))


def test_documents_are_packed_with_separators_and_bytes_are_counted(nano_data):
    documents = ["the sea\n\nthe ship é", "x = 1\n"]
    tokenizer = nano_data.train_tokenizer(documents, 270, 16)
    ids = nano_data.encode_documents(tokenizer, documents)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert [int(i) for i in np.flatnonzero(ids == end)][1:] == [len(ids) - 1]
    assert tokenizer.decode(ids.tolist()) == "the sea\n\nthe ship é<|endoftext|>x = 1\n<|endoftext|>"
    sizes = nano_data.bytes_of_tokens(tokenizer)
    assert sizes[end] == 0
    assert sizes[ids.astype(int)].sum() == sum(len(document.encode()) for document in documents)


def test_tokenizer_sample_follows_the_mixture(nano_data, texts):
    sample = list(nano_data.sample_documents(texts, {"tales": 3, "code": 1}, 4000))
    sizes = [sum(len(text) for text in sample if (" = " in text) == is_code) for is_code in (False, True)]
    assert sizes == [3000, 1000]


def test_same_seed_repeats_and_resumed_equals_uninterrupted(script, one_thread, texts, tmp_path, monkeypatch):
    once, again, interrupted, other = (
        tmp_path / name for name in ("once", "again", "interrupted", "other seed")
    )
    assert script.main(arguments(texts, once, "--steps", 6)) == 0
    assert script.main(arguments(texts, again, "--steps", 2)) == 0
    assert script.main(arguments(texts, again, "--steps", 6)) == 0
    with monkeypatch.context() as patch:
        stop_at(script, patch, 3)  # in the middle of a log interval
        assert script.main(arguments(texts, interrupted, "--steps", 6)) == 3
    assert state_of(interrupted)["run"][2] == 3
    assert script.main(arguments(texts, interrupted, "--steps", 6)) == 0
    assert script.main(arguments(texts, other, "--steps", 6, "--seed", 1)) == 0

    expected = state_of(once)
    curve = expected["run"][-1]
    assert [point["step"] for point in curve] == [2, 4, 6]
    assert [point["tokens"] for point in curve] == [128, 256, 384]
    assert all(set(point["valid"]) == {"tales", "code"} for point in curve)
    assert_same(state_of(again), expected)
    assert_same(state_of(interrupted), expected)
    assert not torch.equal(
        state_of(other)["model"]["model.norm.weight"], expected["model"]["model.norm.weight"]
    )
    with pytest.raises(ValueError, match=r"give the same arguments, or another --work$"):
        script.main(arguments(texts, interrupted, "--steps", 8, "--seed", 1))


def test_a_decayed_branch_leaves_the_run_as_it_was(script, one_thread, texts, tmp_path, monkeypatch):
    straight, branched, stopped = (tmp_path / name for name in ("straight", "branched", "stopped"))
    assert script.main(arguments(texts, straight, "--steps", 6)) == 0
    for work in (branched, stopped):
        assert script.main(arguments(texts, work, "--steps", 4)) == 0
    before = (branched / "checkpoint.pt").read_bytes()
    branch = ("--decay-steps", 4, "--out")
    assert script.main(arguments(texts, branched, *branch, tmp_path / "model")) == 0
    assert (branched / "checkpoint.pt").read_bytes() == before
    assert not (branched / "decay-checkpoint.pt").exists()
    assert script.main(arguments(texts, branched, "--steps", 6)) == 0
    assert_same(state_of(branched), state_of(straight))

    (stage,) = json.loads((tmp_path / "model" / "training.json").read_text(encoding="utf-8"))["stages"]
    assert (stage["first"], stage["done"], stage["decay"]) == (0, 8, [4, 4])
    assert [point["lr_factor"] for point in stage["curve"]] == [1, 1, 0.75, 0.25]

    with monkeypatch.context() as patch:
        stop_at(script, patch, 6)
        assert script.main(arguments(texts, stopped, *branch, tmp_path / "resumed")) == 3
    assert not (tmp_path / "resumed").exists()
    assert script.main(arguments(texts, stopped, *branch, tmp_path / "resumed")) == 0
    names = sorted(file.name for file in (tmp_path / "model").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "resumed").iterdir())
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "resumed")]
    assert weights[0] == weights[1]


def test_export_loads_and_a_run_goes_on_from_it(script, nano_report, one_thread, texts, tmp_path, capsys):
    work, model = tmp_path / "work", tmp_path / "model"
    assert script.main(arguments(texts, work, "--steps", 2, "--z", 0.5)) == 0
    assert script.main(arguments(texts, work, "--decay-steps", 2, "--out", model, "--z", 0.5)) == 0
    with safe_open(model / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
        head, embedding = (file.get_tensor(f"{name}.weight") for name in ("lm_head", "model.embed_tokens"))
        index = json.loads((model / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
        assert index == dict.fromkeys(file.keys(), "model.safetensors")
    assert torch.equal(head, embedding)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    assert type(loaded).__name__ == "OlmoeForCausalLM"
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    config = loaded.config
    assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (8, 2, False)
    assert (config.max_position_embeddings, config.trained_window) == (16, 16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    sentence = "the old man opened a letter"
    assert tokenizer.decode(tokenizer(sentence)["input_ids"]) == sentence

    later, second = tmp_path / "later", tmp_path / "second"
    assert script.main(arguments(texts, later, "--init", model, "--steps", 6)) == 0
    assert state_of(later)["run"][1:3] == (4, 6)
    assert [point["lr_factor"] for point in state_of(later)["run"][-1]] == [1]  # warmed up once more
    assert script.main(arguments(texts, later, "--init", model, "--decay-steps", 2, "--out", second)) == 0
    stages = json.loads((second / "training.json").read_text(encoding="utf-8"))["stages"]
    assert [(stage["settings"]["z"], stage["first"], stage["done"]) for stage in stages] == [
        (0.5, 0, 4),
        (0.001, 4, 8),
    ]

    report = ["--data", texts, "--work", work, "--baseline-window", 8, "--baseline", f"earlier={model}"]
    assert nano_report.main([*map(str, ["--model", second, *report])]) == 0
    card = (second / "README.md").read_text(encoding="utf-8")
    record = json.loads((second / "training.json").read_text(encoding="utf-8"))
    test = record["evaluation"]["this model"]["test"]["code"]
    earlier = record["evaluation"]["earlier"]["test"]["code"]["8"]
    row = f"| code | {test['8']['bits_per_byte']:.3f} | {test['16']['bits_per_byte']:.3f} | {earlier['bits_per_byte']:.3f} |"
    assert row in card
    assert row in capsys.readouterr().out
    assert card.index("z-loss 0.5") < card.index("### Stage 2") < card.index("z-loss 0.001")
    assert "| tales | public domain | Old Tales |  |" in card
    assert "| tales | CC0 |  | New Tales |" in card
    assert "| code | MIT | some/code, more/code |  |" in card
    assert (second / "experts-by-domain.png").read_bytes().startswith(b"\x89PNG")
    for file in second.glob("*.*"):
        if file.suffix in (".md", ".json"):
            assert str(tmp_path) not in file.read_text(encoding="utf-8"), file.name


def test_bits_per_byte_are_those_of_the_module(nano_data, nano_report, small_model):
    ids = np.random.default_rng(0).integers(0, 97, 64).astype(np.uint16)
    bytes_V = torch.arange(97) % 4  # tokens 0, 4, ... stand for no byte, as end-of-text does
    found = nano_report.evaluate(small_model, ids, bytes_V, 16, batch=3)
    windows = torch.from_numpy(ids.astype(np.int64)).view(4, 16)
    with torch.no_grad():
        log_probabilities = small_model(windows).logits.log_softmax(dim=-1)[:, :-1]
    targets = windows[:, 1:]
    nats = -log_probabilities.gather(2, targets.unsqueeze(-1)).squeeze(-1)[bytes_V[targets] > 0].sum().item()
    size = int(bytes_V[targets].sum())
    assert (found["bytes"], found["tokens"]) == (size, int((bytes_V[targets] > 0).sum()))
    # two orders of float32 summation
    assert found["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-5)
    assert torch.tensor(found["slots"]).sum(dim=1).tolist() == [64 * 3, 64 * 3]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", 1, "--micro-windows", 3], "expected the windows of --mixture to be a multiple of"),
        (["--steps", 1, "--valid-every", 3], "expected --valid-every a multiple of --log-every"),
        (["--steps", 1, "--mixture", "tales=0"], "expected DOMAIN=WINDOWS,DOMAIN=WINDOWS,..., got 'tales=0'"),
        (["--decay-steps", 1], "expected --out with --decay-steps, and only with it"),
    ],
)
def test_wrong_arguments_are_refused_by_name(script, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit):
        script.parse_arguments(arguments(tmp_path, tmp_path, *more))
    assert message in capsys.readouterr().err


def test_learning_rate_warms_up_stays_and_falls_to_zero(nano_optimiser):
    factors = [nano_optimiser.learning_rate(step, 10, (50, 40)) for step in range(90)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:51] == [1.0] * 42
    assert factors[70] == pytest.approx(0.5)
    assert factors[89] == pytest.approx(1 / 40)
    assert nano_optimiser.learning_rate(89, 10, None) == 1


def test_muon_splits_gate_from_up(nano_optimiser, small_model):
    adamw, muon = nano_optimiser.make_optimisers(small_model, 1e-3, 0.5, 0.0, torch.float32)
    experts = small_model.model.layers[0].mlp.experts
    before = experts.gate_up_proj.detach().clone()
    for p in small_model.parameters():
        p.grad = torch.randn_like(p)
    muon.step()
    update = before - experts.gate_up_proj.detach()
    for half in update.chunk(2, dim=1):
        singular = torch.linalg.svdvals(half) / 0.5
        assert 0.6 < singular.min() < singular.max() < 1.3
    names = {id(p): name for name, p in small_model.named_parameters()}
    in_adamw = [names[id(p)] for group in adamw.param_groups for p in group["params"]]
    in_muon = [names[id(p)] for group in muon.param_groups for p in group["params"]]
    assert sorted(in_adamw + in_muon) == sorted(names.values())
    assert all(
        name.endswith(("norm.weight", "layernorm.weight", "gate.weight", "embed_tokens.weight"))
        for name in in_adamw
    )
