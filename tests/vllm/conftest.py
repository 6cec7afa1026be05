"""Engines for the vLLM tests: each in a process of its own, started once for all tests that ask for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
_SPEC = find_spec("vllm")
# The folder of these tests is found as a package of that name where vLLM is not installed; it has no file.
HAS_VLLM = _SPEC is not None and _SPEC.origin is not None

# A test may start several engines and wait for a busy machine.
TIMEOUT = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(TIMEOUT))
            if not HAS_VLLM:
                item.add_marker(
                    pytest.mark.skip(reason="vLLM is not installed; `make test-vllm` installs it")
                )


@pytest.fixture(scope="session")
def vllm_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One thread, little memory, no network, compile caches of its own."""
    changes = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("vllm_cache")),
    }
    kept = {k: v for k, v in os.environ.items() if k not in ("VLLM_PLUGINS", "BH_ROUTING_CONFIG")}
    return kept | changes


@pytest.fixture(scope="session")
def run_engine(
    vllm_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """``run_engine(engine, steps, ...)``: the results of the steps (`run_engine.py`), or the failed process.

    The same job is run once. ``fails=True`` returns the log of an engine that must not start.
    """
    done: dict[str, Any] = {}

    def run(
        engine: dict[str, Any], steps: list[Any], *, fails: bool = False, env: dict[str, str] | None = None
    ) -> Any:
        single = engine.get("tensor_parallel_size", 1) == 1
        settings = {"max_model_len": 512, "enable_prefix_caching": False, "max_num_batched_tokens": 2048}
        if single:
            settings["distributed_executor_backend"] = "uni"  # all in one process: it starts twice as fast
        job = json.dumps({"engine": settings | engine, "steps": steps, "env": env or {}, "fails": fails})
        if job not in done:
            out = tmp_path_factory.mktemp("engine") / "out.json"
            process = subprocess.run(
                [sys.executable, str(HERE / "run_engine.py"), str(out)],
                input=job,
                capture_output=True,
                text=True,
                env=vllm_environment
                | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0" if single else "1"}
                | (env or {}),
                timeout=TIMEOUT - 30,
            )
            log = process.stdout + process.stderr
            assert (process.returncode != 0) == fails, log[-6000:]
            done[job] = log if fails else json.loads(out.read_text())
        return done[job]

    return run
