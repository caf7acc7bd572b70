"""Devices, precisions and memory."""

import os
import subprocess
import sys

import pytest
import torch

from pathsegdiff import device as device_module
from pathsegdiff.device import (
    has_arithmetic,
    keep_freed_memory,
    resolve_device,
    resolve_precision,
    training_layout,
    wait_without_spinning,
)
from pathsegdiff.errors import ConfigError

FAULTS = """
import resource, sys
import numpy as np
from pathsegdiff.device import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(3):
    np.ones(40 << 20, np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(40 << 20, np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_not_mapped_anew():
    if not keep_freed_memory():
        pytest.skip("no glibc here")

    def faults(how):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    # 40 MiB of pages each time, or none after the first.
    assert faults("keep") < 0.1 * faults("leave")


def test_threads_wait_without_spinning_unless_the_user_wants_it(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delitem(sys.modules, "torch")
    assert wait_without_spinning()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert not wait_without_spinning()
    assert os.environ["OMP_WAIT_POLICY"] == "active"


def test_a_command_sets_it_before_torch_is_imported():
    code = (
        "import os, sys; from cli.main import run; run(['--version']); "
        "assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.split()[-1] == "PASSIVE"


@pytest.mark.parametrize(
    ("name", "message"),
    [("gpu", "device must be auto"), ("cuda:99", "device"), ("meta", "device must be auto")],
)
def test_devices_that_are_not_there_are_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        resolve_device(name)


def test_a_cpu_computes_in_float32_unless_told_otherwise():
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu) == "float32"
    assert resolve_precision("bfloat16", cpu) == "bfloat16"
    with pytest.raises(ConfigError, match="precision must be auto or one of"):
        resolve_precision("float8", cpu)


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("there", [True, False])
def test_a_precision_that_is_emulated_is_said(monkeypatch, caplog, precision, there):
    monkeypatch.setattr(device_module, "has_arithmetic", lambda name: there or name == "float32")
    assert resolve_precision(precision, torch.device("cpu")) == precision
    expected = not there and precision != "float32"
    assert ("is emulated, which is many times slower" in caplog.text) == expected
    assert has_arithmetic("float32")


@pytest.mark.parametrize(
    ("capability", "layout"),
    [("AVX2", torch.contiguous_format), ("AVX512", torch.channels_last),
     ("AVX512_BF16", torch.channels_last)],
)  # fmt: skip
def test_convolutions_train_in_the_layout_that_the_processor_is_fast_in(
    monkeypatch, capability, layout
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert training_layout(torch.device("cpu")) is layout
    assert training_layout(torch.device("cuda")) is torch.channels_last
