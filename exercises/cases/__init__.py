"""cases -- the inputs that each exercise is graded on, from the smallest up, and what a difference means.

The answers are not here: the expected values come from the repository's own functions, run beside yours.
The last inputs of each exercise are drawn afresh each time, so that no table of answers passes.
"""
from grade import Exercise                               # comes first: it puts the repository on the path
import accountant
import ddpm
import dpsgd
from cases import accounting, diffusion, gradient, leaks

EXERCISES = {
    "ex01_noising": Exercise("ddpm.py:q_sample", ddpm.q_sample, diffusion.noising,
                             ("ddpm.LINEAR", "ddpm.Schedule")),
    "ex02_loss": Exercise("ddpm.py:loss", ddpm.loss, diffusion.losses,
                          ("ddpm.LINEAR", "ddpm.Schedule", "ddpm.q_sample")),
    "ex03_ddim_step": Exercise("ddpm.py:ddim_sample", diffusion.ddim_step, diffusion.jumps),
    "ex04_lora_layer": Exercise("lora.py:LoRALinear", diffusion.lora_forward, diffusion.layers),
    "ex05_merge": Exercise("lora.py:merge", diffusion.merged_weight, diffusion.merges),
    "ex06_per_sample_gradients": Exercise("dpsgd.py:per_sample_grads", dpsgd.per_sample_grads,
                                          gradient.gradients),
    "ex07_clipping": Exercise("dpsgd.py:clip_and_sum", dpsgd.clip_and_sum, gradient.clippings),
    "ex08_noisy_lot": Exercise("dpsgd.py:private_gradient", dpsgd.private_gradient, gradient.steps,
                               ("dpsgd.clip_and_sum",)),
    "ex09_gaussian_rdp": Exercise("accountant.py:rdp", accounting.gaussian_rdp, accounting.gaussians),
    "ex10_subsampled_rdp": Exercise("accountant.py:rdp", accounting.rdp, accounting.integrals),
    "ex11_to_epsilon": Exercise("accountant.py:to_epsilon", accountant.to_epsilon, accounting.conversions),
    "ex12_calibrate": Exercise("accountant.py:calibrate", accountant.calibrate, accounting.calibrations,
                               ("accountant.epsilon",)),
    "ex13_catch_a_leak": Exercise("tests/test_dpsgd.py", leaks.leaks, leaks.suspects),
    "ex14_latents": Exercise("autoencoder.py:to_latents", diffusion.private_latents, diffusion.encodings,
                             ("data.to_float",)),
}
