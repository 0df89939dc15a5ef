"""Why the Triton backend cannot run, on machines that are not at hand."""

import pytest
import torch

import fastkd
from fastkd import kernels
from fastkd.__main__ import main
from fastkd.kernels import triton as triton_backend

REASONS = {
    "absent": "triton is not installed",
    "old": "triton 3.5 is older than 3.6",
    "no GPU in torch": "is built without CUDA or ROCm",
    "numpy": "Triton's interpreter before 3.7 fails with numpy 2.4",
}


@pytest.fixture(params=REASONS)
def case(request, monkeypatch):
    """A machine where the backend cannot run, for one reason."""
    versions = {"triton": (3, 5) if request.param == "old" else (3, 6), "numpy": (2, 4)}
    monkeypatch.setattr(triton_backend, "_installed", lambda name, *_: versions[name])
    monkeypatch.setattr(
        triton_backend, "find_spec", lambda _: None if request.param == "absent" else object()
    )
    monkeypatch.setattr(triton_backend, "INTERPRETED", request.param == "numpy")
    cuda = None if request.param in ("no GPU in torch", "numpy") else "13.0"
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    reasons = triton_backend._missing()
    assert len(reasons) == 1
    backend = kernels.BACKENDS["triton"]._replace(missing=reasons)
    monkeypatch.setitem(kernels.BACKENDS, "triton", backend)
    monkeypatch.setattr(kernels, "_CHOSEN", {})
    return request.param


def test_it_is_named(case):
    assert REASONS[case] in fastkd.backends()["triton"][0]
    logits = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run here: .*" + REASONS[case]):
        fastkd.kd_loss(logits, logits, backend="triton")
    assert fastkd.kd_loss(logits, logits) == 0


def test_the_command_prints_it(case, capsys, monkeypatch):
    monkeypatch.setattr("fastkd.__main__.check", lambda *_: [])
    monkeypatch.setattr("fastkd.__main__.seconds", lambda *_: 1.0)
    assert main() == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("  triton"))
    assert REASONS[case] in line


def test_nothing_speaks_against_it(monkeypatch):
    monkeypatch.setattr(triton_backend, "_installed", lambda *_: (3, 6))
    monkeypatch.setattr(triton_backend, "find_spec", lambda _: object())
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert triton_backend._missing() == []
