"""The error bounds: roundings that can be named, never a tolerance that happens to pass.

|error| <= half an ulp of the stored dtype * |value|       the store: `assert_close`
         + an allowance in eps32 (eps64 for float64)       the arithmetic: `Allowance`
"""

import torch
from torch import Tensor

INF, NAN = float("inf"), float("nan")


def _per_row(value: float | Tensor, N: int) -> Tensor:
    if isinstance(value, Tensor):
        return value.double().reshape(-1, 1)
    return torch.full((N, 1), value, dtype=torch.float64)


class Allowance:
    """What float32 (float64) arithmetic may lose, per class of the gradient and per row of a term.

    From the probabilities of the oracle, in units of eps. A probability q = exp(u) / Z carries
    20 for exp (1.2, 12 without FMA), the sum over a chunk's lanes (sqrt(256) / 4), the division and
    three products;
    |ln q| for the rounding of u = (z - max) / T and of 1 / T, which exp turns into relative error;
    and the same for Z, where the average of |u| is at most the entropy. One exponential may be
    formed from the other and the difference of the logits, whose rounding is relative to |ln q -
    ln p|. A difference q - p or ln q - ln p carries what its two sides do. What is below
    the smallest normal number may be flushed to 0, or held at it.
    """

    def __init__(self, student, teacher, labels, options) -> None:
        double = torch.float64 in (student.dtype, teacher.dtype)
        info = torch.finfo(torch.float64 if double else torch.float32)
        # In float64 the oracle is rounded as much as what it judges.
        self.eps, self.tiny = info.eps * (4 if double else 1), info.tiny
        width = options.get("vocab_size") or student.shape[-1]
        self.width, self.V = width, student.shape[-1]
        whole = student.detach().double().reshape(-1, self.V)
        z = whole[:, :width]
        v = teacher.double()[..., :width].reshape(-1, width)
        self.N = N = z.shape[0]
        T = _per_row(options.get("temperature", 1.0), N)
        teacher_T = options.get("teacher_temperature")
        teacher_T = T if teacher_T is None else _per_row(teacher_T, N)
        kept = _kept(v, options)
        self.q, self.lq, self.rel_q, ln_q = self._softmax((z / T).masked_fill(~kept, -INF))
        self.p, self.lp, self.rel_p, ln_p = self._softmax((v / teacher_T).masked_fill(~kept, -INF))
        # |ln q - ln p|, 0 where a class is absent on either side
        self.gap = (ln_q - ln_p).abs().nan_to_num(0, 0, 0)
        self.rel_q, self.rel_p = self.rel_q + self.gap, self.rel_p + self.gap
        self.T = T
        self.weight = row_weights(labels, N, options)
        self.alpha, self.beta = options.get("alpha", 1.0), options.get("beta", 0.0)
        self.hard_q, _, self.hard_rel, _ = self._softmax(whole)  # whatever vocab_size is
        self.labels = labels

    @staticmethod
    def _softmax(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, |ln q| where q > 0, the relative error of q in eps, ln q."""
        lq = torch.log_softmax(x, -1)
        q = lq.exp()
        size = torch.where(q > 0, lq.abs(), 0)
        return q, size, 20 + size + (q * size).sum(-1, keepdim=True), lq

    def soft_rows(self) -> Tensor:
        """Bounds soft_r / T^2: relative to every term of the sum, and first order in ln p, ln q."""
        gap = self.gap
        terms = torch.maximum(self.p, self.q) * torch.minimum(gap, gap * gap)
        if self.beta == 0:
            terms = torch.where(gap < 1, terms, self.p * gap + self.q)
        elif self.beta == 1:
            terms = torch.where(gap < 1, terms, self.q * gap + self.p)
        else:
            terms = torch.where(gap < 1, terms, self.p + self.q)
        first = (self.p - self.q).abs() * (8 + self.lp + self.lq)
        # What ln p - ln q is off by enters squared where the two are equal.
        second = (self.p + self.q) * (self.eps * (8 + self.lp + self.lq)) ** 2
        # One pass knows the normalisers only at its end: until then ln p - ln q is off by what the
        # two rows' maxima differ in.
        shift = (self.p.amax(-1).log() - self.q.amax(-1).log()).abs()
        shift = 8 * self.eps * torch.minimum(shift, shift * shift)
        floor = self.tiny * (2 + gap)
        return (self.eps * (8 * terms + first) + second + floor).sum(-1) + shift

    def soft_gradient(self) -> Tensor:
        """Bounds dD/dx."""
        if self.beta == 0:
            return self.eps * (self.q * self.rel_q + self.p * self.rel_p) + 2 * self.tiny
        gap, q = self.gap, self.q
        if self.beta < 1:
            # ln m cannot be far below ln q; and q may come as p + (q - p), rounded where p is.
            q = q + self.p
            gap = torch.minimum(gap, gap.new_tensor(16.0))
        bracket = self.rel_q * gap + self.rel_q + self.rel_p.masked_fill(self.p == 0, 0)
        mean = (q * bracket).sum(-1, keepdim=True)
        divergence = (q * gap).sum(-1, keepdim=True)
        allowance = self.eps * q * (bracket + divergence * self.rel_q) + self.eps * self.q * mean
        return allowance + self.tiny * (2 + gap + divergence)

    def hard_rows(self) -> Tensor:
        index = self._index()
        return self.eps * self.hard_rel.gather(-1, index).squeeze(-1)

    def hard_gradient(self) -> Tensor:
        onehot = torch.zeros_like(self.hard_q).scatter_(-1, self._index(), 1.0)
        return self.eps * (self.hard_q * self.hard_rel + onehot) + self.tiny

    def _index(self) -> Tensor:
        labels = self.labels.reshape(-1, 1).long()
        return torch.where((labels >= 0) & (labels < self.V), labels, 0)

    def gradient(self) -> Tensor:
        """[N, V], of the gradient of the loss."""
        weight = self.weight.abs().unsqueeze(-1)
        total = torch.zeros(self.N, self.V, dtype=torch.float64)
        if self.alpha > 0:
            soft = self.alpha * self._weighted(weight * self.T, self.soft_gradient())
            total = total + torch.nn.functional.pad(soft, (0, self.V - self.width))
        if self.labels is not None and self.alpha < 1:
            total = total + (1 - self.alpha) * self._weighted(weight, self.hard_gradient())
        return total

    @staticmethod
    def _weighted(weight: Tensor, bound: Tensor) -> Tensor:
        """Rows of weight 0 are skipped, whatever they hold."""
        return torch.where(weight == 0, 0, weight * bound)

    def rows(self, soft: Tensor, hard: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[N], of the two weighted terms whose float64 values are given."""
        weight, T = self.weight.abs(), self.T.squeeze(-1)
        soft_bound = self._weighted(weight * T**2, self.soft_rows()) + 8 * self.eps * soft.abs()
        if hard is None:
            return soft_bound, None
        hard_bound = self._weighted(weight, self.hard_rows()) + 8 * self.eps * hard.abs()
        return soft_bound, hard_bound

    def shift(self, of_student: Tensor, of_teacher: Tensor) -> None:
        """Let ln q and ln p be off by so many eps besides, [N, V] or broadcast to it."""
        self.lq, self.rel_q = self.lq + of_student, self.rel_q + of_student
        self.lp, self.rel_p = self.lp + of_teacher, self.rel_p + of_teacher


class Pooled:
    """Classes taken together as one: logsumexp(x), the share of each, and what both are off by."""

    def __init__(self, x: Tensor) -> None:  # -inf at the other classes
        self.lse = x.logsumexp(-1, keepdim=True)
        self.share, _, self.rel, _ = Allowance._softmax(x)
        self.share = self.share.nan_to_num(0)
        entropy = self.rel.amin(-1, keepdim=True).nan_to_num(20)
        self.lse_off = (entropy + self.lse.abs()).nan_to_num(0, 0, 0)  # eps; absolute

    def gradient(self, of_pool: Tensor, bound: Tensor, eps: float) -> Tensor:
        """[N, V]: a gradient of the pool, off by `bound`, spread over its classes."""
        spread = eps * of_pool.abs() * self.share * self.rel.nan_to_num(0)
        return bound * self.share + spread


class SparseAllowance:
    """Bounds topk_kd_loss: an Allowance for its few classes and their bucket, spread over all."""

    def __init__(self, student, ids, log_probs, labels, outside, options) -> None:
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        width = options["vocab_size"]
        z, padded = student.double()[:, :width], torch.where(ids < 0, width, ids)
        there = padded < width
        x = torch.nn.functional.pad(z, (0, 1), value=-INF).gather(-1, padded)
        y = log_probs.double().masked_fill(~there, -INF)
        T = _per_row(options["temperature"], len(z))
        self.padded, self.pool, self.full = padded, None, outside == "renormalize"
        if outside == "bucket":
            inside = torch.zeros(len(z), width + 1).scatter(-1, padded, 1.0).bool()[:, :width]
            self.pool = Pooled(z.masked_fill(inside, -INF))
            rest = (-torch.expm1(y.logsumexp(-1, keepdim=True).clamp_max(0))).clamp_min(0)
            x, y = torch.cat((x, self.pool.lse), -1), torch.cat((y, rest.log()), -1)
        elif self.full:
            x, y = z, torch.full((len(z), width + 1), -INF).double().scatter(-1, padded, y)
            y = y[:, :width]
        self.soft = Allowance(
            x.to(dtype), y.to(dtype), None, {"temperature": T, "reduction": "sum"}
        )
        if self.pool:
            # 1 - sum p carries what the sum is off by, relative to what it leaves.
            named = y[:, :-1]
            sum_off = 20 + (named.exp() * named.nan_to_num(0, 0, 0).abs()).sum(-1, keepdim=True)
            of_bucket = torch.zeros_like(x).index_fill(-1, torch.tensor(x.shape[-1] - 1), 1.0)
            self.soft.shift(
                of_bucket * self.pool.lse_off / T,
                of_bucket * (sum_off / rest / T).nan_to_num(0, 0, 0),
            )
        self.hard = Allowance(student, student, labels, {"vocab_size": width, "reduction": "sum"})
        self.T, self.alpha, self.eps = T, options["alpha"], self.soft.eps

    def rows(self, soft: Tensor, hard: Tensor) -> tuple[Tensor, Tensor]:
        """[N], of the two terms whose float64 values are given."""
        of_soft = self.soft.soft_rows()
        if self.full:  # the other classes are not seen in it: the sum's error shows to first order
            of_soft = of_soft + self.eps * self.soft.rel_q.amin(-1)
        of_soft = self.T.squeeze(-1) ** 2 * of_soft + 8 * self.eps * soft.abs()
        return of_soft, self.hard.hard_rows() + 8 * self.eps * hard.abs()

    def gradient(self) -> Tensor:
        """[N, V], of the gradient of alpha soft + (1 - alpha) hard."""
        bound = self.T * self.soft.soft_gradient()
        if not self.full:
            k = self.padded.shape[-1]
            named = torch.zeros(len(bound), self.hard.width + 1).double()
            named = named.scatter(-1, self.padded, bound[:, :k])[:, : self.hard.width]
            if self.pool:
                of_pool = self.T * (self.soft.q - self.soft.p)[:, -1:]
                named = named + self.pool.gradient(of_pool, bound[:, -1:], self.eps)
            bound = named
        total = torch.nn.functional.pad(self.alpha * bound, (0, self.hard.V - self.hard.width))
        if self.alpha < 1:
            total = total + (1 - self.alpha) * self.hard.hard_gradient()
        return total


class DecoupledAllowance:
    """Bounds dkd_loss: the other classes among themselves, and the label against all of them."""

    def __init__(self, student, teacher, labels, options) -> None:
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        self.V, width = student.shape[-1], options.get("vocab_size") or student.shape[-1]
        z, v = student.double()[:, :width], teacher.double()[:, :width]
        if options.get("teacher_kind") == "probs":
            v = v.log()
        label = torch.nn.functional.one_hot(labels, z.shape[-1]).bool()
        others = _kept(v, options) & ~label
        T = _per_row(options["temperature"], len(z))
        teacher_T = _per_row(options.get("teacher_temperature") or T, len(z))
        x, y = ((a / t).masked_fill(~others, -INF) for a, t in ((z, T), (v, teacher_T)))
        once = {"reduction": "sum"}
        self.others = Allowance(x.to(dtype), y.to(dtype), None, once)
        self.pool, pool_y = Pooled(x), Pooled(y)
        at_x, at_y = (a[label].unsqueeze(-1) / t for a, t in ((z, T), (v, teacher_T)))
        odds = [torch.cat((at - pool.lse, torch.zeros_like(at)), -1).nan_to_num(0, 1e4, -1e4)
                for at, pool in ((at_x, self.pool), (at_y, pool_y))]  # fmt: skip
        self.binary = Allowance(odds[0].to(dtype), odds[1].to(dtype), None, once)
        self.binary.shift(self.pool.lse_off + at_x.abs(), pool_y.lse_off + at_y.abs())
        self.hard = Allowance(student, student, labels, once)
        self.T, self.label, self.eps, self.options = T, label, self.others.eps, options

    def rows(self) -> dict[str, Tensor]:
        """[N] each, of the terms."""
        square = self.T.squeeze(-1) ** 2
        return {
            "target": (square * self.binary.soft_rows()).nan_to_num(0),
            "nontarget": (square * self.others.soft_rows()).nan_to_num(0),
            "hard": self.hard.hard_rows(),
        }

    def gradient(self) -> Tensor:
        options, pair = self.options, self.binary.soft_gradient()
        of_pool = (self.binary.q - self.binary.p)[:, 1:]
        target = self.pool.gradient(of_pool, pair[:, 1:], self.eps)
        target = torch.where(self.label, pair[:, :1], target)
        nontarget = self.others.soft_gradient().masked_fill(self.label, 0).nan_to_num(0)
        total = self.T * (options.get("alpha", 1.0) * target + options.get("beta", 8.0) * nontarget)
        total = torch.nn.functional.pad(total, (0, self.V - total.shape[-1]))
        return total + options.get("hard_weight", 0.0) * self.hard.hard_gradient()


def _kept(v: Tensor, options: dict) -> Tensor:
    V = v.shape[-1]
    dropped = int(V * options.get("bottom_percentile", 0.0) / 100 + 1e-6)
    keep = max(1, min(options.get("top_k") or V, V - dropped))
    if keep == V:
        return torch.ones_like(v, dtype=torch.bool)
    return v >= v.sort(-1, descending=True).values[:, keep - 1 : keep]


def row_weights(labels: Tensor | None, N: int, options: dict) -> Tensor:
    """[N] float64: what a row counts in the reduced loss, before alpha and T^2."""
    counting = torch.ones(N, dtype=torch.bool)
    if labels is not None:
        counting = labels.reshape(-1) != options.get("ignore_index", -100)
    weight = options.get("token_weights")
    weight = torch.ones(N) if weight is None else weight.reshape(-1)
    weight = torch.where(counting, weight.double(), 0)
    if options.get("reduction", "batchmean") == "batchmean":
        items = options.get("num_items")
        weight = weight / (max(int(counting.sum()), 1) if items is None else float(items))
    return weight


def assert_close(
    actual: Tensor,
    oracle64: Tensor,
    stored_dtype: torch.dtype,
    allowance: Tensor | float,
    *,
    roundings: float = 1,
    spacings: Tensor | float = 1,
    what: str = "",
) -> None:
    """|actual - oracle64| within the store's rounding plus `allowance`; NaN and inf must agree.

    `spacings`: half-spacings of the subnormal numbers that stores may lose, besides the relative
    `roundings`.
    """
    assert actual.shape == oracle64.shape, (what, actual.shape, oracle64.shape)
    info = torch.finfo(stored_dtype)
    actual, expected = actual.double(), oracle64.double()
    assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: NaN in other places"
    allowance = torch.as_tensor(allowance, dtype=torch.float64).expand_as(expected).nan_to_num()
    # A value that rounds beyond the largest finite number is stored as an infinity.
    overflow = expected.abs() + allowance > info.max
    infinite = (expected.isinf() | overflow | actual.isinf()) & ~expected.isnan()
    assert torch.equal(infinite & ~overflow, expected.isinf() & ~overflow), f"{what}: inf"
    assert torch.equal(actual.sign()[infinite], expected.sign()[infinite]), f"{what}: sign of inf"
    half_spacing = info.smallest_normal * info.eps / 2
    bound = roundings * info.eps / 2 * (expected.abs() + allowance)
    bound = bound + spacings * half_spacing + allowance
    if stored_dtype != torch.float16:
        bound += info.smallest_normal  # a subnormal result may be flushed
    finite = ~expected.isnan() & ~infinite
    excess = torch.where(finite, (actual - expected).abs() / bound, 0)
    if excess.numel() and excess.max() > 1:
        at = tuple(int(i) for i in (excess == excess.max()).nonzero()[0])
        raise AssertionError(
            f"{what} at {at}: {actual[at].item():.9g}, float64 {expected[at].item():.9g}, "
            f"{excess.max().item():.3g} times the bound of {bound[at].item():.3g}; "
            f"{int((excess > 1).sum())} of {excess.numel()} beyond it"
        )
