"""Your answers: for each bug the name of a theorem in tests/ that dies of it, for
example "test_lots_are_poisson", and behind it, as a comment, one sentence: who learns what, how.

The grader does not compare strings: it puts the bug into the repository and runs the theorem that you name.

  $ python -m pytest exercises -k bug02
"""
ANSWERS = {
    "bug01_multiplicity": "",
    "bug02_mean_gradient": "",
    "bug03_clip_gradient": "",
    "bug04_clip_layers": "",
    "bug05_noise_scale": "",
    "bug06_micro_batches": "",
    "bug07_early_return": "",
    "bug08_lots": "",
    "bug09_clip_robustly": "",
    "bug10_closed_form": "",
    "bug11_statement": "",
    "bug12_amplification": "",
    "bug13_reproducible": "",
    "bug14_latent_scale": "",
}
