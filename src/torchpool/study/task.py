"""What a study needs to know of its task: examples, arms, a network, and the words for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Inputs = tuple[Tensor, ...]
"""What a network is called with; each tensor has the examples along its first axis."""
HELD_OUT = 0.25
"""Share of every class that is held out where the data has no such part of its own."""


class DataError(ValueError):
    """The data cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Arm:
    """A pooling to try: what it is, and how to build it with torchpool and out of torch's own
    operators."""

    title: str
    torchpool: Callable[..., nn.Module]
    torch: Callable[..., nn.Module]


@dataclass(frozen=True)
class Words:
    """How a report speaks of a task."""

    examples: str
    """Plural, as "images"."""
    setting: str
    """What all arms share, as "window 2, stride 2"."""
    consistency: str
    """The second score, as "shift consistency"."""
    disturbance: str
    """When predictions should not change, as "the image moves by up to 4 pixels"."""
    pooling: str
    """The layer whose bytes are counted, as "the first pooling layer"."""
    batch: int
    """Examples in a training step."""


@dataclass(frozen=True)
class Examples:
    """Inputs and labels (N,) int64."""

    inputs: Inputs
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, index: Any) -> Examples:
        """Some of the examples."""
        return Examples(tuple(t[index] for t in self.inputs), self.labels[index])

    def to(self, device: str) -> Examples:
        """The same on a device."""
        return Examples(tuple(t.to(device) for t in self.inputs), self.labels.to(device))


class Task(ABC):
    """Examples in a training and a held-out part that never change, and one network per arm."""

    kind: ClassVar[str]
    """What `--task` takes."""
    arms: ClassVar[Mapping[str, Arm]]
    """Every arm by the name that `--arms` takes."""
    threads: ClassVar[int | None] = None
    """Threads to train with; None leaves the choice to torch."""

    @property
    def batch(self) -> int:
        """Examples in a training step."""
        return 64

    @property
    @abstractmethod
    def data(self) -> str:
        """The name of the data."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Tells this data from other data: the same file with other contents is another study."""

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """The names of the labels."""

    @property
    @abstractmethod
    def setting(self) -> dict[str, Any]:
        """What trials depend on beside arm, seed, epochs and device; goes into JSON."""

    @property
    @abstractmethod
    def words(self) -> Words: ...

    @property
    @abstractmethod
    def train(self) -> Examples: ...

    @property
    @abstractmethod
    def test(self) -> Examples: ...

    @property
    def skipped(self) -> tuple[str, ...]:
        """What of the data could not be read, and why."""
        return ()

    @abstractmethod
    def network(self, arm: str, engine: str = "torchpool") -> nn.Module:
        """The network with an arm's pooling.

        Args:
            engine: "torchpool", or "torch" for the same arm out of torch's own operators.
        """

    @abstractmethod
    def disturbed(self, seed: int) -> Inputs:
        """The held-out inputs, each changed in a way that should not matter."""

    @abstractmethod
    def pooling(self, net: nn.Module) -> nn.Module:
        """The layer of a network whose bytes are counted."""

    @abstractmethod
    def pooled_inputs(self) -> Inputs:
        """What that layer may be called with, for one batch."""


def split(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of the training and the held-out part, the same share of every class."""
    train, test = [], []
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        held = max(1, round(HELD_OUT * len(members)))
        test.append(members[:held])
        train.append(members[held:])
    return torch.cat(train), torch.cat(test)
