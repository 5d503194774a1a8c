"""The study of time series: reading files and what is wrong with them, the arms beside their
compositions by hand, a study from the command line."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from torchpool import cli
from torchpool.study import series_data
from torchpool.study.series import ARMS, ENCODERS, WIDTH, Network, SeriesTask, cut
from torchpool.study.task import DataError
from torchpool.study.trial import train

HEADER = "id,time,label,a,b"


def _rows(count: int = 8) -> list[tuple[str, str, np.ndarray]]:
    """Series (id, label, values (T, 2)): the second class rises where the first falls."""
    generator = np.random.default_rng(0)
    made = []
    for i in range(count):
        t = np.arange(3 + i % 4)
        slope = (1 if i % 2 else -1) * t
        values = np.stack([slope + generator.normal(0, 0.1, len(t)), t % 2], 1)
        made.append((f"s{i}", f"class {i % 2}", values))
    return made


def _csv(file: Path, *more: str, header: str = HEADER, rows: bool = True) -> Path:
    """A long table of two classes, the times backwards, and the lines of `more` after it."""
    lines = [
        f"{key},{t},{label},{a},{b}"
        for key, label, values in _rows()
        for t, (a, b) in reversed(list(enumerate(values.tolist())))
    ]
    text = "\n".join([header, *(lines if rows else ()), *more])
    file.write_text(text, encoding="utf-8")
    return file


def _npz(file: Path, **changes: object) -> Path:
    """The same series padded with NaN."""
    rows = _rows()
    x = np.full((len(rows), 6, 2), np.nan)
    for i, (_, _, values) in enumerate(rows):
        x[i, : len(values)] = values
    arrays = {
        "x": x,
        "lengths": np.array([len(values) for *_, values in rows]),
        "y": np.array([label for _, label, _ in rows]),
    }
    given = {**arrays, **changes}
    np.savez(file, **{key: value for key, value in given.items() if value is not None})
    return file


def _main(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["torchpool", *arguments])
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as end:
        cli.main()
    torch.set_num_threads(threads)
    return int(end.value.code or 0)


# Data


def test_csv_and_npz_hold_the_same_series(tmp_path):
    table, arrays = (
        series_data.load(f(tmp_path / name)) for f, name in ((_csv, "a.csv"), (_npz, "a.npz"))
    )
    assert table.classes == arrays.classes == ("class 0", "class 1")
    assert table.channels == 2
    for one in (table, arrays):
        assert (len(one.train), len(one.test)) == (6, 2)
    for a, b in ((table.train, arrays.train), (table.test, arrays.test)):
        torch.testing.assert_close((a.inputs, a.labels), (b.inputs, b.labels))
    assert table.train.inputs[0].isfinite().all()


def test_channels_are_standardised_by_the_training_part_and_padding_is_zero(tmp_path):
    x, lengths = series_data.load(_npz(tmp_path / "a.npz")).train.inputs
    valid = torch.arange(x.shape[2]) < lengths[:, None]
    seen = x.mT[valid]
    torch.testing.assert_close(seen.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(seen.std(0, correction=0), torch.ones(2))
    assert not x.mT[~valid].any()


def test_other_values_are_another_study(tmp_path):
    one = series_data.load(_npz(tmp_path / "a.npz"))
    same = series_data.load(_npz(tmp_path / "b.npz"))
    lengths = np.array([len(values) for *_, values in _rows()])
    lengths[3] -= 1
    other = series_data.load(_npz(tmp_path / "c.npz", lengths=lengths))
    assert one.digest == same.digest != other.digest


def _ship(root: Path, monkeypatch) -> None:
    """A package that ships the default sets, tiny."""
    for name in series_data.DEFAULTS:
        folder = root / "shipping" / "datasets" / "data" / name
        folder.mkdir(parents=True)
        for part in ("TRAIN", "TEST"):
            lines = [
                ":".join([*(",".join(map(str, c)) for c in values.T.tolist()), label])
                for _, label, values in _rows()
            ]
            text = "\n".join(["# about", "@data", *lines])
            (folder / f"{name}_{part}.ts").write_text(text, encoding="utf-8")
    (root / "shipping" / "__init__.py").write_text("raise ImportError('only read, not imported')")
    monkeypatch.syspath_prepend(root)
    monkeypatch.setattr(series_data, "PACKAGES", ("shipping",))


def test_default_sets_are_read_out_of_the_package(tmp_path, monkeypatch):
    _ship(tmp_path, monkeypatch)
    series = series_data.load(None)
    assert (series.name, len(series.train), len(series.test)) == ("JapaneseVowels", 8, 8)
    torch.testing.assert_close(series.train.inputs[0], series.test.inputs[0])
    assert series.train.inputs[1].tolist() == [len(values) for *_, values in _rows()]


@pytest.mark.skipif(find_spec("sktime") is None, reason="sktime ships the sets: torchpool[series]")
@pytest.mark.parametrize(
    ("name", "shape", "longest", "classes"),
    [("JapaneseVowels", (270, 370, 12), 29, 9), ("BasicMotions", (40, 40, 6), 100, 4)],
)
def test_the_real_sets(name, shape, longest, classes):
    series = series_data.load(None, name)
    assert (len(series.train), len(series.test), series.channels) == shape
    lengths = torch.cat([series.train.inputs[1], series.test.inputs[1]])
    assert lengths.max() == longest
    assert len(series.classes) == classes


# Networks


@pytest.mark.parametrize("arm", ARMS)
def test_both_engines_of_an_arm_agree(arm):
    ours, theirs = ARMS[arm].torchpool().eval(), ARMS[arm].torch().eval()
    states = [layer.state_dict().values() for layer in (ours, theirs)]
    with torch.no_grad():
        for a, b in zip(*states, strict=True):
            b.copy_(a.reshape(b.shape))
    x, lengths = torch.randn(4, WIDTH, 9), torch.tensor([9, 4, 1, 6])
    a, b = (layer(x, None, lengths) for layer in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_series_gives_the_same_alone_and_in_a_batch(encoder):
    torch.manual_seed(0)
    net = Network(ENCODERS[encoder](2), ARMS["attentive"].torchpool(), WIDTH, 3).eval()
    x, lengths = torch.randn(3, 2, 8), torch.tensor([8, 3, 5])
    y = net(x, lengths)
    for i, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(net(x[i : i + 1, :, :n], lengths[i : i + 1])[0], y[i])


def test_cutting_takes_elements_off_the_ends_only():
    lengths = torch.tensor([30, 20, 1, 2])
    x = torch.arange(1.0, 31).expand(4, 1, 30) * (torch.arange(30) < lengths[:, None])[:, None]
    seen = set()
    for seed in range(20):
        y, kept = cut(x, lengths, seed)
        for i, n in enumerate(kept.tolist()):
            first = int(y[i, 0, 0])
            assert y[i, 0, :n].tolist() == list(range(first, first + n))
            assert not y[i, 0, n:].any()
            assert lengths[i] - max(1, lengths[i] // 10) <= n <= lengths[i]
            assert n >= 1
            seen.add((i, first, n))
    assert {(0, 1, 27), (0, 4, 27), (0, 1, 30), (2, 1, 1)} <= seen


def test_a_trial_is_reproducible_and_learns(tmp_path):
    task = SeriesTask(series_data.load(_npz(tmp_path / "a.npz")), "cnn")
    first, second = (train("max", 1, task, 30) for _ in range(2))
    assert (first.accuracy, first.consistency) == (second.accuracy, second.consistency)
    assert first.accuracy == 1.0


# The command


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("series")
    _csv(folder / "mine.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert _main(patch, *COMMAND) == 0
    return folder


COMMAND = ["study", "--task", "series", "--data", "mine.csv", "--arms", "mean,attentive,mean"]
COMMAND += ["--seeds", "2", "--epochs", "1", "--out", "out"]


def test_end_to_end(finished):
    for encoder in ENCODERS:
        folder = finished / "out" / f"mine-{encoder}"
        found = json.loads((folder / "results.json").read_text())
        assert found["complete"]
        assert {row["arm"] for row in found["arms"]} == {"mean", "attentive", "mean#2"}
        again = next(c for c in found["comparisons"] if c["arm"] == "mean#2")
        assert (again["difference"], again["p_holm"]) == (0, 1)
        assert found["plan"]["setting"] == {"encoder": encoder}
        page = (folder / "report.html").read_text()
        assert page.count("<svg") == 2
        assert "6 training and 2 held-out series" in page
        assert "images" not in page
        assert (folder / "chart.png").stat().st_size > 10_000


def test_a_second_run_resumes(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    more = ["3" if a == "2" else a for a in COMMAND]
    assert _main(monkeypatch, *more, "--encoders", "gru") == 0
    out = capsys.readouterr().out
    assert "6 of 9 trials are stored already" in out
    assert "…" not in out, "the table fits 80 columns"


def _bad_files(folder: Path) -> None:
    _csv(folder / "good.csv")
    _csv(folder / "columns.csv", header="id,t,a,b,c")
    _csv(folder / "featureless.csv", header="id,time,label", rows=False)
    _csv(folder / "twice.csv", header="id,time,label,a,a")
    _csv(folder / "ragged.csv", "s9,0,class 0,1")
    _csv(folder / "text.csv", "s9,0,class 0,1,high")
    _csv(folder / "nan.csv", "s9,0,class 0,nan,1")
    _csv(folder / "unlabelled.csv", "s9,0,,1,1")
    _csv(folder / "labels.csv", "s0,99,class 1,1,1")
    _csv(folder / "times.csv", "s0,0,class 0,1,1")
    _csv(folder / "lonely.csv", "s9,0,class 9,1,1")
    _csv(folder / "none.csv", rows=False)
    _csv(folder / "one.csv", "s0,0,x,1,1", "s1,0,x,1,1", rows=False)
    (folder / "empty.csv").write_text("")
    (folder / "binary.csv").write_bytes(b"\xff\xfe\x00id")
    (folder / "series.parquet").write_bytes(b"PAR1")
    (folder / "folder.csv").mkdir()
    _npz(folder / "x.npz", x=None)
    _npz(folder / "flat.npz", x=np.ones((8, 6)))
    _npz(folder / "words.npz", x=np.full((8, 6, 2), "a"))
    _npz(folder / "y.npz", y=np.arange(7))
    _npz(folder / "long.npz", lengths=np.array([3, 4, 7, 6, 3, 4, 5, 6]))
    _npz(folder / "zero.npz", lengths=np.array([3, 4, 5, 0, 3, 4, 5, 6]))
    _npz(folder / "float.npz", lengths=np.full(8, 3.0))
    _npz(folder / "unpadded.npz", lengths=None)
    _npz(folder / "single.npz", y=np.zeros(8))
    _npz(folder / "objects.npz", y=np.array([{}] * 8))
    (folder / "nothing.npz").write_bytes(b"")
    whole = _npz(folder / "whole.npz").read_bytes()
    (folder / "half.npz").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--data nowhere.csv", "nowhere.csv: there is no such file; series are .csv or .npz"),
        ("--data folder.csv", "folder.csv: there is no such file"),
        ("--data series.parquet", "series.parquet: series are read from .csv or .npz files"),
        ("--data columns.csv", "columns.csv, row 1: the columns time, label are missing; the hea"),
        ("--data featureless.csv", "row 1: there is no feature beside id, time and label"),
        ("--data twice.csv", "row 1: a column's name stands twice; rename one"),
        ("--data ragged.csv", "ragged.csv, row 38 has 4 cells, the header has 5; give every row"),
        ("--data text.csv", "row 38, column b: 'high' is no finite number; fill it, or remove"),
        ("--data nan.csv", "row 38, column a: 'nan' is no finite number"),
        ("--data unlabelled.csv", "row 38, column label is empty; fill it, or remove the row"),
        ("--data labels.csv", "row 38: id s0 has the label 'class 1' here and 'class 0' before"),
        ("--data times.csv", "row 38: id s0 has the time 0 twice; remove one of the rows"),
        ("--data lonely.csv", "class 'class 9' has one series; every class needs at least two"),
        ("--data none.csv", "none.csv has 0 classes; a study needs at least two labels"),
        ("--data one.csv", "one.csv has 1 class; a study needs at least two labels"),
        ("--data empty.csv", "empty.csv, row 1: the columns id, time, label are missing"),
        ("--data binary.csv", "binary.csv is no CSV in UTF-8 ('utf-8' codec can't decode byte"),
        ("--data x.npz", "x.npz has no array x; it needs x (N, T, C), lengths (N,) and y (N,)"),
        ("--data flat.npz", "x has the shape (8, 6) and dtype float64; it must hold numbers"),
        ("--data words.npz", "x has the shape (8, 6, 2) and dtype <U1; it must hold numbers"),
        ("--data y.npz", "y has the shape (7,); it must be (8,), as x has 8 series"),
        ("--data long.npz", "long.npz: lengths[2] is 7; it must be from 1 to T = 6"),
        ("--data zero.npz", "lengths[3] is 0; it must be from 1 to T = 6"),
        ("--data float.npz", "lengths has dtype float64; it must hold whole numbers"),
        ("--data unpadded.npz", "x[0, 3, 0] is nan; fill it, or leave the series out"),
        ("--data single.npz", "single.npz has 1 class; a study needs at least two labels"),
        ("--data objects.npz", "objects.npz cannot be read: Object arrays cannot be loaded"),
        ("--data nothing.npz", "nothing.npz cannot be read: File is not a zip file; write it"),
        ("--data half.npz", "half.npz cannot be read"),
        ("--data good.csv --encoders gru,rnn", "--encoders rnn: there is no such encoder; choose"),
        ("--data good.csv --arms maxx", "--arms maxx: there is no such arm; choose from mean, "),
        ("--data good.csv --kernel 3", "--kernel 3 goes with --task images only; leave it out"),
        ("--seeds 1", "ship with sktime, which is not installed: pip install 'torchpool[series]'"),
    ],
)
def test_bad_input_ends_with_one_line_and_status_2(
    tmp_path, monkeypatch, capsys, bad_files, arguments, text
):
    shutil.copytree(bad_files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(series_data, "PACKAGES", ("a_package_that_nobody_has",))
    assert _main(monkeypatch, "study", "--task", "series", *arguments.split()) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert text in err
    assert not (tmp_path / "torchpool-study").exists()


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    _bad_files(folder)
    return folder


def test_options_of_series_do_not_go_with_images(monkeypatch, capsys):
    assert _main(monkeypatch, "study", "--encoders", "gru") == 2
    assert "--encoders gru goes with --task series only" in capsys.readouterr().err
    assert _main(monkeypatch, "study", "--task", "sets") == 2
    assert "--task sets is not known; choose images or series" in capsys.readouterr().err


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    file = _csv(tmp_path / "a.csv")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"a\.csv cannot be read: Permission denied; give a file"):
        series_data.load(file)
