"""The benchmark: shapes, peers, wrong results, targets, JSON, the command line."""

from __future__ import annotations

import io
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ctrl_c import press_and_lose
from rich.console import Console
from torch import nn

import torchpool as tp
from torchpool import cli, interruption, plot
from torchpool.bench import contest, groups, model, peers, report, tables, targets, truth
from torchpool.bench.contest import Contender, Outcome, Result, Row
from torchpool.bench.shapes import Problem, problems, window
from torchpool.bench.timing import Call, in_turns

TINY = (1, 2, 6, 8)
Bench = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Bench:
    """Runs `torchpool bench` in an empty folder; gives status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["torchpool", "bench", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = (" ".join(text.split()) for text in capsys.readouterr())
        return int(end.value.code or 0), out, err

    return run


# Shapes


@pytest.mark.parametrize("p", problems() + problems("edge"), ids=lambda p: p.name)
def test_output_sizes_are_torchs(p: Problem):
    small = replace(p, shape=(1, 1, *p.shape[2:]))
    y = peers.function(small, F)(torch.zeros(small.shape).to("meta"))
    assert tuple(y.shape[2:]) == p.out_sizes
    assert p.source


def test_shapes_are_cut_to_what_a_row_may_move():
    p = window("p", "max", (8, 4, 10, 10), 2, 2)
    assert p.within(10**9) == p
    assert p.within(p.traffic() // 2).shape == (4, 4, 10, 10)
    assert p.within(p.traffic() // 16).shape == (1, 2, 10, 10)
    assert p.within(1).shape == (1, 1, 10, 10)
    assert p.within(10**9, taps=p.taps / 2).shape == (4, 4, 10, 10)


# Peers

PROBLEMS = [
    window("2x2/2", "max", TINY, 2, 2),
    window("3x3/1", "max", TINY, 3, 1, 1),
    window("2x2/2", "mean", TINY, 2, 2),
    window("3x3/1", "mean", TINY, 3, 1, 1),
    replace(window("not counted", "mean", TINY, 3, 1, 1), count_include_pad=False),
    replace(window("ceil", "max", (1, 2, 7, 9), 3, 2), ceil=True),
    replace(window("dilated", "max", TINY, 2, 1), dilation=(2, 2)),
    Problem("global", "mean", TINY, output=(1, 1)),
    Problem("tiling", "mean", TINY, output=(3, 2)),
    Problem("overlapping", "mean", TINY, output=(4, 3)),
    window("1-D", "max", (1, 2, 9), 3, 2),
    window("3-D", "mean", (1, 2, 4, 4, 4), 2, 2),
]


@pytest.mark.parametrize("name", [n for n in peers.PEERS if n not in ("torch.compile", "JAX")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_peer_is_right_or_says_why_not(name: str, layout: str):
    answered = 0
    for p in (replace(p, layout=layout) for p in PROBLEMS):
        x = groups.inputs(p)
        try:
            offer = peers.PEERS[name](p, x, torch.get_num_threads())
        except (peers.NotOffered, ModuleNotFoundError):
            continue
        wanted = peers.function(p, tp)(x[0])
        assert contest.difference(offer.read(offer.run(0)), wanted, 1e-5, 1e-6) is None
        answered += 1
    assert answered > 5 or name != "torch"


def test_peers_are_named_as_one_writes_them():
    assert list(peers.chosen(["onednn", "torch", "compile"])) == [
        "oneDNN",
        "torch",
        "torch.compile",
    ]
    with pytest.raises(ValueError, match="--peers tensorflow is not one of torch, compile"):
        peers.chosen(["tensorflow"])


@pytest.mark.parametrize("p", PROBLEMS, ids=lambda p: f"{p.op} {p.name}")
def test_the_truth_is_torchs(p: Problem):
    x = torch.randn(p.shape)
    wanted = peers.function(p, F)(x.double())
    torch.testing.assert_close(truth.pooled(p, x), truth.few(wanted))


# Rows


def _row(**entries: object) -> Row:
    return Row("forward", "row", {"layout": "contiguous"}, lambda: entries)  # type: ignore[arg-type]


def _contender(fault: str | None = None, times: list[int] | None = None) -> Contender:
    return Contender(lambda i: times is not None and times.append(i), lambda result: fault, 100)


def test_a_wrong_or_failing_contender_is_reported_and_not_timed():
    ran: list[int] = []

    def absent() -> Contender:
        raise peers.NotOffered("has no such windows")

    def missing() -> Contender:
        raise ModuleNotFoundError("no", name="something")

    def failing() -> Contender:
        raise RuntimeError("first line\nsecond line")

    result = contest.contend(
        _row(
            torchpool=_contender,
            wrong=lambda: _contender("3 % of the values differ", ran),
            absent=absent,
            missing=missing,
            failing=failing,
        ),
        0.001,
    )
    assert {name: (o.status, o.note) for name, o in result.outcomes.items()} == {
        "torchpool": ("ok", ""),
        "wrong": ("wrong", "3 % of the values differ"),
        "absent": ("absent", "has no such windows"),
        "missing": ("absent", "something is not installed"),
        "failing": ("failed", "first line"),
    }
    assert ran == [0]
    assert result.outcomes["wrong"].median_s is None
    assert result.best_peer is None
    faults = tables.faults(report.Report([result], {}))
    assert faults == [
        "forward row contiguous: wrong wrong: 3 % of the values differ",
        "forward row contiguous: failing failed: first line",
    ]


def test_a_wrong_peer_is_found_out(monkeypatch: pytest.MonkeyPatch):
    def off_by_a_little(p: Problem, x: list[torch.Tensor], threads: int) -> peers.Offer:
        return peers.Offer(lambda i: peers.function(p, F)(x[0]) + 0.01, lambda y: y)

    p = window("tiny", "max", TINY, 2, 2)
    settings = groups.Settings(1, {"torch": peers.eager, "off": off_by_a_little}, quick=True)
    monkeypatch.setattr(groups, "problems", lambda: [p])
    (first, _) = groups.forward(settings)
    result = contest.contend(first, 0.001)
    assert result.outcomes["torch"].is_ok
    assert result.outcomes["off"].status == "wrong"
    assert "100.0% of the values differ" in result.outcomes["off"].note
    assert result.ratio("off") is None


def test_our_own_wrong_result_is_found_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(groups, "problems", lambda: [window("tiny", "mean", TINY, 2, 2)])
    monkeypatch.setattr(groups.functional, "avg_pool2d", lambda x, *rest: F.max_pool2d(x, 2))
    (first, _) = groups.forward(groups.Settings(1, {}, quick=True))
    assert contest.contend(first, 0.001).outcomes["torchpool"].status == "wrong"


def test_differences_are_told_in_words():
    a = torch.tensor([1.0, 2.0, float("nan")])
    assert contest.difference(a, a.clone(), 0, 0) is None
    off, sums = torch.tensor([1e-4, 1.0]), torch.tensor([500.0, 500.0])
    assert contest.difference(off, torch.zeros(2), 0, 0, sums) == (
        "50.0% of the values differ, by up to 1"
    )
    assert contest.difference(a, a[:2], 0, 0) == "shape (3,) instead of (2,)"
    assert "33.3% of the values differ" in str(
        contest.difference(torch.tensor([1.0, 3.0, float("nan")]), a, 0, 0)
    )


def test_contenders_take_turns():
    order: list[str] = []
    calls = [Call(lambda i, name=name: order.append(name)) for name in "ab"]
    timings = in_turns(calls, 0.0)
    assert all(t.samples == 3 and t.low <= t.median <= t.high for t in timings)
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes == 2 * (3 + 1) - 1


@pytest.mark.parametrize("name", list(groups.GROUPS))
def test_every_group_has_rows(name: str):
    quick, whole = (groups.GROUPS[name](groups.Settings(2, peers.PEERS, q)) for q in (True, False))
    assert 0 < len(quick) <= len(whole)
    assert len({(r.name, *map(str, r.about.values())) for r in whole}) == len(whole)


# Targets


def _result(group: str, name: str = "row", *, traffic: int = 0, about=None, **ms: float) -> Result:  # type: ignore[no-untyped-def]
    outcomes = {
        key.replace("_", " "): Outcome("ok", "", t / 1e3, t / 1e3, t / 1e3, 3, traffic)
        for key, t in ms.items()
    }
    return Result(group, name, {"layout": "contiguous", **(about or {})}, outcomes)


def _verdict(results: list[Result], words: str) -> targets.Verdict:
    (found,) = [v for v in targets.verdicts(results) if words in v.target]
    return found


def test_targets_of_the_race():
    rows = [
        _result("forward", "fast", torchpool=1, torch=20, JAX=3, copy=0.9, traffic=1 << 26),
        _result("forward", "slow", torchpool=2, torch=30, JAX=1, copy=1.1, traffic=1 << 26),
    ]
    slower = _verdict(rows, "no row slower than the best peer")
    assert not slower.is_met
    assert slower.found == "1 of 2 rows below; lowest 0.50x (slow contiguous)"
    assert _verdict(rows, "1.5x the best peer").found.startswith("1.22x")
    assert _verdict(rows, "15x torch, contiguous").is_met
    assert "1 of 2 rows below; lowest 55% (slow" in _verdict(rows, "no row under 60 %").found
    assert not _verdict(rows, "(median)").is_met


def test_targets_of_series_and_small_inputs():
    grow = _result("growth")
    grow.outcomes.update(
        {f"k={k}": Outcome("ok", "", t) for k, t in ((3, 1.0), (31, 1.9), (127, 4.0))}
    )
    assert _verdict([grow], "window 31").is_met
    assert not _verdict([grow], "window 127").is_met
    small = _result("small", about={"grad": False}, torchpool=0.010, torch=0.005)
    assert _verdict([small], "very small inputs without").found.endswith(
        "2.0 us beyond (row contiguous)"
    )
    ints = _result("integers", float32=1, uint8=0.5)
    ints.outcomes["float32"] = replace(ints.outcomes["float32"], traffic=4000)
    ints.outcomes["uint8"] = replace(ints.outcomes["uint8"], traffic=1000)
    assert "2.00x (uint8 row" in _verdict([ints], "integers").found


def test_a_second_thread_is_not_asked_of_rows_at_the_copys_speed():
    row = _result("scaling")
    times = {"1 thread": 1.2, "2 threads": 1.0, "copy, 2 threads": 0.9}
    row.outcomes.update({name: Outcome("ok", "", t) for name, t in times.items()})
    assert targets.verdicts([row]) == []
    row.outcomes["copy, 2 threads"] = Outcome("ok", "", 0.5)
    assert not _verdict([row], "second thread").is_met


# Reports and the command line


def test_a_report_survives_json(tmp_path: Path):
    result = _result("forward", torchpool=1, torch=2, copy=1, traffic=1 << 26)
    made = report.report([result], groups.Settings(2, peers.PEERS))
    path = tmp_path / "results" / "cpu.json"
    report.write(made, path)
    whole = json.loads(path.read_text())
    assert set(whole) == {
        "schema",
        "date",
        "machine",
        "threads",
        "quick",
        "versions",
        "targets",
        "rows",
    }
    assert whole["versions"]["torch"] == torch.__version__
    assert set(whole["targets"][0]) == {"target", "found", "is_met"}
    assert whole["rows"][0]["outcomes"]["torch"]["median_s"] == 2e-3
    again = report.read(path)
    assert again.results == made.results
    bars = tables.bars(again)
    assert bars == [{"title": "row", "name": "torch", "ours": 1.0, "peer": 0.5}]
    assert "best other library" in plot.shares_of_copy(bars).svg


def test_rows_that_are_measured_again_take_the_place_of_earlier_ones():
    settings = groups.Settings(2, peers.PEERS)
    earlier = report.report(
        [_result("forward", name, torchpool=1, torch=2) for name in ("first", "second")], settings
    )
    later = report.report(
        [_result("forward", name, torchpool=3, torch=2) for name in ("second", "third")], settings
    )
    made = report.updated(earlier, later)
    assert [(result.name, result.outcomes["torchpool"].median_s) for result in made.results] == [
        ("first", 1e-3),
        ("second", 3e-3),
        ("third", 3e-3),
    ]
    assert made.about == later.about | {"earlier": earlier.about["date"]}
    rows = [Result("memory", "Max", {"layout": "contiguous", "saved_bytes": n}) for n in (7, 9)]
    both = [report.report([row], settings) for row in rows]
    assert report.updated(*both).results == [rows[1]]
    other = report.Report(later.results, later.about | {"threads": 1})
    with pytest.raises(ValueError, match="--update: threads was 2 and is 1"):
        report.updated(earlier, other)


def test_tables_fit_the_terminal():
    times = {peer: 1 + i / 8 for i, peer in enumerate(("torchpool", "copy", *peers.PEERS))}
    results = [_result("forward", "a_name_of_28_characters_long", **times)]
    results.append(_result("formulas", "Lp", **{"torchpool": 2, "torch: a": 8, "torch: b": 6}))
    first = {}
    for width in (80, 140):
        console = Console(width=width, record=True, file=io.StringIO())
        for table in tables.tables(report.Report(results, {})):
            console.print(table)
        lines = console.export_text().splitlines()
        (first[width],) = (line for line in lines if line.startswith("│ a_name_of_28"))
        assert max(map(len, lines)) <= width
        (formula,) = (line for line in lines if line.startswith("│ Lp"))
        assert "3.00" in formula
        assert "4.00" not in formula
    assert "a_name_of_28_characters_long" in first[80]
    assert first[80].split()[-4:] == ["1.25", "│", "torch", "│"]
    assert first[140].count("│") == 4 + len(peers.PEERS)


def test_the_command_measures_writes_and_shows(tmp_path: Path, bench: Bench):
    options = ("--peers", "torch", "--out", "small.json", "--threads", "1")
    status, out, err = bench("--quick", "--group", "small", "--filter", "1x1x4x4", *options)
    assert status == 0, err
    assert "1x1x4x4" in out
    assert "very small inputs" in out
    rows = json.loads((tmp_path / "small.json").read_text())["rows"]
    assert len(rows) == 4
    assert all(o["status"] == "ok" for row in rows for o in row["outcomes"].values())
    status, out, err = bench("--from", "small.json")
    assert status == 0, err
    assert "1x1x4x4" in out
    again = ("--quick", "--group", "small", "--filter", "1x1x4x4", *options, "--update")
    status, out, err = bench(*again)
    assert status == 0, err
    whole = json.loads((tmp_path / "small.json").read_text())
    assert len(whole["rows"]) == 4
    assert whole["earlier"] <= whole["date"]


def test_ctrl_c_that_a_contender_loses_ends_the_run_and_keeps_its_rows(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    ran: list[int] = []
    finished = report.Step("finished", lambda: [_result("forward", "finished", torchpool=1)])
    others: dict[str, Callable[[], Contender]] = {
        "losing": lambda: Contender(lambda i: press_and_lose(), lambda result: None),
        "next": lambda: _contender(times=ran),
    }
    interrupted = report.Step("lost", lambda: [contest.contend(_row(**others), 0.001)])
    after = report.Step("after", lambda: ran.append(0) or [])
    monkeypatch.setattr(report, "plan", lambda *_: [finished, interrupted, after])
    status, out, err = bench("--out", "some.json")
    assert status == 0, err
    assert "Stopped: the rows that were finished follow." in out
    assert [row["name"] for row in json.loads((tmp_path / "some.json").read_text())["rows"]] == [
        "finished"
    ]
    assert ran == []


def test_ctrl_c_that_is_lost_between_samples_ends_the_row():
    ran: list[int] = []
    with interruption.noted(), pytest.raises(KeyboardInterrupt):
        in_turns([Call(lambda i: press_and_lose()), Call(ran.append)], 0.001)
    assert ran == []


MODEL = """
import torch
def build():
    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.MaxPool2d(2), torch.nn.AvgPool2d(2)
    return torch.nn.Sequential(*layers)
def deaf():
    return torch.nn.ReLU()
"""


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--group", "best"], "--group best is not one of forward, adaptive"),
        (["--filter", "nothing like it"], "leaves no row"),
        (["--peers", "numpy"], "--peers numpy is not one of"),
        (["--from", "missing.json"], "--from missing.json cannot be read"),
        (["--update", "--out", "missing.json"], "--update missing.json cannot be read"),
        (["--from", "mymodel.py"], "is not a report"),
        (["--from", "some.json", "--update"], "--update is about measuring"),
        (["--from", "some.json", "--group", "forward"], "--group is about measuring"),
        (["--model", "mymodel"], "MODULE:FACTORY"),
        (["--model", "mymodel:build", "--input", "1,4,9,9"], "the model does not take it"),
        (["--model", "mymodel:deaf", "--input", "1,3,9,9"], "nothing that has a gradient"),
    ],
    ids=lambda v: v if isinstance(v, str) else " ".join(v),
)
def test_bad_input(tmp_path: Path, bench: Bench, arguments: list[str], text: str):
    (tmp_path / "mymodel.py").write_text(MODEL)
    status, _, err = bench(*arguments)
    assert status == 2
    assert text in err
    assert err.startswith("torchpool: ")


def test_a_model_before_and_after():
    layers = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(2), nn.AvgPool2d(2))
    found = model.compare(layers, torch.randn(2, 1, 16, 16), budget=0.01)
    assert [name for name, *_ in found.times] == ["inference", "training step"]
    assert all(t.median > 0 for _, *both in found.times for t in both)
    assert found.difference is None
    assert len(found.report.swapped) == 2
    before, after = found.saved_bytes
    assert type(layers[1]) is nn.MaxPool2d
    pooled, own = 2 * 4 * 8 * 8, 2 * 4 * 16 * 16
    assert before - after == 4 * own + 8 * pooled + 4 * pooled - pooled


def test_a_model_is_found_on_the_command_line(tmp_path: Path, bench: Bench):
    (tmp_path / "mymodel.py").write_text(MODEL)
    status, out, err = bench("--model", "mymodel:build", "--input", "1,3,18,18")
    assert status == 0, err
    assert "saved for backward" in out
