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
        from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats
        self.plan = plan
        connect = {"connect_args": {"timeout": 60}} if storage.startswith("sqlite") else {}

        def open_study() -> Any:
            store = RDBStorage(
                storage,
                heartbeat_interval=HEARTBEAT,
                grace_period=GRACE,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
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

    def _enqueue_missing(self) -> None:
        """Puts what is neither done, running nor waiting into the queue."""
        known = set()
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state.name in ("COMPLETE", "RUNNING", "WAITING"):
                known.add(self._claim(trial))
        for arm, seed in self.plan.trials:
            if (arm, seed) not in known:
                self.study.enqueue_trial({}, user_attrs={"arm": arm, "seed": seed})

    @staticmethod
    def _claim(trial: Any) -> tuple[str, int] | None:
        """The (arm, seed) that a trial was queued for; None for one that was not queued by us."""
        attributes = trial.user_attrs
        return (attributes["arm"], attributes["seed"]) if "seed" in attributes else None

    def _count(self, state: str) -> int:
        """Trials of this plan in a state."""
        return sum(
            t.state.name == state and self._claim(t) in self.plan.trials
            for t in self.study.get_trials(deepcopy=False)
        )

    def _run_next(self, objective: Callable[[Any], float]) -> None:
        """Runs the next trial of the queue. SQLite may hand one to two processes that ask at the
        same moment; the slower one finds it finished, with the score that it has found as well."""
        import optuna

        begun: list[int] = []

        def noted(trial: Any) -> float:
            begun.append(trial.number)
            return objective(trial)

        try:
            self.study.optimize(noted, n_trials=1)
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            trials = self.study.get_trials(deepcopy=False)
            if not begun or trials[begun[0]].state.name != "COMPLETE":
                raise

    def run(self, on_trial: Callable[[str, int], None], tick: Callable[[], None]) -> Results:
        """Runs what is missing, together with any other process on the same storage.

        Args:
            on_trial: called with arm and seed before each trial.
            tick: called after each epoch.
        """
        import optuna

        def objective(trial: Any) -> float:
            claim = self._claim(trial)
            if claim is None or claim not in self.plan.trials:
                raise optuna.TrialPruned  # the queue was emptied by another process meanwhile
            arm, seed = claim
            on_trial(arm, seed)
            try:
                plan = self.plan
                score = train(arm.split("#")[0], seed, plan.task, plan.epochs, plan.device, tick)
            except KeyboardInterrupt:
                raise optuna.TrialPruned from None  # not done: the next run takes it up again
            trial.set_user_attr("score", asdict(score))
            return score.accuracy

        self._enqueue_missing()
        with interruption.noted():
            while True:
                optuna.storages.fail_stale_trials(self.study)
                if self._count("WAITING"):
                    self._run_next(objective)
                elif self._count("RUNNING"):
                    time.sleep(
                        0.5
                    )  # another process is at work; its trial becomes stale if it dies
                else:
                    break
                interruption.heed()
        for arm in self.plan.arms:
            if f"cost:{arm}" not in self.study.user_attrs:
                cost = measure(arm.split("#")[0], self.plan.task, self.plan.device)
                self.study.set_user_attr(f"cost:{arm}", asdict(cost))
        return self.results()
