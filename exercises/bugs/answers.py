"""Your answers. For each bug, write the name of the test in exercises/property_tests.py whose claim the bug
makes false, and a sentence of your own that says who learns what, and how. Here is an example of another bug:

    "bug00_no_noise": ("test_the_noise_has_standard_deviation_sigma_C",
                       "Whoever sees the adapter and knows all other images computes what this one added."),

This file is read, not run. Grade it with: python -m pytest exercises -k bug02
"""
ANSWERS = {
    "bug01_multiplicity": ("", ""),
    "bug02_mean_gradient": ("", ""),
    "bug03_clip_gradient": ("", ""),
    "bug04_clip_layers": ("", ""),
    "bug05_noise_scale": ("", ""),
    "bug06_micro_batches": ("", ""),
    "bug07_early_return": ("", ""),
    "bug08_lots": ("", ""),
    "bug09_clip_robustly": ("", ""),
    "bug10_closed_form": ("", ""),
    "bug11_two_runs": ("", ""),
    "bug12_amplification": ("", ""),
    "bug13_reproducible": ("", ""),
    "bug14_latent_scale": ("", ""),
}
