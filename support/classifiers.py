"""classifiers.py -- the classifiers with which evaluate.py measures synthetic images.

They are DPDM's three networks (Cao et al. 2021; Dockhorn et al. 2023, Sec. 5). Trained on synthetic images,
they are tested on real ones. One of them, trained on real images, is the reference classifier, which is
applied to synthetic images. A run's guarantee covers neither the reference classifier nor what is measured.

  $ python -m support.classifiers        # the three networks and their sizes
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
BATCH = 128                          # images
LEARNING_RATE = 1e-3                 # of Adam at the first step; it falls linearly towards 0 (DPDM: 3e-4)


@torch.no_grad()
def features(net: nn.Module, images: Tensor, batch: int = 500, desc: str | None = None) -> Tensor:
    """net(images), computed in batches: uint8 (n, C, H, W) -> float32 (n, d) on the CPU.

    desc: what the progress bar says; None: no bar
    """
    device = next(net.parameters()).device
    parts = screen.bar(images.split(batch), desc or "", "batch", wanted=desc is not None)
    return torch.cat([net(data.to_float(part.to(device))).float().cpu() for part in parts])


def classifier(kind: str, shape: tuple, classes: int) -> nn.Sequential:
    """One of DPDM's three networks, (n, C, H, W) -> (n, classes).            [code of Dockhorn et al. 2023]

    kind:   one of NETS; shape: (C, H, W)
    Errors: another kind, or images that are too small for the CNN -> ValueError
    """
    C, H, W = shape
    if kind == "logistic":
        return nn.Sequential(nn.Flatten(), nn.Linear(C * H * W, classes))
    if kind == "MLP":
        return nn.Sequential(nn.Flatten(), nn.Linear(C * H * W, 100), nn.ReLU(), nn.Linear(100, classes))
    h, w = (((side - 2) // 2 - 2) // 2 - 2 for side in (H, W))           # 28 -> 3
    if kind != "CNN":
        raise ValueError(f"classifier {kind!r}: expected one of {', '.join(NETS)}")
    if min(h, w) < 1:
        raise ValueError(f"images of {H} x {W} are too small for the CNN that evaluates them: expected "
                         f"18 x 18 or more")
    return nn.Sequential(nn.Conv2d(C, 32, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Dropout(0.5),
                         nn.Conv2d(32, 64, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Dropout(0.5),
                         nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Flatten(),
                         nn.Linear(128 * h * w, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, classes)
                         ).to(memory_format=torch.channels_last)         # 1.4 times faster on a CPU


def train_classifier(net: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int = 0,
                     desc: str | None = None) -> nn.Module:
    """Train `net` on the cross-entropy, from new weights drawn with `seed`. Returns: it, in eval mode

    The weights are those after the last epoch. (DPDM keeps the epoch that is best on held-out synthetic
    images.)
    Shapes: images uint8 (n, C, H, W), labels (n,)
    """
    device = next(net.parameters()).device
    images, labels = images.to(device), labels.to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    steps = epochs * math.ceil(len(images) / BATCH)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):       # keeps the caller's state
        torch.manual_seed(seed)
        for layer in net.train().modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        batches = (b for _ in range(epochs) for b in torch.randperm(len(images)).to(device).split(BATCH))
        bar = screen.bar(batches, desc or "", "step", wanted=desc is not None, total=steps)
        for step, batch in enumerate(bar):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
            with devices.autocast(device, net):
                loss = F.cross_entropy(net(data.to_float(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


def recognised_share(net: nn.Sequential, images: Tensor,
                     labels: Tensor) -> tuple[float, list[float | None]]:
    """(share of all images whose most likely class by `net` is their label, the same share of each class).

    A class without images has None.
    """
    labels = labels.cpu()
    right = (features(net, images).argmax(1) == labels).double()
    by_class = []
    for c in range(net[-1].out_features):
        chosen = right[labels == c]
        by_class.append(chosen.mean().item() if len(chosen) else None)
    return right.mean().item(), by_class


def cached(folder: Path | None, what: str, key: str, make: Callable):
    """make(), or the value that folder/what.pt holds, if it was stored under the same key.

    The value is computed from private images, so only the owner can read the file. folder = None keeps none.
    """
    if folder is None:
        return make()
    path = Path(folder) / (re.sub(r"[^A-Za-z0-9]+", "-", what) + ".pt")
    with contextlib.suppress(Exception):                                 # if missing or unreadable, make it
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["key"] == key:
            return saved["value"]
    value = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(path, dict(key=key, value=value))
    except OSError as e:                                                 # the program works without a cache
        folders.note(f"{what} is not kept for the next time: {e.strerror or e}")
    return value


def reference_classifier(name: str, images: Tensor, labels: Tensor, *, epochs: int = 3,
                         device: torch.device | str = "cpu",
                         folder: Path | None = Path("runs")) -> nn.Sequential:
    """The CNN trained on real images, kept as folder/reference-classifier-NAME.pt (folder = None: not kept).

    All layers but the last give the 128 features of the classifier-FID. The CNN is trained on private images
    WITHOUT privacy: keep its file as secret as the images.
    Example: reference_classifier("mnist", *data.load("mnist")) is right on 98.7% of MNIST's test images
    """
    net = classifier("CNN", images.shape[1:], int(labels.max()) + 1).to(device)
    key = f"{epochs} epochs of {BATCH} at {LEARNING_RATE}, {checkpoint.fingerprint(images, labels)}"

    def make() -> dict:
        desc = f"reference classifier of {name}"
        return train_classifier(net, images, labels, epochs, desc=desc).state_dict()
    net.load_state_dict(cached(folder, f"reference-classifier-{name}", key, make))
    return net.eval()


if __name__ == "__main__":
    for kind in NETS:
        net = classifier(kind, (1, 28, 28), 10)
        print(f"{kind:<9} {sum(p.numel() for p in net.parameters()):>8,} weights for 10 classes of 28 x 28")
