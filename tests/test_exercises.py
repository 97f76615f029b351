"""The exercises keep their promises: a blank says so, the repository passes, wrong versions are caught, every bug dies.

An exercise that is being solved in this working tree is skipped where its blank would be tested.
"""
import ast
import inspect
import math
import sys

import numpy as np
import pytest
import torch
from torch.func import grad, vmap

import accountant
import ddpm
import dpsgd
import test_dpsgd
from conftest import ROOT

sys.path.insert(0, str(ROOT / "exercises"))
import cases  # noqa: E402
import grade  # noqa: E402
import theorem  # noqa: E402

KEY = {                                                                  # bug -> theorems that die of it
    "bug01_multiplicity": ["test_every_image_has_one_gradient_whatever_K",
                           "test_one_image_moves_a_whole_step_by_exactly_C_over_B"],
    "bug02_mean_gradient": ["test_division_is_by_the_declared_batch_not_the_realised_one"],
    "bug03_clip_gradient": ["test_adding_one_image_moves_the_sum_by_at_most_C"],
    "bug04_clip_layers": ["test_clipping_is_joint_over_all_tensors_and_leaves_short_gradients_alone",
                          "test_adding_one_image_moves_the_sum_by_at_most_C"],
    "bug05_noise_scale": ["test_noise_is_sigma_C_over_B_once_a_step_also_for_an_empty_lot"],
    "bug06_micro_batches": ["test_noise_is_sigma_C_over_B_once_a_step_also_for_an_empty_lot",
                            "test_chunk_size_never_changes_the_answer"],
    "bug07_early_return": ["test_noise_is_sigma_C_over_B_once_a_step_also_for_an_empty_lot"],
    "bug08_lots": ["test_lots_are_poisson"],
    "bug09_clip_robustly": ["test_adding_one_image_moves_the_sum_by_at_most_C"],
    "bug10_closed_form": ["test_gaussian_epsilon_is_where_the_hockey_stick_meets_delta"],
    "bug11_statement": ["test_a_run_that_broke_its_promise_is_refused"],
    "bug12_amplification": ["test_rdp_is_the_integral_that_defines_it", "test_one_step_spends_no_more_than_delta"],
    "bug13_reproducible": ["test_noise_is_sigma_C_over_B_once_a_step_also_for_an_empty_lot"],
}


# --- the ladder

def function_of(name: str) -> ast.FunctionDef:
    """The function to be written, as it stands in the exercise's file."""
    tree, wanted = ast.parse((ROOT / "exercises" / f"{name}.py").read_text()), cases.EXERCISES[name].truth.__name__
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == wanted)


@pytest.mark.parametrize("name", cases.EXERCISES)
def test_a_blank_exercise_fails_its_grader_and_says_where_to_write(name):
    body = function_of(name).body
    if len(body) != 2 or "NotImplementedError" not in ast.unparse(body[1]):
        pytest.skip("is being solved in this working tree")
    status, message = grade.check(name, cases.EXERCISES[name])
    assert status == "blank" and f"exercises/{name}.py" in message and "still blank" in message, message


@pytest.mark.parametrize("name", cases.EXERCISES)
def test_an_exercise_asks_for_the_repositorys_own_function(name):
    """The names and their order are those of the function that the grader runs; only optional ones may be left out."""
    given, truth = function_of(name).args, inspect.signature(cases.EXERCISES[name].truth).parameters
    names = [a.arg for a in given.args + ([given.vararg] if given.vararg else []) + given.kwonlyargs]
    assert names == [n for n, p in truth.items() if n in names or p.default is p.empty]
    assert grade.minutes(name) >= 5


@pytest.mark.parametrize("name", [name for name in cases.EXERCISES if name != "ex13_catch_a_leak"])
def test_the_repositorys_function_passes(name):
    status, message = grade.check(name, cases.EXERCISES[name], cases.EXERCISES[name].truth)
    assert status == "done", message


def one_image_moves_a_step_by_at_most_C_over_B(step):
    """Images with K = 4 draws, their gradients in two tensors: long, opposite, long in both tensors, NaN."""
    per_sample = lambda params, x: {"w": x.mean(1)[:, :1], "v": x.mean(1)[:, 1:]}
    params, C, B = {"w": torch.zeros(1), "v": torch.zeros(1)}, 1.0, 5
    images = torch.tensor([[0.3, 0.0], [10.0, 0.0], [-20.0, 0.0], [9.0, 9.0], [math.nan, 1.0]])[:, None].expand(-1, 4, 2)
    for n in range(1, 6):
        with_it, without = (test_dpsgd.flat(step(per_sample, params, (lot,), C=C, sigma=0.0, B=B))
                            for lot in (images[:n], images[:n - 1]))
        assert (with_it - without).norm() * B <= C * (1 + 1e-5)


def test_the_theorems_tell_leaking_steps_from_correct_ones(monkeypatch):
    """Exercise 13 has no single function for its answer: the repository's theorems, run on each step, are the answer."""
    def leaks(step) -> bool:
        monkeypatch.setattr(dpsgd, "private_gradient", step)
        try:
            one_image_moves_a_step_by_at_most_C_over_B(step)
            for lot in (0, 6):
                test_dpsgd.test_noise_is_sigma_C_over_B_once_a_step_also_for_an_empty_lot(lot)
        except AssertionError:
            return True
        return False
    status, message = grade.check("ex13_catch_a_leak", cases.EXERCISES["ex13_catch_a_leak"], leaks)
    assert status == "done", message


def noise_first(x, noise, a, a_next, eta, fresh):
    """A jump that forgets to clip the predicted image."""
    x0, sigma = (x - (1 - a) ** 0.5 * noise) / a**0.5, eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5
    return a_next**0.5 * x0 + max(1 - a_next - sigma**2, 0) ** 0.5 * noise + sigma * fresh


def clip_with_nan(grads, C):
    if not C > 0:
        raise ValueError
    norm = dpsgd.norms(grads).float()
    factor = torch.where(norm.isfinite(), (C / norm).clamp(max=1), 0)
    return {name: (factor @ g.flatten(1)).view(g.shape[1:]) for name, g in grads.items()}


WRONG = {                                                                # exercise -> plausible wrong versions
    "ex01": [lambda x0, t, noise, schedule=ddpm.LINEAR: ddpm.q_sample(x0, t, noise),
             lambda x0, t, noise, schedule=ddpm.LINEAR: schedule.alpha_bar[t][..., None, None, None] * x0 + noise],
    "ex02": [lambda *a: ddpm.loss(*a).mean(), lambda m, x0, labels, t, *a: ddpm.loss(m, x0, labels, t, *a) * t.shape[1]],
    "ex03": [noise_first],
    "ex04": [lambda x, W, b, A, B, lora_alpha, r: x @ W.mT + b + lora_alpha * x @ A.mT @ B.mT],
    "ex05": [lambda W, A, B, lora_alpha, r: W.add_(lora_alpha / r * B @ A)],
    "ex06": [lambda loss, params, *ex: grad(lambda p: vmap(loss, (None,) + (0,) * len(ex))(p, *ex).sum())(params)],
    "ex07": [clip_with_nan, lambda grads, C: {name: g.sum(0) for name, g in grads.items()},
             lambda grads, C: {name: dpsgd.clip_and_sum({name: g}, C)[name] for name, g in grads.items()}],
    "ex08": [cases.step_of(n) for n in (2, 5, 6, 7, 13)] + [cases.twice_C],
    "ex09": [lambda sigma, order: order / (2 * sigma)],
    "ex10": [lambda q, sigma, order: q**2 * cases.rdp(1, sigma, order)],
    "ex11": [lambda total, orders, delta: min((float(r - math.log(delta) / (a - 1)), a) for r, a in zip(total, orders))],
    "ex12": [lambda *a: accountant.calibrate(*a) * 0.9999, lambda *a: accountant.calibrate(*a) * 1.02],
    "ex13": [lambda step: False, lambda step: True, lambda step: step is not dpsgd.private_gradient],
}


@pytest.mark.parametrize("name, version", [(name, i) for name in cases.EXERCISES for i in range(len(WRONG[name[:4]]))])
def test_a_wrong_version_is_rejected_with_a_lesson(name, version):
    status, message = grade.check(name, cases.EXERCISES[name], WRONG[name[:4]][version])
    assert status == "wrong" and message.startswith(f"{name[:4]} differs from"), message
    for part in ("yours       =", "expected    =", "What it means: "):
        assert part in message, message


def test_a_message_shows_the_smallest_input_both_answers_and_where_they_part():
    def clip(grads, C):
        return {name: g.sum(0) for name, g in grads.items()}
    _, message = grade.check("ex07_clipping", cases.EXERCISES["ex07_clipping"], clip)
    for part in ("a gradient longer than C", "{a: [[3, 4]]}", "= {a: [3, 4]}", "= {a: [0.6, 0.8]}", "got 3, expected 0.6"):
        assert part in message, message


@pytest.mark.parametrize("got, expected", [
    (1.0, 1.1), (torch.ones(2), torch.ones(3)), ({"a": 1.0}, {"b": 1.0}), (math.nan, 1.0), ((1.0,), (1.0, 2.0)), (None, 1.0),
    ("x", 1.0), (ValueError(), 1.0), (1, True), (1.0, ValueError()), (TypeError(), ValueError()), (np.ones((1, 1)), 1.0)])
def test_the_grader_sees_a_difference(got, expected):
    assert grade.difference(got, expected, 1e-4, 1e-5)
    assert not grade.difference(expected, expected, 1e-4, 1e-5)


# --- spot the bug

@pytest.fixture(scope="module")
def fates():
    """Every theorem of the key, two that survive and one that does not exist, run on their bugs in ONE other process."""
    pairs = [(bug, name) for bug, names in KEY.items() for name in names]
    pairs += [("bug02_mean_gradient", "test_lots_are_poisson"), ("bug08_lots", "test_a_zero_gradient_stays_zero"),
              ("bug08_lots", "test_that_nobody_wrote")]
    return dict(zip(pairs, theorem.judge(pairs)))


@pytest.mark.parametrize("bug", theorem.BUGS)
def test_every_bug_dies_of_the_theorems_in_the_key(bug, fates):
    for name in KEY[bug]:
        fate, why = fates[bug, name]
        assert fate == "died", f"{name} {fate} on {bug}: {why}"
        assert not any(word in why for word in ("NameError", "TypeError", "ImportError", "AttributeError")), why


def test_a_theorem_about_something_else_survives_and_a_wrong_name_is_told(fates):
    assert fates["bug02_mean_gradient", "test_lots_are_poisson"][0] == "survived"
    assert fates["bug08_lots", "test_a_zero_gradient_stays_zero"] == ("survived", "1 case")
    assert fates["bug08_lots", "test_that_nobody_wrote"][0] == "unknown"


def test_a_bug_is_gone_when_the_grader_is_done():
    right = dpsgd.clip_and_sum
    with theorem.installed("bug04_clip_layers"):
        assert dpsgd.clip_and_sum is not right
    assert dpsgd.clip_and_sum is right


def test_every_bug_waits_for_an_answer():
    assert list(theorem.answers()) == theorem.BUGS == list(KEY)
    for status, message in theorem.check(dict.fromkeys(theorem.BUGS, "")).values():
        assert status == "blank" and "exercises/bugs/answers.py" in message
