"""Every loss as one writes it in PyTorch: (student, teacher, options) -> scalar."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Sparse = tuple[Tensor, Tensor]  # ids, log-probabilities


def plain(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_q = F.log_softmax(student / temperature, -1)
    p = F.softmax(teacher / temperature, -1)
    return F.kl_div(log_q, p, reduction="batchmean") * temperature**2


def hard(
    student: Tensor, teacher: Tensor, temperature: float, alpha: float, labels: Tensor
) -> Tensor:
    soft = plain(student, teacher, temperature)
    return alpha * soft + (1 - alpha) * F.cross_entropy(student, labels)


def jsd(student: Tensor, teacher: Tensor, temperature: float, beta: float) -> Tensor:
    log_q = F.log_softmax(student / temperature, -1)
    log_p = F.log_softmax(teacher / temperature, -1)
    log_m = torch.logaddexp(log_q + math.log1p(-beta), log_p + math.log(beta))
    kl_teacher = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
    kl_student = F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
    return (beta * kl_teacher + (1 - beta) * kl_student) * temperature**2


def _over(kept: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """KL over the classes kept, of logits at their temperature."""
    log_q = F.log_softmax(student.masked_fill(~kept, -torch.inf), -1)
    p = F.softmax(teacher.masked_fill(~kept, -torch.inf), -1)
    # 0 * -inf is NaN: the dropped classes leave the sum.
    return F.kl_div(log_q.masked_fill(~kept, 0), p, reduction="batchmean")


def top_k(student: Tensor, teacher: Tensor, temperature: float, top_k: int) -> Tensor:
    kept = teacher >= teacher.topk(top_k, -1).values[..., -1:]
    return _over(kept, student / temperature, teacher / temperature) * temperature**2


def bottom_percentile(
    student: Tensor, teacher: Tensor, temperature: float, bottom_percentile: float
) -> Tensor:
    dropped = int(teacher.shape[-1] * bottom_percentile / 100 + 1e-6)
    kept = teacher >= teacher.kthvalue(dropped + 1, -1, keepdim=True).values
    return _over(kept, student / temperature, teacher / temperature) * temperature**2


def probs(student: Tensor, teacher: Tensor, temperature: float, teacher_kind: str) -> Tensor:
    return plain(student, teacher.log(), temperature)


def dkd(
    student: Tensor, teacher: Tensor, temperature: float, beta: float, labels: Tensor
) -> Tensor:
    """The label's class against all others, and the others among themselves."""
    student, teacher, label = student / temperature, teacher / temperature, labels.unsqueeze(-1)
    q = F.softmax(student, -1).gather(-1, label)
    p = F.softmax(teacher, -1).gather(-1, label)
    target = F.kl_div(torch.cat([q, 1 - q], -1).log(), torch.cat([p, 1 - p], -1),
                      reduction="batchmean")  # fmt: skip
    others = torch.ones_like(student, dtype=torch.bool).scatter(-1, label, False)
    return (target + beta * _over(others, student, teacher)) * temperature**2


def bucket(student: Tensor, teacher: Sparse, temperature: float, outside: str) -> Tensor:
    """The classes outside count as one."""
    ids, log_probs = teacher
    rest = student.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    log_rest = torch.log1p(-log_probs.exp().sum(-1, keepdim=True))
    return plain(
        torch.cat([student.gather(-1, ids), rest], -1),
        torch.cat([log_probs, log_rest], -1),
        temperature,
    )


def restrict(student: Tensor, teacher: Sparse, temperature: float, outside: str) -> Tensor:
    ids, log_probs = teacher
    return plain(student.gather(-1, ids), log_probs, temperature)


def renormalize(student: Tensor, teacher: Sparse, temperature: float, outside: str) -> Tensor:
    ids, log_probs = teacher
    log_q = F.log_softmax(student / temperature, -1).gather(-1, ids)
    p = F.softmax(log_probs / temperature, -1)
    return F.kl_div(log_q, p, reduction="batchmean") * temperature**2


EAGER = {
    loss.__name__: loss
    for loss in (plain, hard, jsd, top_k, bottom_percentile, probs, dkd, bucket, restrict,
                 renormalize)
}  # fmt: skip
