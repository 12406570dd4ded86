"""What tests need before they are imported, models and clips for many of them, and where the Triton kernels run."""

import json
import os
import sys

# Threads that wait must not spin: on a busy machine that makes short operations tens of times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from rrvideo.compat import mend_torchvision

mend_torchvision()  # before any test imports transformers
torch.set_num_threads(2)

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before any test imports Triton, which reads it where kernels are defined

# The interpreter's bfloat16 products are wrong: that dtype is for GPUs.
TARGETS = [("cpu", "float32"), ("cpu", "float16"), ("cuda", "float32"), ("cuda", "float16"), ("cuda", "bfloat16")]


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not HAS_GPU:
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A small random checkpoint of each family, not to be changed."""
    from checkpoints import FAMILIES, make_checkpoint

    return {family: make_checkpoint(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="session")
def folder(folders):
    return folders["qwen2_vl"]


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """Six seconds, in which every frame is another."""
    return _write_clip(tmp_path_factory, seconds=6)


@pytest.fixture(scope="session")
def eight_seconds(tmp_path_factory):
    """The same, longer."""
    return _write_clip(tmp_path_factory, seconds=8)


def _write_clip(tmp_path_factory, seconds):
    from clips import numbered_frames, write_video

    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", numbered_frames(24 * seconds, width=84, height=56))


@pytest.fixture(
    params=[
        pytest.param(
            (device, getattr(torch, dtype)), id=f"{device}-{dtype}", marks=[pytest.mark.gpu] * (device == "cuda")
        )
        for device, dtype in TARGETS
    ]
)
def kernel_target(request):
    """The device and dtype that a test of Triton kernels uses: the interpreter, or with the mark `gpu` a real GPU."""
    if request.param[0] == "cpu" and HAS_GPU:
        pytest.skip("kernels run on the GPU here")
    return request.param


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fill fresh memory with NaN, or the largest integer, so that whatever a kernel fails to write is noticed."""

    def poisoned(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Run a script with arguments; returns its exit code, what it printed, and the last line of that as JSON."""
    from benching import room

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        code = room(script).main()
        printed = capsys.readouterr().out
        return code, printed, json.loads(printed.splitlines()[-1])

    return run
