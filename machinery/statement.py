"""statement.py -- what a run promises before it starts, and what it can say when it is over.

    "This adapter is (epsilon, delta)-differentially private" means: for all sets of images D, D' that differ
    by one image and all sets S of adapters,  P[train(D) in S] <= e^epsilon P[train(D') in S] + delta.
                                                                            [Dwork & Roth 2014, Def. 2.4]

What is covered is the FOLDER of a finished run. The screen, the log, the exit code, the time that a step
takes and the checkpoint are the curator's alone: they may depend on single images, no epsilon covers them.

  $ python -m machinery.statement      # what a shipped run says
"""
import dataclasses
import json
import math
from pathlib import Path

import accountant
import data
import dpsgd
import lora
import sample
from machinery import checkpoint, pld

CURATORS = ("chunk", "device", "resume", "peek")     # how a run went may tell how large its lots were
COVERED = "the finished run's folder: the adapter, tables and pictures, and every image ever drawn with it"
NOISE = "float64 normals, added in float64, rounded once"
NOT_COVERED = [
    "a person with several images: the unit is ONE image",
    "other runs on the same images: losses add up (python accountant.py compose A/privacy.json ...)",
    "choices made by looking at the private images before the run, such as hyper-parameters tuned on them",
    "N, the names of the classes and the data set's existence: they are declared, and public",
    "figures computed from private images afterwards: accuracy, FID, nearest neighbours",
    "what the curator alone sees: the screen, the log, the exit code, how long each step takes, files' times",
    "a run that was not finished: its checkpoint.pt stays, and holds the state of the noise",
    "two folders that went on from copies of one checkpoint: they have the same noise, so publish one",
    "the network between ranks: clipped sums cross it before the noise is added",
    "attacks on the arithmetic: float64 noise is no exact Gaussian, and its generator is not cryptographic",
    "rounding: in bfloat16 or on a GPU a gradient may move with who else is in the lot; epsilon ignores that",
    "what the public base learnt: shipped ones saw drawings made by code, or ImageNet photographs, or both",
    "anyone who can read checkpoint.pt while the run lasts: it holds the state of the noise",
]


def plan(s, sigma: float, trainable: dict, model, coder, layers: int, where: str, declared: dict) -> str:
    """Every public constant of a run (train.Settings s), before the first private image is read.

    coder: the base's autoencoder, or None; layers: how many layers or tensors are trained; where: "1 x cpu"
    Errors: noise whose longest value gives an image away more often than delta / 100 -> ValueError
    """
    q, trained = s.B / s.N, sum(p.numel() for p in trainable.values())
    if s.epsilon < math.inf and dpsgd.tail(q, sigma, s.steps, trained) > s.delta / 100:
        raise ValueError(f"--epsilon {s.epsilon:g} leaves so little noise (sigma = {sigma:.3f}) that float64 "
                         f"normals are too short for delta = {s.delta:g}; expected a smaller --epsilon, or "
                         f"inf for a run without privacy")
    total = sum(p.numel() for p in model.parameters())
    norm = sigma * math.sqrt(trained) / s.B
    lines = [f"plan      {s.data}: N = {s.N:,} declared, B = {s.B:,}, q = B/N = {q:.5f}, T = {s.steps} steps",
             f"          epsilon <= {s.epsilon:g} at delta = {s.delta:g}  ->  sigma = {sigma:.4f}; "
             f"C = {s.C:g}, K = {s.K}",
             f"          training {trained:,} of {total:,} weights: the noise on the mean gradient has norm "
             f"{norm:.2f} C"]
    if s.epsilon == math.inf:
        lines.append("NO PRIVACY: epsilon is infinite. This run is a baseline; its output may give away any "
                     "private image.")
    if s.seed is not None:
        lines.append("NOT PRIVATE: with --seed anyone can compute the noise; this run is reproducible, for "
                     "tests and teaching.")
    lines.append(f"          {s.train} on {s.base}: {layers} layers adapted, lr {s.lr:g}, draws {s.draws}; "
                 f"{where}")
    if coder is not None:
        rows = f"; class rows start from: {s.start}" if model.classes is not None else ""
        lines.append(f"          in the latents of that file's autoencoder{rows}")
    if s.data not in data.KNOWN and declared:
        lines.append("          declared classes, and the base's: " + data.table(**declared))
    return "\n".join(lines)


def after(s, sigma: float, steps: int, weights: int) -> dict:
    """privacy.json. epsilon is computed again, from the steps that ran; weights: how many were trained.

    Errors: more was spent than promised -> RuntimeError, and the caller must publish nothing
    """
    rdp, order, tight = math.inf, None, math.inf
    if s.epsilon < math.inf:
        rdp, order = accountant.epsilon(s.B / s.N, sigma, steps, s.delta)
        tight = pld.pld_epsilon(s.B / s.N, sigma, steps, s.delta)
    spent = tight if s.accountant == "pld" else rdp
    if spent > s.epsilon:
        raise RuntimeError(f"spent epsilon = {spent} > promised {s.epsilon}: calibrate and epsilon disagree; "
                           f"nothing was saved")
    private = s.epsilon < math.inf and s.seed is None
    return dict(private=private, epsilon=shown(spent), delta=s.delta,
                neighbours="add or remove one image", unit_of_privacy="one image",
                N=s.N, B=s.B, q=s.B / s.N, C=s.C, K=s.K, sigma=sigma, steps=steps,
                mechanism="Poisson-sampled Gaussian, one noise draw a step",
                noise=NOISE if sigma > 0 else "none", tail=dpsgd.tail(s.B / s.N, sigma, steps, weights),
                accountant=s.accountant, epsilon_rdp=shown(rdp), epsilon_pld=shown(tight), best_order=order,
                covers=COVERED if private else "nothing", does_not_cover=NOT_COVERED)


def shown(epsilon: float) -> float | str:
    """JSON has no infinity."""
    return "inf" if epsilon == math.inf else epsilon


def text(facts: dict) -> str:
    """The same statement for the screen, one fact a line; numbers to six digits, the file has them all."""
    lines = []
    for name, value in facts.items():
        if isinstance(value, float):
            value = f"{value:.6g}"
        values = value if isinstance(value, list) else [value]
        lines += [f"  {name if i == 0 else '':<16} {v}" for i, v in enumerate(values)]
    return "\n".join(lines)


def publish(s, sigma: float, metrics: list, model, trainable: dict, shape: tuple, base: str,
            declared: dict, coder) -> None:
    """Write the run's folder, the statement last, and say it on the screen.

    metrics: a row a step; shape: (C, H, W) of an image; base: fingerprint of the public base; coder: its
    autoencoder or None
    """
    out, trained = Path(s.out), sum(p.numel() for p in trainable.values())
    facts = after(s, sigma, len(metrics), trained)
    rows = [["step", "epsilon_rdp", "best_order"], *metrics]
    checkpoint.write_text(out / "metrics.csv", "".join(",".join(map(str, row)) + "\n" for row in rows))
    config = dict(dataclasses.asdict(s), channels=shape[0], side=shape[-1], base_sha256=base) | declared
    for name in CURATORS:
        del config[name]
    checkpoint.write_text(out / "config.json", json.dumps(config, indent=2) + "\n")
    lora.save(out, trainable, lora.describe(s.train, s.rank, s.rank, model.classes is not None))
    public = sample.load_run(out, public=True)
    sample.before_and_after(out / "samples.png", public, model, shape, declared.get("labels"), coder)
    checkpoint.write_text(out / "privacy.json", json.dumps(facts, indent=2) + "\n")
    (out / "checkpoint.pt").unlink()                                     # and with it the noise's state

    print(f"\n{out}/: samples.png (public before | private after), adapter_model.bin, privacy.json, "
          f"config.json, metrics.csv")
    print(text(facts))
    print(f"next: python sample.py {out} --n 100 --out grid.png")


if __name__ == "__main__":
    print(text(json.loads((data.ASSETS / "mnist-eps10" / "privacy.json").read_text())))
