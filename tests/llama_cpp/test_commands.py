"""The command line and the server on GGUF files."""

from __future__ import annotations

import io
import json

import pytest

from bh_routing.cli import main
from bh_routing.models import bundled_calibration

CALIBRATION = str(bundled_calibration())
SMALL = ["--context", "256", "--threads", "1"]


def test_chat(gguf_file, capsys):
    """A model without a chat template continues what is said; the line at the end says what was decided."""
    code = main(
        [
            "chat",
            gguf_file("q8_0"),
            "--calibration",
            CALIBRATION,
            "--experts",
            "4",
            "-p",
            "The old man",
            "--max-new-tokens",
            "8",
            *SMALL,
        ]
    )
    out = " ".join(capsys.readouterr().out.split())
    assert code == 0
    assert "of 8 experts per token and layer (standard deviation" in out
    assert "compensation on." in out


def test_chat_without_a_word_says_nothing(gguf_file, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main(["chat", gguf_file("q8_0"), "--calibration", CALIBRATION, "--mode", "analyze", *SMALL]) == 0
    assert capsys.readouterr().out == ""


def test_chat_says_what_would_have_been_selected(gguf_file, capsys, monkeypatch):
    """One line is one message, an empty one ends it; nothing is dropped, so nothing is compensated."""
    monkeypatch.setattr("sys.stdin", io.StringIO("The old man\nShe\n\n"))
    short = ["--max-new-tokens", "4", *SMALL]
    assert main(["chat", gguf_file("q8_0"), "--calibration", CALIBRATION, "--mode", "analyze", *short]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "BH would select" in out
    assert "compensation off." in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["chat", "model.gguf", "--experts", "4"],
            "routing in llama.cpp needs a calibration: give --calibration FILE",
        ),
        (["chat", "olmoe-nano", "--experts", "4"], "expected a name that ends in .gguf, got 'olmoe-nano'"),
        (
            ["chat", "none.gguf", "--calibration", CALIBRATION],
            "expected a GGUF file, got 'none.gguf', which does not exist",
        ),
        (
            ["serve", "none.gguf", "--calibration", CALIBRATION, "--dtype", "float32"],
            "--dtype is an option of vLLM",
        ),
        (
            ["chat", "none.gguf", "--calibration", CALIBRATION, "--loads", "8"],
            "llama.cpp does not support price",
        ),
    ],
)
def test_one_sentence(arguments, sentence, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.strip().splitlines()) == 1


def test_server(make_llama, calibration):
    """The server's own completions; statistics and level as in vLLM's; no page of a browser."""
    from fastapi.testclient import TestClient

    from bh_routing.engines.llama_cpp.serving import make_app

    llm = make_llama(calibration, kind="q8_0", experts_per_token=4, logits_all=False)
    client = TestClient(make_app(llm, "nano", rpc=True))

    def rpc(method: str, **level: float) -> dict:
        told = client.post("/collective_rpc", content=json.dumps({"method": method, "kwargs": level}))
        assert told.status_code == 200
        return told.json()["results"][0]

    body = {"model": "nano", "prompt": "The old man", "max_tokens": 6, "temperature": 0.0}
    first = client.post("/v1/completions", json=body).json()
    assert first["usage"]["completion_tokens"] == 6
    told = rpc("bh_routing_stats")
    assert told["moe_layers"] == len(told["layers"]) == 4
    assert told["telemetry"]["total"]["tokens"] > 0
    assert told["stats"]["experts_per_token"] == 4
    assert rpc("bh_routing_set", experts_per_token=2)["experts_per_token"] == 2
    assert "no level selects 99" in rpc("bh_routing_set", experts_per_token=99)["error"]
    assert rpc("bh_routing_reset") == {"rank": 0, "reset": True}
    assert rpc("bh_routing_stats")["telemetry"]["total"]["tokens"] == 0
    assert client.post("/collective_rpc", content='{"method": "shutdown"}').status_code == 400
    assert client.post("/collective_rpc", content="{", headers={}).status_code == 400
    assert (
        client.post("/collective_rpc", content="{}", headers={"Origin": "http://elsewhere"}).status_code
        == 403
    )
    closed = TestClient(make_app(llm, "nano", rpc=False))
    assert closed.post("/collective_rpc", content='{"method": "bh_routing_stats"}').status_code == 404
