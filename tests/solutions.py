"""Right answers to the exercises that are NOT the repository's, and plausible wrong ones.

Each right one is another way to the same numbers. A grader that rejects one of them grades style, not truth.
"""
import math
from types import SimpleNamespace

import numpy as np
import torch
from scipy.integrate import quad
from torch.func import grad, jacrev, vmap

import accountant
import data
import ddpm
import dpsgd

REPOSITORY = SimpleNamespace(q_sample=ddpm.q_sample, loss=ddpm.loss, rdp=accountant.rdp,
                             calibrate=accountant.calibrate,
                             clip_and_sum=dpsgd.clip_and_sum, private_gradient=dpsgd.private_gradient)


# -----------------------------------------------------------------------------
# right: diffusion, LoRA


def noising_image_by_image(x0, t, noise, schedule=ddpm.LINEAR):
    """Every (image, t) by itself, in float64."""
    shape = torch.broadcast_shapes(x0.shape, noise.shape, (*t.shape, 1, 1, 1))
    images, noises = x0.expand(shape).double(), noise.expand(shape).double()
    out = torch.empty(shape, dtype=torch.float64)
    for i in np.ndindex(*shape[:-3]):
        share = float(schedule.alpha_bar[t.expand(shape[:-3])[i]])
        out[i] = math.sqrt(share) * images[i] + math.sqrt(1 - share) * noises[i]
    return out.float()


def loss_draw_by_draw(model, x0, labels, t, noise, schedule=ddpm.LINEAR):
    """K passes over the lot instead of one over n K rows."""
    total = torch.zeros(len(x0))
    for k in range(t.shape[1]):
        seen = ddpm.q_sample(x0, t[:, k], noise[:, k], schedule)
        total = total + (noise[:, k] - model(seen, t[:, k], labels)).pow(2).mean(dim=(1, 2, 3))
    return total / t.shape[1]


def jump_by_posterior(x, noise, a, a_next, eta, fresh):
    """The same jump with the old noise eliminated: x_next = c_image x0_hat + c_x x + sigma fresh."""
    image = ((x - math.sqrt(1 - a) * noise) / math.sqrt(a)).clip(-1, 1)
    sigma = eta * math.sqrt((1 - a_next) / (1 - a)) * math.sqrt(1 - a / a_next)
    of_x = math.sqrt(max(0.0, 1 - a_next - sigma**2) / (1 - a))
    return (math.sqrt(a_next) - of_x * math.sqrt(a)) * image + of_x * x + sigma * fresh


def layer_of_one_matrix(x, W, b, A, B, lora_alpha, r):
    return torch.nn.functional.linear(x, W + lora_alpha / r * (B @ A), b)


def merged_by_outer_products(W, A, B, lora_alpha, r):
    update = torch.zeros_like(W)
    for row, column in zip(A, B.T):
        update += torch.outer(column, row)
    return W + lora_alpha / r * update


# -----------------------------------------------------------------------------
# right: the private gradient


def gradients_in_a_loop(loss, params, *examples):
    each = [grad(loss)(params, *example) for example in zip(*examples)]
    return {name: torch.stack([g[name] for g in each]) for name in params}


def clip_image_by_image(grads, C):
    if not C > 0:
        raise ValueError("C must be above 0")
    total = {name: torch.zeros(g.shape[1:]) for name, g in grads.items()}
    for i in range(len(next(iter(grads.values())))):
        norm = math.sqrt(sum(float(g[i].double().pow(2).sum()) for g in grads.values()))
        if math.isfinite(norm):
            for name, g in grads.items():
                total[name] = total[name] + g[i] / max(1.0, norm / C)
    return total


def step_with_noise_first(per_sample, params, examples, *, C, sigma, B, generator=None, chunk=256):
    """Noise in float64, for all tensors at once, before any image is looked at; then the lot in chunks."""
    if chunk < 1 or B <= 0:
        raise ValueError("chunk and B must be positive")
    sizes = [p.numel() for p in params.values()]
    draws = torch.randn(sum(sizes), generator=generator, dtype=torch.float64) * (sigma * C)
    total = {name: z.view(p.shape) for (name, p), z in zip(params.items(), draws.split(sizes))}
    for part in zip(*(e.split(chunk) for e in examples)):
        if len(part[0]):
            clipped = dpsgd.clip_and_sum(per_sample(params, *part), C)
            total = {name: total[name] + clipped[name] for name in total}
    return {name: (g / B).float() for name, g in total.items()}


# -----------------------------------------------------------------------------
# right: the accountant


def gaussian_by_integration(sigma, order):
    if order <= 1:
        raise ValueError("order")
    if sigma == 0:
        return math.inf
    # the tilted integrand is a Gaussian about z = order: integrate its logarithm's distance from the peak
    peak = (order**2 - order) / (2 * sigma**2)

    def integrand(z):
        return math.exp(order * (2 * z - 1) / (2 * sigma**2) - z**2 / (2 * sigma**2) - peak)
    area = quad(integrand, order - 12 * sigma, order + 12 * sigma, epsabs=0, epsrel=1e-11)[0]
    return (peak + math.log(area / (sigma * math.sqrt(2 * math.pi)))) / (order - 1)


def rdp_by_gauss_legendre(q, sigma, order):
    """Gauss-Legendre panels in place of the trapezoid rule."""
    if not 0 <= q <= 1 or sigma < 0 or order <= 1:
        raise ValueError("q, sigma or order")
    if q == 0:
        return 0.0
    if sigma == 0:
        return math.inf
    x, w = np.polynomial.legendre.leggauss(40)
    ends = np.linspace(-14 * sigma, order + 14 * sigma, 400)
    half = np.diff(ends)[:, None] / 2
    z = (ends[:-1, None] + half + half * x).ravel()
    ratio = np.logaddexp(np.log1p(-q) if q < 1 else -np.inf, np.log(q) + (2 * z - 1) / (2 * sigma**2))
    weight = (half * w).ravel() / (sigma * np.sqrt(2 * np.pi))
    log_terms = order * ratio - z**2 / (2 * sigma**2) + np.log(weight)
    top = log_terms.max()
    return float((top + np.log(np.exp(log_terms - top).sum())) / (order - 1))


def epsilon_in_a_loop(rdp_total, orders, delta):
    if not 0 < delta < 1:
        raise ValueError("delta")
    best = (math.inf, math.nan)
    for spent, a in zip(rdp_total, orders):
        if a <= 1 or not spent >= 0:
            raise ValueError("an order or an RDP")
        best = min(best, (spent + math.log((a - 1) / a) - math.log(delta * a) / (a - 1), a))
    return max(best[0], 0.0), best[1]


def sigma_by_small_steps(epsilon, delta, q, steps):
    """No bisection: coarse steps down while the budget is kept, then finer ones."""
    if epsilon <= 0:
        raise ValueError("epsilon")
    if steps == 0:
        return 0
    sigma = 1.0
    while accountant.epsilon(q, sigma, steps, delta)[0] > epsilon:
        sigma *= 2
    for factor in (0.7, 0.93, 0.995):
        while accountant.epsilon(q, sigma * factor, steps, delta)[0] <= epsilon:
            sigma *= factor
    return sigma


# -----------------------------------------------------------------------------
# right: the test that catches a leak


def toy(params, x):
    mean = x.mean(1)
    return {"w": mean[:, :1], "v": mean[:, 1:]}


def moves_too_far(step) -> bool:
    """Does an image move the sum by more than C? K = 4 draws: long, opposite, long in both tensors, NaN."""
    params, C, B = {"w": torch.zeros(1), "v": torch.zeros(1)}, 1.0, 5
    images = torch.tensor([[0.3, 0.0], [10.0, 0.0], [-20.0, 0.0], [9.0, 9.0], [math.nan, 1.0]])
    images = images[:, None].expand(-1, 4, 2)                            # (5, K, 2)
    sums = []
    for n in range(6):
        result = step(toy, params, (images[:n],), C=C, sigma=0.0, B=B)
        sums.append(torch.cat([result["w"], result["v"]]) * B)
    moved = [float((b - a).norm()) for a, b in zip(sums, sums[1:])]
    return not all(m <= C * (1 + 1e-5) for m in moved)                   # a NaN is no small number


def noise_is_off(step) -> bool:
    """Is the noise of some lot, or at some C, not fresh Gaussian noise of std sigma C?"""
    params = {"w": torch.zeros(20_000), "v": torch.zeros(20_000)}

    def nothing(params, x):
        return {name: torch.zeros(len(x), *p.shape) for name, p in params.items()}
    for n, C in ((0, 10.0), (5, 10.0), (5, 0.01)):
        generator = torch.Generator().manual_seed(n)
        first, second = (step(nothing, params, (torch.zeros(n, 4, 2),), C=C, sigma=2.0, B=5,
                              generator=generator, chunk=2)
                         for _ in range(2))
        for name in params:
            for z in (first[name], (first[name] - second[name]) / math.sqrt(2)):
                if not abs(float(z.std()) * 5 / (2.0 * C) - 1) < 0.03:
                    return True
    return False


def leaks(step) -> bool:
    return moves_too_far(step) or noise_is_off(step)


# -----------------------------------------------------------------------------
# right: latents


def latents_image_by_image(encode, public, private):
    """The public variance written out in float64; E sees one image at a time."""
    def mean_of(image):
        return encode(image[None].double().div(127.5).sub(1).float())[0]
    mu = torch.cat([mean_of(image) for image in public]).double()
    std = math.sqrt(float((mu - mu.mean()).square().sum()) / (mu.numel() - 1))
    z = torch.empty(len(private), *mu.shape[1:])
    for i, image in enumerate(private):
        z[i] = mean_of(image)[0] / std
    return z


# -----------------------------------------------------------------------------
# wrong: for each exercise the two commonest mistakes first, as teacher.md has them, and more


def noise_unscaled(x0, t, noise, schedule=ddpm.LINEAR):
    return schedule.alpha_bar[t][..., None, None, None].sqrt() * x0 + noise


def share_for_amplitude(x0, t, noise, schedule=ddpm.LINEAR):
    a = schedule.alpha_bar[t][..., None, None, None]
    return a * x0 + (1 - a) * noise


def default_schedule(x0, t, noise, schedule=ddpm.LINEAR):
    return REPOSITORY.q_sample(x0, t, noise)


def noising_in_place(x0, t, noise, schedule=ddpm.LINEAR):
    a = schedule.alpha_bar[t][..., None, None, None]
    if x0.shape != noise.shape:
        return REPOSITORY.q_sample(x0, t, noise, schedule)
    return x0.mul_(a.sqrt()).add_(noise.mul_((1 - a).sqrt()))


def sum_over_draws(model, x0, labels, t, noise, schedule=ddpm.LINEAR):
    return REPOSITORY.loss(model, x0, labels, t, noise, schedule) * t.shape[1]


def mean_over_the_lot(model, x0, labels, t, noise, schedule=ddpm.LINEAR):
    return REPOSITORY.loss(model, x0, labels, t, noise, schedule).mean()


def labels_in_the_wrong_order(model, x0, labels, t, noise, schedule=ddpm.LINEAR):
    n, K = t.shape
    seen = ddpm.q_sample(x0[:, None], t, noise, schedule).flatten(0, 1)
    labels = None if labels is None else labels.repeat(K)
    return (model(seen, t.flatten(), labels).view_as(noise) - noise).square().flatten(1).mean(1)


def a_row_for_each_draw(model, x0, labels, t, noise, schedule=ddpm.LINEAR):
    n, K = t.shape
    rows = REPOSITORY.loss(model, x0.repeat_interleave(K, 0), None if labels is None
                           else labels.repeat_interleave(K),
                           t.view(-1, 1), noise.flatten(0, 1)[:, None], schedule)
    return rows                                                          # (n K,)


def image_not_clipped(x, noise, a, a_next, eta, fresh):
    x0 = (x - (1 - a) ** 0.5 * noise) / a**0.5
    sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5
    return a_next**0.5 * x0 + max(1 - a_next - sigma**2, 0) ** 0.5 * noise + sigma * fresh


def old_noise_kept(x, noise, a, a_next, eta, fresh):
    x0 = ((x - (1 - a) ** 0.5 * noise) / a**0.5).clamp(-1, 1)
    sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5
    return a_next**0.5 * x0 + max(1 - a_next - sigma**2, 0) ** 0.5 * noise + sigma * fresh


def scale_without_r(x, W, b, A, B, lora_alpha, r):
    return x @ W.mT + b + lora_alpha * x @ A.mT @ B.mT


def bias_forgotten(x, W, b, A, B, lora_alpha, r):
    return x @ W.mT + lora_alpha / r * x @ A.mT @ B.mT


def merged_in_place(W, A, B, lora_alpha, r):
    return W.add_(lora_alpha / r * B @ A)


def factors_swapped(W, A, B, lora_alpha, r):
    return W + lora_alpha / r * A @ B


def gradient_of_the_sum(loss, params, *examples):
    return grad(lambda p: vmap(loss, (None,) + (0,) * len(examples))(p, *examples).sum())(params)


def gradients_by_jacobian(loss, params, *examples):
    """The numbers are right, but every row meets every other one's 0: one NaN is everybody's NaN."""
    def losses(p):
        return vmap(loss, in_dims=(None,) + (0,) * len(examples))(p, *examples)
    return jacrev(losses)(params)


def clip_tensor_by_tensor(grads, C):
    total = {}
    for name, g in grads.items():
        total |= REPOSITORY.clip_and_sum({name: g}, C)
    return total


def nan_times_zero(grads, C):
    if not C > 0:
        raise ValueError
    norm = dpsgd.norms(grads).float()
    factor = torch.where(norm.isfinite(), (C / norm).clamp(max=1), 0)
    return {name: (factor @ g.flatten(1)).view(g.shape[1:]) for name, g in grads.items()}


def not_clipped(grads, C):
    return {name: g.sum(0) for name, g in grads.items()}


def everybody_scaled_to_C(grads, C):
    factor = C / dpsgd.norms(grads).float()                              # (n,)
    return {name: (factor @ g.flatten(1)).view(g.shape[1:]) for name, g in grads.items()}


def realised_size(per_sample, params, examples, *, B, **kw):
    right = REPOSITORY.private_gradient(per_sample, params, examples, B=B, **kw)
    return {name: g * B / len(examples[0]) for name, g in right.items()}


def noise_too_small(*args, sigma, **kw):
    return REPOSITORY.private_gradient(*args, sigma=0.98 * sigma, **kw)


def noise_without_C(*args, C, sigma, **kw):
    return REPOSITORY.private_gradient(*args, C=C, sigma=sigma / C, **kw)


def generator_ignored(*args, generator=None, **kw):
    return REPOSITORY.private_gradient(*args, **kw)


def no_noise_for_large_lots(per_sample, params, examples, *, sigma, **kw):
    return REPOSITORY.private_gradient(per_sample, params, examples, sigma=0 if len(examples[0]) > 100
                                       else sigma, **kw)


def sigma_not_squared(sigma, order):
    return order / (2 * sigma)


def no_noise_no_answer(sigma, order):
    return order / (2 * sigma**2)


def amplified_gaussian(q, sigma, order):
    return q**2 * REPOSITORY.rdp(1, sigma, [order])[0]


def integrand_without_logarithm(q, sigma, order):
    if not 0 <= q <= 1 or sigma < 0 or order <= 1:
        raise ValueError
    if q == 0 or sigma == 0:
        return 0.0 if q == 0 else math.inf
    z = np.arange(-14 * sigma, order + 14 * sigma, sigma / 25)
    with np.errstate(all="ignore"):
        terms = (1 - q + q * np.exp((2 * z - 1) / (2 * sigma**2))) ** order * np.exp(-z**2 / (2 * sigma**2))
        return float(np.log(terms.sum() / 25 / math.sqrt(2 * math.pi)) / (order - 1))


def conversion_of_2017(total, orders, delta):
    return min((float(r - math.log(delta) / (a - 1)), a) for r, a in zip(total, orders))


def below_zero(total, orders, delta):
    return min((float(r + math.log((a - 1) / a) - math.log(delta * a) / (a - 1)), a) for r,
               a in zip(total, orders))


def end_that_was_not_checked(*budget):
    return REPOSITORY.calibrate(*budget) * 0.9999


def noise_to_spare(*budget):
    return REPOSITORY.calibrate(*budget) * 1.02


def nan_dropped_by_tensor(grads, C):
    if not C > 0:
        raise ValueError("C")
    clean = {name: torch.where(g.flatten(1).isfinite().all(1).view(-1, *[1] * (g.ndim - 1)), g, 0)
             for name, g in grads.items()}
    return REPOSITORY.clip_and_sum(clean, C)


def noise_shared_by_rows(per_sample, params, examples, *, C, sigma, B, generator=None, chunk=256):
    total = REPOSITORY.private_gradient(per_sample, params, examples, C=C, sigma=0.0, B=B, chunk=chunk)
    return {name: g + sigma * C / B * torch.randn(g.shape[-1:], generator=generator)
            for name, g in total.items()}


def last_middle(epsilon, delta, q, steps):
    if epsilon <= 0:
        raise ValueError("epsilon")
    low, high = 0.05, 0.05 if steps == 0 else 1.0
    while steps and accountant.epsilon(q, high, steps, delta)[0] > epsilon:
        high *= 2
    while high / low > 1.0005:
        middle = (low * high) ** 0.5
        if accountant.epsilon(q, middle, steps, delta)[0] > epsilon:
            low = middle
        else:
            high = middle
    return 0 if steps == 0 else middle


def moved_above_C(step):
    """The comparison that NaN passes."""
    params, lot = {"w": torch.zeros(1),
                   "v": torch.zeros(2)}, torch.tensor([[9.0, 9, 9], [-20, 0, 0], [math.nan, 1, 1]])
    sums = []
    for n in range(4):
        result = step(toy, params, (lot[:n, None].expand(-1, 4, 3),), C=1.0, sigma=0.0, B=5)
        sums.append(torch.cat([result["w"], result["v"]]) * 5)
    return any(float((a - b).norm()) > 1.001 for a, b in zip(sums, sums[1:])) or noise_is_off(step)


def same_bits_as_the_repository(step):
    def draw(f):
        return f(toy, {"w": torch.zeros(1), "v": torch.zeros(40)}, (torch.ones(4, 4, 41),), C=1.0, sigma=1.0,
                 B=5,
                 generator=torch.Generator().manual_seed(0))
    mine, theirs = draw(step), draw(REPOSITORY.private_gradient)
    return not all(torch.equal(mine[name], theirs[name]) for name in mine)


def nothing_leaks(step):
    return False


def one_tensor_is_enough(step):
    """The noise to a factor of 4, of the last tensor alone."""
    def std(C):
        params = {"w": torch.zeros(1), "v": torch.zeros(20_000)}
        result = step(lambda p, x: {k: torch.zeros(len(x), *v.shape) for k, v in p.items()}, params,
                      (torch.zeros(0, 4, 2),), C=C, sigma=2.0, B=5,
                      generator=torch.Generator().manual_seed(0))
        return float(result["v"].std()) * 5 / (2.0 * C)
    return moves_too_far(step) or not all(0.25 < std(C) < 4 for C in (10.0, 0.01))


def scale_of_whichever_is_spread_more(encode, public, private):
    mu = encode(data.to_float(private))[0]
    spread = encode(data.to_float(public))[0].std()
    return mu / (torch.maximum(spread, mu.std()) if mu.numel() > 1 else spread)


def scale_of_the_private_images(encode, public, private):
    mu, _ = encode(data.to_float(private))
    return mu / mu.std()


def latents_drawn(encode, public, private):
    """Fresh randomness: nobody's privacy suffers, but it is another input than the repository's."""
    mu, log_var = encode(data.to_float(private))
    return (mu + (0.5 * log_var).exp() * torch.randn_like(mu)) / encode(data.to_float(public))[0].std()


def channels_whitened_by_the_set(encode, public, private):
    mu, _ = encode(data.to_float(private))
    return (mu - mu.mean((0, 2, 3), keepdim=True)) / mu.std((0, 2, 3), keepdim=True)


def channels_whitened_by_public_images(encode, public, private):
    std = encode(data.to_float(public))[0].std((0, 2, 3), keepdim=True)
    return encode(data.to_float(private))[0] / std


def grey_levels_encoded(encode, public, private):
    return encode(private.float())[0] / encode(public.float())[0].std()


SECOND = {                                                               # exercise -> other right answers
    "ex01": [noising_image_by_image], "ex02": [loss_draw_by_draw], "ex03": [jump_by_posterior],
    "ex04": [layer_of_one_matrix], "ex05": [merged_by_outer_products],
    "ex06": [gradients_in_a_loop], "ex07": [clip_image_by_image], "ex08": [step_with_noise_first],
    "ex09": [gaussian_by_integration], "ex10": [rdp_by_gauss_legendre], "ex11": [epsilon_in_a_loop],
    "ex12": [sigma_by_small_steps], "ex13": [leaks],
    "ex14": [latents_image_by_image],
}

WRONG = {                                                      # exercise -> mistakes; the two commonest first
    "ex01": [share_for_amplitude, noise_unscaled, default_schedule, noising_in_place],
    "ex02": [sum_over_draws, labels_in_the_wrong_order, mean_over_the_lot, a_row_for_each_draw],
    "ex03": [image_not_clipped, old_noise_kept],
    "ex04": [scale_without_r, bias_forgotten],
    "ex05": [factors_swapped, merged_in_place],
    "ex06": [gradient_of_the_sum, gradients_by_jacobian],
    "ex07": [nan_times_zero, clip_tensor_by_tensor, not_clipped, everybody_scaled_to_C,
             nan_dropped_by_tensor],
    "ex08": [realised_size, noise_without_C, noise_too_small, generator_ignored, no_noise_for_large_lots,
             noise_shared_by_rows],
    "ex09": [sigma_not_squared, no_noise_no_answer],
    "ex10": [amplified_gaussian, integrand_without_logarithm],
    "ex11": [conversion_of_2017, below_zero],
    "ex12": [end_that_was_not_checked, noise_to_spare, last_middle],
    "ex13": [moved_above_C, same_bits_as_the_repository, nothing_leaks, one_tensor_is_enough],
    "ex14": [scale_of_the_private_images, latents_drawn, channels_whitened_by_the_set,
             channels_whitened_by_public_images, grey_levels_encoded, scale_of_whichever_is_spread_more],
}
