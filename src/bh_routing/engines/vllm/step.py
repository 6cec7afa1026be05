"""Which request each token of a step belongs to, and its phase: from vLLM's own description of a batch. No vLLM in here.

Shape legend: T tokens of a step, padding included; R requests of a step.

vLLM's forward knows tokens, not requests. Before each forward its model runner describes the batch to itself: the
requests in order, how many tokens of each are computed in this step, how many were computed before, and how long each
prompt is. `watch` wraps that one method of the runner *instance*, and writes what follows from it into a `Step`.

The tensors of a `Step` are allocated once and written in place, before the forward and on its stream, without waiting
for the device: a compiled graph or a CUDA graph that reads them sees the step that it runs. What they say holds for
the operations of a forward; `Step.at` gives the rows of a call with T tokens. During warm-up they are what they were.

What is read, in vLLM 0.32 (checked by `watch`, when the model has been loaded):

- the model runner (V1, the only one on CPU without Triton): ``_prepare_inputs(scheduler_output, ...)`` and, of its
  ``input_batch``, ``req_ids``, ``num_reqs``, ``num_computed_tokens_cpu``, ``num_prompt_tokens``;
- the model runner V2: ``prepare_inputs(scheduler_output, ...)``, whose result has ``req_ids``, ``num_computed_tokens_np``
  and ``idx_mapping_np``, and ``req_states.prompt_len.np``. Read in its source, not run;
- of both, ``execute_model(scheduler_output, ...)``: which requests begin and end, and what they asked for.

Tokens are in the requests' order, and each MoE layer sees them all: not where ranks split or gather tokens (data
parallelism, sequence parallelism, two batches at a time), which `checks.check_step` refuses to those who ask for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import MissingDependencyError
from .levels import LevelBook

PADDING = 0  # a row that vLLM adds to reach the size of a CUDA graph: no token
PREFILL = 1  # a token of the prompt
DECODE = 2  # a token beyond the prompt, the only one of its sequence in this step
REPEATED = (
    3  # a token beyond the prompt, one of several in this step: computed again after a preemption, or drafted
)


class Step:
    """The tokens of the step in progress.

    Parameters
    ----------
    max_tokens : int
        The most that a forward has, padding included.
    device : torch.device

    Attributes
    ----------
    request_T : Tensor
        int64 [max_tokens]: the token's request, its index in ``requests``; 0 for padding.
    phase_T : Tensor
        int8 [max_tokens]: `PADDING`, `PREFILL`, `DECODE` or `REPEATED`. Generated tokens are those ``>= DECODE``;
        tokens of *different* sequences at one decoding position are those ``== DECODE``.
    level_T : Tensor
        int64 [max_tokens]: the row of the token's own level (`levels.LevelBook`); 0 for the default, and for padding.
    requests : tuple of str
        vLLM's ids of the requests of the step, in order, length R.
    tokens, decoding, leveled : int
        Tokens without padding, those that decode, and those with a level of their own. Plain numbers on the host: of the step that was written last,
        which is the one in progress everywhere but inside of a CUDA graph that is played again.
    """

    def __init__(self, max_tokens: int, device: torch.device) -> None:
        self.request_T = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self.phase_T = torch.zeros(max_tokens, dtype=torch.int8, device=device)
        self.level_T = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self.requests: tuple[str, ...] = ()
        self.tokens = self.decoding = self.leveled = 0

    def at(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """``request_T``, ``phase_T`` and ``level_T`` of a call with so many tokens: views, not copies."""
        return self.request_T[:tokens], self.phase_T[:tokens], self.level_T[:tokens]

    def write(
        self,
        requests: Sequence[str],
        scheduled_R: Sequence[int],
        computed_R: Any,
        prompt_R: Any,
        level_R: Sequence[int] = (),
    ) -> None:
        """Describe the next step.

        Parameters
        ----------
        requests : sequence of str
            Ids, in the order of the step's tokens.
        scheduled_R, computed_R, prompt_R : sequence or array of int
            Of each request: tokens of this step, tokens before it, tokens of the prompt.
        level_R : sequence of int
            Its level's row; empty: all have the default.

        Examples
        --------
        >>> step = Step(8, torch.device("cpu"))
        >>> step.write(["a", "b", "c"], [1, 3, 2], computed_R=[5, 0, 3], prompt_R=[5, 9, 4])
        >>> step.request_T.tolist(), step.phase_T.tolist()
        ([0, 1, 1, 1, 2, 2, 0, 0], [2, 1, 1, 1, 1, 3, 0, 0])
        """
        scheduled, computed, prompt = (
            torch.as_tensor(x, dtype=torch.int64) for x in (scheduled_R, computed_R, prompt_R)
        )
        request_T = torch.repeat_interleave(scheduled)
        start_R = computed - (scheduled.cumsum(0) - scheduled)  # a token's position is its index plus this
        position_T = torch.arange(len(request_T)) + start_R[request_T]
        beyond_R = torch.where(scheduled == 1, DECODE, REPEATED).to(torch.int8)
        phase_T = beyond_R[request_T].masked_fill_(position_T < prompt[request_T], PREFILL)
        before, self.tokens = self.tokens, len(request_T)
        self.requests, self.decoding = tuple(requests), int((phase_T == DECODE).sum())
        self._put(self.request_T, request_T, before)
        self._put(self.phase_T, phase_T, before)
        had, self.leveled = self.leveled, 0
        if any(level_R):
            level_T = torch.tensor(level_R)[request_T]
            self.leveled = int(level_T.count_nonzero())
            self._put(self.level_T, level_T, before)
        elif had:
            self.level_T.zero_()

    def _put(self, buffer_T: Tensor, values_T: Tensor, before: int) -> None:
        """Write the values, and 0 where only the step before had tokens; on a GPU without waiting for it."""
        tokens = len(values_T)
        if buffer_T.device.type == "cuda":  # its allocator keeps pinned memory until the copy is done
            values_T = values_T.pin_memory()
        buffer_T[:tokens].copy_(values_T, non_blocking=True)
        if before > tokens:
            buffer_T[tokens:before].zero_()


class _Watched:
    """In place of a runner's method that prepares a step: its own result, then the description of the step."""

    def __init__(self, runner: Any, name: str, step: Step, book: LevelBook | None) -> None:
        self.runner, self.inner, self.step, self.book = runner, getattr(runner, name), step, book

    def __call__(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        result = self.inner(scheduler_output, *args, **kwargs)
        requests, *numbers = self.describe(scheduler_output.num_scheduled_tokens, result)
        if self.book is not None:
            numbers.append(self.book.rows(requests))
        self.step.write(requests, *numbers)
        return result

    def describe(self, scheduled: Mapping[str, int], _result: Any) -> tuple[Any, ...]:
        batch = self.runner.input_batch
        requests, count = batch.req_ids, batch.num_reqs
        before, prompt = batch.num_computed_tokens_cpu[:count], batch.num_prompt_tokens[:count]
        return requests, [scheduled[one] for one in requests], before, prompt


class _WatchedV2(_Watched):
    def describe(self, scheduled: Mapping[str, int], result: Any) -> tuple[Any, ...]:
        prompt = self.runner.req_states.prompt_len.np[result.idx_mapping_np]
        return (
            result.req_ids,
            [scheduled[one] for one in result.req_ids],
            result.num_computed_tokens_np,
            prompt,
        )


class _Followed:
    """In place of a runner's ``execute_model``: the book first. Requests end in steps without tokens, too."""

    def __init__(self, runner: Any, book: LevelBook) -> None:
        self.inner, self.book = runner.execute_model, book

    def __call__(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self.book.follow(scheduler_output)
        return self.inner(scheduler_output, *args, **kwargs)


# Method -> what stands in for it, and what it reads that is there before the first step.
_RUNNERS: dict[str, tuple[type[_Watched], tuple[str, ...]]] = {
    "_prepare_inputs": (
        _Watched,
        (
            "max_num_tokens",
            "execute_model",
            "input_batch.req_ids",
            "input_batch.num_reqs",
            "input_batch.num_computed_tokens_cpu",
            "input_batch.num_prompt_tokens",
        ),
    ),
    "prepare_inputs": (_WatchedV2, ("max_num_tokens", "execute_model", "req_states.prompt_len.np")),
}


def watch(runner: Any, device: torch.device, book: LevelBook | None = None) -> Step:
    """Let a model runner of vLLM write a `Step` before each of its forwards.

    Parameters
    ----------
    runner : vLLM's model runner, V1 or V2
        Its method that prepares a step is wrapped, on the instance.
    device : torch.device
        Where the model runs.
    book : LevelBook, optional
        What knows the level of each request.

    Raises
    ------
    MissingDependencyError
        If it lacks what is read, naming that.
    """
    for name, (kind, reads) in _RUNNERS.items():
        if not hasattr(runner, name):
            continue
        missing = [path for path in reads if not _has(runner, path)]
        if missing:
            raise MissingDependencyError(
                f"vLLM's {type(runner).__name__} does not say which token belongs to which request: expected its "
                f"{missing[0]}, which it has not; install a vLLM that bh-routing was tested with."
            )
        step = Step(runner.max_num_tokens, device)
        setattr(runner, name, kind(runner, name, step, book))
        if book is not None:
            runner.execute_model = _Followed(runner, book)
        return step
    raise MissingDependencyError(
        f"vLLM's {type(runner).__name__} does not say which token belongs to which request: expected a method "
        f"{' or '.join(_RUNNERS)}, which it has not; install a vLLM that bh-routing was tested with."
    )


def _has(owner: Any, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(owner, name):
            return False
        owner = getattr(owner, name)
    return True
