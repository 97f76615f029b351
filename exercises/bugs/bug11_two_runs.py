"""bug11 -- The epsilon of several runs on the same images is that of the run which tells most."""
import accountant

STANDS_IN_FOR = "accountant.composed_epsilon"


def composed_epsilon(runs, delta):
    """The largest epsilon of the runs: each of them keeps its own promise."""
    return max(accountant.epsilon(q, sigma, steps, delta)[0] for q, sigma, steps in runs)
