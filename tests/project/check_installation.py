"""Whether an installed fastkd fits the torch beside it, CPU or CUDA, with or without a GPU.

python check_installation.py [--cuda]     --cuda: the wheel was built with the CUDA kernels

Run it outside of the source tree, with nothing but torch and the wheel installed.
"""

import argparse
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

import fastkd

TREE = Path(__file__).parents[2]
OPS = ("fastkd::dense_rows", "fastkd::scale_rows_")


def expected_reasons(built: bool) -> list[str]:
    """What backends()["cuda"] has to speak of, where no GPU is seen."""
    words = [] if built else ["not part of this installation"]
    if torch.version.cuda is None:
        return [*words, "built without CUDA"]
    return words or ["sees no GPU"]


def train() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 5000)
    teacher = torch.randn(32, 5000) * 3
    hidden, labels = torch.randn(32, 64), torch.randint(5000, (32,))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = fastkd.kd_loss(
            head(hidden), teacher, labels, temperature=2.0, alpha=0.7, inplace=True
        )
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"distillation: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < 0.8 * losses[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="check an installed fastkd")
    parser.add_argument("--cuda", action="store_true")
    built = parser.parse_args().cuda
    where = Path(fastkd.__file__)
    assert where.parent != TREE / "fastkd", f"this is the source tree, not an installation: {where}"
    assert not torch.cuda.is_initialized(), "import fastkd initialised CUDA"
    assert (find_spec("fastkd._C_cuda") is not None) == built

    with_cuda = built and torch.version.cuda is not None
    for op in OPS:
        for key, there in (("CPU", True), ("CUDA", with_cuda)):
            found = torch._C._dispatch_has_kernel_for_dispatch_key(op, key)
            assert found == there, f"{op} for {key}: {found}"

    reasons = fastkd.backends()
    assert reasons["cpu"] == reasons["reference"] == []
    if not torch.cuda.is_available():
        assert len(reasons["cuda"]) == len(expected_reasons(built)), reasons["cuda"]
        for reason, words in zip(reasons["cuda"], expected_reasons(built), strict=True):
            assert words in reason, reason
    print(f"torch {torch.__version__}: cuda {reasons['cuda'] or 'ready'}")
    train()
    subprocess.run([sys.executable, "-m", "fastkd"], check=True)


if __name__ == "__main__":
    main()
