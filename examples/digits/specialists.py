"""Specialists for the classes that a small generalist confuses.

Hinton et al. 2015, section 5: 61 specialists take a net for 15,000 classes from 25.0 % right to
26.1 %. The classes of a specialist are a cluster of the columns of the covariance of the
generalist's predictions; all other classes are one, the dustbin. At inference, the answer is the q
that minimises KL(p_generalist || q) + KL(p_specialist || q), q summed over the dustbin's classes.
"""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor

import fastkd

from .data import CLASSES, Batch, Digits
from .report import CHECK, TEST, Experiment, Row, errors, measured, row
from .training import (
    Networks,
    Settings,
    cross_entropy,
    data_and_teacher,
    distilled,
    initialised,
    train,
)

HIDDEN = (12, 12)
SPECIALISTS = 3
DUSTBIN = CLASSES  # its label
OWN_SHARE = 0.5  # of the training examples of a specialist
STEPS = 300  # of gradient descent on the logits of an answer
INF = float("inf")


def clusters(generalist: Networks, data: Digits) -> Tensor:
    """[SPECIALISTS, S, 10] bool: whose class is whose, from the generalist's predictions."""
    p = F.softmax(generalist.logits(data.inputs), dim=-1)
    groups = []
    for seed, rows in enumerate(p):
        covariance = np.cov(rows.numpy().T)
        group = KMeans(SPECIALISTS, n_init=10, random_state=seed).fit_predict(covariance)
        groups.append(torch.from_numpy(group))
    return F.one_hot(torch.stack(groups).long(), SPECIALISTS).permute(2, 0, 1).bool()


def with_dustbin(logits: Tensor, own: Tensor) -> Tensor:
    """[S, B, 11]: the `own` [S, 10] classes' logits, -inf at all others, and theirs pooled."""
    own = own.unsqueeze(1)
    dustbin = logits.masked_fill(own, -INF).logsumexp(-1, keepdim=True)
    return torch.cat([logits.masked_fill(~own, -INF), dustbin], -1)


def specialist(
    generalist: Networks, own: Tensor, data: Digits, settings: Settings, name: str
) -> Networks:
    """Begun as the generalist; half of its examples are of its `own` classes."""
    S, n = data.labels.shape
    network = generalist.trained_as(range(S)).requires_grad_()
    network.weights[-1].data = F.pad(network.weights[-1].data, (0, 1))
    network.biases[-1].data = F.pad(network.biases[-1].data, (0, 1))
    special = own.gather(1, data.labels)  # [S, n]
    weights = special / special.sum(1, keepdim=True) * OWN_SHARE
    weights += ~special / (~special).sum(1, keepdim=True) * (1 - OWN_SHARE)
    torch.manual_seed(SPECIALISTS)
    index = weights.multinomial(n, replacement=True)
    part = data[index]
    labels = part.labels.masked_fill(~special.gather(1, index), DUSTBIN)
    outside = F.pad(~own, (0, 1)).unsqueeze(1)
    # The generalist's targets keep it from overfitting what it sees so often.
    targets = with_dustbin(generalist.logits(part.inputs), own)

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        return fastkd.kd_loss(
            logits.masked_fill(outside, -INF), batch.of(targets), batch.labels,
            alpha=0.5, num_items=batch.size,
        )  # fmt: skip

    train(network, Digits(part.inputs, labels), loss, settings.epochs, name)
    # How many times too often it saw its own classes, taken back.
    share = special.double().mean(1)
    correction = torch.log((1 - share) / share) + torch.log(
        torch.tensor(OWN_SHARE / (1 - OWN_SHARE))
    )
    network.biases[-1].data[:, 0, DUSTBIN] += correction.float()
    network.biases[-1].data.masked_fill_(outside, -INF)
    return network


def combined(inputs: Tensor, generalist: Networks, experts: list[Networks], own: Tensor) -> Tensor:
    """The logits [S, B, 10] of the answer: of the generalist and its best class's specialist."""
    p = generalist.logits(inputs)
    best = p.argmax(-1)  # [S, B]
    z = p.clone().requires_grad_()
    terms = []
    for expert, classes in zip(experts, own, strict=True):  # classes [S, 10]
        log_p = F.log_softmax(expert.logits(inputs), dim=-1)[..., :CLASSES]
        ids = torch.arange(CLASSES).where(classes, -1).unsqueeze(1).expand_as(log_p)
        terms.append((ids, log_p, classes.gather(1, best).float()))
    for _ in range(STEPS):
        loss = fastkd.kd_loss(z, p, reduction="sum")
        for ids, log_p, asked in terms:  # the dustbin is the bucket of what they do not name
            loss = loss + fastkd.topk_kd_loss(z, ids, log_p, token_weights=asked, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, z)
        z = (z - gradient).detach().requires_grad_()
    return z.detach()


def run(settings: Settings) -> Experiment:
    splits, teacher = data_and_teacher(settings)
    S = settings.seeds
    generalist = initialised(S, HIDDEN)
    train(generalist, splits.training, cross_entropy, settings.epochs, "generalist")
    rows: list[Row] = [row("teacher", teacher, splits), row("generalist", generalist, splits)]

    more = generalist.trained_as(range(S))
    train(more, splits.training, cross_entropy, settings.epochs, "generalist, twice as long")
    rows.append(row("generalist, twice as long", more, splits))

    own = clusters(generalist, splits.training)
    experts = [
        specialist(generalist, classes, splits.training, settings, f"specialist {m + 1}")
        for m, classes in enumerate(own)
    ]
    name = f"generalist and {SPECIALISTS} specialists"
    values = {
        column: errors(combined(part.inputs, generalist, experts, own), part.labels)
        for column, part in ((CHECK, splits.validation), (TEST, splits.test))
    }
    rows.append(measured(name, values))

    answer = combined(splits.training.inputs, generalist, experts, own)
    student = initialised(S, HIDDEN)
    loss = distilled(answer, temperature=settings.temperature, alpha=settings.alpha)
    train(student, splits.training, loss, settings.epochs, "distilled")
    rows.append(row("distilled from the generalist and specialists", student, splits))
    return Experiment("Specialists for confusable classes", rows, baseline="generalist")
