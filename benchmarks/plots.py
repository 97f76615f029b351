"""plots.py -- draws the plot of docs/privacy.md: epsilon against steps, and the noise that a budget needs.

  $ pip install -r requirements-peers.txt && python benchmarks/plots.py          # assets/epsilon.png, seconds
"""
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import accountant  # noqa: E402
import train  # noqa: E402
import pld  # noqa: E402


def main() -> None:
    s = train.check(train.Settings())
    q, sigma = s.B / s.N, accountant.calibrate(s.epsilon, s.delta, s.B / s.N, s.steps)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))

    steps = np.unique(np.geomspace(1, s.steps, 12).astype(int))
    rdp = [accountant.epsilon(q, sigma, int(t), s.delta)[0] for t in steps]
    tight = [pld.pld_epsilon(q, sigma, int(t), s.delta) for t in steps]
    clt = [pld.gdp_epsilon(q, sigma, int(t), s.delta) for t in steps]
    left.plot(steps, rdp, "o-", label="RDP, what a run states")
    left.plot(steps, tight, "s-", label="PLD, tighter")
    left.plot(steps, clt, "x:", label="CLT, NOT a bound")
    left.set(xlabel="steps", ylabel="epsilon spent",
             title=f"the default run: q = {q:.4f}, sigma = {sigma:.3f}")
    left.legend()

    budgets, sizes = np.geomspace(0.3, 20, 12), (256, 1024, 4096)
    for B in sizes:
        noise = [accountant.calibrate(e, s.delta, B / s.N, s.steps) / B for e in budgets]
        right.loglog(budgets, noise, "o-", label=f"B = {B}")
    right.set(xlabel="epsilon", ylabel="sigma / B", title="noise on the mean gradient, in units of C")
    right.legend()
    figure.tight_layout()
    figure.savefig(ROOT / "assets" / "epsilon.png", dpi=110)
    print("wrote assets/epsilon.png")


if __name__ == "__main__":
    main()
