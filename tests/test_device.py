"""Scripts on a device that refuses tensors of the CPU (pretend.py): smoke runs of three, of all with --device-all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

from reproduce import PAPERS

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="needs PyTorch 2.13",
)


def run(*command):
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)


def test_mixing_devices_is_an_error():
    lines = "import torch; from tests.pretend import install; install(); x = torch.rand(3).to('pretend')"
    assert run("-c", f"{lines}; print((x + 2 * x)[[0]].sum().item())").returncode == 0
    for mixed in (
        "x + torch.rand(3)",
        "torch.cat([x, torch.rand(3)])",
        "torch.rand(3)[x > 0]",
        "x.numpy()",
    ):
        assert "Error" in run("-c", f"{lines}; {mixed}").stderr, mixed


@pytest.mark.parametrize("script", PAPERS)
def test_smoke(script, tmp_path, request):
    if script not in ("patching", "crosscoder", "train_hapax") and not request.config.getoption(
        "--device-all"
    ):
        pytest.skip("--device-all")
    flags = ["--preset", "smoke", "--device", "pretend", "--out", str(tmp_path)]
    done = run("tests/pretend.py", f"{script}.py", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        json.loads((tmp_path / "result.json").read_text())["device"] == "pretend:0"
    )  # as set_device needs it
