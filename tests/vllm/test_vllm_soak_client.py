"""What the clients of benchmarks/vllm_serving.py do where the server closes a connection; no engine runs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ANSWER = b'{"results": [{"tokens": 3}]}'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


@pytest.fixture
def serving(monkeypatch) -> Any:
    if not BENCHMARKS.exists():
        pytest.skip("the benchmarks are not part of a wheel")
    monkeypatch.syspath_prepend(BENCHMARKS)
    return pytest.importorskip("vllm_serving")


def ask(serving: Any, closes: int) -> tuple[Any, int]:
    """What one question gets of a server that reads so many requests and closes, and how many were sent again."""

    async def run() -> tuple[Any, int]:
        left = closes

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal left
            await reader.readuntil(b"}}")  # the body
            if left == 0:
                writer.write(HEAD % len(ANSWER) + ANSWER)
            left -= 1
            writer.close()

        server = serving.Server(vllm="")
        async with await asyncio.start_server(handle, "127.0.0.1", server.port), serving.aiohttp.ClientSession() as session:  # fmt: skip
            server.session = session
            try:
                return await server.rpc("bh_routing_stats"), server.resent
            except serving.aiohttp.ClientError as error:
                return error, server.resent

    return asyncio.run(run())


def test_a_request_that_is_lost_is_sent_once_more_and_counted(serving):
    assert ask(serving, 0) == ({"tokens": 3}, 0)
    assert ask(serving, 1) == ({"tokens": 3}, 1)


def test_a_request_that_is_lost_twice_is_an_error(serving):
    error, resent = ask(serving, 2)
    assert isinstance(error, serving.aiohttp.ServerDisconnectedError)
    assert resent == 1
