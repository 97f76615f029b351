"""The exercises keep their promises: blanks say so, right answers pass, wrong ones are caught, bugs die.

An exercise that is being solved in this working tree is skipped where its blank would be tested.
"""
import ast
import csv
import inspect
import io
import math
import re
import sys

import numpy as np
import pytest
import torch

import accountant
import ddpm
import dpsgd
from conftest import ROOT
from solutions import SECOND, WRONG

HERE = ROOT / "exercises"
sys.path.insert(0, str(HERE))
import cases  # noqa: E402
import grade  # noqa: E402
import progress  # noqa: E402
import theorem  # noqa: E402

TEACHER, README = (HERE / "teacher.md").read_text(), (HERE / "README.md").read_text()
NAMES = {name[:4]: name for name in cases.EXERCISES}                     # ex01 -> ex01_noising


def rows(first: str, text: str = TEACHER) -> list[list[str]]:
    """The rows of a table whose first cell matches, cell by cell."""
    lines = [line for line in text.splitlines() if re.match(rf"\| {first} \|", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# --- the ladder

def function_of(name: str) -> ast.FunctionDef:
    """The function to be written, as it stands in the exercise's file."""
    tree, wanted = ast.parse((HERE / f"{name}.py").read_text()), cases.EXERCISES[name].truth.__name__
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
    """The names and their order are those of the function that the grader runs; but for optional ones."""
    given, truth = function_of(name).args, inspect.signature(cases.EXERCISES[name].truth).parameters
    names = [a.arg for a in given.args + ([given.vararg] if given.vararg else []) + given.kwonlyargs]
    assert names == [n for n, p in truth.items() if n in names or p.default is p.empty]
    assert f"; {grade.table(name)[0]} minutes]" in (HERE / f"{name}.py").read_text().splitlines()[0]


@pytest.mark.parametrize("name", cases.EXERCISES)
def test_the_repositorys_function_passes(name):
    status, message = grade.check(name, cases.EXERCISES[name], cases.EXERCISES[name].truth)
    assert status == "done" and f"compare your code with {cases.EXERCISES[name].origin}" in message, message


@pytest.mark.parametrize("function", [f for short in NAMES for f in SECOND[short]], ids=lambda f: f.__name__)
def test_a_right_answer_that_is_not_the_repositorys_passes(function):
    name = next(NAMES[short] for short in NAMES if function in SECOND[short])
    status, message = grade.check(name, cases.EXERCISES[name], function)
    assert status == "done", message


@pytest.mark.parametrize("function", [f for short in NAMES for f in WRONG[short]], ids=lambda f: f.__name__)
def test_a_wrong_version_is_rejected_with_a_lesson(function):
    short = next(short for short in NAMES if function in WRONG[short])
    status, message = grade.check(NAMES[short], cases.EXERCISES[NAMES[short]], function)
    assert status == "wrong" and message.startswith(short), message
    if "your code stopped" not in message:
        for part in (f"{short} differs from", "yours       =", "expected    =", "What it means: "):
            assert part in message, message
    for row in rows(short):                                              # the teacher's two commonest
        if row[2] == f"`{function.__name__}`":
            assert row[3] in message and function in WRONG[short][:2], (row[3], message)


def test_the_teacher_has_two_mistakes_for_each_exercise_and_points_to_the_code():
    for short, name in NAMES.items():
        assert [row[2].strip("`") for row in rows(short)] == [f.__name__ for f in WRONG[short][:2]]
        if short != "ex13":
            assert {row[1].strip("`") for row in rows(short)} == {cases.EXERCISES[name].origin}


def test_the_experiments_figures_are_the_accountants():
    """Noise for the six settings of experiments.md, in the order of the key; and its norm for each rank."""
    def sigma(epsilon, B, steps):
        return accountant.calibrate(epsilon, 1e-5, B / 60_000, steps)
    one = [sigma(10, 512, 110), sigma(1, 512, 110)]
    assert f"sigma {one[0]:.3f} -> {one[1]:.3f}" in TEACHER
    large, small = sigma(10, 1024, 110), sigma(10, 128, 110)
    assert f"sigma is {large:.3f} (B = 1024, K = 1) and {small:.3f} (B = 128, K = 8)" in TEACHER
    many, few = sigma(1, 64, 600), sigma(1, 512, 75)
    assert f"sigma {many:.3f} (B = 64, 600 steps) and {few:.3f} (B = 512, 75 steps)" in TEACHER
    assert f"sigma / B {many / 64:.4f} and {few / 512:.4f}" in TEACHER
    weights = [2_240, 6_848, 25_280, 662_692]
    norms = [f"{one[0] * math.sqrt(n) / 512:.2f}" for n in weights]
    assert f"{weights[0]:,}, {weights[1]:,}, {weights[2]:,} and, full, {weights[3]:,} weights" in TEACHER
    assert f"noise of norm {', '.join(norms)} C" in TEACHER


def test_the_right_test_tells_leaking_steps_from_correct_ones():
    """What ex13 is graded on is true: a test that looks at distances and deviations alone says the same."""
    leaks = SECOND["ex13"][0]
    for title, step, answer, _ in cases.STEPS:
        assert leaks(step) == answer, title


def test_a_message_shows_the_smallest_input_both_answers_and_where_they_part():
    def clip(grads, C):
        return {name: g.sum(0) for name, g in grads.items()}
    _, message = grade.check("ex07_clipping", cases.EXERCISES["ex07_clipping"], clip)
    for part in ("a gradient longer than C", "{a: [[3, 4]]}", "= {a: [3, 4]}", "= {a: [0.6, 0.8]}",
                 "got 3, expected 0.6"):
        assert part in message, message


@pytest.mark.parametrize("got, expected", [
    (1.0, 1.1), (torch.ones(2), torch.ones(3)), ({"a": 1.0}, {"b": 1.0}), (math.nan, 1.0),
    ((1.0,), (1.0, 2.0)),
    ("x", 1.0), (1, True), (np.ones((1, 1)), 1.0), (torch.ones(2).int(), torch.ones(2)),
    (np.ones(2), torch.ones(2))])
def test_the_grader_sees_a_difference(got, expected):
    assert grade.form(got, expected) or grade.difference(got, expected, 1e-4, 1e-5)
    assert not grade.form(expected, expected) and not grade.difference(expected, expected, 1e-4, 1e-5)


# --- what a file that was handed in is told

def hand_in(folder, name: str, body: str):
    """The exercise's file with this body, in `folder`; the number of the body's first line."""
    lines = (HERE / f"{name}.py").read_text().splitlines()
    at = function_of(name).body[0].end_lineno                            # behind the docstring
    written = lines[:at] + ["    " + line for line in body.splitlines()]
    (folder / f"{name}.py").write_text("\n".join(written) + "\n")
    return at + 1


OWN_WORDS = [                                                          # exercise, body, what the message says
    ("ex01_noising", "pass", "your function returned nothing"),
    ("ex01_noising", "return x0 + oops", "your code stopped at line {line} of ex01_noising.py: NameError"),
    ("ex01_noising", "return (x0 +", "your file cannot be loaded at line {line} of ex01_noising.py: "
     "SyntaxError"),
    ("ex01_noising", "raise SystemExit(3)", "your code stopped at line {line} of ex01_noising.py: "
     "SystemExit: 3"),
    ("ex01_noising", "while True: pass", "TimeoutError: no answer after 1 s: is there an endless loop?"),
    ("ex01_noising", "return x0.int()", "got numbers of type torch.int32, expected torch.float32"),
    ("ex01_noising", "return x0.numpy()", "got a ndarray, expected a tensor of shape (1, 1, 1, 1)"),
    ("ex02_loss", "return noise.mean()", "got shape (), expected (1,)"),
    ("ex07_clipping", "return list(grads)", "got a list, expected a dict with the names ['a']"),
    ("ex08_noisy_lot", "return clip_and_sum(per_sample(params, *examples), C) and {}",
     "got the names [], expected ['w', 'v']"),
    ("ex11_to_epsilon", "return 2.214", "got a float, expected 2 values"),
    ("ex12_calibrate", "return 1.0, 2.0", "TypeError: the result is (1, 2), expected one number"),
    ("ex08_noisy_lot", "return {n: g / B for n, g in clip_and_sum(per_sample(params, *examples), C).items()}",
     "your code stopped at line {line} of ex08_noisy_lot.py: RuntimeError: per_sample was called on no "
     "examples")]


@pytest.mark.parametrize("name, body, words", OWN_WORDS)
def test_what_is_no_answer_is_told_so_and_gets_no_lesson(name, body, words, tmp_path, monkeypatch):
    monkeypatch.setattr(grade, "SECONDS", 1)
    line = hand_in(tmp_path, name, body)
    status, message = grade.check(name, cases.EXERCISES[name], folder=tmp_path)
    assert status == "wrong" and words.format(line=line) in message, message
    lesson = message.partition("What it means: ")[2]
    assert not lesson or lesson.startswith("it has another form"), message


def test_an_empty_lot_divided_by_its_size_is_told_of_the_realised_size(tmp_path):
    hand_in(tmp_path, "ex08_noisy_lot", "g = {n: torch.zeros_like(p) for n, p in params.items()}\n"
            "if len(examples[0]): g = clip_and_sum(per_sample(params, *examples), C)\n"
            "return {n: x / len(examples[0]) for n, x in g.items()}")
    _, message = grade.check("ex08_noisy_lot", cases.EXERCISES["ex08_noisy_lot"], folder=tmp_path)
    assert "The realised lot size is private" in message, message


def test_a_file_without_the_function_is_told_its_name(tmp_path):
    (tmp_path / "ex01_noising.py").write_text("def noise_it(x0, t, noise): return x0\n")
    _, message = grade.check("ex01_noising", cases.EXERCISES["ex01_noising"], folder=tmp_path)
    assert "has no function q_sample" in message, message


@pytest.mark.parametrize("name", [name for name, e in cases.EXERCISES.items() if e.out_of_order])
def test_the_repositorys_own_answer_is_out_of_order_while_a_students_runs(name, tmp_path):
    """By module, and imported by name; and it is back in order afterwards."""
    place = cases.EXERCISES[name].out_of_order[0]
    module, _, function = place.partition(".")
    calls = [f"import {module}\nreturn {place}()"]
    if "." not in function:
        calls.append(f"from {module} import {function} as done\nreturn done()")
    for body in calls:
        hand_in(tmp_path, name, body)
        status, message = grade.check(name, cases.EXERCISES[name], folder=tmp_path)
        assert status == "wrong", message
        assert message.endswith(f"your code calls {place}: this is the one you are to write"), message
    assert grade.check(name, cases.EXERCISES[name], cases.EXERCISES[name].truth)[0] == "done"


def test_a_solution_that_changes_what_it_was_given_is_told_so_at_once():
    """Not by a later input: the arguments of one call share no memory, so nothing else goes wrong."""
    def in_place(x0, t, noise, schedule=ddpm.LINEAR):
        a = schedule.alpha_bar[t][..., None, None, None]
        return x0.mul_(a.sqrt()).add_(noise * (1 - a).sqrt())
    _, message = grade.check("ex01_noising", cases.EXERCISES["ex01_noising"], in_place)
    assert "your function changed its argument x0 in place" in message and "schedule" not in message, message


# --- marks

def test_points_and_minutes_are_those_of_the_readmes_table():
    worth = {name: grade.table(name)[1] for name in [*cases.EXERCISES, *theorem.BUGS]}
    assert worth["ex13_catch_a_leak"] == 4 and worth["bug07_early_return"] == 1 and sum(worth.values()) == 34
    left = re.search(r"Homework: (.*?) \((\d+) minutes\)", README)
    assert sum(grade.table(short)[0] for short in re.findall(r"ex\d\d", left[1])) == int(left[2])


def test_the_lesson_plan_fits_its_own_times():
    """Three hours without a gap; what the class writes fits its slot; no exercise is left out."""
    found = re.findall(r"^\| (\d+) to (\d+) \| (.*?) \|", README, re.M)
    slots = [(int(a), int(b), what) for a, b, what in found]
    assert [a for a, _, _ in slots if a == 0] == [0, 0, 0] and slots[-1][1] == 60
    for (_, end, _), (start, _, _) in zip(slots, slots[1:]):
        assert end % 60 == start
    written = []
    for start, end, what in slots:
        if what.startswith("class"):
            work = re.findall(r"\b(ex\d\d|bug\d\d)\b", what)
            written += work
            assert sum(grade.table(one)[0] for one in work) <= end - start, what
    homework = re.findall(r"ex\d\d", re.search(r"Homework: (.*?) \(", README)[1])
    assert sorted([one for one in written if one[:2] == "ex"] + homework) == sorted(NAMES)


def test_marks_are_a_line_for_each_hand_in_whatever_the_others_do(tmp_path, capsys):
    """One right answer is one point; a hand-in that ends the process is not marked, and the next one is."""
    for student in ("anna", "ben"):
        (tmp_path / student).mkdir()
    hand_in(tmp_path / "anna", "ex05_merge", "print('hello')\nreturn W + lora_alpha / r * B @ A")
    hand_in(tmp_path / "ben", "ex05_merge", "import os\nos._exit(0)")
    anna, ben = progress.marks(tmp_path / "anna"), progress.marks_of_a_process(tmp_path / "ben")
    out = io.StringIO()
    csv.writer(out).writerows([progress.COLUMNS, anna, ben])
    first, second = csv.DictReader(out.getvalue().splitlines())
    assert (first["student"], first["ex05"], first["ex04"]) == ("anna", "1", "0")
    assert (first["points"], first["of"]) == ("1", "34")
    assert second["student"] == "ben" and second["points"] == "" and second["remark"].startswith("not marked")
    assert "hello" not in capsys.readouterr().out


def test_a_folder_that_is_no_hand_in_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["progress.py", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        progress.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "expected a hand-in" in said


# --- spot the bug

BUG = {row[0]: row for row in rows(r"bug\d\d")}                          # bug01 -> its row in teacher.md
KEY = {bug: re.findall(r"`(test_\w+)`", BUG[bug[:5]][1]) for bug in theorem.BUGS}
ALSO = {bug: re.findall(r"`(test_\w+)`", BUG[bug[:5]][2]) for bug in theorem.BUGS}
NEIGHBOURS = {                                             # theorems that see the same function, and are fast
    "dpsgd": ["test_clipping_is_joint_over_all_tensors_and_leaves_short_gradients_alone",
              "test_a_zero_gradient_stays_zero",
              "test_the_norm_of_a_long_gradient_is_exact",
              "test_mixed_precision_never_touches_norms_sums_or_noise",
              "test_noise_is_sigma_C_over_B_once_a_step_also_for_an_empty_lot", "test_lots_are_poisson",
              "test_division_is_by_the_declared_batch_not_the_realised_one",
              "test_an_empty_and_a_full_lot_are_legal",
              "test_what_has_no_meaning_is_a_value_error"],
    "accountant": ["test_rdp_is_the_integral_that_defines_it", "test_rdp_at_whole_orders_is_the_binomial_sum",
                   "test_rdp_without_sampling_is_the_gaussians", "test_rdp_at_the_ends"],
    "machinery.pld": ["test_gaussian_epsilon_is_where_the_hockey_stick_meets_delta"],
    "train": ["test_every_image_has_one_gradient_whatever_K"],
    "machinery.statement": ["test_a_run_that_broke_its_promise_is_refused"],
    "autoencoder": ["test_no_layer_averages_over_the_batch",
                    "test_one_image_moves_a_step_on_latents_by_at_most_C",
                    "test_scaled_public_latents_have_standard_deviation_1_and_the_way_back_undoes_the_scale",
                    "test_grey_and_small_images_become_photographs_and_come_back"]}
STRANGERS = [("bug02_mean_gradient", "test_lots_are_poisson"), ("bug08_lots", "test_that_nobody_wrote"),
             ("bug01_multiplicity", "test_adding_one_image_moves_the_sum_by_at_most_C")]


@pytest.fixture(scope="module")
def fates():
    """What becomes of the theorems of the key, and of their neighbours, on each bug: in ONE other process."""
    pairs = list(STRANGERS)
    for bug in theorem.BUGS:
        neighbours = NEIGHBOURS[theorem.replaced(bug).rsplit(".", 1)[0]]
        pairs += [(bug, name) for name in KEY[bug] + ALSO[bug] + neighbours]
    pairs = list(dict.fromkeys(pairs))
    return dict(zip(pairs, theorem.judge(pairs)))


@pytest.mark.parametrize("bug", theorem.BUGS)
def test_a_bug_dies_of_the_theorems_in_the_key_and_of_no_other(bug, fates):
    """By their own assertions: a bug differs from the repository in one idea, and crashes nowhere."""
    assert KEY[bug] and len(BUG[bug[:5]][3]) > 40, "a theorem, and who learns what, how"
    for (other, name), (fate, why) in fates.items():
        if other == bug and (other, name) not in STRANGERS:
            expected = ("died",) if name in KEY[bug] + ALSO[bug] else ("survived", "unconcerned")
            assert fate in expected, f"{name} {fate} on {bug}: {why}"


def test_a_theorem_about_something_else_survives_and_a_wrong_name_is_told(fates):
    assert fates["bug02_mean_gradient", "test_lots_are_poisson"] == ("unconcerned", "0 calls")
    assert fates["bug08_lots", "test_that_nobody_wrote"][0] == "unknown"


def test_the_right_theorem_that_never_runs_the_bug_is_told_so(fates):
    bug, name = "bug01_multiplicity", "test_adding_one_image_moves_the_sum_by_at_most_C"
    status, message = theorem.verdict(bug, name, *fates[bug, name])
    assert status == "wrong" and "SURVIVES" not in message, message
    assert "never runs train.per_image_gradients" in message and "whole step" in message, message


def test_a_crash_is_not_a_catch():
    """One case that asserts makes it a death, a case that merely stops does not."""
    crash, death, calm = ("crashed", "f[1]: TypeError", 1), ("died", "f[2]: assert 0", 1), ("survived", "", 3)
    assert theorem.summary([calm, crash])[0] == "crashed" and theorem.summary([crash, death])[0] == "died"
    assert theorem.summary([calm, calm]) == ("survived", "6 calls in 2 cases")
    of_another = [("died", "f: assert 0", 0)]
    assert theorem.summary(of_another)[0] == "unconcerned", "what it died of was not the bug"
    assert theorem.verdict("bug05_noise_scale", "f", "crashed", "f[1]: TypeError")[0] == "wrong"


def test_a_bug_that_stops_is_seen_to_crash(tmp_path, monkeypatch):
    """In place of bug05: a stand-in that raises."""
    (tmp_path / "bugs").mkdir()
    (tmp_path / "bugs" / "bug05_noise_scale.py").write_text(
        "STANDS_IN_FOR = 'dpsgd.private_gradient'\ndef private_gradient(*a, **kw): raise KeyError('w')\n")
    monkeypatch.setattr(theorem, "HERE", tmp_path)
    name = "test_division_is_by_the_declared_batch_not_the_realised_one"
    fate, why = theorem.run("bug05_noise_scale", [name])[name]
    assert fate == "crashed" and "KeyError" in why, (fate, why)


def test_a_bug_is_gone_when_the_grader_is_done():
    right = dpsgd.clip_and_sum
    with theorem.installed("bug04_clip_layers"):
        assert dpsgd.clip_and_sum is not right
    assert dpsgd.clip_and_sum is right


def test_every_bug_waits_for_an_answer():
    file = grade.load(HERE / "bugs" / "answers.py")
    assert list(file.ANSWERS) == theorem.BUGS == list(KEY)
    for status, message in theorem.check(dict.fromkeys(theorem.BUGS, "")).values():
        assert status == "blank" and "exercises/bugs/answers.py" in message
