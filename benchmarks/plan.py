"""plan.py -- what a run at the paper's CelebA-HQ scale needs: operations, memory, hours and noise, by GPUs.

The network is built on torch's "meta" device, where tensors have shapes but nothing is computed.
FlopCounterMode counts the operations of a forward and backward pass with a copy of the adapter for each
image, and saved_tensors_hooks counts the bytes that the forward pass keeps for the backward pass. One figure
cannot be counted: the share of its peak that a GPU reaches. `python benchmarks/speed.py` measures it on a
GPU; this program takes it from --share.

  $ python benchmarks/plan.py                              # 2 minutes on a CPU, no GPU
"""
import argparse
import sys
from pathlib import Path

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import accountant  # noqa: E402
import lora  # noqa: E402
import unet  # noqa: E402

# DDPM's own network for 256 x 256 pixels (Ho et al. 2020, App. B); and the paper's network for CelebA-64, on
# latents ("code") of 64 x 64, in which each side of the image is a quarter as long, with attention from
# 32 x 32 on
NETWORKS = {
    "pixels, 256 x 256": (256, dict(image_channels=3, channels=128, multipliers=(1, 1, 2, 2, 4, 4), blocks=2,
                                    attention_levels=(4,), heads=1, classes=None, patch=1)),
    "code, 64 x 64": (64, dict(image_channels=3, channels=128, multipliers=(1, 2, 4), blocks=2,
                               attention_levels=(1, 2), heads=8, classes=None, patch=1))}
N, B, K, EPOCHS, RANK, DELTA = 30_000, 2048, 4, 10, 8, 1e-5    # the paper's released settings, published N
PEAK, MEMORY = 989e12, 80e9    # dense bfloat16 operations a second; bytes (H100 SXM, NVIDIA's data sheet)


def count(side: int, config: dict, rank: int, images: int = 1) -> dict:
    """What one chunk of `images` needs in bfloat16, as a dict.

    flops: operations of the forward and backward pass; kept: bytes kept between them
    weights, trained: how many weights are frozen, and how many are trained
    """
    with torch.device("meta"):
        model = unet.UNet(**config)
        lora.inject(model, rank, rank)
        trainable, frozen = lora.split(model.bfloat16())
        x = torch.empty(images, config["image_channels"], side, side).bfloat16()
        t = torch.empty(images, dtype=torch.int64)
    model.time.register_forward_pre_hook(lambda layer, inputs: inputs[0].bfloat16())
    copies = {name: p.detach().expand(images, *p.shape).requires_grad_() for name, p in trainable.items()}
    weights = {p.untyped_storage()._cdata for p in [*trainable.values(), *frozen.values()]}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage                       # a storage counts once, whatever its views
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = functional_call(model, (copies, frozen), (x, t)).square().mean()
        torch.autograd.grad(loss, list(copies.values()))
    return dict(flops=counter.get_total_flops(), kept=sum(s.nbytes() for s in kept.values()),
                weights=sum(p.numel() for p in frozen.values()),
                trained=sum(p.numel() for p in trainable.values()))


def hours(flops: int, draws: int, gpus: int, share: float) -> float:
    """Hours for `draws` passes (forward and backward) of one image, on `gpus` at `share` of their peak."""
    return flops * draws / (gpus * PEAK * share) / 3600


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--share", type=float, default=0.2,
                   help="share of its peak that a GPU is assumed to reach, above 0, at most 1")
    a = p.parse_args()
    if not 0 < a.share <= 1:
        p.exit(2, f"{p.prog}: --share {a.share}: expected a number above 0, at most 1\n")
    steps = round(EPOCHS * N / B)
    print(f"N = {N:,}, rank {RANK}, K = {K}, delta = {DELTA}; "
          f"a GPU with {PEAK / 1e12:.0f} TFLOP/s at its peak, of which it reaches {a.share:.0%}, and "
          f"{MEMORY / 1e9:.0f} GB\nAn image-draw is one draw of one image.\n")
    print("| network | trained and frozen weights | GFLOP per image-draw | MB kept per image-draw "
          "| image-draws in 70% of the memory |")
    print("| --- | --- | --- | --- | --- |")
    flops = {}
    for name, (side, config) in NETWORKS.items():
        c = count(side, config, RANK)
        flops[name] = c["flops"]
        print(f"| {name} | {c['trained']:,} and {c['weights'] / 1e6:.0f}M | {c['flops'] / 1e9:,.0f} "
              f"| {c['kept'] / 1e6:,.0f} | {int(0.7 * MEMORY / c['kept']):,} |", flush=True)
    print("\n| GPUs | expected batch size B | steps | sigma, epsilon = 1 | sigma, epsilon = 10 | "
          + " | ".join(f"hours, {name}" for name in NETWORKS) + " |\n| " + "--- | " * (5 + len(NETWORKS)))
    for gpus in (1, 8, 64):
        for lot in (B, 4 * B):
            sigma = [accountant.calibrate(e, DELTA, lot / N, steps) for e in (1.0, 10.0)]
            draws = lot * K * steps
            cells = " | ".join(f"{hours(flops[name], draws, gpus, a.share):.2g}" for name in NETWORKS)
            print(f"| {gpus} | {lot:,} | {steps} | {sigma[0]:.2f} | {sigma[1]:.2f} | {cells} |")


if __name__ == "__main__":
    main()
