"""ex03, as a student may write it."""


def ddim_step(x, noise, a, a_next, eta, fresh):
    x0 = ((x - (1 - a)**0.5 * noise) / a**0.5).clamp(-1, 1)
    noise = (x - a**0.5 * x0) / (1 - a)**0.5
    sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next))**0.5
    return a_next**0.5 * x0 + max(1 - a_next - sigma**2, 0)**0.5 * noise + sigma * fresh
