"""``python -m fastkd``: versions, backends with reasons, a self-check and a small timing."""

import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import __version__, backends, kd_loss

# (what it exercises, options); V is not a multiple of any vector width.
CHECKS = (
    ("forward KL, T = 2", {"temperature": 2.0}),
    ("reverse KL", {"beta": 1.0}),
    ("Jensen-Shannon, beta = 0.3", {"beta": 0.3, "temperature": 2.0}),
    ("top_k = 50", {"top_k": 50}),
    ("bottom 20 %, hard term", {"bottom_percentile": 20.0, "alpha": 0.5, "temperature": 4.0}),
)
N, V = 8, 5003


def logits(N: int, V: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(N, V, generator=generator) * 3
    student = teacher + torch.randn(N, V, generator=generator)
    labels = torch.randint(V, (N,), generator=generator)
    return student.to(device), teacher.to(device), labels.to(device)


def check(backend: str, device: torch.device) -> list[tuple[str, float, float]]:
    """Per option the relative error of loss and gradient against the definition in float64."""
    student, teacher, labels = logits(N, V, device)
    rows = []
    for name, options in CHECKS:
        results: list[tuple[Tensor, Tensor]] = []
        for dtype, runs_on in ((torch.float32, backend), (torch.float64, "reference")):
            s = student.to(dtype, copy=True).requires_grad_()
            loss = kd_loss(s, teacher.to(dtype), labels, **options, backend=runs_on)
            assert isinstance(loss, Tensor)
            loss.backward()
            assert s.grad is not None
            results.append((loss.detach().double(), s.grad.double()))
        (loss, gradient), (loss64, gradient64) = results
        rows.append(
            (
                name,
                ((loss - loss64).abs() / loss64).item(),
                ((gradient - gradient64).norm() / gradient64.norm()).item(),
            )
        )
    return rows


def seconds(step: Callable[[], None], device: torch.device, repeats: int = 5) -> float:
    """Median of a few runs, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(f"fastkd {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"device {device} ({where}), {torch.get_num_threads()} threads")
    available = backends()
    if not available["cpu"]:
        print(f"CPU instruction set {torch.ops.fastkd.cpu_instruction_set(0)}")

    print("\nBackends")
    for name, reasons in available.items():
        print(f"  {name:10} {'; '.join(reasons) or 'ready'}")

    failed = False
    print("\nSelf-check against the definition in float64 (relative errors; at most 1e-5)")
    for name, reasons in available.items():
        if reasons:
            continue
        on = torch.device("cpu") if name == "cpu" else device
        for what, loss_error, gradient_error in check(name, on):
            bad = not (loss_error < 1e-5 and gradient_error < 1e-5)
            failed |= bad
            print(
                f"  {name:10} {what:28} loss {loss_error:.1e}  gradient {gradient_error:.1e}"
                f"{'  FAILED' if bad else ''}"
            )

    rows, T = (64, 2.0) if device.type == "cpu" else (1024, 2.0)
    student, teacher, _ = logits(rows, 32768, device)
    student.requires_grad_()

    def fused() -> None:
        student.grad = None
        kd_loss(student, teacher, temperature=T).backward()

    def eager() -> None:
        student.grad = None
        log_q, p = F.log_softmax(student / T, -1), F.softmax(teacher / T, -1)
        (F.kl_div(log_q, p, reduction="batchmean") * T * T).backward()

    ours, theirs = seconds(fused, device), seconds(eager, device)
    print(f"\nForward + backward, {rows} x 32768 float32: fastkd {ours * 1e3:.2f} ms, ", end="")
    print(f"eager PyTorch {theirs * 1e3:.2f} ms ({theirs / ours:.1f}x)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
