"""One trial: train the network of an arm from a seed and score it. One measurement: what an arm
costs per training step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchpool.analysis import saved_bytes
from torchpool.study.data import Images, shifted
from torchpool.study.model import WIDTHS, Geometry, network

BATCH = 64
LEARNING_RATE = 3e-3
SHIFT_SEEDS = (11, 12, 13)


@dataclass(frozen=True)
class Score:
    """What a trained network reaches on the held-out images."""

    accuracy: float
    """Share of correct predictions."""
    consistency: float
    """Share of predictions that a random shift by up to 4 pixels leaves unchanged."""
    parameters: int
    seconds: float
    """Time of training and scoring."""


@dataclass(frozen=True)
class Cost:
    """What an arm's first pooling layer and a training step of its network cost."""

    before_bytes: int
    """Activation of one batch that enters the pooling layer."""
    after_bytes: int
    """Activation that leaves it."""
    step_ms: float
    """Median time of a training step with torchpool."""
    torch_step_ms: float
    """The same with torch's own operators."""
    saved_bytes: int
    """Kept for the backward pass by the pooling layer with torchpool."""
    torch_saved_bytes: int
    """The same with torch's own operators."""


def _initialise(net: nn.Module, seed: int) -> None:
    """Gives layer i of every arm the same start from the same seed, whatever the pooling between
    them holds."""
    for i, layer in enumerate(net.children()):
        torch.manual_seed(seed * 1000 + i)
        for module in layer.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()


def train(
    arm: str,
    seed: int,
    images: Images,
    geometry: Geometry,
    epochs: int,
    device: str = "cpu",
    tick: Callable[[], None] = lambda: None,
) -> Score:
    """Trains and scores one network; the same arguments give the same score.

    Args:
        tick: called after each epoch.
    """
    began = time.perf_counter()
    net = network(arm, geometry, images.channels, len(images.classes))
    _initialise(net, seed)
    net = net.to(device)
    x, labels = images.train.to(device), images.train_labels.to(device)
    steps = epochs * -(-len(x) // BATCH)
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE * 3, total_steps=steps)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        net.train()
        for batch in torch.randperm(len(x), generator=order).to(device).split(BATCH):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(net(x[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
        tick()
    accuracy, consistency = _score(net.eval(), images, device)
    parameters = sum(p.numel() for p in net.parameters())
    return Score(accuracy, consistency, parameters, time.perf_counter() - began)


@torch.no_grad()
def _score(net: nn.Module, images: Images, device: str) -> tuple[float, float]:
    def predict(x: Tensor) -> Tensor:
        return torch.cat([net(part.to(device)).argmax(1).cpu() for part in x.split(256)])

    still = predict(images.test)
    moved = [predict(shifted(images.test, seed)) for seed in SHIFT_SEEDS]
    unchanged = torch.stack([(m == still).float().mean() for m in moved]).mean()
    return float((still == images.test_labels).float().mean()), float(unchanged)


def measure(
    arm: str, images: Images, geometry: Geometry, device: str = "cpu", repeats: int = 12
) -> Cost:
    """Times training steps with both engines side by side (alternating, medians) and counts the
    bytes the pooling layer keeps."""
    engines = ("torchpool", "torch")
    nets = {e: network(arm, geometry, images.channels, len(images.classes), e) for e in engines}
    batch, labels = images.train[:BATCH].to(device), images.train_labels[:BATCH].to(device)
    times: dict[str, list[float]] = {engine: [] for engine in engines}
    for engine in engines:
        nets[engine].to(device).train()
    for repeat in range(repeats + 2):
        for engine in engines:
            elapsed = _step(nets[engine], batch, labels)
            if repeat >= 2:  # the first two warm up: kernels are compiled or loaded there
                times[engine].append(elapsed)
    x = torch.randn(BATCH, WIDTHS[0], *images.train.shape[-2:], device=device)
    saved = {engine: saved_bytes(nets[engine][3], x) for engine in engines}  # type: ignore[index]
    after = nets["torchpool"][3](x)  # type: ignore[index]
    return Cost(
        x.numel() * x.element_size(),
        after.numel() * after.element_size(),
        median(times["torchpool"]) * 1e3,
        median(times["torch"]) * 1e3,
        saved["torchpool"],
        saved["torch"],
    )


def _step(net: nn.Module, batch: Tensor, labels: Tensor) -> float:
    _synchronise(batch)
    began = time.perf_counter()
    net.zero_grad(set_to_none=True)
    F.cross_entropy(net(batch), labels).backward()
    _synchronise(batch)
    return time.perf_counter() - began


def _synchronise(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
