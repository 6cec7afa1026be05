"""llama-cpp-python's own OpenAI-compatible server with a routed model in it; statistics and level as in vLLM's server.

``POST /collective_rpc`` with ``{"method": "bh_routing_stats"}`` (``bh_routing_reset``, ``bh_routing_set`` with ``kwargs``) is answered where only this
machine reaches the server, and to no page of a browser.
"""

from __future__ import annotations

import json
import shlex
from typing import Any
from unittest import mock

from ...errors import BHRoutingError, InvalidParameterError, MissingDependencyError
from ..addresses import is_loopback, url
from .routing import LlamaRouting


def answer(routing: LlamaRouting, body: Any) -> dict[str, Any]:
    """What ``/collective_rpc`` says to a request's JSON; raises `InvalidParameterError` for an unknown method.

    Examples
    --------
    >>> answer(None, {"method": "shutdown"})
    Traceback (most recent call last):
    ...
    bh_routing.errors.InvalidParameterError: method must be one of bh_routing_stats, bh_routing_reset, bh_routing_set, got 'shutdown'.
    """
    given = body if isinstance(body, dict) else {}
    method, level = given.get("method"), given.get("kwargs", {})
    if method == "bh_routing_stats":
        return {"rank": 0, "moe_layers": len(routing.structure.blocks)} | routing.stats()
    if method == "bh_routing_reset":
        routing.reset_stats()
        return {"rank": 0, "reset": True}
    if method == "bh_routing_set":
        try:
            routing.set_level(**level)
        except (BHRoutingError, TypeError) as error:
            return {"rank": 0, "error": str(error), "alpha": routing.alpha}
        return {"rank": 0, "alpha": routing.alpha, "experts_per_token": routing.budget}
    raise InvalidParameterError(
        f"method must be one of bh_routing_stats, bh_routing_reset, bh_routing_set, got {method!r}."
    )


def make_app(llm: Any, name: str, *, rpc: bool) -> Any:
    """The server's application; ``rpc``: with ``/collective_rpc``.

    Raises
    ------
    MissingDependencyError
        Without what llama-cpp-python's server needs.
    """
    try:
        from fastapi import Request
        from fastapi.responses import JSONResponse
        from llama_cpp.server.app import create_app
        from llama_cpp.server.model import LlamaProxy
        from llama_cpp.server.settings import ModelSettings, ServerSettings
    except ImportError as error:
        raise MissingDependencyError(
            f"serving needs llama-cpp-python with its server ({error}); pip install 'bh-routing[llama-cpp]'."
        ) from error
    with mock.patch.object(LlamaProxy, "load_llama_from_model_settings", staticmethod(lambda _: llm)):
        app = create_app(
            server_settings=ServerSettings(),
            model_settings=[ModelSettings(model=llm.model_path, model_alias=name)],
        )
    if not rpc:
        return app

    async def collective_rpc(request: Any) -> Any:
        if "origin" in request.headers:  # the server allows pages of every origin
            return JSONResponse({"error": "not for browsers"}, status_code=403)
        try:
            body = json.loads(await request.body())
            return JSONResponse({"results": [answer(llm.routing, body)]})
        except (InvalidParameterError, ValueError) as error:
            return JSONResponse({"error": str(error)}, status_code=400)

    collective_rpc.__annotations__["request"] = Request  # the annotations of this file are text
    app.add_api_route("/collective_rpc", collective_rpc, methods=["POST"])
    return app


def serve(llm: Any, name: str, host: str, port: int) -> None:
    """Serve until it is interrupted."""
    import uvicorn

    app = make_app(llm, name, rpc=is_loopback(host))
    print(f"\n{name} at {url(host, port)}/v1: {llm.routing}")
    print(how_to_talk(name, host, port), flush=True)
    uvicorn.run(app, host=host, port=port, log_level="warning")


def how_to_talk(name: str, host: str, port: int) -> str:
    """What a person types to use the server."""
    here = url(host, port)
    body = json.dumps({"model": name, "prompt": "The old man", "max_tokens": 20})
    lines = [
        f"  complete    curl {here}/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}",
        f'  in Python   openai.OpenAI(base_url="{here}/v1", api_key="none")',
    ]
    if is_loopback(host):
        post = f"curl {here}/collective_rpc -H 'Content-Type: application/json' -d"
        lines += [
            f'  statistics  {post} \'{{"method": "bh_routing_stats"}}\'',
            f'  level       {post} \'{{"method": "bh_routing_set", "kwargs": {{"experts_per_token": 3}}}}\'',
        ]
    else:
        lines.append("  statistics  not over HTTP: other machines can reach this address")
    return "\n".join([*lines, "  end         Ctrl-C"])
