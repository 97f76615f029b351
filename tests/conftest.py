"""Shared by all tests: the repository on the path, a tiny UNet that runs in milliseconds, random examples."""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

for name in ("CI", "BUILD_NUMBER"):          # where these are set, pytest shows the whole difference of two
    os.environ.pop(name, None)               # files, and needs hours to find it

os.environ.setdefault("OMP_NUM_THREADS", "1")                # for the processes that tests start, too
torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import ddpm  # noqa: E402
import lora  # noqa: E402
import unet  # noqa: E402
from machinery import screen  # noqa: E402

screen.PATIENCE = 600.0      # seconds: on a busy machine no test finds a line about waiting among the words


# -----------------------------------------------------------------------------
# `python -m pytest`, without a file's name, is the work of two processes: here and, for these, another

OTHERS = [f"test_{name}.py" for name in ("ablations", "audit", "checkpoint", "distributed", "exercises",
                                         "faults", "one_step")]


def pytest_configure(config):
    config.other = None
    if config.args_source.name == "TESTPATHS" and not config.option.collectonly:
        command = [sys.executable, "-m", "pytest", *config.invocation_params.args,
                   *(str(ROOT / "tests" / name) for name in OTHERS)]
        config.said = tempfile.TemporaryFile("w+")
        config.other = subprocess.Popen(command, stdout=config.said, stderr=subprocess.STDOUT)


def pytest_ignore_collect(collection_path, config):
    return True if config.other and collection_path.name in OTHERS else None


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session, exitstatus):
    """A failure there is a failure here; Ctrl-C and -x stop both."""
    if other := session.config.other:
        if exitstatus == pytest.ExitCode.INTERRUPTED or session.shouldfail:
            other.terminate()
        code, none = other.wait(), pytest.ExitCode.NO_TESTS_COLLECTED
        if exitstatus in (pytest.ExitCode.OK, none) and code != none:
            session.exitstatus = code


def pytest_terminal_summary(terminalreporter, config):
    if config.other:
        config.said.seek(0)
        terminalreporter.section("the other process")
        terminalreporter.write(config.said.read())


# -----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def tiny_unet(classes=10, image_channels=1, seed=0) -> unet.UNet:
    """A UNet whose outputs are not all zero: every parameter is random."""
    torch.manual_seed(seed)
    model = unet.UNet(image_channels=image_channels, channels=8, multipliers=(1, 2), heads=2, classes=classes,
                      patch=2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def tiny_adapted(targets=lora.ATTENTION, rank=2, alpha=3.0, **kw) -> unet.UNet:
    """tiny_unet with LoRA whose B factors are not zero, so that every factor has a gradient."""
    model = tiny_unet(**kw)
    lora.inject(model, rank, alpha, targets)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.normal_(0, 0.3)
    return model


def examples(n: int, K: int, side: int = 8, channels: int = 1, seed: int = 0):
    """(x0, labels, t, noise): n images with K draws each."""
    g = torch.Generator().manual_seed(seed)
    x0 = torch.rand(n, channels, side, side, generator=g) * 2 - 1
    labels = torch.randint(10, (n,), generator=g)
    return x0, labels, *ddpm.draw_t_and_noise(x0, K, g)
