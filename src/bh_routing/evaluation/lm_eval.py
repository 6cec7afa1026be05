"""lm-evaluation-harness: the model name ``bh-routing``, a model under a routing policy.

`register` makes the name known; then::

    lm_eval.simple_evaluate("bh-routing", model_args={"pretrained": "olmoe-nano", "policy": "bh:experts=4"},
                            tasks=["hellaswag"])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from functools import lru_cache
from typing import Any

import torch

from ..errors import DatasetError, InvalidParameterError, MissingDependencyError
from ..stats.risk import mcnemar

NAME = "bh-routing"
RIGHT_OR_WRONG = ("acc", "acc_norm", "exact_match")  # metrics that are 0 or 1 for an item


@lru_cache(maxsize=1)
def register() -> type:
    """Make the name ``bh-routing`` known to lm-evaluation-harness; returns its model class.

    ``model_args``: ``pretrained`` (what `bh_routing.models.loading.load_model` takes, or a loaded model with its
    ``tokenizer``), ``policy``, ``calibration`` (a file; default: the one that comes with a bundled model, ``none``
    for none), ``device``, ``dtype``, and those of lm-evaluation-harness' own ``hf``. The model stays patched until
    ``unpatch`` is called on the object.

    Raises
    ------
    MissingDependencyError
        Without lm-evaluation-harness.
    """
    try:
        import lm_eval.models  # noqa: F401 - fills the registry, which would stay without its own names
        from lm_eval.api.registry import register_model
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise MissingDependencyError(
            f"lm-evaluation-harness is needed and cannot be imported ({error}); pip install 'lm_eval[hf]'."
        ) from error

    @register_model(NAME)
    class BHRoutingLM(HFLM):  # type: ignore[misc, valid-type, unused-ignore]
        """A transformers model under a routing policy."""

        def __init__(
            self,
            pretrained: Any,
            policy: str = "full",
            calibration: str | None = None,
            tokenizer: Any = None,
            device: str | None = None,
            dtype: str = "auto",
            **settings: Any,
        ) -> None:
            from ..calibration.calibration import Calibration
            from ..models.loading import default_calibration, load_model
            from .specs import make_routing, parse_policy
            from .workbench import Workbench

            spec = parse_policy(policy)
            if isinstance(pretrained, str):
                path = default_calibration(pretrained) if calibration is None else calibration
                pretrained, tokenizer = load_model(pretrained, device=device or "auto", dtype=dtype)
            else:
                path = calibration
            held = None if path in (None, "none") else Calibration.load(path)
            self.routing = make_routing(spec, Workbench(pretrained, held))
            self._inputs: set[tuple[int, ...]] = set()
            super().__init__(pretrained=pretrained, tokenizer=tokenizer, **settings)
            self.routing.patch_model()

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            self._inputs = {tuple((c + t)[-(self.max_length + 1) :][:-1]) for _, c, t in requests}
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

        def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
            """As in ``hf``, but the model is told what is padding: rows are filled up with zeros."""
            if attn_mask is not None or labels is not None or inps.shape[0] == 1:
                return super()._model_call(inps, attn_mask, labels)
            autocast = torch.autocast(
                self.device.type, self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
            )
            lengths = [real_length(row, self._inputs) for row in inps.tolist()]
            positions_S = torch.arange(inps.shape[1], device=inps.device)
            mask_BS = positions_S < torch.tensor(lengths, device=inps.device).unsqueeze(-1)
            with torch.no_grad(), autocast:
                return self.model(inps, attention_mask=mask_BS.long()).logits

        def unpatch(self) -> None:
            """Restore the model."""
            self.routing.unpatch_model()

        def get_model_info(self) -> dict[str, Any]:
            """As in ``hf``, with the policy and the experts that it kept so far."""
            info: dict[str, Any] = super().get_model_info()
            return info | {"routing": self.routing.get_routing_stats()}

    return BHRoutingLM


def real_length(row: Sequence[int], inputs: Set[tuple[int, ...]]) -> int:
    """Tokens of a row before the zeros that fill it up: the shortest beginning that is an input; all of it if none is."""
    start = len(row)
    while start and row[start - 1] == 0:
        start -= 1
    return next((n for n in range(start, len(row)) if tuple(row[:n]) in inputs), len(row))


def evaluate(
    model: Any,
    tokenizer: Any,
    policies: Sequence[str],
    tasks: Sequence[str],
    *,
    calibration: Any = None,
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Run tasks of lm-evaluation-harness under several policies of one model.

    Parameters
    ----------
    calibration : path, optional
    include_path : str, optional
        A folder of one's own task files.

    Returns
    -------
    list of dict
        Per policy: ``policy``, ``mean_experts_per_token``, ``results``, {task: {metric: value}}, and ``against_full``
        (`against`; empty where ``"full"`` is none of the policies).

    Raises
    ------
    InvalidParameterError
        For a task that does not exist.
    DatasetError
        If a task's data cannot be read.
    """
    made = register()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    known = set(manager.all_tasks)
    if unknown := [task for task in tasks if task not in known]:
        raise InvalidParameterError(
            f"lm-evaluation-harness knows no task {unknown[0]!r}; give a folder of task files with --include-path, "
            "or see `lm-eval ls tasks`."
        )
    rows, right = [], []
    for policy in policies:
        wrapped = made(
            pretrained=model,
            tokenizer=tokenizer,
            policy=policy,
            calibration=calibration,
            batch_size=batch_size,
        )
        try:
            found = simple_evaluate(
                wrapped,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                num_fewshot=num_fewshot,
                bootstrap_iters=0,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                log_samples=True,
            )
            mean = wrapped.routing.telemetry.mean_experts_per_token
        except (OSError, ConnectionError) as error:
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise DatasetError(
                f"the data of {', '.join(tasks)} cannot be read, got {type(error).__name__}: {reason}; check the "
                "network, or give a task file of local data with --include-path."
            ) from error
        finally:
            wrapped.unpatch()
        results = {
            task: {
                key.removesuffix(",none"): value
                for key, value in found["results"][task].items()
                if isinstance(value, float) and "stderr" not in key
            }
            for task in found["results"]
        }
        rows.append({"policy": policy, "mean_experts_per_token": mean, "results": results})
        right.append(_right(found.get("samples", {})))
    full = next((i for i, policy in enumerate(policies) if policy == "full"), None)
    for row, mine in zip(rows, right, strict=True):
        row["against_full"] = {} if full is None else against(mine, right[full])
    return rows


def _right(samples: Mapping[str, Any]) -> dict[str, dict[Any, dict[str, bool]]]:
    """{task: {item: {metric: whether it was answered rightly}}}, of the metrics that are right or wrong."""
    return {
        task: {
            one["doc_id"]: {m: bool(one[m]) for m in RIGHT_OR_WRONG if one.get(m) in (0, 1)} for one in found
        }
        for task, found in samples.items()
    }


def against(
    mine: Mapping[str, Mapping[Any, Mapping[str, bool]]], full: Mapping[str, Mapping[Any, Mapping[str, bool]]]
) -> dict[str, dict[str, dict[str, float]]]:
    """{task: {metric: ...}}: items that only this policy (``only_here``) or only the full model (``only_full``) got
    right, and McNemar's exact p-value that both are right equally often (`bh_routing.stats.risk.mcnemar`).

    Examples
    --------
    >>> mine, full = {"t": {1: {"acc": True}, 2: {"acc": False}}}, {"t": {1: {"acc": False}, 2: {"acc": False}}}
    >>> against(mine, full)
    {'t': {'acc': {'only_here': 1, 'only_full': 0, 'p': 1.0}}}
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for task, items in mine.items():
        for metric in RIGHT_OR_WRONG:
            pairs = [
                (one[metric], full[task][item][metric])
                for item, one in items.items()
                if metric in one and metric in full[task].get(item, {})
            ]
            if pairs:
                here, there = (sum(a > b for a, b in pairs), sum(a < b for a, b in pairs))
                told = {"only_here": here, "only_full": there, "p": mcnemar(here, there)}
                found.setdefault(task, {})[metric] = told
    return found
