"""plan.py -- what the paper's CelebA-HQ scale takes: operations, memory, hours and noise on 1, 8 and 64 GPUs.

Counted, not guessed: the network is built on torch's "meta" device, where shapes flow and nothing is
computed. FlopCounterMode counts the operations of a forward and backward pass with a copy of the adapter per
image, and saved_tensors_hooks the bytes that the forward pass keeps for the backward pass. The share of its
peak that a GPU reaches is the one figure to be measured (`python benchmarks/speed.py` on that GPU); here it
is declared: --share.

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

# DDPM's own network for 256 x 256 pixels (Ho et al. 2020, App. B); CelebA-64's of the paper on the 64 x 64
# code of an autoencoder that shrinks each side fourfold, with attention from 32 x 32 on
NETWORKS = {
    "pixels, 256 x 256": (256, dict(image_channels=3, channels=128, multipliers=(1, 1, 2, 2, 4, 4), blocks=2,
                                    attention_levels=(4,), heads=1, classes=None, patch=1)),
    "code, 64 x 64": (64, dict(image_channels=3, channels=128, multipliers=(1, 2, 4), blocks=2,
                               attention_levels=(1, 2), heads=8, classes=None, patch=1))}
N, B, K, EPOCHS, RANK, DELTA = 30_000, 2048, 4, 10, 8, 1e-5    # the paper's released settings; N as published
PEAK, MEMORY = 989e12, 80e9    # H100 SXM, NVIDIA's data sheet: dense bfloat16 operations a second, bytes


def count(side: int, config: dict, rank: int, images: int = 1) -> dict:
    """Of one chunk of `images` in bfloat16.

    The flops of forward and backward, the bytes kept between them, the weights, and the trained ones.
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
            kept[storage._cdata] = storage                       # each storage once, however many views of it
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = functional_call(model, (copies, frozen), (x, t)).square().mean()
        torch.autograd.grad(loss, list(copies.values()))
    return dict(flops=counter.get_total_flops(), kept=sum(s.nbytes() for s in kept.values()),
                weights=sum(p.numel() for p in frozen.values()),
                trained=sum(p.numel() for p in trainable.values()))


def hours(flops: int, draws: int, gpus: int, share: float) -> float:
    """Hours for `draws` forward and backward passes, shared by `gpus` that reach `share` of their peak."""
    return flops * draws / (gpus * PEAK * share) / 3600


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--share", type=float, default=0.2,
                   help="of the GPU's peak that is reached, declared: above 0, at most 1")
    a = p.parse_args()
    if not 0 < a.share <= 1:
        p.exit(2, f"{p.prog}: --share {a.share}: expected above 0, at most 1\n")
    steps = round(EPOCHS * N / B)
    print(f"N = {N:,}, rank {RANK}, K = {K}, delta = {DELTA}; "
          f"{PEAK / 1e12:.0f} TFLOP/s and {MEMORY / 1e9:.0f} GB a GPU, {a.share:.0%} of the peak\n")
    print("| network | trained of all weights | GFLOP an image-draw | MB kept an image-draw "
          "| image-draws in 70% of a GPU |")
    print("| --- | --- | --- | --- | --- |")
    flops = {}
    for name, (side, config) in NETWORKS.items():
        c = count(side, config, RANK)
        flops[name] = c["flops"]
        print(f"| {name} | {c['trained']:,} of {c['weights'] / 1e6:.0f}M | {c['flops'] / 1e9:,.0f} "
              f"| {c['kept'] / 1e6:,.0f} | {int(0.7 * MEMORY / c['kept']):,} |", flush=True)
    print("\n| GPUs | lot B | steps | sigma, epsilon = 1 | sigma, epsilon = 10 | "
          + " | ".join(f"hours, {name}" for name in NETWORKS) + " |\n| " + "--- | " * (5 + len(NETWORKS)))
    for gpus in (1, 8, 64):
        for lot in (B, 4 * B):
            sigma = [accountant.calibrate(e, DELTA, lot / N, steps) for e in (1.0, 10.0)]
            draws = lot * K * steps
            cells = " | ".join(f"{hours(flops[name], draws, gpus, a.share):.2g}" for name in NETWORKS)
            print(f"| {gpus} | {lot:,} | {steps} | {sigma[0]:.2f} | {sigma[1]:.2f} | {cells} |")


if __name__ == "__main__":
    main()
