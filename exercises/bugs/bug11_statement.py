"""bug11 -- privacy.json: what the run promised, in the words of its settings."""
import math

STANDS_IN_FOR = "statement.after"


def after(s, sigma, steps):
    """The privacy statement of a finished run."""
    return dict(private=s.epsilon < math.inf and s.seed is None, epsilon=s.epsilon, delta=s.delta,
                neighbours="add or remove one image", unit_of_privacy="one image", N=s.N, B=s.B, q=s.B / s.N, C=s.C, K=s.K,
                sigma=sigma, steps=steps, accountant="RDP of the Poisson-sampled Gaussian mechanism")
