"""Properties of the private gradient. Each is what one line of the privacy proof needs."""
import functools
import math

import pytest
import torch
from torch.func import functional_call

import base
import ddpm
import dpsgd
import lora
from conftest import examples, tiny_adapted, tiny_unet
from machinery import devices
from machinery.secret import Secret, new_key

SECRET = Secret(new_key(0))
BOTH = lora.ATTENTION + lora.CONVOLUTIONS


def diffusion(model, weight=ddpm.flat):
    """(losses, one, trainable) of the real loss.

    losses(params, *examples) -> (n,), one(params, *example) -> scalar
    """
    trainable, frozen = lora.split(model)

    def losses(params, x0, labels, t, noise):
        model_at = lambda *a: functional_call(model, (params, frozen), a)
        return ddpm.loss(model_at, x0, labels, t, noise, weight=weight)
    return losses, lambda params, *example: losses(params, *(e[None] for e in example))[0], trainable


def assert_equal_gradients(found, expected):
    """Tensor by tensor, within 0.1% of its norm.

    In float32 processors add in different orders (in float64: 1e-14).
    A tensor whose true gradient is 0, as a bias before a GroupNorm of one channel has, may be off by 1e-6 of
    all of them.
    """
    assert found.keys() == expected.keys()
    whole = flat(expected).norm()
    for name, g in found.items():
        assert g.shape == expected[name].shape, name
        apart, size = (g - expected[name]).norm(), expected[name].norm()
        said = f"{name}: {apart:.2g} apart, norm {size:.2g} of {whole:.2g}"
        assert apart <= 1e-3 * size + 1e-6 * whole and whole > 0.1, said


def loop(losses, params, *ex):
    """The definition: one backward pass per example."""
    rows = [torch.autograd.grad(losses(params, *(e[i:i + 1] for e in ex)).sum(), list(params.values()))
            for i in range(len(ex[0]))]
    return {name: torch.stack(g) for name, g in zip(params, zip(*rows))}


def flat(total) -> torch.Tensor:
    return torch.cat([g.flatten() for g in total.values()])


# --- per-sample gradients

@pytest.mark.parametrize("K", [1, 4])
@pytest.mark.parametrize("what", ["lora", "lora+embed", "lora+conv", "attention", "full"])
def test_per_sample_gradients_equal_a_loop(what, K):
    """Linear, convolution and embedding layers, with adapters and without."""
    model = tiny_adapted(lora.TARGETS[what]) if lora.TARGETS[what] else tiny_unet()
    if what in ("attention", "full"):
        lora.train_only(model, what)
    losses, one, trainable = diffusion(model)
    ex = examples(3, K)
    assert_equal_gradients(dpsgd.per_sample_grads(one, trainable, *ex), loop(losses, trainable, *ex))


@pytest.mark.parametrize("K", [1, 4])
@pytest.mark.parametrize("targets", [lora.ATTENTION, BOTH, lora.TARGETS["lora+embed"]])
def test_copies_give_the_same_gradients_as_vmap(targets, K):
    losses, one, trainable = diffusion(tiny_adapted(targets))
    ex = examples(5, K)
    assert_equal_gradients(dpsgd.per_sample_grads_by_copies(losses, trainable, *ex),
                           dpsgd.per_sample_grads(one, trainable, *ex))


def test_per_sample_gradients_hold_no_graph():
    """Or memory would grow with the lot: the sum over chunks would keep all that led to it."""
    losses, one, trainable = diffusion(tiny_adapted())
    assert all(p.requires_grad for p in trainable.values())
    for found in (dpsgd.per_sample_grads(one, trainable, *examples(2, 1)),
                  dpsgd.per_sample_grads_by_copies(losses, trainable, *examples(2, 1))):
        assert not any(g.requires_grad for g in found.values())


@pytest.mark.parametrize("weight", [ddpm.flat, ddpm.even])
def test_one_image_leaves_the_gradients_of_the_others_alone(weight):
    losses, _, trainable = diffusion(tiny_adapted(BOTH), weight)
    ex = examples(4, K=2)
    before = dpsgd.per_sample_grads_by_copies(losses, trainable, *ex)
    ex[0][2] += 1
    ex[2][2] = 7                                                         # another image, and another t
    after = dpsgd.per_sample_grads_by_copies(losses, trainable, *ex)
    for name in before:
        moved = (before[name] - after[name]).flatten(1).norm(dim=1)
        assert moved[[0, 1, 3]].max() < 1e-6 and moved[2] > 0, (name, moved)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])      # grey, and colour
@pytest.mark.parametrize("targets", [lora.TARGETS["lora+embed"], lora.TARGETS["lora+conv"], None])
def test_an_images_gradient_is_the_same_to_the_last_bit_in_any_company(targets, memory, precision):
    """In full chunks, on a CPU: alone, beside others, in another place. Or one image would move all.

    With LoRA by copies, and for all weights by vmap.
    """
    device = torch.device("cpu")
    if precision == "bfloat16" and not devices.hardware(device):
        pytest.skip("this CPU has no instructions for bfloat16, so no run on it would take bfloat16")
    model = tiny_adapted(targets) if targets else tiny_unet()
    losses, one, trainable = diffusion(model.to(memory_format=memory))
    method = (dpsgd.per_sample_grads_by_copies, losses) if targets else (dpsgd.per_sample_grads, one)

    def gradients(*args):
        with devices.autocast(device, model, precision):
            return method[0](method[1], *args)
    per_sample, _ = dpsgd.full_chunks(gradients, 8)
    ex, found = examples(8, K=2), []
    for lot in ([3], [3, 5], [0, 1, 2, 3, 4], [7, 6, 5, 4, 2, 1, 0, 3]):
        rows = per_sample(trainable, *(e[lot] for e in ex))
        assert all(g.shape == (len(lot), *trainable[name].shape) for name, g in rows.items())
        found.append(flat({name: g[lot.index(3)] for name, g in rows.items()}))
    for other in found[1:]:
        apart = (found[0] - other).norm() / other.norm()
        assert torch.equal(found[0], other), f"{apart:.1g} of its length apart"
    assert found[0].norm() > 0.1


@pytest.mark.parametrize("file, channels, side, what, K", [
    ("base.pt", 1, 28, "lora+embed", 8), ("base.pt", 1, 28, "lora+conv", 1),
    ("photos.pt", 4, 16, "lora+conv", 1), ("faces.pt", 8, 16, "lora+conv", 2)])
def test_and_so_it_is_in_the_networks_of_the_adapters_that_ship(file, channels, side, what, K):
    """With the default chunk and precision, on one thread: alone, and as the last of a full chunk."""
    model = base.load(f"assets/{file}").model
    lora.inject(model, 16, 16, lora.TARGETS[what])
    losses, _, trainable = diffusion(model)
    for p in trainable.values():
        p.data.add_(0.02 * torch.randn_like(p))                          # or the factors A have no gradient

    def gradients(*args):
        with devices.autocast(torch.device("cpu"), model):
            return dpsgd.per_sample_grads_by_copies(losses, *args)
    per_sample, size = dpsgd.full_chunks(gradients, 128 // K)
    x0, labels, t, noise = examples(size, K, side, channels)
    ex = x0, labels % model.classes, t, noise
    alone = per_sample(trainable, *(e[:1] for e in ex))
    last = per_sample(trainable, *(e.flip(0) for e in ex))
    for name in trainable:
        assert torch.equal(alone[name][0], last[name][-1]) and alone[name].norm() > 0, name


@pytest.mark.parametrize("chunk, threads, size", [
    (128, 1, 128), (128, 3, 126), (7, 2, 6), (2, 3, 3), (0, 1, 1)])
def test_each_thread_gets_as_many_whole_examples(chunk, threads, size):
    """An example that two threads compute together is rounded in another way than its neighbours."""
    assert dpsgd.full_chunks(linear_per_sample, chunk, threads)[1] == size


@pytest.mark.parametrize("file, channels, side, what", [
    ("base.pt", 1, 28, "lora"), ("base.pt", 1, 28, "lora+conv"), ("photos.pt", 4, 16, "lora+conv")])
def test_on_three_threads_a_place_in_the_chunk_changes_no_bit(file, channels, side, what):
    """In float32. With 128 examples on three threads the rows of the first two differed in three places."""
    model = base.load(f"assets/{file}").model
    lora.inject(model, 16, 16, lora.TARGETS[what])
    losses, _, trainable = diffusion(model)
    for p in trainable.values():
        p.data.add_(0.02 * torch.randn_like(p))
    per_sample, size = dpsgd.full_chunks(
        lambda *args: dpsgd.per_sample_grads_by_copies(losses, *args), 128, threads=3)
    x0, labels, t, noise = (e.expand(size, *e.shape[1:]) for e in examples(1, 1, side, channels))
    torch.set_num_threads(3)
    try:
        rows = per_sample(trainable, x0, labels % model.classes, t, noise)
    finally:
        torch.set_num_threads(1)
    for name, g in rows.items():
        assert torch.equal(g, g[:1].expand_as(g)) and g.norm() > 0, name


# --- clipping: the bound that the noise is made for

def strange(ex, kind):
    x0 = ex[0]
    x0[-1] = {"ordinary": x0[-1], "NaN": math.nan, "inf": math.inf,
              "scaled by 1e6": 1e6 * x0[-1], "1e30": 1e30}[kind]
    return ex


@pytest.mark.parametrize("kind", ["ordinary", "NaN", "inf", "scaled by 1e6", "1e30"])
@pytest.mark.parametrize("K", [1, 4, 12])
def test_adding_one_image_moves_the_sum_by_at_most_C(K, kind):
    """The sensitivity that the noise is calibrated to, with the real network and adapters, for every K."""
    losses, _, trainable = diffusion(tiny_adapted())
    C, ex = 0.01, strange(examples(5, K), kind)
    gradients = dpsgd.per_sample_grads_by_copies(losses, trainable, *ex)
    with_it = flat(dpsgd.clip_and_sum(gradients, C))
    without = flat(dpsgd.clip_and_sum({k: g[:-1] for k, g in gradients.items()}, C))
    moved = (with_it - without).norm().item()
    assert moved <= C * (1 + 1e-12), f"one image moved the sum by {moved / C:.3f} C at K = {K}"
    assert kind != "ordinary" or moved > 0.99 * C, "C must be reached here, or the test could not fail"


def test_the_published_codes_rule_breaks_the_bound():
    """K draws clipped one by one: one image moves the sum by up to K C.

    That is why the K losses are averaged first.
    """
    losses, _, trainable = diffusion(tiny_adapted())
    C, K, (x0, labels, t, noise) = 1e-6, 4, examples(1, 4)
    as_rows = (x0.expand(K, -1, -1, -1), labels.expand(K), t.view(K, 1), noise.view(K, 1, *x0.shape[1:]))
    by_copies = dpsgd.per_sample_grads_by_copies
    wrong = flat(dpsgd.clip_and_sum(by_copies(losses, trainable, *as_rows), C)).norm()
    right = flat(dpsgd.clip_and_sum(by_copies(losses, trainable, x0, labels, t, noise), C)).norm()
    assert wrong > 1.5 * C and right <= C * (1 + 1e-12)


def test_clipping_is_joint_over_all_tensors_and_leaves_short_gradients_alone():
    a, b = torch.tensor([[3.0, 0.0], [0.3, 0.0]]), torch.tensor([[[4.0]], [[0.4]]])
    grads = {"a": a, "b": b}                                             # norms 5 and 0.5
    torch.testing.assert_close(dpsgd.norms(grads), torch.tensor([5.0, 0.5]).double())
    total = dpsgd.clip_and_sum(grads, C=1.0)
    torch.testing.assert_close(total["a"], torch.tensor([0.6 + 0.3, 0.0]).double(), atol=1e-7, rtol=0)
    torch.testing.assert_close(total["b"], torch.tensor([[0.8 + 0.4]]).double(), atol=1e-7, rtol=0)


def test_a_zero_gradient_stays_zero():
    assert dpsgd.clip_and_sum({"a": torch.zeros(3, 2)}, C=1.0)["a"].tolist() == [0, 0]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_an_example_with_one_number_that_is_none_counts_as_zero_in_all_its_weights(number):
    """Its norm is unknown, so the others are not summed unclipped."""
    grads = {"a": 9 * torch.randn(3, 5), "b": 9 * torch.randn(3, 2, 2)}
    others = dpsgd.clip_and_sum({name: g[[0, 2]] for name, g in grads.items()}, 1.0)
    grads["a"][1, 2] = number
    assert torch.equal(flat(dpsgd.clip_and_sum(grads, 1.0)), flat(others))


@pytest.mark.parametrize("draw", [torch.randn, lambda *shape: torch.full(shape, 0.1)])
def test_the_norm_of_a_long_gradient_is_exact(draw):
    """2.4 million weights: a sum in plain float32 order is too small by 4e-5.

    Then the image moves the sum by more than C.
    """
    g = {"w": draw(1, 2_400_000)}
    exact = math.sqrt(math.fsum(x * x for x in g["w"][0].tolist()))
    assert dpsgd.norms(g).item() == pytest.approx(exact, rel=dpsgd.SLACK / 1000)
    assert dpsgd.clip_and_sum(g, 1.0)["w"].norm() <= 1


def test_a_norm_is_the_same_to_the_last_bit_in_any_company():
    """Alone, beside others, in another place, in tensors of any width: other rounding would move a sum."""
    shapes = ((3,), (7, 11), (1,), (2049,), (4, 5, 6), (1024,), (5000,))
    grads = {str(i): torch.randn(50, *shape) for i, shape in enumerate(shapes)}
    together = dpsgd.norms(grads)
    for some in (*([i] for i in range(50)), [3, 4], [7, 3, 44], list(range(49, 2, -3))):
        assert torch.equal(dpsgd.norms({name: g[some] for name, g in grads.items()}), together[some]), some
    exact = [math.sqrt(math.fsum(x * x for g in grads.values() for x in g[i].flatten().tolist()))
             for i in range(50)]
    torch.testing.assert_close(together.tolist(), exact, rtol=1e-15, atol=0)


def test_mixed_precision_never_touches_norms_sums_or_noise():
    """Inside autocast, with bfloat16 gradients: float64 out, and the sum is still at most C."""
    g = {"a": torch.randn(9, 4000).bfloat16(), "b": torch.randn(9, 10, 10)}
    expected = dpsgd.clip_and_sum({k: v.float() for k, v in g.items()}, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = dpsgd.clip_and_sum(g, 1.0)
        noisy = dpsgd.add_noise(total, 1.0, SECRET.normals(1, 4100))
        alone = dpsgd.clip_and_sum({k: v[:1] for k, v in g.items()}, 1.0)
    for k in g:
        assert total[k].dtype == noisy[k].dtype == torch.float64
        torch.testing.assert_close(total[k], expected[k], atol=1e-6, rtol=1e-6)
    assert flat(alone).norm() <= 1 + 1e-12


# --- chunks, noise, the step

def linear_per_sample(params, x):
    return {"w": x * params["w"]}                            # any function of one example at a time will do


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunk_size_never_changes_the_answer(chunk):
    losses, _, trainable = diffusion(tiny_adapted())
    per_sample = lambda params, *ex: dpsgd.per_sample_grads_by_copies(losses, params, *ex)

    normals = SECRET.normals(1, len(flat(trainable)))

    def step(chunk):
        return flat(dpsgd.private_gradient(per_sample, trainable, examples(7, 2), C=0.1, sigma=1.0, B=5,
                                           normals=normals, chunk=chunk))
    torch.testing.assert_close(step(chunk), step(7), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("lot", [0, 6])
def test_noise_is_sigma_C_over_B_once_a_step_also_for_an_empty_lot(lot):
    d, sigma, C, B = 40_000, 1.7, 0.03, 5
    params, x = {"w": torch.zeros(d // 2), "v": torch.zeros(2, d // 4)}, torch.randn(lot, 3)
    nothing = lambda params, x: {name: torch.zeros(len(x), *p.shape) for name, p in params.items()}

    def draw(step):
        return B * flat(dpsgd.private_gradient(nothing, params, (x,), C=C, sigma=sigma, B=B,
                                               normals=SECRET.normals(step, d), chunk=2))
    first, second = draw(1), draw(2)
    for noise in (first, second):                                # three chunks must not mean three draws
        assert noise.std().item() == pytest.approx(sigma * C, rel=0.02)
        assert abs(noise.mean().item()) < 5 * sigma * C / math.sqrt(d)
    correlation = torch.corrcoef(torch.stack([first, second]))[0, 1].item()
    assert abs(correlation) < 5 / math.sqrt(d), "noise must be fresh in every step"
    halves = torch.corrcoef(torch.stack([first[:d // 2], first[d // 2:]]))[0, 1].item()
    assert abs(halves) < 5 / math.sqrt(d / 2), "noise must be independent between tensors"


def test_division_is_by_the_declared_batch_not_the_realised_one():
    for n in (1, 4):
        ones = {"w": torch.ones(1)}
        g = dpsgd.private_gradient(linear_per_sample, ones, (torch.ones(n, 1),), C=10, sigma=0, B=4)
        assert g["w"].item() == n / 4


def test_without_noise_clipping_and_sampling_a_step_is_gradient_descent():
    """sigma = 0, C = infinity, q = 1: the private gradient is the gradient of the mean loss."""
    losses, _, trainable = diffusion(tiny_adapted())
    ex = examples(6, K=2)
    lot = dpsgd.poisson_sample(SECRET.coins(1, 6), 1.0)
    per_sample = lambda params, *ex: dpsgd.per_sample_grads_by_copies(losses, params, *ex)
    mine = tuple(e[lot] for e in ex)
    private = dpsgd.private_gradient(per_sample, trainable, mine, C=math.inf, sigma=0, B=6, chunk=4)
    plain = torch.autograd.grad(losses(trainable, *ex).mean(), list(trainable.values()))
    assert_equal_gradients(private, dict(zip(private, plain)))


# --- lots

def test_lots_are_poisson():
    """Each image is in a lot with probability q, pairs with q^2, and the size varies as a binomial's."""
    N, q, rounds = 40, 0.3, 4000
    inside = torch.zeros(rounds, N)
    for step, row in enumerate(inside):
        row[dpsgd.poisson_sample(SECRET.coins(step, N), q)] = 1
    tolerance = 5 * math.sqrt(q * (1 - q) / rounds)
    assert (inside.mean(0) - q).abs().max() < tolerance
    pairs = inside.T @ inside / rounds
    off = pairs[~torch.eye(N, dtype=torch.bool)]
    assert (off - q**2).abs().max() < 5.5 * math.sqrt(q**2 * (1 - q**2) / rounds)
    variance = inside.sum(1).var().item()
    assert variance == pytest.approx(N * q * (1 - q), rel=0.1), "a fixed lot size is not Poisson sampling"


def test_an_image_is_in_a_lot_if_its_coin_is_below_q_and_only_then():
    coins = SECRET.coins(1, 500)
    assert dpsgd.poisson_sample(coins, 0.1).tolist() == [i for i in range(500) if coins[i] < 0.1]
    near = torch.tensor([0.0, math.nextafter(0.1, 0), 0.1, math.nextafter(0.1, 1)], dtype=torch.float64)
    assert dpsgd.poisson_sample(near, 0.1).tolist() == [0, 1]


def test_an_empty_and_a_full_lot_are_legal():
    assert len(dpsgd.poisson_sample(SECRET.coins(1, 100), 0.0)) == 0
    assert dpsgd.poisson_sample(SECRET.coins(1, 100), 1.0).tolist() == list(range(100))
    assert len(dpsgd.poisson_sample(SECRET.coins(1, 0), 0.5)) == 0


COINS, ONE, NORMAL = torch.zeros(10).double(), {"w": torch.ones(1)}, torch.zeros(1).double()


def step_of_one(**changed):
    """A private step on one example, right but for what is changed."""
    settings = dict(examples=(torch.ones(1, 1),), C=1.0, sigma=1.0, B=1, normals=NORMAL) | changed
    return dpsgd.private_gradient(linear_per_sample, ONE, settings.pop("examples"), **settings)


@pytest.mark.parametrize("call", [
    lambda: dpsgd.poisson_sample(COINS, 1.5),
    lambda: dpsgd.poisson_sample(COINS, -0.1),
    lambda: dpsgd.poisson_sample(COINS, math.nan),
    lambda: dpsgd.poisson_sample(COINS.float(), 0.5),
    lambda: dpsgd.clip_and_sum({"a": torch.ones(1, 1)}, 0.0),
    lambda: dpsgd.clip_and_sum({"a": torch.ones(1, 1)}, math.nan),
    lambda: dpsgd.add_noise(ONE, -1.0, NORMAL),
    lambda: dpsgd.add_noise(ONE, math.nan, NORMAL),
    lambda: dpsgd.add_noise(ONE, 1.0, NORMAL.float()),
    lambda: dpsgd.add_noise(ONE, 1.0, torch.zeros(2).double()),
    lambda: dpsgd.add_noise(ONE, 1.0, torch.zeros(1, 1).double()),
    lambda: step_of_one(B=0),
    lambda: step_of_one(chunk=0),
    lambda: step_of_one(sigma=-1.0),
    lambda: step_of_one(sigma=math.nan),
    lambda: step_of_one(normals=None),
    lambda: step_of_one(normals=NORMAL.float()),
    lambda: step_of_one(normals=torch.zeros(0).double()),
    lambda: step_of_one(examples=(torch.ones(1, 1).expand(dpsgd.MOST_EXAMPLES + 1, 1),)),
    lambda: dpsgd.full_chunks(linear_per_sample, 2)[0](ONE, torch.ones(3, 1)),
    lambda: dpsgd.full_chunks(lambda p, x: {"w": x.repeat(2, 1)}, 2)[0]({}, torch.ones(2, 1))])
def test_what_has_no_meaning_is_a_value_error(call):
    step_of_one()
    with pytest.raises(ValueError, match="expected"):
        call()
