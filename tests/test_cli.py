"""`show` and `inspect` as a user meets them, and the analysis behind them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command import command
from PIL import Image
from torch import nn

import torchpool as tp
from torchpool import analysis, gallery

RUN = [sys.executable, "-c", "from torchpool.cli import main; main()"]
MODEL = """
import torch
def build():
    layers = torch.nn.Conv2d(3, 8, 7, 2, 3), torch.nn.MaxPool2d(3, 2, 1), torch.nn.AvgPool2d(2)
    return torch.nn.Sequential(*layers)
def nothing():
    return 3
def fails():
    return 1 / 0
"""


def _run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    wide = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        [*RUN, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=wide,
        timeout=300,
        check=False,
    )


def test_show_draws_a_gallery(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3)).astype(np.uint8)).save(
        tmp_path / "p.png"
    )
    done = _run(
        "show", "p.png", "--kernel", "4", "--reductions", "max,std", "--out", "g.png", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "90 x 60 pixels became 22 x 15" in done.stdout
    with Image.open(tmp_path / "g.png") as drawn:
        assert min(drawn.size) > 100


def test_gallery_pools_the_default_photograph():
    x = gallery.load(None)
    assert x.shape == (1, 3, 427, 640)
    assert 0 <= x.min() < x.max() <= 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["paint"], "No such command 'paint' (in `torchpool paint`; see `torchpool --help`)"),
        (["show", "missing.png"], "missing.png is missing; give the path of an image"),
        (["show", "no"], "no is a folder; give the path of an image"),
        (["show", "cut.png"], "cut.png is not a readable image"),
        (["show", "p.png", "--reductions", "best"], "--reductions best"),
        (["show", "p.png", "--kernel", "500"], "--kernel 500 does not fit a picture of 90 x 60"),
        (["show", "p.png", "--padding", "500"], "--padding 500 makes windows that see no pixel"),
        (["show", "p.png", "--out", "nofolder/g.png"], "--out nofolder/g.png cannot be written"),
        (["show", "p.png", "--out", "g.txt"], "--out g.txt must be a PNG file"),
        (["inspect"], "Missing argument"),
        (["inspect", "mymodel"], "MODULE:FACTORY"),
        (["inspect", "mymodel:other"], "has no attribute 'other'"),
        (["inspect", "nomodule:x"], "nomodule:x: the module 'nomodule' cannot be imported"),
        (["inspect", "mymodel.py:build"], "write mymodel:build"),
        (["inspect", "mymodel:nothing"], "returned int"),
        (["inspect", "mymodel:fails"], "mymodel:fails fails: ZeroDivisionError"),
        (["inspect", "mymodel:build", "--input", "1,x"], "--input 1,x"),
        (["inspect", "mymodel:build", "--input", "1,4,64,64"], "the model fails on an input"),
    ],
    ids=lambda v: v if isinstance(v, str) else " ".join(v),
)
def test_bad_input(tmp_path, arguments, text):
    (tmp_path / "mymodel.py").write_text(MODEL)
    Image.fromarray(np.zeros((60, 90, 3), np.uint8)).save(tmp_path / "p.png")
    whole = (tmp_path / "p.png").read_bytes()
    (tmp_path / "no").mkdir()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert text in done.stderr


def test_help_and_version(tmp_path):
    for arguments in (["--help"], ["study", "--help"], ["show", "--help"], ["inspect", "--help"]):
        done = command(*arguments, cwd=tmp_path)
        assert done.returncode == 0
        assert "Usage: torchpool" in done.stdout
    assert "Usage: torchpool" in command(cwd=tmp_path).stdout
    assert _run("--version", cwd=tmp_path).stdout == f"torchpool {tp.__version__}\n"


def test_inspect_lists_the_pooling(tmp_path):
    (tmp_path / "mymodel.py").write_text(MODEL)
    done = _run("inspect", "mymodel:build", "--input", "2,3,64,64", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "MaxPool2d" in done.stdout


def test_analysis_knows_shapes_fields_and_bytes():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 7, 2, 3),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(1),
    )
    first, second, last = analysis.inspect(model, torch.randn(2, 3, 64, 64))
    assert (first.path, first.kind, first.in_shape, first.out_shape) == (
        "1",
        "MaxPool2d",
        (2, 8, 32, 32),
        (2, 8, 16, 16),
    )
    assert (first.receptive_field, first.jump) == ((11, 11), (4, 4))
    assert (second.receptive_field, second.jump) == ((23, 23), (8, 8))
    assert last.receptive_field == ()
    assert first.torchpool_saved_bytes == 2 * 8 * 16 * 16
    assert first.saved_bytes == 2 * 8 * 32 * 32 * 4 + 2 * 8 * 16 * 16 * 8
    assert second.torchpool_saved_bytes == 0
    assert type(model[1]) is nn.MaxPool2d


def test_receptive_field_is_what_gradients_reach():
    model = nn.Sequential(
        tp.nn.Pool(tp.Mean(), tp.Window(3, 2, 1)), nn.AvgPool2d(2), tp.nn.AvgPool2d(3, 1)
    )
    x = torch.ones(1, 1, 40, 40, requires_grad=True)
    y = model(x)
    y[0, 0, y.shape[2] // 2, y.shape[3] // 2].backward()
    reached = tuple(int(n) for n in (x.grad[0, 0] != 0).any(1).sum().expand(2))
    assert analysis.inspect(model, x.detach())[-1].receptive_field == reached


def test_shift_consistency_of_an_invariant_and_a_sensitive_model():
    torch.manual_seed(0)
    images = torch.rand(16, 1, 16, 16)
    invariant = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(1, 3))
    assert analysis.shift_consistency(invariant, images) == 1.0
    sensitive = nn.Sequential(nn.Flatten(), nn.Linear(256, 50))
    assert analysis.shift_consistency(sensitive, images) < 0.9
