"""scripts/train_olmoe_nano.py: its forward pass is the model's, its runs repeat and resume exactly, its export loads."""

import argparse
import importlib
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

transformers = pytest.importorskip("transformers")
SCRIPTS = Path(__file__).parents[1] / "scripts"
SHAPE = {
    "vocab": 300,
    "hidden": 16,
    "layers": 2,
    "heads": 2,
    "experts": 8,
    "top-k": 2,
    "expert-width": 8,
    "context": 32,
}
RUN = {
    "steps": 4,
    "batch-tokens": 64,
    "micro-tokens": 32,
    "window": 16,
    "log-every": 2,
    "valid-every": 2,
    "warmup": 2,
}


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


def write_text(path, paragraphs=120, seed=5):
    words = [
        "the",
        "sea",
        "ship",
        "old",
        "man",
        "said",
        "that",
        "it",
        "was",
        "dark",
        "letter",
        "opened",
        "never",
    ]
    generator = random.Random(seed)
    lines = [" ".join(generator.choices(words, k=30)) + "." for _ in range(paragraphs)]
    lines.insert(paragraphs // 2, "")  # two books
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def arguments(folder, text, *more):
    sizes = [part for name, value in (SHAPE | RUN).items() for part in (f"--{name}", str(value))]
    paths = [
        "--text",
        str(text),
        "--valid",
        str(text),
        "--out",
        str(folder / "model"),
        "--work",
        str(folder / "work"),
    ]
    plain = ["--compare-tokens", "100", "--no-bf16", "--no-compile", "--no-progress"]
    return [*paths, *sizes, *plain, *more]


def curve_of(folder):
    record = json.loads((folder / "model" / "training.json").read_text(encoding="utf-8"))
    return [{k: v for k, v in point.items() if k != "seconds"} for point in record["curve"]]


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


def test_orthogonalise_brings_singular_values_near_one(script):
    stack = torch.randn(3, 24, 10, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(script.orthogonalise(stack))
    assert singular.shape == (3, 10)
    # the five steps of these coefficients are made to end anywhere in about 0.7 to 1.2
    assert 0.6 < singular.min() < singular.max() < 1.3


def test_batches_visit_every_window_of_an_epoch_once(script):
    ids = np.arange(1000, dtype=np.uint16)
    seen = torch.cat([script.batch_of_step(ids, step, 3, 16, 7) for step in range(20)])
    assert seen.shape == (60, 17)
    assert torch.equal(seen[:, 1:], seen[:, :-1] + 1)
    starts = seen[:, 0].tolist()
    assert len(set(starts)) == 60
    assert len({start % 16 for start in starts}) == 1
    next_epoch = script.batch_of_step(ids, 20, 3, 16, 7)
    assert not torch.equal(next_epoch, seen[:3])
    with pytest.raises(
        ValueError, match="expected a text of at least 101 windows of 16 tokens, got 1000 tokens"
    ):
        script.batch_of_step(ids, 0, 100, 16, 7)


def test_same_seed_repeats_and_resumed_equals_uninterrupted(script, one_thread, tmp_path):
    text = write_text(tmp_path / "text.txt")
    folders = [tmp_path / name for name in ("once", "again", "interrupted", "other seed")]
    for folder in folders:
        folder.mkdir()
    once, again, interrupted, other = folders
    assert script.main(arguments(once, text)) == 0
    assert script.main(arguments(again, text, "--resume", "--baseline", f"first={once / 'model'}")) == 0
    assert (
        script.main(arguments(interrupted, text, "--stop-after", "3")) == 3
    )  # in the middle of a log interval
    assert not (interrupted / "model").exists()
    assert script.main(arguments(interrupted, text, "--resume")) == 0
    assert script.main(arguments(other, text, "--seed", "1")) == 0

    assert [point["step"] for point in curve_of(once)] == [2, 4]
    assert curve_of(once) == curve_of(again) == curve_of(interrupted)
    assert curve_of(once) != curve_of(other)
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1] == weights[2]
    assert weights[0] != weights[3]

    with pytest.raises(ValueError, match=r"give the same arguments, or start without --resume$"):
        script.main(arguments(interrupted, text, "--resume", "--seed", "1"))

    card = (again / "model" / "README.md").read_text(encoding="utf-8")
    record = json.loads((again / "model" / "training.json").read_text(encoding="utf-8"))
    found = record["evaluation"]["this model"]["text, first 100 tokens"]
    assert found == record["evaluation"]["first"]["text, first 100 tokens"]
    assert f"| text, first 100 tokens | {found['perplexity']:.2f} | {found['perplexity']:.2f} |" in card
    assert np.allclose(np.mean(found["load"], axis=1), 1, atol=1e-3)
    for file in (again / "model").glob("*.*"):
        if file.suffix in (".md", ".json"):
            assert str(tmp_path) not in file.read_text(encoding="utf-8"), file.name


def test_export_is_bfloat16_tied_and_loads_with_the_auto_classes(script, one_thread, tmp_path):
    text = write_text(tmp_path / "text.txt")
    first = tmp_path / "first"
    first.mkdir()
    assert script.main(arguments(first, text, "--z", "0.5")) == 0
    more = ("--init", str(first / "model"), "--tokenizer", str(first / "model"), "--optimiser", "adamw")
    assert script.main(arguments(tmp_path, text, *more)) == 0
    folder = tmp_path / "model"
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert [stage["settings"]["z"] for stage in record["earlier_stages"]] == [0.5]
    assert "--z 0.5" in record["earlier_stages"][0]["command"]
    assert "--init DIR --tokenizer DIR" in record["command"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "Tokens seen: 0.0 M" in card
    assert (
        card.index("### Stage 1")
        < card.index("z-loss 0.5")
        < card.index("### Stage 2")
        < card.index("z-loss 0.001")
    )
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "OlmoeForCausalLM"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.config.num_experts, model.config.num_experts_per_tok, model.config.norm_topk_prob) == (
        8,
        2,
        False,
    )
    sentence = "the old man opened a letter"
    assert tokenizer.decode(tokenizer(sentence)["input_ids"]) == sentence
    ids = script.encode_text(tokenizer, "the sea\n\nthe ship")
    assert tokenizer.convert_ids_to_tokens(int(ids[list(ids).index(0)])) == "<|endoftext|>"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--micro-tokens", "48"], "expected --batch-tokens a multiple of --micro-tokens"),
        (["--valid-every", "3"], "expected --valid-every a multiple of --log-every"),
        (["--baseline", "no-name"], "expected NAME=DIR, got 'no-name'"),
    ],
)
def test_wrong_arguments_are_refused_by_name(script, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit):
        script.parse_arguments(arguments(tmp_path, tmp_path / "text.txt", *more))
    assert message in capsys.readouterr().err


def test_schedule_warms_up_stays_and_falls_to_zero(script):
    factors = [script.schedule(step, 100, 10, 0.5) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:51] == [1.0] * 42
    assert factors[75] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.02)


def test_muon_splits_gate_from_up(script, small_model):
    args = argparse.Namespace(lr=1e-3, muon_lr=0.5, weight_decay=0.0, optimiser="muon")
    adamw, muon = script.make_optimisers(small_model, args)
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
