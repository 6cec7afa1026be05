"""`bh-routing serve` with a real client, and what stops it."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from bh_routing.calibration.calibration import Calibration
from bh_routing.models import bundled_calibration, bundled_path

CALIBRATION = str(bundled_calibration("olmoe-nano"))
QUICK = "--enforce-eager --max-model-len 256"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(environment: dict[str, str], *argv: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bh_routing", "serve", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell starts background jobs, and so perhaps these tests, with the signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


class Running:
    """A server that has said how to talk to it."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.url = process, f"http://127.0.0.1:{port}"
        self.log: list[str] = []
        self.reader = threading.Thread(target=lambda: self.log.extend(process.stderr), daemon=True)
        self.reader.start()
        self.said = []
        for line in process.stdout:
            self.said.append(line.rstrip("\n"))
            if "Ctrl-C" in line:
                return
        raise AssertionError("".join(self.log)[-6000:])

    def rpc(self, method: str, **kwargs: Any) -> list[dict[str, Any]]:
        body = json.dumps({"method": method, "kwargs": kwargs}).encode()
        request = urllib.request.Request(
            self.url + "/collective_rpc", body, {"Content-Type": "application/json"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=120) as response:
            return json.loads(response.read())["results"]

    def get(self, path: str) -> str:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.url + path, timeout=120) as response:
            return response.read().decode()


@pytest.fixture(scope="module")
def server(vllm_environment) -> Iterator[Running]:
    port = free_port()
    argv = ("olmoe-nano", "--calibration", CALIBRATION, "--experts", 4, "--port", port, "--vllm", QUICK)
    process = serve(vllm_environment, *argv)
    try:
        running = Running(process, port)
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait(60)
    running.reader.join(30)
    process.stdout.close()
    process.stderr.close()


def test_it_says_what_is_routed_and_how_to_talk_to_it(server):
    said = "\n".join(server.said)
    assert re.search(
        rf"^olmoe-nano at {server.url}/v1: 4 of 4 MoE layers routed: bh at alpha [\d.e-]+, budget 4\.0",
        said,
        re.M,
    )
    for word in ("curl", "openai.OpenAI", "bh_routing_stats", "bh_routing_set"):
        assert word in said
    log = "".join(server.log)
    for layer in range(4):
        path = f"model.layers.{layer}.mlp"
        assert (
            f"bh-routing: {path}.experts: CPURouter -> BH routing of {path}.gate (8 of 64 experts before)"
            in log
        )


def test_eight_clients_at_once_while_statistics_are_read(server):
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
    server.rpc("bh_routing_reset")

    def ask(number: int) -> Any:
        answer = client.completions.create(
            model="olmoe-nano",
            prompt=f"The old man number {number} walked to the",
            max_tokens=24,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        return answer

    seen: list[int] = []
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, number % 8) for number in range(32)]
        while not all(future.done() for future in asked):
            (worker,) = server.rpc("bh_routing_stats")
            seen.append(worker["telemetry"]["total"]["tokens"])
        answers = [future.result() for future in asked]
    assert seen == sorted(seen)
    assert len(set(seen)) > 2, seen  # it was read while tokens came
    (worker,) = server.rpc("bh_routing_stats")
    used = [answer.usage for answer in answers]
    assert all(u.completion_tokens == 24 for u in used)
    cached = [u.prompt_tokens_details.cached_tokens if u.prompt_tokens_details else 0 for u in used]
    # The last token of an answer is not routed; what the prefix cache holds is not routed again.
    routed = sum(u.prompt_tokens + 24 - 1 for u in used)
    assert routed - 16 * 32 <= worker["telemetry"]["total"]["tokens"] <= routed - sum(cached)
    for layer in worker["telemetry"]["layers"]:
        assert sum(layer["count_histogram"]) == layer["tokens"]
    pairs = sum(
        k * n for layer in worker["telemetry"]["layers"] for k, n in enumerate(layer["count_histogram"])
    )
    assert pairs == worker["pairs_computed"]
    assert 3 < worker["stats"]["mean_experts_per_token"] < 5
    for first, again in zip(answers[:8], answers[8:16], strict=True):
        assert first.choices[0].text  # greedy, but batches differ: equal texts are not promised
        assert again.choices[0].text


def test_a_level_of_its_own_and_a_wrong_one_over_http(server):
    """The wrong one is its own error; what else is under way goes on. /metrics tells both."""
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)

    def ask(stream: bool = False, **level: Any) -> Any:
        extra = {
            "ignore_eos": True,
            "vllm_xargs": {f"bh_routing.{name}": value for name, value in level.items()},
        }
        return client.completions.create(
            model="olmoe-nano", prompt="The ship", max_tokens=24, extra_body=extra, stream=stream
        )

    server.rpc("bh_routing_reset")
    with ThreadPoolExecutor(4) as pool:
        going = [pool.submit(ask, experts_per_token=2) for _ in range(3)]
        for level, sentence in (
            ({"experts": 3}, "a level has no 'experts'; did you mean 'experts_per_token'?"),
            ({"experts_per_token": 99}, "no level selects 99 experts per token in the model on average: "),
        ):
            with pytest.raises(openai.BadRequestError) as refused:
                ask(**level)
            with pytest.raises(openai.BadRequestError):
                ask(stream=True, **level)
            assert refused.value.status_code == 400
            assert refused.value.body["message"].startswith(sentence)
        assert all(future.result().usage.completion_tokens == 24 for future in going)
    (worker,) = server.rpc("bh_routing_stats")
    assert worker["requests"] == {"own": {"experts_per_token=2.0": 3}}
    assert 1.5 < worker["stats"]["mean_experts_per_token"] < 2.5
    text = server.get("/metrics")
    sums = {phase: worker["phases"][phase]["experts"] for phase in ("prefill", "decode")}
    for phase, experts in sums.items():
        assert f'bh_routing_experts_total{{phase="{phase}"}} {float(experts)}' in text
    assert 'bh_routing_requests_total{level="experts_per_token=2.0",why="own"} 3.0' in text
    assert 'bh_routing_level{kind="experts_per_token"} 4.0' in text
    assert sum(sums.values()) == worker["pairs_computed"]


def test_level_over_http(server):
    (changed,) = server.rpc("bh_routing_set", experts_per_token=2)
    assert changed["experts_per_token"] == 2
    (refused,) = server.rpc("bh_routing_set", alpha="much")
    assert refused["error"] == "alpha must be a number, got 'much'."
    (back,) = server.rpc("bh_routing_set", experts_per_token=4)
    assert back["alpha"] > changed["alpha"]


def test_interrupting_it_ends_everything(server):
    """Last in this file: it ends the server."""
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 130
    with pytest.raises(OSError):
        server.rpc("bh_routing_stats")
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(server.process.pid)], capture_output=True, text=True
    ).stdout
    assert children.strip() == ""


def test_a_calibration_of_other_weights_stops_start_up_with_one_sentence(vllm_environment, tmp_path):
    from dataclasses import replace

    held = Calibration.load(CALIBRATION)
    # Without the certificate, which names the fingerprint: the file itself is sound.
    noise_LD = torch.randn_like(held.fingerprint_LD)
    other = replace(held, fingerprint_LD=held.fingerprint_LD + noise_LD, certificate=None)
    file = tmp_path / "other.safetensors"
    other.save(file)
    start = time.monotonic()
    process = serve(
        vllm_environment,
        "olmoe-nano",
        "--calibration",
        file,
        "--experts",
        4,
        "--port",
        free_port(),
        "--vllm",
        QUICK,
    )
    out, err = process.communicate(timeout=600)
    print(f"refused after {time.monotonic() - start:.0f} s")
    assert (process.returncode, out) == (2, "")
    last = err.rstrip().splitlines()[-1]
    assert last.startswith(
        "bh-routing serve: the router weights of layer model.layers.0.mlp.experts differ from those that were "
    )
    assert last.endswith("to use the calibration all the same.")


@pytest.mark.parametrize("content", [None, b"no calibration"])
def test_a_file_that_is_no_calibration_stops_before_vllm_starts(vllm_environment, tmp_path, content):
    file = tmp_path / "wrong.safetensors"
    if content is not None:
        file.write_bytes(content)
    process = serve(
        vllm_environment, "olmoe-nano", "--calibration", file, "--experts", 4, "--port", free_port()
    )
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("bh-routing serve: ")
    assert str(file) in err


def test_a_wrong_file_stops_vllm_itself(vllm_environment, tmp_path):
    """Without `bh-routing serve`: the front end refuses, the last line of its log is the sentence."""
    value = {"bh_routing": {"calibration": str(tmp_path / "missing.safetensors"), "alpha": 0.1}}
    code = f"from vllm import LLM; LLM({str(bundled_path('olmoe-nano'))!r}, additional_config={value})"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=vllm_environment,
    )
    assert run.returncode == 1
    last = run.stderr.rstrip().splitlines()[-1]
    assert last.startswith("bh_routing.errors.CalibrationFileError: there is no calibration file ")
