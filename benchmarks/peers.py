"""Other packages' losses, called as their users call them on logits: the caller divides by the
temperature, makes the probabilities that a package asks for, and multiplies by T^2.

They are optional. What cannot be imported, or not run on a device, says why.
"""

import os
from importlib import import_module

import torch.nn.functional as F

from .cases import TEMPERATURE, Case, Loss

T = TEMPERATURE


def _missing(module: str) -> list[str]:
    try:
        import_module(module)
    except Exception as error:  # a peer's import may fail in any way
        return [f"{type(error).__name__}: {str(error).splitlines()[0]}"]
    return []


def _in_triton(module: str, device: str) -> list[str]:
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return ["its Triton kernels need a GPU"]
    return _missing(module)


def liger_reasons(device: str) -> list[str]:
    return _in_triton("liger_kernel.transformers", device)


def liger(case: Case) -> Loss | None:
    """Its kernels take log-probabilities: both softmaxes are the caller's."""
    from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss

    if case.option == "plain":
        kl = LigerKLDIVLoss(reduction="batchmean")
        return lambda s, t: kl(F.log_softmax(s / T, -1), F.softmax(t / T, -1)) * T**2
    if case.option == "jsd":
        jsd = LigerJSD(beta=case.kwargs["beta"])
        return lambda s, t: jsd(F.log_softmax(s / T, -1), F.log_softmax(t / T, -1)) * T**2
    return None


def trl_reasons(device: str) -> list[str]:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # it would warn of its place
    return _missing("trl.experimental.gkd")


def trl(case: Case) -> Loss | None:
    from trl.experimental.gkd import GKDTrainer

    if case.option not in ("plain", "jsd"):
        return None
    beta = case.kwargs.get("beta", 0.0)
    loss = GKDTrainer.generalized_jsd_loss
    return lambda s, t: loss(s, t, beta=beta, temperature=T) * T**2


def speculators_reasons(device: str) -> list[str]:
    return _in_triton("speculators.losses.fused", device)


def speculators(case: Case) -> Loss | None:
    """Rows in one batch; a loss per row."""
    from speculators.losses.fused import fused_js_div_loss, fused_kl_div_loss

    loss = {"plain": fused_kl_div_loss, "jsd": fused_js_div_loss}.get(case.option)
    if loss is None:
        return None
    return lambda s, t: loss((s / T).unsqueeze(0), (t / T).unsqueeze(0)).mean() * T**2
