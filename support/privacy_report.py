"""privacy_report.py -- the plan that a run prints before it starts, and its privacy report at the end.

A run is (epsilon, delta)-differentially private if for all sets of private images D and D' of which one is
the other with one image added, and for every set S of results,             [Dwork & Roth 2014, Def. 2.4]

    P[train(D) in S] <= e^epsilon P[train(D') in S] + delta

The result train(D) is the folder of the finished run. The screen, the log, the exit code, the time that a
step takes and the checkpoint are for the curator alone, the person who holds the private images. They may
depend on single images, and no epsilon covers them.

  $ python -m support.privacy_report      # the report of a shipped run
"""
import json
import math
import shlex
from pathlib import Path

import accountant
import data
import lora
import pld
from machinery import checkpoint, screen
from machinery.secret import FINE, tail
from support import classes
from support.runs import Run

# name -> a function of (q, sigma, steps, delta), an upper bound on epsilon. A new accountant is a row here.
ACCOUNTANTS = {"rdp": accountant.rdp_epsilon, "pld": pld.pld_epsilon}

COVERED = "the finished run's folder: the adapter, tables and pictures, and every image ever drawn with it"
NOISE = ("SHAKE-256 of a 256-bit secret key; float64 normals of at most 13.3 standard deviations (Box & "
         "Muller), added to an exact sum, rounded to a fixed grid and to the weights' precision")
NOT_COVERED = [
    "a person with several images: the unit is ONE image",
    "other runs on the same images: privacy losses add up (python accountant.py compose A/privacy.json ...)",
    "choices made by looking at the private images before the run, such as hyper-parameters tuned on them",
    "N, the names of the classes and the data set's existence: they are declared, and public",
    "figures computed from private images afterwards, such as the FID and nearest neighbours",
    "what the curator, who holds the images, sees: the screen, log, exit code, times of steps and of files",
    "a run that was not finished, or was continued twice: each continuation is another look at the images",
    "the network between the processes of a run: the key of the noise and sums without noise cross it",
    "attacks on the arithmetic (float64 noise is no exact Gaussian); whoever breaks SHAKE-256 or has its key",
    "rounding: on a GPU the last bits of latents and gradients may depend on other images, which epsilon "
    "ignores",
    "what the public base learnt: those that ship saw drawings made by code, ImageNet photographs, or both",
    "whoever can read checkpoint.pt, which holds a fingerprint of the private images, or the memory of the "
    "process (also in core files and swap), which holds the key",
    "a crash that depends on the batch (memory, time): --resume then draws that step's batch again",
]


def plan(run: Run, sigma: float, trained: int, where: str) -> str:
    """Every public constant of a run as text, before the first private image is read.

    trained: the number of trained weights; where: the processes and their device, such as "1 x cpu"
    Errors:  very long normals are not Gaussian, and that may add more than delta/10^6 to delta -> ValueError
    """
    s = run.settings
    q = s.B / s.N
    if s.epsilon < math.inf and tail(s.epsilon, s.steps, trained) > s.delta / 1e6:
        extra = tail(s.epsilon, s.steps, trained)
        raise ValueError(f"--epsilon {s.epsilon:g} --delta {s.delta:g}: normals beyond {FINE:.1f} standard "
                         f"deviations are not Gaussian, which may add {extra:.1g} to delta, more than a "
                         f"millionth of it; lower --epsilon, raise --delta, or pass --epsilon inf")
    total = sum(p.numel() for p in run.model.parameters())
    norm = sigma * math.sqrt(trained) / s.B
    lines = [f"plan      {s.data}: N = {s.N:,} declared, B = {s.B:,}, q = B/N = {q:.5f}, T = {s.steps} steps",
             f"          epsilon <= {s.epsilon:g} at delta = {s.delta:g}  ->  sigma = {sigma:.4f}; "
             f"C = {s.C:g}, K = {s.K}",
             f"          training {trained:,} of {total:,} weights: the noise on the mean gradient has norm "
             f"{norm:.2f} C"]
    if s.epsilon == math.inf:
        lines.append("NO PRIVACY: epsilon is infinite. This run is a baseline, and its output may give away "
                     "any private image.")
    if s.seed is not None:
        lines.append("NOT PRIVATE: with --seed anyone can compute the noise. The run can be repeated "
                     "exactly, for tests and teaching.")
    changed = "trained tensors" if lora.TARGETS[s.train] is None else "layers adapted"
    lines.append(f"          --train {s.train} on {s.base}: {run.adapted} {changed}, lr {s.lr:g}, "
                 f"--draws {s.draws}; {where}")
    if run.coder is not None:
        rows = f"; class embeddings start from: {s.start}" if run.model.classes is not None else ""
        lines.append(f"          in the latents of that base's autoencoder{rows}")
    if s.data not in data.KNOWN and run.classes:
        lines.append("          declared classes, with their numbers in the network: "
                     + classes.table(run.classes, run.labels))
    return "\n".join(lines)


def after(s, sigma: float, steps: int) -> dict:
    """The content of privacy.json. Its epsilon is computed again, from the steps that ran.

    Errors: more was spent than promised -> RuntimeError, after which the caller must publish nothing
    """
    q, best_order = s.B / s.N, None
    spent = dict.fromkeys(ACCOUNTANTS, math.inf)
    if s.epsilon < math.inf:
        spent = {name: bound(q, sigma, steps, s.delta) for name, bound in ACCOUNTANTS.items()}
        best_order = accountant.epsilon(q, sigma, steps, s.delta)[1]
    if spent[s.accountant] > s.epsilon:
        raise RuntimeError(f"the run spent epsilon = {spent[s.accountant]}, more than the promised "
                           f"{s.epsilon}, so accountant.calibrate and --accountant {s.accountant} disagree; "
                           f"nothing was published")
    private = s.epsilon < math.inf and s.seed is None
    noise = "none"
    if sigma > 0:
        noise = NOISE if s.seed is None else NOISE.replace("secret key", "key made of --seed, not secret")
    return dict(private=private, epsilon=shown(spent[s.accountant]), delta=s.delta,
                neighbours="add or remove one image", unit_of_privacy="one image",
                N=s.N, B=s.B, q=q, C=s.C, K=s.K, sigma=sigma, steps=steps,
                mechanism="Poisson-sampled Gaussian, one noise draw a step",
                noise=noise,
                accountant=s.accountant, **{f"epsilon_{name}": shown(e) for name, e in spent.items()},
                best_order=best_order,
                covers=COVERED if private else "nothing", does_not_cover=NOT_COVERED)


def shown(epsilon: float) -> float | str:
    """epsilon as JSON can hold it: JSON has no infinity."""
    return "inf" if epsilon == math.inf else epsilon


def text(facts: dict) -> str:
    """The whole report as text for the screen, one fact a line, with six digits; epsilons are rounded up."""
    lines = []
    for name, value in facts.items():
        if isinstance(value, float):
            value = screen.up(value, 6) if name.startswith("epsilon") else f"{value:.6g}"
        values = value if isinstance(value, list) else [value]
        lines += [f"  {name if i == 0 else '':<16} {v}" for i, v in enumerate(values)]
    return "\n".join(lines)


def summary(facts: dict, path: Path) -> str:
    """The five most important lines of a report, and the path of the whole."""
    spent = f"epsilon = {screen.up(float(facts['epsilon']), 6)}"
    bounds = {name.removeprefix("epsilon_").upper(): value for name, value in facts.items()
              if name.startswith("epsilon_")}
    others = ", ".join(f"{name} {screen.up(float(e), 4)}" for name, e in bounds.items())
    return "\n".join([
        f"  private      {facts['private']}: {spent} at delta = {facts['delta']:g}, {facts['neighbours']}",
        f"  spent by     {facts['steps']} steps at q = {facts['q']:.6g} and sigma = {facts['sigma']:.6g} "
        f"(bounds on epsilon: {others})",
        f"  noise        {facts['noise']}",
        f"  covers       {facts['covers']}",
        f"  not covered  {facts['does_not_cover'][0]}; and {len(facts['does_not_cover']) - 1} more points: "
        f"see {path}"])


def write(folder: Path, facts: dict) -> None:
    """Write privacy.json, the last file of a run, and remove the checkpoint. That finishes the run."""
    checkpoint.write_text(folder / "privacy.json", json.dumps(facts, indent=2) + "\n")
    checkpoint.shred(folder / "checkpoint.pt")
    print(f"\n{folder}/: samples.png (public before | private after), adapter_model.bin, privacy.json, "
          f"config.json, metrics.csv")
    print(summary(facts, folder / "privacy.json"))
    print(f"next: python sample.py {shlex.quote(str(folder))} --n 100 --out grid.png")


if __name__ == "__main__":
    print(text(json.loads((data.ASSETS / "mnist-eps10" / "privacy.json").read_text())))
