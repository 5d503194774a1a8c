"""The study: statistics against known examples, storage, resuming, sharing, bad input, the
report."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from command import command
from optuna.trial import TrialState
from PIL import Image
from scipy import stats

from torchpool.study import data, experiment, report, statistics
from torchpool.study.model import ARMS, WIDTHS, Geometry, ImageTask, network
from torchpool.study.trial import Cost, Score, train

RUN = [sys.executable, "-c", "from torchpool.cli import main; main()"]
TINY = ["study", "--arms", "max,average,max", "--seeds", "2", "--epochs", "1"]


def _run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RUN, *arguments], capture_output=True, text=True, cwd=cwd, timeout=300, check=False
    )


def test_paired_test_against_a_permutation_test():
    a, b = [0.91, 0.93, 0.90, 0.94, 0.92, 0.95], [0.88, 0.91, 0.89, 0.90, 0.91, 0.92]
    mean, low, high, p = statistics.paired(a, b)
    differences = np.subtract(a, b)
    assert mean == pytest.approx(differences.mean())
    flips = [abs(np.mean(differences * signs)) for signs in itertools.product((1, -1), repeat=6)]
    assert p < 0.05
    assert np.mean(np.array(flips) >= abs(mean) - 1e-12) <= 2 / 64
    assert low < mean < high
    assert p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)


def test_paired_test_without_noise_or_pairs():
    assert statistics.paired([0.5, 0.6], [0.5, 0.6])[3] == 1
    assert statistics.paired([0.5, 0.6], [0.4, 0.5])[3] == pytest.approx(0, abs=1e-9)
    assert statistics.paired([0.5], [0.1])[1:] == (-math.inf, math.inf, 1.0)


def test_equal_differences_of_shares_are_not_free_of_noise():
    arm, reference = [0.50, 0.60, 0.70], [0.49, 0.59, 0.69]
    assert statistics.paired(arm, reference)[3] < 1e-6
    mean, low, high, p = statistics.paired(arm, reference, step=0.01)
    reach = stats.t.ppf(0.975, 2) * math.sqrt(0.01**2 / 6 / 3)
    assert (mean - low, high - mean) == (pytest.approx(reach), pytest.approx(reach))
    assert p == pytest.approx(2 * stats.t.sf(0.01 / math.sqrt(0.01**2 / 6 / 3), 2))
    assert statistics.paired([0.5, 0.6], [0.5, 0.6], step=0.01) == (0, 0, 0, 1)


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == [1.0, 1.0]


def test_noise_is_called_a_difference_as_rarely_as_promised():
    generator = np.random.default_rng(0)
    claims = 0
    for _ in range(400):
        scores = {
            arm: dict(enumerate(generator.normal(0.9, 0.01, 5))) for arm in ("a", "b", "c", "d")
        }
        claims += any(c.is_significant for c in statistics.compare(scores, "a"))
    assert claims / 400 < 0.08


@pytest.mark.parametrize("arm", ARMS)
def test_both_engines_of_an_arm_agree(arm):
    geometry = Geometry(3, 2)
    ours, theirs = (network(arm, geometry, 1, 10, engine) for engine in ("torchpool", "torch"))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    layers = [net[3] for net in (ours, theirs)]
    x = torch.rand(2, WIDTHS[0], 32, 32)
    if arm == "strided":
        layers[1].load_state_dict(layers[0].state_dict())
    if arm == "gated":
        with torch.no_grad():
            layers[1].gate.weight.zero_()
    a, b = (layer(x) for layer in layers)
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_trial_is_reproducible_and_shared_layers_start_alike():
    images = data.digits()
    assert images.train.shape[1:] == (1, 32, 32)
    assert not set(map(hash, map(bytes, images.train.numpy()))) & set(
        map(hash, map(bytes, images.test.numpy()))
    )
    small = data.Images(
        images.name,
        images.train[:128],
        images.train_labels[:128],
        images.test[:64],
        images.test_labels[:64],
        images.classes,
    )
    scores = [train("max", 3, ImageTask(small), 1) for _ in range(2)]
    assert (scores[0].accuracy, scores[0].consistency) == (
        scores[1].accuracy,
        scores[1].consistency,
    )


def test_shifting_moves_pixels():
    x = torch.zeros(6, 1, 32, 32)
    x[:, :, 16, 16] = 1
    y = data.shifted(x, 1)
    assert torch.equal(y.sum((1, 2, 3)), torch.ones(6))
    assert not torch.equal(x, y)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    done = _run(*TINY, "--out", str(folder / "out"))
    assert done.returncode == 0, done.stderr
    return folder


def test_end_to_end(finished):
    found = json.loads((finished / "out" / "results.json").read_text())
    assert found["complete"]
    assert {row["arm"] for row in found["arms"]} == {"max", "average", "max#2"}
    again = next(c for c in found["comparisons"] if c["arm"] == "max#2")
    assert again["difference"] == 0
    assert again["p_holm"] == 1
    costs = {row["arm"]: row["cost"] for row in found["arms"]}
    assert costs["max"]["saved_bytes"] * 16 < costs["max"]["torch_saved_bytes"]
    page = (finished / "out" / "report.html").read_text()
    assert page.count("<svg") == 2
    assert not any(f'{load}="http' in page for load in ("src", "href")), "the page loads nothing"
    assert "url(http" not in page
    with Image.open(finished / "out" / "chart.png") as chart:
        assert chart.width > 1000


def test_a_second_run_resumes(finished):
    done = _run(*TINY, "--out", str(finished / "out"))
    assert done.returncode == 0
    assert "6 of 6 trials are stored already" in done.stdout


def test_two_processes_share_a_storage(tmp_path):
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    command = [*RUN, *TINY, "--storage", storage]
    started = [
        subprocess.Popen([*command, "--out", str(tmp_path / name)], stdout=subprocess.DEVNULL)
        for name in "ab"
    ]
    assert [process.wait(300) for process in started] == [0, 0]
    for name in "ab":
        assert json.loads((tmp_path / name / "results.json").read_text())["complete"]
    arms = experiment.labels(["max", "average", "max"], ARMS)
    plan = experiment.Plan(ImageTask(data.digits()), arms, 2, 1)
    assert experiment.Experiment(plan, storage).results().is_complete


def _pictures(folder: Path, classes: int = 2, count: int = 6) -> Path:
    generator = np.random.default_rng(1)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 120, (40, 30, 3)) + 120 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class{label}" / f"{i}.png")
    return folder


def test_a_folder_with_a_truncated_image(tmp_path):
    folder = _pictures(tmp_path / "data")
    good = (folder / "class0" / "0.png").read_bytes()
    (folder / "class0" / "broken.png").write_bytes(good[: len(good) // 2])
    (folder / "class1" / "text.jpg").write_text("no image")
    images = data.folder(folder)
    assert images.channels == 3
    assert len(images.train) + len(images.test) == 12
    assert len(images.skipped) == 2
    done = _run(
        "study",
        "--data",
        str(folder),
        "--arms",
        "max",
        "--seeds",
        "1",
        "--epochs",
        "1",
        "--out",
        str(tmp_path / "out"),
    )
    assert done.returncode == 0, done.stderr
    assert "Skipped 2 unreadable images" in done.stdout
    assert "broken.png" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--arms", "max,maxx"], "--arms maxx: there is no such arm; choose from max, average"),
        (["--arms", ","], "names no arm"),
        (["--data", "nowhere"], "--data nowhere is missing; give a folder"),
        (["--data", "text"], "--data text is a file; give a folder"),
        (["--data", "empty"], "class folders"),
        (["--data", "single"], "has 1 class folders"),
        (["--data", "hollow"], "has 0 readable images"),
        (["--device", "cudax"], "--device cudax"),
        (["--kernel", "40"], "--kernel 40"),
        (["--storage", "nonsense://x"], "--storage nonsense://x cannot be opened"),
        (["--out", "broken"], "trials.db, the trials of --out broken, cannot be opened"),
        (["--out", "text"], "--out text cannot be made: File exists; name a folder"),
        (["--seeds", "0"], "--seeds 0 must be at least 1"),
        (["--seeds", "x"], "`torchpool study --seeds x`; see `torchpool study --help`"),
        (["--size", "3"], "No such option: --size"),
    ],
    ids=lambda v: v if isinstance(v, str) else " ".join(v),
)
def test_bad_input_ends_with_one_line_and_status_2(tmp_path, arguments, text):
    (tmp_path / "empty").mkdir()
    _pictures(tmp_path / "single", classes=1)
    (tmp_path / "hollow" / "a").mkdir(parents=True)
    (tmp_path / "hollow" / "b").mkdir()
    (tmp_path / "text").write_text("no folder")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "trials.db").write_bytes(b"no database" * 100)
    done = command("study", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert text in done.stderr


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    folder = _pictures(tmp_path / "data")

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(data.DataError, match=r"data cannot be read \(Permission denied\); give"):
        data.folder(folder)


def test_other_images_are_another_study(tmp_path):
    folder = _pictures(tmp_path / "data")

    def plan():
        return experiment.Plan(ImageTask(data.folder(folder)), ("max",), 1, 1)

    before = plan()
    assert plan().fingerprint == before.fingerprint
    (folder / "class0" / "0.png").unlink()
    assert plan().fingerprint != before.fingerprint


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no SIGINT to send")
def test_an_interrupted_study_loses_nothing(tmp_path):
    command = [*RUN, "study", "--data", str(_pictures(tmp_path / "data")), "--arms", "max,average"]
    command += ["--epochs", "1", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [*command, "--seeds", "100"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    file = tmp_path / "out" / "trials.db"
    deadline = time.monotonic() + 120
    try:
        while _finished(file) < 3 and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "the same command goes on" in out
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert not found["complete"]
    done = sum(row["seeds"] for row in found["arms"])
    assert done == _finished(file) >= 3
    again = _run(*command[len(RUN) :], "--seeds", "2")
    assert again.returncode == 0, again.stderr
    assert "4 of 4 trials are stored" in again.stdout or "3 of 4" in again.stdout


def test_a_trial_that_another_process_has_finished_meanwhile(tmp_path, monkeypatch):
    plan = experiment.Plan(ImageTask(data.digits()), ("max",), 1, 1)
    mine = experiment.Experiment(plan, f"sqlite:///{tmp_path / 'trials.db'}")
    score = Score(0.5, 0.5, 10, 1.0)

    def finished_elsewhere(*_):
        (trial,) = mine.study.get_trials()
        storage = mine.study._storage
        storage.set_trial_user_attr(trial._trial_id, "score", asdict(score))
        storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [score.accuracy])
        return score

    monkeypatch.setattr(experiment, "train", finished_elsewhere)
    monkeypatch.setattr(experiment, "measure", lambda *_: Cost(1, 1, 1.0, 1.0, 1, 1))
    results = mine.run(lambda *_: None, lambda: None)
    assert results.is_complete
    assert results.scores["max"][0] == score


def test_fewer_seeds_after_an_interrupted_study_of_many(tmp_path, monkeypatch):
    storage = f"sqlite:///{tmp_path / 'trials.db'}"
    task = ImageTask(data.digits())
    trained = []

    def train(arm, seed, *_):
        trained.append((arm, seed))
        if len(trained) == 3:
            signal.raise_signal(signal.SIGINT)
        return Score(0.5, 0.5, 10, 1.0)

    monkeypatch.setattr(experiment, "train", train)
    monkeypatch.setattr(experiment, "measure", lambda *_: Cost(1, 1, 1.0, 1.0, 1, 1))
    many = experiment.Experiment(experiment.Plan(task, ("max", "average"), 100, 1), storage)
    with pytest.raises(KeyboardInterrupt):
        many.run(lambda *_: None, lambda: None)
    few = experiment.Experiment(experiment.Plan(task, ("max", "average"), 2, 1), storage)
    assert few.run(lambda *_: None, lambda: None).is_complete
    assert trained == [("max", 0), ("average", 0), ("max", 1), ("max", 1), ("average", 1)]
    states = [trial.state.name for trial in few.study.get_trials()]
    assert states == ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE", "COMPLETE"]


def test_processes_that_start_together_do_each_trial_once(tmp_path, monkeypatch):
    storage = f"sqlite:///{tmp_path / 'trials.db'}"
    plan = experiment.Plan(ImageTask(data.digits()), ("max", "average"), 10, 1)
    trained = []

    def train(arm, seed, *_):
        trained.append((arm, seed))
        time.sleep(0.02)
        return Score(0.5, 0.5, 10, 1.0)

    monkeypatch.setattr(experiment, "train", train)
    monkeypatch.setattr(experiment, "measure", lambda *_: Cost(1, 1, 1.0, 1.0, 1, 1))
    together = threading.Barrier(4)

    def work(_):
        mine = experiment.Experiment(plan, storage)
        together.wait()
        return mine.run(lambda *_: None, lambda: None)

    with ThreadPoolExecutor(4) as pool:
        assert all(results.is_complete for results in pool.map(work, range(4)))
    assert sorted(trained) == sorted(plan.trials)


def _finished(file: Path) -> int:
    """Trials that a database holds complete."""
    try:
        with contextlib.closing(sqlite3.connect(file, timeout=30)) as base:
            found = base.execute("SELECT count(*) FROM trials WHERE state = 'COMPLETE'")
            return int(found.fetchone()[0])
    except sqlite3.OperationalError:  # not made yet
        return 0


def test_verdicts_in_words():
    plan = experiment.Plan(ImageTask(data.digits()), ("max", "average"), 6, 1)
    results = experiment.Results(plan)
    assert report.verdict(results) == ["No trial has finished yet."]
    for arm, shift in (("max", 0.0), ("average", 0.05)):
        results.scores[arm] = {
            s: Score(0.8 + shift + 0.003 * ((s * 7 + len(arm)) % 5), 0.7, 10, 1.0) for s in range(6)
        }
    assert report.verdict(results)[0].startswith("Choose average: average has")
    results.scores["average"] = dict(results.scores["max"])
    assert "more than noise" in report.verdict(results)[0]
