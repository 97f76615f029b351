"""classifiers.py -- the three nets that judge images, and what they say of them.

Trained on synthetic images to be tested on real ones, or on real ones to judge synthetic ones: DPDM's
networks (Cao et al. 2021; Dockhorn et al. 2023, Sec. 5). What evaluate.py measures with, outside guarantees.

  $ python -m support.classifiers        # the three nets, with their sizes
"""
import contextlib
import math
import re
from pathlib import Path
from typing import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import data
from machinery import checkpoint, devices, folders, screen


NETS = ("logistic", "MLP", "CNN")
BATCH, LEARNING_RATE = 128, 1e-3     # images; Adam's at the first step, falling linearly to 0 (DPDM: 3e-4)


@torch.no_grad()
def features(net: nn.Module, images: Tensor, batch: int = 500, desc: str | None = None) -> Tensor:
    """net(images) in float32, in batches: uint8 (n, C, H, W) -> (n, d) on the CPU; desc: of the bar."""
    device = next(net.parameters()).device
    parts = screen.bar(images.split(batch), desc or "", "batch", wanted=desc is not None)
    return torch.cat([net(data.to_float(part.to(device))).float().cpu() for part in parts])


def classifier(kind: str, shape: tuple, classes: int) -> nn.Sequential:
    """DPDM's three nets: (n, C, H, W) -> (n, classes). [Cao et al. 2021; Dockhorn et al. 2023, their code]"""
    C, H, W = shape
    if kind == "logistic":
        return nn.Sequential(nn.Flatten(), nn.Linear(C * H * W, classes))
    if kind == "MLP":
        return nn.Sequential(nn.Flatten(), nn.Linear(C * H * W, 100), nn.ReLU(), nn.Linear(100, classes))
    h, w = (((side - 2) // 2 - 2) // 2 - 2 for side in (H, W))           # 28 -> 3
    if kind != "CNN":
        raise ValueError(f"classifier {kind!r}: expected one of {', '.join(NETS)}")
    if min(h, w) < 1:
        raise ValueError(f"images of {H} x {W} are too small for the CNN that judges: expected 18 x 18 or "
                         f"more")
    return nn.Sequential(nn.Conv2d(C, 32, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Dropout(0.5),
                         nn.Conv2d(32, 64, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Dropout(0.5),
                         nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Flatten(),
                         nn.Linear(128 * h * w, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, classes)
                         ).to(memory_format=torch.channels_last)         # 1.4 times faster on a CPU


def train_classifier(net: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int = 0,
                     desc: str | None = None) -> nn.Module:
    """Cross-entropy from fresh weights drawn with `seed`; the last epoch's net, in eval mode.

    Nothing is chosen by looking at other images. (DPDM keeps the epoch that is best on held-out synthetic
    ones.)
    Shapes: images uint8 (n, C, H, W), labels (n,)
    """
    device = next(net.parameters()).device
    images, labels = images.to(device), labels.to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    steps = epochs * math.ceil(len(images) / BATCH)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):       # the caller's is untouched
        torch.manual_seed(seed)
        for layer in net.train().modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        lots = (lot for _ in range(epochs) for lot in torch.randperm(len(images)).to(device).split(BATCH))
        bar = screen.bar(lots, desc or "", "step", wanted=desc is not None, total=steps)
        for step, lot in enumerate(bar):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
            with devices.autocast(device, net):
                loss = F.cross_entropy(net(data.to_float(images[lot])), labels[lot])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


def recognised_share(judge: nn.Sequential, images: Tensor,
                     labels: Tensor) -> tuple[float, list[float | None]]:
    """Share of images whose likeliest class is their label: over all, and class by class (None: no image)."""
    labels = labels.cpu()
    right, by_class = (features(judge, images).argmax(1) == labels).double(), []
    for c in range(judge[-1].out_features):
        chosen = right[labels == c]
        by_class.append(chosen.mean().item() if len(chosen) else None)
    return right.mean().item(), by_class


def cached(folder: Path | None, what: str, key: str, make: Callable):
    """make(), or what folder/what.pt kept of it under this key. Computed from private images: owner-only."""
    if folder is None:
        return make()
    path = Path(folder) / (re.sub(r"[^A-Za-z0-9]+", "-", what) + ".pt")
    with contextlib.suppress(Exception):                                 # missing or unreadable: made again
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["key"] == key:
            return saved["value"]
    value = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(path, dict(key=key, value=value))
    except OSError as e:                                                 # a cache is no reason to stop
        folders.note(f"{what} is not kept for the next time: {e.strerror or e}")
    return value


def judge(name: str, images: Tensor, labels: Tensor, *, epochs: int = 3, device: torch.device | str = "cpu",
          folder: Path | None = Path("runs")) -> nn.Sequential:
    """The CNN trained on real images, kept as folder/judge-NAME.pt (None: not kept); judge[:-1]: 128 numbers.

    Trained on private images WITHOUT privacy: keep the file as you keep the images.
    Example: judge("mnist", *data.load("mnist")) is right on 98.7% of MNIST's test images
    """
    net = classifier("CNN", images.shape[1:], int(labels.max()) + 1).to(device)
    key = f"{epochs} epochs of {BATCH} at {LEARNING_RATE}, {checkpoint.fingerprint(images, labels)}"

    def make() -> dict:
        return train_classifier(net, images, labels, epochs, desc=f"judge of {name}").state_dict()
    net.load_state_dict(cached(folder, f"judge-{name}", key, make))
    return net.eval()


if __name__ == "__main__":
    for kind in NETS:
        net = classifier(kind, (1, 28, 28), 10)
        print(f"{kind:<9} {sum(p.numel() for p in net.parameters()):>8,} weights for 10 classes of 28 x 28")
