"""speed.py -- what a private step costs, compared with an ordinary step and with Opacus, and how that grows.

All steps do the same work: the same UNet, adapters and images. They run in turn in one process, and ratios
are medians over the rounds. Opacus sees the same adapter as modules of PEFT, because its hooks know nn.Linear
and nn.Embedding.

  $ pip install -r requirements-peers.txt
  $ python benchmarks/speed.py                       # --no-peers leaves out Opacus and dp-accounting
  $ python benchmarks/speed.py --train               # also times the default run, `python train.py`
  $ python benchmarks/speed.py --growth --plot       # how the cost grows, and assets/cost.png
"""
import argparse
import contextlib
import functools
import itertools
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import accountant  # noqa: E402
import base  # noqa: E402
import ddpm  # noqa: E402
import dpsgd  # noqa: E402
import lora  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
import unet  # noqa: E402
from drawings import glyphs  # noqa: E402
from machinery import devices, draws  # noqa: E402
from machinery.secret import Secret, new_key  # noqa: E402
from support import runs  # noqa: E402

# dense bfloat16 operations a second (NVIDIA's data sheets)
PEAK = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}

# -----------------------------------------------------------------------------
# 1. one step, computed in several ways


def setting(device, images: int, K: int = 1, rank: int = 16, side: int = 28, what: str = "lora",
            channels: int | None = None, file: str = "base.pt"):
    """(model, trainable, frozen, example): a model that is ready for fine-tuning, and a lot.

    The model is the base in assets/`file`, or a new UNet with `channels`. The images are drawn digits, and
    each channel of the network sees the same one.
    """
    torch.manual_seed(0)
    model = unet.UNet(channels=channels) if channels else base.load(ROOT / "assets" / file).model
    lora.attach(model, lora.describe(what, rank, rank, True))
    model.to(device)
    x0, labels = glyphs.draw(images, torch.Generator().manual_seed(0))
    x0 = F.interpolate(x0, size=(side, side)).expand(-1, model.config["image_channels"], -1, -1)
    labels = labels % model.classes
    return model, *lora.split(model), tuple(v.to(device) for v in (x0, labels, *ddpm.draw_t_and_noise(x0, K)))


def precision_of(device) -> str:
    """The precision in which train.py runs the UNet for grey images on this device."""
    return devices.precision(device, unet.UNet())


def losses_of(model, frozen, device, precision: str, compiled: bool = False):
    """losses(params, x0, labels, t, noise) -> (n,), with the network in the given precision."""
    def plain(params, *example):
        return ddpm.loss(lambda *a: functional_call(model, (params, frozen), a), *example)
    inner = torch.compile(plain, dynamic=False) if compiled else plain

    def losses(params, *example):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            return inner(params, *example)
    return losses


def ordinary_step(losses, trainable, example, chunk: int):
    """A function that computes the mean gradient of a step by ordinary backward passes of `chunk` images."""
    def step():
        weights = list(trainable.values())
        parts = [torch.autograd.grad(losses(trainable, *part).sum() / len(example[0]), weights)
                 for part in zip(*(e.split(chunk) for e in example))]
        return [sum(g[1:], g[0]) for g in zip(*parts)]
    return step


def private_step(losses, trainable, example, chunk: int, by_copies: bool = True, C: float = 0.01,
                 sigma: float = 1.0):
    """A function that computes the private gradient of a step: clips, sums and adds noise."""
    per_sample = (functools.partial(dpsgd.per_sample_grads_by_copies, losses) if by_copies else
                  functools.partial(dpsgd.per_sample_grads, dpsgd.loss_of_one(losses)))
    fresh = normals_of(trainable)
    return lambda: dpsgd.private_gradient(per_sample, trainable, example, C=C, sigma=sigma, B=len(example[0]),
                                          normals=fresh(), chunk=chunk)


def normals_of(trainable):
    """A function whose every call draws the secret normals of another step, one for each trained weight."""
    secret, steps, weights = Secret(new_key()), itertools.count(), sum(p.numel() for p in trainable.values())
    return lambda: secret.normals(next(steps), weights)


def opacus_step(device, trainable, example, rank: int, **how):
    """The same gradient by Opacus: its GradSampleModule around the same adapter as modules of PEFT."""
    from opacus.grad_sample import GradSampleModule
    from peft import PeftModel
    with tempfile.TemporaryDirectory() as folder:
        lora.save(Path(folder), trainable, lora.describe("lora", rank, rank, True))
        plain = base.load(ROOT / "assets" / "base.pt").model
        theirs = PeftModel.from_pretrained(plain, folder, is_trainable=True)
    theirs, fresh = GradSampleModule(theirs, strict=False, **how).to(device), normals_of(trainable)

    def step():
        theirs.zero_grad(set_to_none=True)
        for p in theirs.parameters():
            p.grad_sample = None
        ddpm.loss(theirs, *example).mean().backward()
        grads = {k: p.grad_sample for k, p in theirs.named_parameters()
                 if getattr(p, "grad_sample", None) is not None}
        return dpsgd.add_noise(dpsgd.clip_and_sum(grads, 0.01), 0.01, fresh())
    return step


def steps(n: int, K: int, rank: int, device, peers: bool, compiled: bool) -> dict:
    """name -> a function that computes the gradient of one step, from the same n images with K draws each."""
    model, trainable, frozen, example = setting(device, n, K, rank)
    made, default = {}, precision_of(device)
    for precision in dict.fromkeys((default, "float32")):
        losses = losses_of(model, frozen, device, precision)
        made[f"ordinary, {precision}"] = ordinary_step(losses, trainable, example, n)
        made[f"ours (copies), {precision}"] = private_step(losses, trainable, example, n)
    made["ours (vmap), float32"] = private_step(losses, trainable, example, n, by_copies=False)
    if compiled:
        torch.compiler.reset()
        fast = losses_of(model, frozen, device, default, compiled=True)
        for name, make in (("ordinary", ordinary_step), ("ours (copies)", private_step)):
            with contextlib.suppress(Exception):                       # no row if it does not compile here
                make(fast, trainable, example, n)()
                made[f"{name}, compiled, {default}"] = make(fast, trainable, example, n)
    if peers and K == 1:                                         # for K > 1 it would clip each draw by itself
        made["Opacus hooks, float32"] = opacus_step(device, trainable, example, rank)
        made["Opacus functorch, float32"] = opacus_step(device, trainable, example, rank,
                                                        force_functorch=True)
    return made


def measure(made: dict, rounds: int, device) -> dict:
    """name -> the seconds of each round. A round runs all steps once, in turn."""
    seconds = {name: [] for name in made}
    for r in range(rounds + 1):
        for name, step in made.items():
            start = time.perf_counter()
            step()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            if r:                                                        # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def seconds_of(call) -> float:
    """The seconds of one call, without a warm-up."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ratios(seconds: dict, name: str, other: str) -> list[float]:
    """The time of `name` divided by that of `other`, round by round."""
    return [x / y for x, y in zip(seconds[name], seconds[other])]


def spread(values, form: str) -> str:
    """The 10% and the 90% quantile as text."""
    return " to ".join(form.format(v) for v in np.quantile(values, (0.1, 0.9)))


def table_of_steps(n: int, rank: int, rounds: int, device, peers: bool) -> dict:
    """Print the table of steps. Returns: K -> name -> the seconds of each round"""
    print("| step | K | ms, median | spread (10-90%) | over the ordinary step of the same precision "
          "| images x draws per second | share of the GPU's peak |\n"
          "| --- | --- | --- | --- | --- | --- | --- |")
    peak, found = PEAK.get(device_name(device)), {}
    for K in (1, 4):
        made = steps(n // K, K, rank, device, peers, compiled=device.type == "cuda")
        with FlopCounterMode(display=False) as counter:       # the operations of one ordinary step
            made["ordinary, float32"]()
        found[K] = measure(made, rounds, device)
        for name, s in found[K].items():
            precision, seconds = name.split(", ")[-1], median(s)
            flops, over = counter.get_total_flops(), ratios(found[K], name, f"ordinary, {precision}")
            share = f"{flops / seconds / peak:.2%}" if peak and precision == "bfloat16" else "-"
            print(f"| {name} | {K} | {1e3 * seconds:.1f} | {spread(1e3 * np.array(s), '{:.1f}')} | "
                  f"{median(over):.2f} | {n / seconds:,.0f} | {share} |", flush=True)
    return found


# -----------------------------------------------------------------------------
# 2. the targets


def verdict(what: str, bound: str, value: float | None, note: str = "") -> str:
    """One row of the table of targets. bound is ">= x" or "<= x"; value = None: not measured, see `note`."""
    if value is None:
        return f"| {what} | {bound} | not measured ({note}) | - |"
    limit = float(bound[3:].replace(",", ""))
    met = value <= limit if bound.startswith("<=") else value >= limit
    shown = f"{value:.3f}" if limit < 2 else f"{value:.1f}" if limit < 1000 else f"{value:,.0f}"
    return f"| {what} | {bound} | {shown}{note and f' ({note})'} | {'yes' if met else '**no**'} |"


def peak_of_a_lot(lot: int, chunk: int, resident: int, device) -> int:
    """The peak memory of this process in bytes, after one private step with `lot` of `resident` images.

    The images are random bytes, because drawing glyphs takes some 200 MiB, which would hide the memory of the
    step. On Linux the peak is read from /proc, because getrusage's ru_maxrss is inherited from the process
    that started this one.
    """
    images = torch.randint(256, (resident, 1, 28, 28), dtype=torch.uint8).to(device)
    labels = torch.randint(10, (resident,)).to(device)
    model = base.load(ROOT / "assets" / "base.pt").model
    lora.inject(model, 16, 16)
    trainable, frozen = lora.split(model.to(device))
    key, s = torch.tensor(0, device=device), train.Settings(K=1)
    pick = torch.randperm(resident)[:lot].to(device)
    hashes = draws.hashes(images[pick])
    examples = train.with_draws(images[pick], labels[pick], hashes, key, 1, model.classes, s)
    per_sample = train.per_image_gradients(model, frozen, s)
    dpsgd.private_gradient(per_sample, trainable, examples, C=0.01, sigma=1.0, B=lot,
                           normals=normals_of(trainable)(), chunk=chunk)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss            # macOS: bytes


def seconds_of_calibrations(s: train.Settings, peers: bool) -> dict:
    """name -> the seconds in which the sigma of the default run is found.

    Ours is the median of 10 calls; each peer is called once.
    """
    q = s.B / s.N
    made = {"ours": lambda: accountant.calibrate(s.epsilon, s.delta, q, s.steps)}
    if peers:
        import dp_accounting
        from dp_accounting import pld, rdp
        from opacus.accountants.utils import get_noise_multiplier
        for kind in ("rdp", "prv"):
            made[f"Opacus ({kind})"] = lambda kind=kind: get_noise_multiplier(
                target_epsilon=s.epsilon, target_delta=s.delta, sample_rate=q, steps=s.steps, accountant=kind)
        run = lambda sigma: dp_accounting.SelfComposedDpEvent(
            dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma)), s.steps)
        for name, kind in (("rdp", rdp.RdpAccountant), ("pld", pld.PLDAccountant)):
            made[f"dp-accounting ({name})"] = lambda kind=kind: dp_accounting.calibrate_dp_mechanism(
                kind, run, s.epsilon, s.delta)
    seconds = {name: seconds_of(make) for name, make in made.items()}
    return seconds | {"ours": median(measure({"ours": made["ours"]}, 10, torch.device("cpu"))["ours"])}


def table_of_targets(found: dict, n: int, device, peers: bool, train_too: bool) -> None:
    """Print each target with what was measured and whether the target is met."""
    print("\n| target | bound | measured | met |\n| --- | --- | --- | --- |")
    say = lambda *row: print(verdict(*row), flush=True)
    cpu = device.type == "cpu"
    for precision in dict.fromkeys(("float32", precision_of(device))):
        for K in (1, 4):
            r = ratios(found[K], f"ours (copies), {precision}", f"ordinary, {precision}")
            say(f"private step / ordinary step, K = {K}, {precision}", "<= 1.05" if cpu else "<= 1.10",
                median(r), spread(r, "{:.2f}"))
    r = ratios(found[1], "Opacus hooks, float32", "ours (copies), float32") if peers else None
    say("step by Opacus' hooks / ours, K = 1, float32", ">= 1.05" if cpu else ">= 1.5",
        *((median(r), spread(r, "{:.2f}")) if peers else (None, "because of --no-peers")))

    def peak_alone(lot: int) -> int:
        """peak_of_a_lot in a separate process."""
        command = [sys.executable, __file__, "--n", str(n), "--lot", str(lot), "--device", str(device)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    small, large = peak_alone(4 * n), peak_alone(64 * n)
    say(f"peak memory with a lot of {64 * n:,} / with a lot of {4 * n:,}", "<= 1.05", large / small,
        f"{large / 2**20:,.0f} MiB / {small / 2**20:,.0f} MiB")
    times = seconds_of_calibrations(train.check(train.Settings()), peers)
    ours = times.pop("ours")
    say("accountant.calibrate, ms", "<= 50", 1e3 * ours)
    for name, seconds in times.items():
        say(f"calibration by {name} / accountant.calibrate", ">= 5", seconds / ours,
            f"{1e3 * seconds:,.0f} ms")
    if not peers:
        say("calibration by Opacus and dp-accounting / accountant.calibrate", ">= 5", None,
            "because of --no-peers")
    glyphs.draw(10)                                                      # the first call draws the templates
    say("glyphs drawn per second", ">= 10,000", 20_000 / seconds_of(lambda: glyphs.draw(20_000)))
    run, m = runs.load(ROOT / "assets" / "mnist-eps10", public=True), min(1000, 4 * n)
    run.model.to(device)
    how = ddpm.Sampling("ddim", 50, guidance=0.0)
    generate = lambda: sample.generate(run, sample.trained_classes(run, m), m, how, quiet=True)
    say("10,000 samples of 50 steps, seconds", "<= 240", seconds_of(generate) * 10_000 / m,
        f"from {m:,} samples")
    seconds = None
    if train_too:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "train.py", "--out", f"{folder}/run", "--device", str(device)]
            seconds = seconds_of(lambda: subprocess.run(command, cwd=ROOT, capture_output=True, check=True))
    say("python train.py, seconds", "<= 180", seconds, "" if train_too else "needs --train")


# -----------------------------------------------------------------------------
# 3. how the cost grows


def shapes(n: int) -> dict:
    """what varies -> the changes to the base point.

    The base point has n images, one draw each, rank 16, 28 x 28 pixels, LoRA, and the base for digits.
    """
    return {"images B": [dict(images=b) for b in (max(1, n // 4), n, 4 * n, 16 * n)],
            "draws K, B K fixed": [dict(images=max(1, n // K), K=K) for K in (1, 4, 16)],
            "draws K, B fixed": [dict(K=K) for K in (1, 4, 16)],
            "rank": [dict(rank=r) for r in (4, 16, 64)],
            "image side": [dict(side=side) for side in (28, 56)],
            "trained": [dict(what=what) for what in lora.TARGETS],
            "channels": [dict(channels=c) for c in (32, 64, 128)],       # 32: the shipped base's width
            "trained, latents": [dict(images=4 * n, side=16, file="smears.pt", what=what)
                                 for what in ("lora", "lora+embed", "lora+conv")]}


def growth(groups: dict, n: int, rounds: int, device) -> list[tuple]:
    """A row for each shape; all shapes are timed in turn.

    A row is (what varies, its value, ms of a private step, that over the ms at the base point, that over the
    ms of the ordinary step). A chunk has 4 n images x draws. Precision and kind of gradients are train.py's.
    """
    point = dict(images=n, K=1, rank=16, side=28, what="lora", channels=None, file="base.pt")
    key = lambda change: tuple({**point, **change}.items())
    made = {}
    for shape in dict.fromkeys(key(change) for change in [{}, *sum(groups.values(), [])]):       # each once
        how = dict(shape)
        model, trainable, frozen, example = setting(device, **how)
        precision, chunk = devices.precision(device, model), max(1, 4 * n // how["K"])
        losses = losses_of(model, frozen, device, precision)
        made[shape, "private"] = private_step(losses, trainable, example, chunk,
                                              by_copies=how["what"].startswith("lora"))
        made[shape, "ordinary"] = ordinary_step(losses, trainable, example, chunk)
    seconds = measure(made, rounds, device)
    start = (key({}), "private")
    return [(what, list(change.values())[-1], 1e3 * median(seconds[key(change), "private"]),
             median(ratios(seconds, (key(change), "private"), start)),
             median(ratios(seconds, (key(change), "private"), (key(change), "ordinary"))))
            for what, changes in groups.items() for change in changes]


def plot(rows: list[tuple], path: Path) -> None:
    """Plot the numeric rows of `growth`, each relative to the base point, on logarithmic axes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    point = {"images B": rows[1][1], "rank": 16, "image side": 28, "channels": 32}
    figure, axes = plt.subplots(figsize=(6, 4))
    for what in dict.fromkeys(row[0] for row in rows if "trained" not in row[0]):
        points = [(value / point.get(what, 1), times) for name, value, _, times, _ in rows if name == what]
        axes.loglog(*zip(*points), "o-", label=what)
    axes.loglog((1 / 4, 16), (1 / 4, 16), "k:", label="proportional")
    axes.set(xlabel="times the base point's value", ylabel="times the base point's ms",
             title="cost of a private step")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def device_name(device) -> str:
    """The name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    lines = [line for line in text.splitlines() if line.startswith("model name")]
    return lines[0].split(": ")[1] if lines else platform.processor() or platform.machine()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--n", type=int, default=256,
                   help="images times draws of a step, at least 16; all other sizes follow from it")
    p.add_argument("--rounds", type=int, help="how often each step is timed (default: 15, with --growth 5)")
    p.add_argument("--rank", type=int, default=16, help="LoRA rank")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--no-peers", action="store_true", help="leave out Opacus and dp-accounting")
    p.add_argument("--train", action="store_true", help="also time the default run, `python train.py`")
    p.add_argument("--growth", action="store_true", help="print only how the cost grows")
    p.add_argument("--plot", action="store_true", help="with --growth, draw assets/cost.png")
    # for this program's own use: print only the peak memory with a lot of this size, in bytes
    p.add_argument("--lot", type=int, help=argparse.SUPPRESS)
    a = p.parse_args()
    warnings.filterwarnings("ignore")                                    # the peers' deprecations
    device, peers = devices.pick(a.device), not a.no_peers
    if a.lot:
        return print(peak_of_a_lot(a.lot, a.n, 64 * a.n, device))
    print(f"torch {torch.__version__}, {device}: {device_name(device)}, {torch.get_num_threads()} threads, "
          f"{precision_of(device)} by default, {a.n // 4 if a.growth else a.n} images x draws per step, "
          f"rank {a.rank}\n")
    if not a.growth:
        found = table_of_steps(a.n, a.rank, a.rounds or 15, device, peers)
        return table_of_targets(found, a.n, device, peers, a.train)
    rows = growth(shapes(a.n // 4), a.n // 4, a.rounds or 5, device)
    print("| what | value | ms of a private step | over the base point | over the ordinary step |\n"
          "| --- | --- | --- | --- | --- |")
    for what, value, ms, times, over_ordinary in rows:
        print(f"| {what} | {value} | {ms:.1f} | {times:.2f} | {over_ordinary:.2f} |")
    if a.plot:
        plot(rows, ROOT / "assets" / "cost.png")
        print("\nwrote assets/cost.png")


if __name__ == "__main__":
    main()
