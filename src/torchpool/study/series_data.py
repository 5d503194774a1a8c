"""The time series a study trains on: JapaneseVowels and BasicMotions as sktime and aeon ship them,
or the user's own CSV or .npz file."""

from __future__ import annotations

import csv
import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from torchpool.study.task import DataError, Examples, split

DEFAULTS = ("JapaneseVowels", "BasicMotions")
PACKAGES = ("sktime", "aeon")
"""Packages that ship these sets. Only their files are read; the packages, which take seconds to
import, are not imported."""
KEYS = ("id", "time", "label")
"""Columns of a CSV beside the features."""


@dataclass(frozen=True)
class Series:
    """Padded series (N, C, T) with their lengths (N,), in a training and a held-out part.

    Each channel has mean 0 and deviation 1 over the training part; padding is 0.
    """

    name: str
    train: Examples
    test: Examples
    classes: tuple[str, ...]
    digest: str = field(default="")

    @property
    def channels(self) -> int:
        """Values per time."""
        return int(self.train.inputs[0].shape[1])


@dataclass(frozen=True)
class _Raw:
    """Series (T_i, C) as they were read, with their labels."""

    values: list[np.ndarray[Any, Any]]
    labels: list[str]


def load(source: Path | None, name: str = DEFAULTS[0]) -> Series:
    """The user's file, or one of the default sets.

    Raises:
        DataError: what is wrong, where, and what to do.
    """
    if source is None:
        return _default(name)
    if not source.is_file():
        raise DataError(f"--data {source}: there is no such file; series are .csv or .npz files")
    readers = {".csv": _read_csv, ".npz": _read_npz}
    reader = readers.get(source.suffix.lower())
    if reader is None:
        raise DataError(f"--data {source}: series are read from .csv or .npz files")
    try:
        raw = reader(source)
    except OSError as error:
        raise DataError(
            f"--data {source} cannot be read: {error.strerror or error}; give a file that you may "
            f"read"
        ) from None
    classes = tuple(sorted(set(raw.labels)))
    _check_classes(raw, classes, source)
    labels = torch.tensor([classes.index(label) for label in raw.labels])
    train, test = split(labels, torch.Generator().manual_seed(0))
    return _prepare(str(source), raw.values, labels, classes, train, test)


def _check_classes(raw: _Raw, classes: Sequence[str], source: Path) -> None:
    if len(classes) < 2:
        raise DataError(
            f"--data {source} has {len(classes)} class{'es' * (len(classes) != 1)}; a study needs "
            f"at least two labels"
        )
    for label in classes:
        if raw.labels.count(label) < 2:
            raise DataError(
                f"--data {source}: class {label!r} has one series; every class needs at least two"
            )


def _prepare(
    name: str,
    values: Sequence[np.ndarray[Any, Any]],
    labels: Tensor,
    classes: tuple[str, ...],
    train: Tensor,
    test: Tensor,
) -> Series:
    """Standardises by the training part, pads, and splits."""
    seen = np.concatenate([values[i] for i in train.tolist()])
    centre, spread = seen.mean(0), seen.std(0)
    spread[spread == 0] = 1
    scaled = [torch.tensor((v - centre) / spread, dtype=torch.float32) for v in values]
    lengths = torch.tensor([len(v) for v in values])
    padded = pad_sequence(scaled, batch_first=True).transpose(1, 2).contiguous()
    whole = Examples((padded, lengths), labels)
    digest = hashlib.sha256(padded.numpy().tobytes() + lengths.numpy().tobytes())
    digest.update(labels.numpy().tobytes())
    return Series(name, whole.part(train), whole.part(test), classes, digest.hexdigest()[:10])


# The default sets


def _default(name: str) -> Series:
    folder = _shipped(name)
    parts = [_read_ts(folder / f"{name}_{part}.ts") for part in ("TRAIN", "TEST")]
    values = [*parts[0].values, *parts[1].values]
    names = [*parts[0].labels, *parts[1].labels]
    classes = tuple(sorted(set(names)))
    labels = torch.tensor([classes.index(label) for label in names])
    first = len(parts[0].labels)
    train, test = torch.arange(first), torch.arange(first, len(names))
    return _prepare(name, values, labels, classes, train, test)


def _shipped(name: str) -> Path:
    """The folder of a set inside whichever package is installed."""
    for package in PACKAGES:
        found = find_spec(package)
        for root in (found.submodule_search_locations or []) if found else []:
            folder = Path(root) / "datasets" / "data" / name
            if (folder / f"{name}_TRAIN.ts").is_file():
                return folder
    raise DataError(
        f"the default series {name} ship with sktime, which is not installed: "
        f"pip install 'torchpool[series]', or give --data FILE"
    )


def _read_ts(file: Path) -> _Raw:
    """A .ts file: a header of lines with # and @, then one series per line, its channels separated
    by colons, the label last."""
    values, labels = [], []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith(("#", "@")):
            continue
        *channels, label = line.strip().split(":")
        try:
            rows = [[float(v) for v in channel.split(",")] for channel in channels]
            values.append(np.array(rows).T)
        except ValueError as error:
            raise DataError(f"{file}, line {number}: {error}; install the package anew") from None
        labels.append(label)
    return _Raw(values, labels)


# The user's files


def _read_csv(file: Path) -> _Raw:
    """Long format: one row per series and time, with the columns id, time, label and features."""
    rows: dict[str, dict[float, list[float]]] = {}
    labels: dict[str, str] = {}
    for where, row in _csv_rows(file):
        key, label = _text(row, "id", where), _text(row, "label", where)
        if labels.setdefault(key, label) != label:
            raise DataError(
                f"{where}: id {key} has the label {label!r} here and {labels[key]!r} before; "
                f"a series has one label"
            )
        time = _number(row, "time", where)
        times = rows.setdefault(key, {})
        if time in times:
            raise DataError(
                f"{where}: id {key} has the time {row['time']} twice; remove one of the rows"
            )
        times[time] = [_number(row, name, where) for name in row if name not in KEYS]
    values = [np.array([times[t] for t in sorted(times)]) for times in rows.values()]
    return _Raw(values, [labels[key] for key in rows])


def _csv_rows(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The cells of each row by their columns, and where it stands."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream)
            header = [name.strip() for name in next(reader, [])]
            _check_header(header, file)
            for cells in reader:
                where = f"--data {file}, row {reader.line_num}"
                if len(cells) not in (0, len(header)):
                    raise DataError(
                        f"{where} has {len(cells)} cells, the header has {len(header)}; give every "
                        f"row a cell per column"
                    )
                if cells:
                    yield where, dict(zip(header, map(str.strip, cells), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"--data {file} is no CSV in UTF-8 ({error}); export it anew as CSV"
        ) from None


def _check_header(header: Sequence[str], file: Path) -> None:
    missing = [name for name in KEYS if name not in header]
    if missing:
        raise DataError(
            f"--data {file}, row 1: the columns {', '.join(missing)} are missing; the header must "
            f"be id,time,label and the names of the features"
        )
    if len(header) == len(KEYS):
        raise DataError(f"--data {file}, row 1: there is no feature beside id, time and label")
    if len(set(header)) != len(header):
        raise DataError(f"--data {file}, row 1: a column's name stands twice; rename one")


def _text(row: dict[str, str], column: str, where: str) -> str:
    if not row[column]:
        raise DataError(f"{where}, column {column} is empty; fill it, or remove the row")
    return row[column]


def _number(row: dict[str, str], column: str, where: str) -> float:
    try:
        value = float(row[column])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(
            f"{where}, column {column}: {row[column]!r} is no finite number; "
            f"fill it, or remove the row"
        )
    return value


def _read_npz(file: Path) -> _Raw:
    """Arrays x (N, T, C), y (N,) and, unless every series fills T, lengths (N,)."""
    try:
        with zipfile.ZipFile(file), np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(
            f"--data {file} cannot be read: {error}; write it with numpy.savez(file, x=x, "
            f"lengths=lengths, y=y) from arrays of numbers or text"
        ) from None
    missing = [key for key in ("x", "y") if key not in arrays]
    if missing:
        raise DataError(
            f"--data {file} has no array {', '.join(missing)}; it needs x (N, T, C), lengths (N,) "
            f"and y (N,)"
        )
    x, y = arrays["x"], arrays["y"]
    if x.ndim != 3 or x.dtype.kind not in "iuf" or 0 in x.shape:
        raise DataError(
            f"--data {file}: x has the shape {x.shape} and dtype {x.dtype}; it must hold numbers "
            f"of shape (N, T, C)"
        )
    lengths = arrays.get("lengths", np.full(len(x), x.shape[1]))
    for name, array in (("y", y), ("lengths", lengths)):
        if array.shape != (len(x),):
            raise DataError(
                f"--data {file}: {name} has the shape {array.shape}; it must be ({len(x)},), as x "
                f"has {len(x)} series"
            )
    if lengths.dtype.kind not in "iu":
        raise DataError(
            f"--data {file}: lengths has dtype {lengths.dtype}; it must hold whole numbers: "
            f"lengths.astype(int)"
        )
    return _Raw(_cut(x, lengths, file), [str(label) for label in y.tolist()])


def _cut(
    x: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], file: Path
) -> list[np.ndarray[Any, Any]]:
    """Each series without its padding, which may hold anything."""
    values = []
    for i, length in enumerate(lengths.tolist()):
        if not 1 <= length <= x.shape[1]:
            raise DataError(
                f"--data {file}: lengths[{i}] is {length}; it must be from 1 to T = {x.shape[1]}"
            )
        series = x[i, :length].astype(np.float64)
        if not np.isfinite(series).all():
            t, c = np.argwhere(~np.isfinite(series))[0].tolist()
            raise DataError(
                f"--data {file}: x[{i}, {t}, {c}] is {series[t, c]}; fill it, or leave the series "
                f"out"
            )
        values.append(series)
    return values
