"""The key to bugs/answers.py: the test of the claim that each bug makes false, and who learns what."""
ANSWERS = {
    "bug01_multiplicity": (
        "test_one_image_has_one_gradient_whatever_K",
        "Whoever sees the adapter learns whether an image took part: its K rows are clipped one by one and "
        "move the sum by up to K C, while the noise hides only C."),
    "bug02_mean_gradient": (
        "test_the_sum_is_divided_by_the_declared_batch_size",
        "One more image changes what every other one counts for, so the result moves by more than C / B. The "
        "size of the noise also tells how many images were sampled."),
    "bug03_clip_gradient": (
        "test_each_image_is_clipped_by_its_own_norm",
        "One image can reverse the mean of the lot, and so move the result by up to 2 n C: whoever knows the "
        "others sees which way it points."),
    "bug04_clip_layers": (
        "test_the_norm_is_over_all_tensors_jointly",
        "An image moves each of L tensors by C, and so all of them together by sqrt(L) C, while the noise "
        "hides only C: its presence shows sqrt(L) times as clearly as promised."),
    "bug05_noise_scale": (
        "test_the_noise_has_standard_deviation_sigma_C",
        "With C = 10 the noise is a tenth of what was accounted for, and an image shows through it. With C "
        "below 1 there is too much noise, and nobody learns anything, not even the model."),
    "bug06_micro_batches": (
        "test_the_noise_is_added_once_however_many_chunks",
        "The noise has standard deviation (number of chunks) sigma C: its size tells the size of the lot, "
        "which one image can change."),
    "bug07_early_return": (
        "test_an_empty_lot_gets_its_noise",
        "Where the image is the only one, any result but 0 tells that it was there. This has probability q "
        "with the image and 0 without it, which no epsilon covers."),
    "bug08_lots": (
        "test_each_image_is_in_the_lot_by_its_own_coin",
        "The accountant's proof is about lots in which each image has its own coin. With a fixed size, one "
        "image that joins pushes another one out, so lots differ in two images. The proof does not cover "
        "that, so whoever sees the adapter may learn more than epsilon allows."),
    "bug09_clip_robustly": (
        "test_an_image_whose_gradient_is_not_finite_counts_as_zero",
        "One image with a NaN gradient makes the published adapter NaN, since 0 times NaN is NaN: everybody "
        "sees that it took part."),
    "bug10_closed_form": (
        "test_the_calibrated_noise_keeps_the_budget",
        "The textbook proves its formula only for epsilon below 1. At epsilon = 10 the noise has a delta of "
        "2.3e-5 in place of 1e-5, so readers of the report trust a promise that does not hold."),
    "bug11_two_runs": (
        "test_runs_on_the_same_images_add_up",
        "Whoever has both adapters has two noisy looks at each image and averages the noise: two runs of "
        "epsilon = 3.15 each tell as much as one of 3.54."),
    "bug12_amplification": (
        "test_rdp_of_a_step_is_that_of_the_mixture",
        "E[e^X] is not e^(E[X]): the rare lot with the image tells much more than its share. So the epsilon "
        "that is printed is below the true one, and the adapter tells more than was promised."),
    "bug13_reproducible": (
        "test_the_noise_is_new_in_every_step",
        "The noise is the same in every step. Whoever has two released gradients subtracts them, and what is "
        "left has no noise at all; whoever guesses the seed needs only one."),
    "bug14_latent_scale": (
        "test_a_latent_depends_on_its_own_image_alone",
        "One image of the first batch moves the latents, and so the gradients, of all others: the sum moves "
        "by up to 2 C for each of them, while the noise hides only C."),
}
