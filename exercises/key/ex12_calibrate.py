"""ex12, as a student may write it."""
from accountant import epsilon as epsilon_of


def calibrate(epsilon, delta, q, steps):
    if epsilon <= 0:
        raise ValueError(f"epsilon = {epsilon}, expected a number above 0")
    if steps == 0:
        return 0.0
    low, high = 0.01, 1.0
    while epsilon_of(q, high, steps, delta)[0] > epsilon:
        high *= 2
    while high > 1.001 * low:
        middle = (low * high)**0.5
        if epsilon_of(q, middle, steps, delta)[0] > epsilon:
            low = middle
        else:
            high = middle
    return high
