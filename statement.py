"""statement.py -- what a run promises before it starts, and what it can say when it is over.

    "This adapter is (epsilon, delta)-differentially private" means: for all sets of images D, D' that differ
    by one image and all sets S of adapters,  P[train(D) in S] <= e^epsilon P[train(D') in S] + delta.
                                                                            [Dwork & Roth 2014, Def. 2.4]
"""
import math

import accountant

NOT_COVERED = [
    "a person with several images: the unit is ONE image",
    "choices made by looking at the private images before the run, such as hyper-parameters tuned on them",
    "N and the data set's existence: they are declared, and public",
    "figures computed from private images afterwards: accuracy, FID, nearest neighbours",
    "attacks on floating point: the noise is float32, from a generator that is not cryptographic",
    "what the public base model learnt: the shipped ones saw only drawings made by code",
    "anyone who can read checkpoint.pt while the run lasts: it holds the state of the noise",
]


def plan(s, sigma: float, trained: int, total: int) -> str:
    """Every public constant of a run (train.Finetune s), before the first private image is read."""
    lines = [f"plan      {s.data}: N = {s.N:,} declared, B = {s.B:,}, q = B/N = {s.B / s.N:.5f}, T = {s.steps} steps",
             f"          epsilon <= {s.epsilon:g} at delta = {s.delta:g}  ->  sigma = {sigma:.4f}; C = {s.C:g}, K = {s.K}",
             f"          training {trained:,} of {total:,} weights: the noise on the mean gradient has norm "
             f"{sigma * math.sqrt(trained) / s.B:.2f} C"]
    if s.epsilon == math.inf:
        lines.append("NO PRIVACY: epsilon is infinite. This run is a baseline; its output may give away any private image.")
    if s.seed is not None:
        lines.append("NOT PRIVATE: with --seed anyone can compute the noise; this run is reproducible, for tests and teaching.")
    return "\n".join(lines)


def after(s, sigma: float, steps: int) -> dict:
    """privacy.json. epsilon is computed again, from the steps that ran.

    Errors: more was spent than promised -> RuntimeError, and the caller must publish nothing
    """
    rdp, order, pld = math.inf, None, math.inf
    if s.epsilon < math.inf:
        rdp, order = accountant.epsilon(s.B / s.N, sigma, steps, s.delta)
        pld = accountant.pld_epsilon(s.B / s.N, sigma, steps, s.delta)
    spent = pld if s.accountant == "pld" else rdp
    if spent > s.epsilon:
        raise RuntimeError(f"spent epsilon = {spent} > promised {s.epsilon}: calibrate and epsilon disagree; nothing was saved")
    private = s.epsilon < math.inf and s.seed is None
    return dict(private=private, epsilon=shown(spent), delta=s.delta,
                neighbours="add or remove one image", unit_of_privacy="one image", N=s.N, B=s.B, q=s.B / s.N, C=s.C, K=s.K,
                sigma=sigma, steps=steps, mechanism="Poisson-sampled Gaussian, one noise draw a step",
                accountant=s.accountant, epsilon_rdp=shown(rdp), epsilon_pld=shown(pld), best_order=order,
                covers="the adapter, and every image ever drawn with it" if private else "nothing",
                does_not_cover=NOT_COVERED)


def shown(epsilon: float) -> float | str:
    """JSON has no infinity."""
    return "inf" if epsilon == math.inf else epsilon


def text(facts: dict) -> str:
    """The same statement for the screen, one fact a line."""
    lines = []
    for name, value in facts.items():
        values = value if isinstance(value, list) else [value]
        lines += [f"  {name if i == 0 else '':<16} {v}" for i, v in enumerate(values)]
    return "\n".join(lines)


if __name__ == "__main__":
    import train
    s = train.check(train.Finetune())
    model = train.ddpm.load_unet(train.Path(__file__).parent / s.base)
    train.lora.inject(model, s.rank, s.lora_alpha)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sigma = accountant.calibrate(s.epsilon, s.delta, s.B / s.N, s.steps)
    print(plan(s, sigma, trained, sum(p.numel() for p in model.parameters())) + "\n\nand if all steps run:\n" + text(after(s, sigma, s.steps)))
