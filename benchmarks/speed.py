"""speed.py -- what a private step costs, beside the ordinary step and Opacus' step on the same work.

All on the same UNet, adapters and lot, interleaved in one process; medians of ratios to the ordinary step.
Opacus sees the same adapter through PEFT's modules (its hooks know nn.Linear and nn.Embedding).

  $ pip install -r requirements-peers.txt && python benchmarks/speed.py
"""
import argparse
import resource
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).parent.parent))
import accountant  # noqa: E402
import data  # noqa: E402
import ddpm  # noqa: E402
import dpsgd  # noqa: E402
import lora  # noqa: E402
import sample  # noqa: E402

warnings.filterwarnings("ignore")
ROOT = Path(__file__).parent.parent


def adapted(rank: int):
    """(model, trainable, frozen) of the shipped base with fresh adapters."""
    torch.manual_seed(0)
    model = ddpm.load_unet(ROOT / "assets" / "base.pt")
    lora.inject(model, rank, rank)
    return model, *lora.split(model)


def in_peft(rank: int, **how):
    """The same adapter in PEFT's modules, under Opacus' GradSampleModule."""
    from opacus.grad_sample import GradSampleModule
    from peft import PeftModel
    model, trainable, _ = adapted(rank)
    with tempfile.TemporaryDirectory() as folder:
        lora.save(Path(folder), trainable, lora.describe("lora", rank, rank, True))
        theirs = PeftModel.from_pretrained(ddpm.load_unet(ROOT / "assets" / "base.pt"), folder, is_trainable=True)
    return GradSampleModule(theirs, strict=False, **how)


def steps(n: int, K: int, rank: int, device, peers: bool) -> dict:
    """name -> a function that makes one optimiser step's gradient for the same n images with K draws each."""
    model, trainable, frozen = adapted(rank)
    model.to(device)
    trainable, frozen = lora.split(model)
    x0, labels = (v.to(device) for v in data.glyphs(n, torch.Generator().manual_seed(0)))
    t, noise = ddpm.draw_t_and_noise(x0, K)
    example = (x0, labels, t, noise)
    generator = dpsgd.os_generator()

    def losses(params, *ex, autocast=True):
        call = lambda *a: functional_call(model, (params, frozen), a)
        with ddpm.autocast(x0.device) if autocast else torch.autocast(device.type, enabled=False):
            return ddpm.loss(call, *ex)

    def one(params, *ex):
        return losses(params, *(e[None] for e in ex), autocast=False)[0]

    def private(per_sample):
        return lambda: dpsgd.private_gradient(per_sample, trainable, example, C=0.01, sigma=1.0, B=n, generator=generator, chunk=n)

    made = {"ordinary": lambda: torch.autograd.grad(losses(trainable, *example).mean(), list(trainable.values())),
            "ours (copies)": private(lambda p, *ex: dpsgd.per_sample_grads_by_copies(losses, p, *ex)),
            "ordinary, float32": lambda: torch.autograd.grad(losses(trainable, *example, autocast=False).mean(), list(trainable.values())),
            "ours (copies), float32": private(lambda p, *ex: dpsgd.per_sample_grads_by_copies(
                lambda *a: losses(*a, autocast=False), p, *ex)),
            "ours (vmap), float32": private(lambda p, *ex: dpsgd.per_sample_grads(one, p, *ex))}
    if peers and K == 1:                                                 # K > 1: its rows would be clipped one by one
        for name, how in (("Opacus hooks, float32", dict()), ("Opacus functorch, float32", dict(force_functorch=True))):
            theirs = in_peft(rank, **how).to(device)

            def step(theirs=theirs):
                theirs.zero_grad(set_to_none=True)
                for p in theirs.parameters():
                    p.grad_sample = None
                ddpm.loss(theirs, *example).mean().backward()
                grads = {k: p.grad_sample for k, p in theirs.named_parameters() if getattr(p, "grad_sample", None) is not None}
                return dpsgd.add_noise(dpsgd.clip_and_sum(grads, 0.01), 0.01, generator)
            made[name] = step
    return made


def measure(made: dict, rounds: int, device) -> dict:
    """name -> seconds of each round; every round runs all of them once, in turn."""
    seconds = {name: [] for name in made}
    for r in range(rounds + 1):
        for name, step in made.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if r:                                                        # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--n", type=int, default=256, help="images times draws per step")
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--device", default="auto")
    p.add_argument("--no-peers", action="store_true")
    a = p.parse_args()
    device = sample.pick_device(a.device)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {a.n} images x draws a step, rank {a.rank}\n")
    print("| step | K | ms, median | spread (10-90%) | over the ordinary step of the same precision |\n| --- | --- | --- | --- | --- |")
    for K in (1, 4):
        seconds = measure(steps(a.n // K, K, a.rank, device, not a.no_peers), a.rounds, device)
        for name, s in seconds.items():
            ordinary = seconds["ordinary, float32" if "float32" in name else "ordinary"]
            ratio = statistics.median(x / y for x, y in zip(s, ordinary))
            low, high = statistics.quantiles(s, n=10)[0], statistics.quantiles(s, n=10)[-1]
            print(f"| {name} | {K} | {1e3 * statistics.median(s):.0f} | {1e3 * low:.0f} to {1e3 * high:.0f} | {ratio:.2f} |", flush=True)

    print("\n| other | measured |\n| --- | --- |")
    start = time.perf_counter()
    for _ in range(10):
        accountant.calibrate(10.0, 1e-5, 0.0085, 300)
    print(f"| calibrate | {(time.perf_counter() - start) * 100:.0f} ms |")
    if not a.no_peers:
        from opacus.accountants.utils import get_noise_multiplier
        for kind in ("rdp", "prv"):
            start = time.perf_counter()
            get_noise_multiplier(target_epsilon=10.0, target_delta=1e-5, sample_rate=0.0085, steps=300, accountant=kind)
            print(f"| Opacus get_noise_multiplier ({kind}) | {(time.perf_counter() - start) * 1000:.0f} ms |")
    data.glyphs(10)
    start = time.perf_counter()
    data.glyphs(20_000)
    print(f"| glyphs | {20_000 / (time.perf_counter() - start):,.0f} images a second |")
    model = ddpm.load_unet(ROOT / "assets" / "base.pt").to(device)
    start = time.perf_counter()
    sample.generate(model, torch.arange(1000) % 10, (1000, 1, 28, 28), steps=50, quiet=True)
    print(f"| sampling, 50 steps, no guidance | {(time.perf_counter() - start) * 10:.0f} s per 10,000 images |")
    print(f"| peak memory so far | {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB |")


if __name__ == "__main__":
    main()
