"""Fixtures for every test: fixed seeds, the devices there are, and uninitialised memory that shows."""

import signal
import sys

import pytest
import torch
import torch.utils._device

try:
    import hypothesis
except ImportError:  # the machine with the GPU need not have it
    pass
else:  # how long an example takes is the machine's business
    quiet = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=quiet)
    hypothesis.settings.load_profile("untimed")

# torch lists what "with torch.device(...)" reaches once, at its first use, by identity: that has to be before the wraps
torch.utils._device._device_constructors()

POISON = 0x7D  # small enough for every integer dtype, and no code, shape or count of ours


def poisoned(make):
    """``make``, but filled with NaN (integers: POISON) for callers in our own packages."""

    def wrapper(*args, **kwargs):
        out = make(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] in ("lowbit", "lowbit_kernels") and type(out) is torch.Tensor:
            with torch.no_grad():
                out.fill_(float("nan") if out.is_floating_point() else POISON)
        return out

    return wrapper


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Whoever forgets to write an element of torch.empty reads NaN, not the zero that happened to be there."""
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Each device the machine has."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here (torch.cuda.is_available() is False)")
    return torch.device(request.param)


def pytest_terminal_summary(terminalreporter):
    """Say why something was skipped, also without -rs."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = [report.longrepr[2] for report in skipped if isinstance(report.longrepr, tuple)]
    for reason in sorted(set(reasons)):
        terminalreporter.write_line(f"{reasons.count(reason)} x {reason}")


@pytest.fixture
def quiet():
    """transformers draws no progress bars on stderr."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture
def installed(quiet):
    """transformers loads packed folders through lowbit."""
    import lowbit

    lowbit.install()
    yield
    lowbit.uninstall()


@pytest.fixture
def interruptible():
    """Children of this test can be interrupted, also when the tests run in a background job, which ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
