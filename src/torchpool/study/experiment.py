"""The experiment: arms x seeds as trials of an Optuna study, stored one by one, shared by
processes, resumed after an interruption."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torchpool import interruption
from torchpool.study.task import Task
from torchpool.study.trial import Cost, Score, measure, train

HEARTBEAT = 5
"""Seconds between the signs of life of a running trial."""
GRACE = 20
"""Seconds without one after which a trial counts as abandoned and is run again."""


@dataclass(frozen=True)
class Plan:
    """What a study compares. `arms` are labels: a name of the task's arms, with #2, #3, ... for its
    repetitions."""

    task: Task
    arms: tuple[str, ...]
    seeds: int
    epochs: int
    device: str = "cpu"

    def as_json(self) -> dict[str, Any]:
        """The plan as numbers and text."""
        return {
            "task": self.task.kind,
            "data": self.task.data,
            "digest": self.task.digest,
            "setting": self.task.setting,
            "arms": list(self.arms),
            "seeds": self.seeds,
            "epochs": self.epochs,
            "device": self.device,
        }

    @property
    def fingerprint(self) -> str:
        """Trials of plans that differ only in arms, seeds and the name of the data can be put
        together."""
        task = self.task
        fixed = [task.kind, self.epochs, task.setting, self.device, task.digest]
        return hashlib.sha256(json.dumps(fixed).encode()).hexdigest()[:10]

    @property
    def trials(self) -> list[tuple[str, int]]:
        """Every (arm, seed), seed by seed, so that an interrupted study has compared all arms."""
        return [(arm, seed) for seed in range(self.seeds) for arm in self.arms]


@dataclass
class Results:
    """What is known so far: scores[arm][seed] and costs[arm]."""

    plan: Plan
    scores: dict[str, dict[int, Score]] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether every trial of the plan has run."""
        return all(seed in self.scores.get(arm, {}) for arm, seed in self.plan.trials)


def labels(names: Sequence[str], arms: Collection[str]) -> tuple[str, ...]:
    """Labels for arms that may repeat: max, max#2, ...

    Args:
        names: the arms that are asked for.
        arms: those that there are.

    Raises:
        ValueError: an unknown arm.
    """
    made: list[str] = []
    for name in names:
        if name not in arms:
            raise ValueError(f"--arms {name}: there is no such arm; choose from {', '.join(arms)}")
        count = sum(label.split("#")[0] == name for label in made)
        made.append(name if count == 0 else f"{name}#{count + 1}")
    return tuple(made)


def _persist(attempt: Callable[[], Any], times: int = 5) -> Any:
    """Tries again a little later: two processes that start together both make the tables, and one
    of them fails."""
    for _ in range(times - 1):
        try:
            return attempt()
        except Exception:  # every database has exceptions of its own
            time.sleep(0.5)
    return attempt()


class Experiment:
    """A plan and its storage.

    Args:
        storage: an SQLAlchemy URL; processes that name the same one share the work.
    """

    def __init__(self, plan: Plan, storage: str) -> None:
        import optuna
        from optuna.storages import RDBStorage

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats
        self.plan = plan
        connect = {"connect_args": {"timeout": 60}} if storage.startswith("sqlite") else {}

        def open_study() -> Any:
            store = RDBStorage(
                storage,
                heartbeat_interval=HEARTBEAT,
                grace_period=GRACE,
                engine_kwargs=connect,
            )
            return optuna.create_study(
                study_name=f"torchpool-{plan.fingerprint}",
                storage=store,
                direction="maximize",
                load_if_exists=True,
                sampler=optuna.samplers.RandomSampler(),
            )

        self.study: Any = _persist(open_study)

    def results(self) -> Results:
        """Everything that is stored for the plan."""
        found = Results(self.plan)
        for trial in self.study.get_trials(deepcopy=False):
            arm, seed = trial.user_attrs.get("arm"), trial.user_attrs.get("seed")
            if trial.state.name == "COMPLETE" and (arm, seed) in self.plan.trials:
                found.scores.setdefault(arm, {})[seed] = Score(**trial.user_attrs["score"])
        for key, value in self.study.user_attrs.items():
            if key.startswith("cost:") and key[5:] in self.plan.arms:
                found.costs[key[5:]] = Cost(**value)
        return found

    def _trials(self) -> list[tuple[int, str, tuple[str, int] | None]]:
        """Number and state of each stored trial, and the (arm, seed) that it is for: None as long
        as its process has not said."""
        trials = self.study.get_trials(deepcopy=False)
        noted = [(t.number, t.state.name, t.user_attrs) for t in trials]
        return [(n, s, (a["arm"], a["seed"]) if "seed" in a else None) for n, s, a in noted]

    def _left(self, *states: str) -> list[tuple[str, int]]:
        """What the plan asks for and no trial in one of these states is for."""
        gone = {claim for _, state, claim in self._trials() if state in states}
        return [claim for claim in self.plan.trials if claim not in gone]

    def _claim(self, trial: Any) -> tuple[str, int] | None:
        """Takes the first (arm, seed) that is neither done nor running for a running trial. Of two
        processes that take the same one at the same moment, the one with the older trial keeps it.

        Returns:
            None if there was nothing to take, or another process keeps it.
        """
        claim = next(iter(self._left("COMPLETE", "RUNNING")), None)
        if claim is None:
            return None
        trial.set_user_attr("arm", claim[0])
        trial.set_user_attr("seed", claim[1])
        deadline = time.monotonic() + GRACE
        while True:
            older = [(state, taken) for n, state, taken in self._trials() if n < trial.number]
            if ("RUNNING", claim) in older or ("COMPLETE", claim) in older:
                return None
            if ("RUNNING", None) not in older or time.monotonic() > deadline:
                return claim
            time.sleep(0.05)  # an older trial is about to say what it takes

    def _run_next(self, on_trial: Callable[[str, int], None], tick: Callable[[], None]) -> None:
        """Runs one trial, unless other processes have taken all that were left."""
        import optuna

        scores: list[Score] = []

        def objective(trial: Any) -> float:
            try:
                claim = self._claim(trial)
                if claim is None:
                    raise optuna.TrialPruned
                (arm, seed), plan = claim, self.plan
                on_trial(arm, seed)
                with interruption.released():
                    score = train(
                        arm.split("#")[0], seed, plan.task, plan.epochs, plan.device, tick
                    )
            except KeyboardInterrupt:
                raise optuna.TrialPruned from None  # not done: the next run takes it up again
            scores.append(score)
            trial.set_user_attr("score", asdict(score))
            return score.accuracy

        try:
            self.study.optimize(objective, n_trials=1)
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            if not scores:
                raise
            # this process stood still for so long that another one took its trial for abandoned

    def run(self, on_trial: Callable[[str, int], None], tick: Callable[[], None]) -> Results:
        """Runs what is missing, together with any other process on the same storage.

        Args:
            on_trial: called with arm and seed before each trial.
            tick: called after each epoch.
        """
        import optuna

        with interruption.noted(), interruption.held():
            while self._left("COMPLETE"):
                optuna.storages.fail_stale_trials(self.study)
                if self._left("COMPLETE", "RUNNING"):
                    self._run_next(on_trial, tick)
                else:
                    time.sleep(0.5)  # others are at work; the trial of one that dies becomes stale
                interruption.heed()
            for arm in self.plan.arms:
                if f"cost:{arm}" not in self.study.user_attrs:
                    with interruption.released():
                        cost = measure(arm.split("#")[0], self.plan.task, self.plan.device)
                    self.study.set_user_attr(f"cost:{arm}", asdict(cost))
            interruption.heed()
        return self.results()
