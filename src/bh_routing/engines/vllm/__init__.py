"""The same routing in vLLM, from the same calibration file (docs/vllm.md).

vLLM loads `plugin.register` by the entry point ``vllm.general_plugins``; nobody else imports this package.

    settings.py   what a person configures, checked; its digest
    paths.py      a calibration's module paths -> vLLM's layer names
    routing.py    the routers of one engine: decide, count, fill unused slots; pure PyTorch, no vLLM
    step.py       which request a token of a step belongs to, and its phase; pure PyTorch, no vLLM
    levels.py     a level per request: asked, solved, and the rows that workers look it up in; no vLLM
    phases.py     what is counted by phase; pure PyTorch, no vLLM
    ragged.py     the experts' kernel called with the kept pairs only; pure PyTorch, no vLLM
    ops.py        both as operations that torch.compile does not look into (needs vLLM)
    checks.py     what is refused at start-up
    plugin.py     where vLLM is hooked
    admission.py  what happens to a request before it is scheduled
    metrics.py    figures on the server's /metrics
    worker.py     bh_routing_stats, bh_routing_reset, bh_routing_set on every worker
    serving.py    `bh-routing serve`
"""
