"""lora.py -- freeze a network, and add updates of rank r to its layers.

    y = W x + (lora_alpha / r) B A x,    A: (r, d_in), B: (d_out, r)          [LoRA, Hu et al. 2021, Sec. 4.1]

W is public and frozen. Only A, B and the class embedding are trained on private data. (The baselines of the
DP-LoRA paper, Tsai et al. 2025, train weights of the network itself: see `train_only`.)

  $ python lora.py            # the default UNet before and after `inject`
"""
import csv
import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from machinery import checkpoint, kernels, screen

ATTENTION = ("qkv", "proj")              # the layers that DP-LoRA adapts
CONVOLUTIONS = ("conv1", "conv2")        # an extension: the convolutions of every residual block
EMBEDDINGS = ("embed",)                  # an extension: the linear layers by which t and the class enter the
                                         # residual blocks; they are few numbers
# Which layers LoRA adapts, by the last part of their names. To add a set of layers, add a row here. None:
# DP-LoRA's baselines, which train weights themselves (see `train_only`).
TARGETS = {"lora": ATTENTION, "lora+embed": ATTENTION + EMBEDDINGS, "lora+conv": ATTENTION + CONVOLUTIONS,
           "attention": None, "full": None}


class LoRALinear(nn.Module):
    """W x + (lora_alpha / r) B A x around a frozen nn.Linear. B starts at 0, so at first nothing changes.

    Shapes: x (n, ..., d_in) -> (n, ..., d_out); lora_A (r, d_in), lora_B (d_out, r)
    Both factors may have a leading dimension with one copy for each example: lora_A (m, r, d_in), lora_B
    (m, d_out, r), where m divides n. Example i then owns rows i n/m .. (i + 1) n/m of x (see
    dpsgd.per_sample_grads_by_copies).
    Errors: r < 1 or r > min(d_in, d_out) -> ValueError
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        _check_rank(rank, min(base.in_features, base.out_features))
        self.base, self.scale = base, alpha / rank
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / rank)   # std 1/r, as published
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        A, B = self.lora_A, self.lora_B
        rows = x if A.ndim == 2 else x.reshape(len(A), -1, x.shape[-1])
        update = rows @ A.mT @ B.mT                                      # one matrix product, or one per copy
        return self.base(x) + self.scale * update.reshape(*x.shape[:-1], -1)

    def delta(self) -> Tensor:
        """(d_out, d_in): the whole update (lora_alpha / r) B A, of rank at most r."""
        return self.scale * self.lora_B @ self.lora_A


class LoRAConv2d(nn.Module):
    """conv(x) + (lora_alpha / r) B * (A * x): A is a k x k convolution to r channels, B is 1 x 1.

    Shapes: lora_A (r, c_in, k, k), lora_B (c_out, r, 1, 1), or m equal copies of each, where m divides n
    """

    def __init__(self, base: nn.Conv2d, rank: int, alpha: float):
        super().__init__()
        height, width = base.kernel_size
        _check_rank(rank, min(base.in_channels * height * width, base.out_channels))
        self.base, self.scale = base, alpha / rank
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_channels, *base.kernel_size) / rank)
        self.lora_B = nn.Parameter(torch.zeros(base.out_channels, rank, 1, 1))

    def forward(self, x):
        A, B = self.lora_A, self.lora_B
        stride, padding = self.base.stride, self.base.padding
        if A.ndim == 4:
            update = F.conv2d(F.conv2d(x, A, None, stride, padding), B)
        else:
            update = kernels.conv_of_copies(kernels.conv_of_copies(x, A, stride, padding), B, (1, 1), (0, 0))
        return self.base(x) + self.scale * update

    def delta(self) -> Tensor:
        """(c_out, c_in, k, k): the update as one convolution's weight."""
        return self.scale * torch.einsum("or,rikl->oikl", self.lora_B[:, :, 0, 0], self.lora_A)


class PerExampleEmbedding(nn.Module):
    """nn.Embedding whose table may have one copy for each example.

    Shapes: weight (classes + 1, e), or m copies (m, classes + 1, e); the last row is the null class
    """

    def __init__(self, base: nn.Embedding):
        super().__init__()
        self.weight = base.weight

    def forward(self, labels):
        if self.weight.ndim == 2:
            return F.embedding(labels, self.weight)
        copies = len(self.weight)
        owner = torch.arange(copies, device=labels.device).repeat_interleave(len(labels) // copies)
        return self.weight[owner, labels]


def _check_rank(rank: int, largest: int) -> None:
    if not 1 <= rank <= largest:
        raise ValueError(f"rank = {rank}, expected 1 to {largest}, the smaller side of the layer it adapts")


# -----------------------------------------------------------------------------
# what to train


def inject(model: nn.Module, rank: int, alpha: float, targets: tuple[str, ...] = ATTENTION,
           class_embedding: bool = True) -> int:
    """Freeze `model`, and adapt each layer that has one of `targets` as the last part of its name.

    For example, the target "qkv" matches the layer "down.3.1.qkv".

    The class embedding becomes trainable as well, if there is one and `class_embedding` is true.
    Returns: the number of adapted layers
    Errors:  a bad rank, or a target that matches no layer -> ValueError. (The published code ignores such a
             target silently.)
    """
    model.requires_grad_(False)
    adapted = 0
    for target in targets:
        names = [name for name, layer in model.named_modules()
                 if name.split(".")[-1] == target and isinstance(layer, (nn.Linear, nn.Conv2d))]
        if not names:
            raise ValueError(f"lora.inject: no linear or convolution layer is called {target!r}, so nothing "
                             f"would be adapted; expected the last part of a layer's name, such as 'qkv'")
        for name in names:
            parent, child = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            base = getattr(parent, child)
            kind = LoRALinear if isinstance(base, nn.Linear) else LoRAConv2d
            setattr(parent, child, kind(base, rank, alpha))
            adapted += 1
    if class_embedding and getattr(model, "class_embedding", None) is not None:
        model.class_embedding = PerExampleEmbedding(model.class_embedding)
        model.class_embedding.requires_grad_(True)
    return adapted


def train_only(model: nn.Module, what: str) -> int:
    """Make weights themselves trainable, without LoRA, as DP-LoRA's baselines do.

    what:    "attention": the weights and biases of qkv and proj, and the class embedding, as in DP-LDM. The
             attention's GroupNorm stays frozen. "full": all weights
    Returns: the number of trainable tensors
    Errors:  another `what` -> ValueError
    """
    if what not in ("attention", "full"):
        raise ValueError(f"train_only: {what!r}, expected 'attention' or 'full'")
    chosen = []
    for name, p in model.named_parameters():
        attends = any(part in ATTENTION for part in name.split("."))
        if what == "full" or attends or "class_embedding" in name:
            chosen.append(p)
    model.requires_grad_(False)
    for p in chosen:
        p.requires_grad_(True)
    return len(chosen)


def new_classes(model: nn.Module, names: list[str], start: str = "own") -> None:
    """Give `model` a table of the classes `names` in place of its own; the null class stays.

    start says what each row begins as. All choices are public knowledge; a start that looked at the private
    images, or counted them, would be a leak.
        "own":  the public class of the same name, or the mean of all public classes if there is none
        "mean": the mean of all public classes
        "null": the null class
        else:   names of public classes, "bullfrog,sports car,...", one for each private class
    Rows of public classes that no private image can have are removed, because they would get noise and no
    gradient.
    Errors: a name that the base does not know, or another number of names than classes -> ValueError
    """
    old, known = model.class_embedding.weight.detach(), model.config.get("names") or []
    mean, null = old[:-1].mean(0), old[-1]
    if start == "own":
        row = {name: old[i] for i, name in enumerate(known)}
        rows = [row.get(name, mean) for name in names]
    elif start == "mean":
        rows = [mean] * len(names)
    elif start == "null":
        rows = [null] * len(names)
    else:
        wanted = [name.strip() for name in next(csv.reader([start], skipinitialspace=True))]
        unknown = [name for name in wanted if name not in known]
        if unknown or len(wanted) != len(names):
            raise ValueError(f"{len(wanted)} public classes ({start}) for {len(names)} private ones, unknown "
                             f"to the base: {', '.join(unknown) or 'none'}; expected own, mean, null, or for "
                             f"each private class one class name that the base knows")
        rows = [old[known.index(name)] for name in wanted]
    table = torch.stack([*rows, null])
    model.class_embedding = nn.Embedding(*table.shape, _weight=table)
    model.classes, model.config = len(names), dict(model.config, classes=len(names), names=None)


def split(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(trainable, frozen): two dicts name -> tensor that together hold every parameter and buffer."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return trainable, frozen | dict(model.named_buffers())


def merge(model: nn.Module) -> nn.Module:
    """Add each update to its frozen weight, in place, and remove the adapters.

        W <- W + (lora_alpha / r) B A
    """
    for parent in list(model.modules()):
        for child, layer in list(parent.named_children()):
            if isinstance(layer, (LoRALinear, LoRAConv2d)):
                layer.base.weight.data += layer.delta().detach()
                setattr(parent, child, layer.base)
    return model


# -----------------------------------------------------------------------------
# the adapter on disk, in PEFT's layout, so that peft.PeftModel.from_pretrained(UNet, folder) reads it
#
# Our LoRA factor `x.lora_A` is called `base_model.model.x.lora_A.weight` there. Every other trained tensor
# (the class embedding, and all weights of the baselines without LoRA) keeps its name after the prefix.

PREFIX = "base_model.model."


def attach(model: nn.Module, config: dict) -> int:
    """Make `model` trainable as an adapter_config.json says: with LoRA on its targets, or as a baseline."""
    if config["peft_type"] == "LORA":
        return inject(model, config["r"], config["lora_alpha"], tuple(config["target_modules"]),
                      class_embedding=bool(config["modules_to_save"]))
    return train_only(model, config["trained"])


def save(folder: Path, trainable: dict[str, Tensor], config: dict) -> None:
    """Write adapter_model.bin and adapter_config.json; `describe` makes the `config`."""
    state = {}
    for name, p in trainable.items():
        ending = ".weight" if name.endswith(("lora_A", "lora_B")) else ""
        state[PREFIX + name + ending] = p.detach().cpu().clone()
    checkpoint.save(Path(folder) / "adapter_model.bin", state, mode=0o644)
    checkpoint.write_text(Path(folder) / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def describe(what: str, rank: int, alpha: float, conditional: bool) -> dict:
    """The content of adapter_config.json for `what`, one of TARGETS.

    Errors: another `what` -> ValueError
    """
    if what not in TARGETS:
        raise ValueError(f"train = {what!r}, expected one of {', '.join(TARGETS)}")
    if TARGETS[what] is None:
        return dict(peft_type=None, trained=what)
    return dict(peft_type="LORA", r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", task_type=None,
                target_modules=list(TARGETS[what]),
                modules_to_save=["class_embedding"] if conditional else None)


def load(model: nn.Module, folder: Path) -> nn.Module:
    """Attach the adapter saved in `folder` to a plain UNet, in place. Only weights are read; no code is run.

    Errors: no adapter, an adapter of another network, a damaged or foreign file -> ValueError that says which
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        state = dict(torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True))
        config["peft_type"]                                              # a KeyError if it is missing
    except FileNotFoundError as e:
        raise ValueError(f"no adapter in {folder}: {Path(e.filename).name} is missing; train one with "
                         f"train.py") from None
    except Exception as e:
        raise ValueError(f"{folder} holds no readable adapter ({screen.cause(e)}); train it again") from None
    attach(model, config)
    trainable, _ = split(model)
    state = {name.removeprefix(PREFIX): p for name, p in state.items()}
    for name in [name for name in state if name.endswith(("lora_A.weight", "lora_B.weight"))]:
        state[name.removesuffix(".weight")] = state.pop(name)
    wrong = [name for name in trainable.keys() | state.keys()
             if name not in state or name not in trainable or state[name].shape != trainable[name].shape]
    if wrong:
        raise ValueError(f"the adapter in {folder} is for another network: {min(wrong)} and {len(wrong) - 1} "
                         f"more tensors do not fit; use the base it was trained on")
    with torch.no_grad():
        for name, p in trainable.items():
            p.copy_(state[name])
    return model


if __name__ == "__main__":
    import unet
    model = unet.UNet()
    total = sum(p.numel() for p in model.parameters())
    adapted = inject(model, rank=16, alpha=16)
    trainable, frozen = split(model)
    factors = sum(p.numel() for name, p in trainable.items() if "lora_" in name)
    rows = sum(p.numel() for name, p in trainable.items() if "lora_" not in name)
    print(f"before: {total:,} weights, all trainable")
    print(f"after:  {sum(p.numel() for p in frozen.values()):,} of them frozen, {rows:,} (the class "
          f"embedding) trainable as they are, and {factors:,} new ones in the factors of {adapted} adapted "
          f"layers\n")
    for name, p in trainable.items():
        print(f"  {name:<28} {str(tuple(p.shape)):<12} {p.numel():>6,}")
    first = next(name for name in trainable if name.endswith(".lora_A"))
    layer = model.get_submodule(first.removesuffix(".lora_A"))
    x = torch.randn(2, 49, layer.base.in_features)
    apart = (layer(x) - layer.base(x)).abs().max().item()
    print(f"\nwith B = 0 the layer has not changed: largest difference {apart:.1g}")
    nn.init.normal_(layer.lora_B)
    merged = F.linear(x, layer.base.weight + layer.delta(), layer.base.bias)
    rank, apart = torch.linalg.matrix_rank(layer.delta()).item(), (layer(x) - merged).abs().max().item()
    print(f"with B random the update {tuple(layer.delta().shape)} has rank {rank}, and "
          f"W x + (lora_alpha / r) B A x = (W + update) x to {apart:.1g}")
