"""bug12 -- The RDP of one step takes into account that sampling at rate q hides an image, too."""
import numpy as np

STANDS_IN_FOR = "accountant.rdp"


def rdp(q, sigma, orders):
    """q^2 a / (2 sigma^2): the Gaussian's a / (2 sigma^2), its sensitivity multiplied by q."""
    orders = np.asarray(orders, dtype=float)
    if not 0 <= q <= 1 or not 0 <= sigma < np.inf or not np.all((orders > 1) & np.isfinite(orders)):
        raise ValueError(f"q = {q}, sigma = {sigma}, orders = {orders}, expected 0 <= q <= 1, a sigma >= 0, "
                         f"orders > 1")
    return q**2 * orders / (2 * sigma**2) if sigma else np.full_like(orders, np.inf)
