"""property_tests.py -- the privacy proof, claim by claim: each claim is one property test.

A test fails where its claim is false. Each bug of bugs/ makes one claim false. Some tests are about more than
one claim: they fail on several bugs, so they do not say which claim broke.

  $ python exercises/property_tests.py                # lists the claims; each holds in the repository
"""
import math

import torch
from scipy.stats import norm

import grade                              # noqa: F401   comes first: it puts the repository on the path
import accountant
import autoencoder
import dpsgd
import lora
import unet
from machinery.secret import Secret, new_key

SECRET = Secret(new_key(seed=0))


def close(found, expected, what: str, rel: float = 1e-4) -> None:
    """The assertion of most tests: `found` equals `expected`, up to rounding."""
    assert math.isclose(found, expected, rel_tol=rel, abs_tol=1e-6), f"{what} {found:.4g}, not {expected:.4g}"


def whole(total: dict) -> torch.Tensor:
    return torch.cat([g.flatten() for g in total.values()]).double()


def step_on_zeros(n: int, C: float, chunk: int = 256, steps: int = 1) -> torch.Tensor:
    """(steps, 20_000): B times the result of private_gradient for n images of zero gradient, at sigma = 2.

    B is n, or 1 for no image. These tests look at the noise, whatever it is divided by.
    """
    def nothing(params, x):
        return {name: torch.zeros(len(x), *p.shape) for name, p in params.items()}
    B, found = max(n, 1), []
    for now in range(steps):
        step = dpsgd.private_gradient(nothing, {"w": torch.zeros(20_000)}, (torch.zeros(n, 1),), C=C,
                                      sigma=2.0, B=B, normals=SECRET.normals(now, 20_000), chunk=chunk)
        found.append(B * step["w"])
    return torch.stack(found)


# -----------------------------------------------------------------------------
# step 1 of the proof: one image, one gradient


def test_one_image_has_one_gradient_whatever_K():
    import train
    model = unet.UNet(channels=8, heads=2)
    lora.inject(model, 2, 2.0)
    trainable, frozen = lora.split(model)
    n, K = 3, 4
    lot = (torch.zeros(n, 1, 8, 8), torch.zeros(n).long(), torch.full((n, K), 500),
           torch.randn(n, K, 1, 8, 8))
    grads = train.per_image_gradients(model, frozen, train.Settings(K=K))(trainable, *lot)
    for g in grads.values():
        close(len(g), n, f"for {n} images of K = {K} draws the number of gradients is")


def test_a_latent_depends_on_its_own_image_alone():
    torch.manual_seed(0)
    model = autoencoder.Autoencoder(channels=8, blocks=(1, 1))
    photos = torch.randint(256, (3, 3, 64, 64)).to(torch.uint8)
    before = autoencoder.to_latents(model, photos[:2], batch=3)
    moved = (autoencoder.to_latents(model, photos, batch=3)[:2] - before).abs().max()
    close(moved, 0, "when a third image joins, the latents of the others move by")


# -----------------------------------------------------------------------------
# step 2: it moves the sum by at most C (clip_and_sum is the whole numbers of clip_and_count times their unit)


def test_each_image_is_clipped_by_its_own_norm():
    total = dpsgd.clip_and_sum({"a": torch.tensor([[3.0], [-0.5]])}, 1.0)
    close(total["a"].item(), 0.5, "gradients 3 and -0.5, clipped to norm 1, have the sum")


def test_the_norm_is_over_all_tensors_jointly():
    total = dpsgd.clip_and_sum({"a": torch.tensor([[3.0]]), "b": torch.tensor([[4.0]])}, 1.0)
    close(whole(total).norm().item(), 1, "an image of norm 5 in two tensors, clipped to norm 1, has norm")


def test_an_image_whose_gradient_is_not_finite_counts_as_zero():
    for strange in (math.nan, math.inf):
        total = dpsgd.clip_and_sum({"a": torch.tensor([[strange], [0.5]])}, 1.0)
        close(total["a"].item(), 0.5, f"gradients {strange} and 0.5 have the sum")


def test_adding_one_image_moves_the_sum_by_at_most_C():
    """This test is about all of step 2."""
    rows = torch.tensor([[0.3, 0.4], [9.0, 0.0], [-20.0, 0.0], [5.0, 5.0], [math.nan, 1.0]])
    sums = [whole(dpsgd.clip_and_sum({"a": rows[:n, :1], "b": rows[:n, 1:]}, 1.0)) for n in range(1, 6)]
    for before, after in zip(sums, sums[1:]):
        moved = (after - before).norm().item()
        assert moved <= 1 + 1e-6, f"one image moved the sum by {moved:.3g} C"


# -----------------------------------------------------------------------------
# step 3: Poisson lots, noise once in each step, a public divisor


def test_each_image_is_in_the_lot_by_its_own_coin():
    lots = [dpsgd.poisson_sample(SECRET.coins(now, 100), 0.3) for now in range(4000)]
    sizes = torch.tensor([float(len(lot)) for lot in lots])
    close(sizes.mean().item(), 30, "for N = 100 and q = 0.3 the mean size of a lot is", rel=0.05)
    close(sizes.var().item(), 21, "for N = 100 and q = 0.3 the variance of its size is", rel=0.2)


def test_the_noise_has_standard_deviation_sigma_C():
    for C in (10.0, 0.01):
        size = step_on_zeros(3, C).std().item() / (2 * C)
        close(size, 1, f"at C = {C:g} the noise has a standard deviation, in sigma C, of", rel=0.05)


def test_the_noise_is_added_once_however_many_chunks():
    size = step_on_zeros(6, 1.0, chunk=2).std().item() / 2
    close(size, 1, "for 3 chunks the noise has a standard deviation, in sigma C, of", rel=0.05)


def test_an_empty_lot_gets_its_noise():
    size = step_on_zeros(0, 1.0).std().item() / 2
    close(size, 1, "for an empty lot the noise has a standard deviation, in sigma C, of", rel=0.05)


def test_the_noise_is_new_in_every_step():
    share = torch.corrcoef(step_on_zeros(1, 1.0, steps=2))[0, 1].item()
    assert abs(share) < 0.05, f"the noise of two steps has correlation {share:.3g}"


def test_the_noise_of_two_coordinates_is_independent():
    share = torch.corrcoef(step_on_zeros(1, 1.0).view(2, -1))[0, 1].item()
    assert abs(share) < 0.06, f"the noise of two halves of a tensor has correlation {share:.3g}"


def test_the_sum_is_divided_by_the_declared_batch_size():
    def same(params, x):
        return {"w": torch.full((len(x), 1), 0.25)}
    for n in (1, 3):
        step = dpsgd.private_gradient(same, {"w": torch.zeros(1)}, (torch.zeros(n, 1),), C=1.0, sigma=0.0,
                                      B=4)
        close(step["w"].item(), n * 0.25 / 4, f"for B = 4 and gradients of 0.25 (n = {n}) the step is")


def test_chunks_are_memory_only():
    x = torch.randn(7, 1, generator=torch.Generator().manual_seed(0))
    steps = [dpsgd.private_gradient(lambda params, x: {"w": x}, {"w": torch.zeros(1)}, (x,), C=9.0, sigma=0.0,
                                    B=7, chunk=chunk)["w"].item() for chunk in (2, 7)]
    close(*steps, "when the lot is cut into chunks of 2, the step is")


def test_a_step_is_the_clipped_sum_and_noise_of_sigma_C_over_B():
    """This test is about steps 2 and 3 together."""
    def long(params, x):
        return {"w": torch.ones(len(x), 10_000)}                         # norm 100, all in one direction

    def step(n, sigma):
        return dpsgd.private_gradient(long, {"w": torch.zeros(10_000)}, (torch.zeros(n, 1),), C=10.0, B=5,
                                      sigma=sigma, normals=SECRET.normals(0, 10_000), chunk=1)["w"]
    for n in (0, 1, 2):
        bare, noisy = step(n, 0.0), step(n, 2.0)
        close(bare.norm().item() * 5 / 10, n, f"for {n} long gradients the sum has a norm, in C, of")
        size = (noisy - bare).std().item() * 5 / 20
        close(size, 1, f"for {n} images the noise has a standard deviation, in sigma C, of", rel=0.05)


# -----------------------------------------------------------------------------
# step 4: the accountant's epsilon is not below the truth


def test_rdp_of_a_step_is_that_of_the_mixture():
    q, sigma = 0.5, 1.0
    expected = math.log1p(q**2 * math.expm1(1 / sigma**2))               # order 2, in closed form
    close(float(accountant.rdp(q, sigma, [2.0])[0]), expected, "at q = 1/2, sigma = 1, order 2 the RDP is")


def test_the_calibrated_noise_keeps_the_budget():
    """The exact delta of one Gaussian step in which everybody takes part.      [Balle & Wang 2018, Thm 8]"""
    epsilon, delta = 10.0, 1e-5
    sigma = accountant.calibrate(epsilon, delta, 1.0, 1)
    exact = (norm.cdf(1 / (2 * sigma) - epsilon * sigma)
             - math.exp(epsilon) * norm.cdf(-1 / (2 * sigma) - epsilon * sigma))
    assert exact <= delta, f"delta = {delta:g} was promised, but sigma = {sigma:.4g} has delta = {exact:.2g}"


def test_runs_on_the_same_images_add_up():
    one, two = (accountant.epsilon(0.01, 0.7, steps, 1e-5)[0] for steps in (100, 200))
    both = accountant.composed_epsilon([(0.01, 0.7, 100)] * 2, 1e-5)
    close(both, two, f"two runs of 100 steps, of epsilon = {one:.3g} each, cost together epsilon =", rel=1e-3)


def test_more_steps_cost_more_and_more_noise_costs_less():
    less, usual, more = (accountant.epsilon(0.01, sigma, steps, 1e-5)[0]
                         for sigma, steps in ((2, 100), (1, 100), (1, 200)))
    assert less < usual < more, (f"epsilon is {usual:.3g}, but {less:.3g} with more noise and {more:.3g} for "
                                 f"more steps")


TESTS = {name: test for name, test in list(globals().items()) if name.startswith("test_")}

if __name__ == "__main__":
    for name, test in TESTS.items():
        test()
        print(f"holds   {name}")
    print(f"\n{len(TESTS)} tests hold in the repository. Which one fails on a bug? "
          f"python -m pytest exercises -k bug02")
