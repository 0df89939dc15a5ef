"""A user's calls, for a type checker and nothing else: test_typing.py runs mypy over them."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import fastkd

student, teacher = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
labels = torch.zeros(4, dtype=torch.long)
sparse = fastkd.topk_teacher(teacher, 3)

fastkd.kd_loss(student, teacher).backward()
fastkd.kd_loss(
    student, teacher, labels, temperature=2, alpha=0.5, top_k=3, inplace=False
).backward()
fastkd.dkd_loss(student, teacher, labels, hard_weight=1.0).backward()
fastkd.topk_kd_loss(student, *sparse, outside="restrict").backward()
assert_type(fastkd.kd_loss(student, teacher, return_terms=False), Tensor)
out = fastkd.kd_loss(student, teacher, labels, return_terms=True, reduction="sum")
assert_type(out, fastkd.KDLossOutput)
assert_type(out.hard, Tensor | None)
(out.loss + out.soft).backward()
decoupled = fastkd.dkd_loss(student, teacher, labels, return_terms=True)
assert_type(decoupled.hard, Tensor)
assert_type(fastkd.topk_kd_loss(student, *sparse, return_terms=True), fastkd.KDLossOutput)


def configured(options: dict[str, Any]) -> None:
    fastkd.kd_loss(student, teacher, **options).backward()


def logged(terms: bool, options: dict[str, Any]) -> float:
    result = fastkd.kd_loss(student, teacher, return_terms=terms, **options)
    loss = result.loss if isinstance(result, fastkd.KDLossOutput) else result
    return loss.item()


loss = fastkd.KDLoss(temperature=2.0, beta=0.5)
loss(student, teacher).backward()
loss(student, teacher, labels, token_weights=torch.ones(4)).backward()
assert_type(loss(student, teacher), Tensor)
assert_type(loss(student, teacher, return_terms=True), fastkd.KDLossOutput)
assert_type(fastkd.KDLoss(return_terms=True)(student, teacher), fastkd.KDLossOutput)
assert_type(fastkd.DKDLoss()(student, teacher, labels), Tensor)
assert_type(fastkd.DKDLoss(return_terms=True)(student, teacher, labels).target, Tensor)
assert_type(fastkd.TopKKDLoss(outside="restrict")(student, *sparse), Tensor)
loss.temperature = 3.0
loss.temperature = torch.ones(4)
loss.beta = 0.1
assert_type(loss.top_k, int | None)
module: nn.Module = loss

loss.top_k = "many"  # type: ignore[assignment]
fastkd.KDLoss(temprature=2.0)  # type: ignore[call-overload]
fastkd.kd_loss(student, teacher, temprature=2.0)  # type: ignore[call-overload]
fastkd.topk_kd_loss(student, *sparse, beta=1.0)  # type: ignore[call-overload]
