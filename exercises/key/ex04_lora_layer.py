"""ex04, as a student may write it."""


def lora_forward(x, W, b, A, B, lora_alpha, r):
    return x @ W.mT + b + lora_alpha / r * (x @ A.mT) @ B.mT
