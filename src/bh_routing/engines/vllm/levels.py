"""A level per request: what a request asks for, what it means, and the rows that workers look it up in. No vLLM in here.

Shape legend: L layers, K ranks of the model's own choice, R requests of a step.

A request asks in ``SamplingParams.extra_args``: ``{"bh_routing": {"experts_per_token": 3}}``, or with flat keys, as they
come over HTTP in ``vllm_xargs``: ``{"bh_routing.experts_per_token": 3}``. The front end solves that once (`Resolver`), refuses what
cannot be served while nothing else has happened, and puts the thresholds in its place; workers only copy them into a
row of a table (`LevelBook`). So no worker waits for a budget to be solved.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...calibration.calibration import Calibration
from ...errors import InvalidParameterError
from ...policies import LevelsPolicy
from ...settings.levels import LEVELS
from .settings import KEY, Settings, number

logger = logging.getLogger("vllm.bh_routing")

PREFIX = f"{KEY}."  # of flat keys
NAMES = tuple(name for name in LEVELS if name != "phases")
_MOST_COUNTED = 32  # levels that are counted by themselves: labels of a metric must not grow without end
_MOST_SOLVED = 256  # levels that a front end remembers


@dataclass(frozen=True, kw_only=True)
class Level:
    """A level that was solved.

    Attributes
    ----------
    key : str
        What was asked for, in one form: "experts_per_token=3.0". Equal keys are equal levels.
    min_k : int
    thresholds : list of L lists of K floats
        The first columns of `bh_routing.DecisionTable.thresholds_LE`.
    why : str
        "own": the request's own. "load": the server's, under load.
    """

    key: str
    min_k: int
    thresholds: list[list[float]]
    why: str = "own"

    def to_value(self) -> dict[str, Any]:
        """What travels in ``extra_args``."""
        return asdict(self)

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None) -> Level | None:
        """The level that the front end put into a request; None without one."""
        held = (extra_args or {}).get(KEY)
        return cls(**held) if isinstance(held, Mapping) and "thresholds" in held else None


def asked_of(extra_args: Mapping[str, Any] | None) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """What a request asks for, None for nothing; and its other arguments.

    Raises
    ------
    InvalidParameterError
        If it asks in both forms.

    Examples
    --------
    >>> asked_of({"bh_routing.experts_per_token": 3, "seed": 1})
    ({'experts_per_token': 3}, {'seed': 1})
    >>> asked_of({"seed": 1})
    (None, {'seed': 1})
    """
    given = dict(extra_args or {})
    flat = {name.removeprefix(PREFIX): given.pop(name) for name in [*given] if name.startswith(PREFIX)}
    if KEY not in given:
        return flat or None, given
    asked = given.pop(KEY)
    if flat:
        raise InvalidParameterError(
            f"a request's level was given twice, as {KEY} and as {PREFIX}{next(iter(flat))}; give it once."
        )
    return asked, given


class Resolver:
    """From what a request asks for to its level, for one engine; each level is solved once.

    Parameters
    ----------
    settings : Settings or None
        Of the engine; None: it routes nothing.
    weights : str
        The dtype of the engine's weights: a certified loss that was certified with others is served with a warning.
    """

    def __init__(self, settings: Settings | None, weights: str = "") -> None:
        self.settings, self.weights = (None if settings is None else settings.at_rest()), weights
        self._calibration: Calibration | None = None
        self._solved: OrderedDict[str, Level] = OrderedDict()

    def resolve(self, asked: Any, why: str = "own") -> Level:
        """The level that these keywords mean.

        Raises
        ------
        BHRoutingError
            One sentence: an unknown keyword, a value out of range, a level that the calibration cannot serve, or an
            engine that has none.
        """
        settings = self.settings
        if settings is None:
            raise InvalidParameterError(
                f"this server routes nothing by {KEY}: expected a request without {KEY}; start the server with "
                "`bh-routing serve`, or ask without."
            )
        if settings.top_k is not None or settings.calibration is None:
            came = "no calibration" if settings.calibration is None else f"top_k={settings.top_k}"
            raise InvalidParameterError(
                f"a request's own level needs a server that was started with a calibration, got {came}; ask without {KEY}."
            )
        if isinstance(asked, Mapping):
            numbers = {name: number(name, value) if name in NAMES else value for name, value in asked.items()}
            asked = {name: value for name, value in numbers.items() if value is not None}
        key = (
            ", ".join(f"{name}={value!r}" for name, value in asked.items())
            if isinstance(asked, Mapping)
            else ""
        )
        if key not in self._solved:
            if self._calibration is None:
                self._calibration = settings.load_calibration()
                assert self._calibration is not None
            policy = settings.level_policy(asked, self._calibration)
            named = settings.with_level(**asked)
            if sentence := named.elsewhere(self._calibration, self.weights, "vLLM"):
                logger.warning("bh-routing: a request's %s: %s", key, sentence)
            most = max(layer.top_k for layer in self._calibration.layers)
            thresholds = policy.table.thresholds_LE[:, :most].tolist()
            self._solved[key] = Level(key=key, min_k=policy.min_k, thresholds=thresholds)
            if len(self._solved) > _MOST_SOLVED:
                self._solved.popitem(last=False)
        level = self._solved[key]
        return level if why == level.why else Level(**asdict(level) | {"why": why})

    def admit(self, extra_args: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """A request's ``extra_args`` with its level solved; None where it asks for none."""
        asked, rest = asked_of(extra_args)
        return None if asked is None else rest | {KEY: self.resolve(asked).to_value()}


class Shedding:
    """Which level requests without one get while others wait: fewer experts, the more there are.

    The i-th of the levels begins when `ENTER` [i] requests wait, and ends when fewer than half as many do.

    Parameters
    ----------
    levels : sequence of Level
        At most three, in the order of the load.

    Examples
    --------
    >>> levels = [Level(key=key, min_k=1, thresholds=[], why="load") for key in "abc"]
    >>> shedding = Shedding(levels)
    >>> [level and level.key for level in map(shedding.level, (0, 4, 2, 9, 5, 30, 8, 7, 1))]
    [None, 'a', 'a', 'b', 'b', 'c', 'c', 'b', None]
    """

    ENTER = (4, 8, 16)

    def __init__(self, levels: Sequence[Level]) -> None:
        self.levels, self.rung = list(levels), 0

    def level(self, waiting: int) -> Level | None:
        """The level of a request that comes while so many wait; None: the default."""
        while self.rung < len(self.levels) and waiting >= self.ENTER[self.rung]:
            self.rung += 1
        while self.rung and waiting < self.ENTER[self.rung - 1] / 2:
            self.rung -= 1
        return self.levels[self.rung - 1] if self.rung else None

    @staticmethod
    def budgets(most: float, least: float) -> list[float]:
        """The levels' budgets, experts per token: in equal steps from below the default's down to the least."""
        rungs = len(Shedding.ENTER)
        return [most - (most - least) * i / rungs for i in range(1, rungs + 1)]


class LevelBook:
    """Which level each request of a worker has, and in which row of the table it is.

    Parameters
    ----------
    policy : LevelsPolicy
        With a row for each request that a step can have.
    """

    def __init__(self, policy: LevelsPolicy) -> None:
        self.policy = policy
        self.counts: dict[str, dict[str, int]] = {}  # why -> key -> requests that began
        self._of: dict[str, Level] = {}
        self._rows: OrderedDict[str, int] = OrderedDict()  # by key, the one used longest ago first

    def follow(self, scheduler_output: Any) -> None:
        """Take in the requests that begin in this step, and forget those that have ended."""
        for name in scheduler_output.finished_req_ids:
            self._of.pop(name, None)
        for new in scheduler_output.scheduled_new_reqs:
            if new.req_id in self._of:  # one that was preempted
                continue
            params = new.sampling_params
            level = None if params is None else Level.of(params.extra_args)
            why, key = ("default", "default") if level is None else (level.why, level.key)
            counts = self.counts.setdefault(why, {})
            key = key if key in counts or len(counts) < _MOST_COUNTED else "others"
            counts[key] = counts.get(key, 0) + 1
            if level is not None:
                self._of[new.req_id] = level

    def rows(self, requests: Sequence[str]) -> list[int]:
        """The row of each request of a step, 0 for the default; a level that has none yet gets one.

        There are as many rows as a step has requests: a row that no request of this step uses is given away.
        """
        if not self._of:
            return [0] * len(requests)
        levels = [self._of.get(name) for name in requests]
        used = {level.key for level in levels if level is not None}
        return [0 if level is None else self._row(level, used) for level in levels]

    def _row(self, level: Level, used: set[str]) -> int:
        row = self._rows.get(level.key)
        if row is None:
            if len(self._rows) < self.policy.rows:
                row = len(self._rows) + 1
            else:
                row = self._rows.pop(next(key for key in self._rows if key not in used))
            self.policy.set_row(row, torch.tensor(level.thresholds, dtype=torch.float32), level.min_k)
            self._rows[level.key] = row
        self._rows.move_to_end(level.key)
        return row
