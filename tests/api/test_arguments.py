"""Every bad input: the exception and its words, the same from every backend; nothing is touched."""

import numpy as np
import pytest
import torch
from lib.backends import BACKENDS
from lib.bounds import INF, NAN
from lib.logits import at_backend, normal, some_labels

import fastkd
from fastkd import KDLoss, kd_loss

N, V = 4, 9
LABELS = some_labels(N, V)


def labels_with(value: int) -> torch.Tensor:
    labels = LABELS % 6
    labels[2] = value
    return labels


def temperatures(value: float) -> torch.Tensor:
    return torch.tensor([1.0, 2.0, value, 1.0])


# (arguments that replace good ones, exception, what the message has to say)
BAD = {
    # logits
    "student is a list": ({"student": [[1.0]]}, TypeError, ["student_logits", "list"]),
    "teacher is None": ({"teacher": None}, TypeError, ["teacher_logits", "NoneType"]),
    "student int": ({"student": torch.ones(N, V).long()}, TypeError, ["student_logits", "int64"]),
    "teacher int": ({"teacher": torch.ones(N, V).int()}, TypeError, ["teacher_logits", "int32"]),
    "teacher bool": ({"teacher": torch.ones(N, V).bool()}, TypeError, ["teacher_logits", "bool"]),
    "student complex": (
        {"student": torch.ones(N, V).cfloat()},
        TypeError,
        ["student_logits", "complex64"],
    ),
    "student float8": (
        {"student": torch.ones(N, V).to(torch.float8_e4m3fn)},
        TypeError,
        ["student_logits", "float8"],
    ),
    "0-dim": (
        {"student": torch.ones(()), "teacher": torch.ones(())},
        ValueError,
        ["student_logits", "()"],
    ),
    "no classes": (
        {"student": torch.ones(N, 0), "teacher": torch.ones(N, 0)},
        ValueError,
        ["student_logits", f"({N}, 0)"],
    ),
    "student COO": ({"student": torch.ones(N, V).to_sparse()}, TypeError, ["student", "to_dense"]),
    "teacher COO": ({"teacher": torch.ones(N, V).to_sparse()}, TypeError, ["teacher", "to_dense"]),
    "student jagged": (
        {"student": torch.nested.nested_tensor([torch.ones(2, V)] * 2, layout=torch.jagged)},
        TypeError,
        ["student_logits", "jagged", "values()"],
    ),
    "classes in dimension 1": (
        {
            "student": torch.ones(2, V, 4, 3),
            "teacher": torch.ones(2, V, 4, 3),
            "labels": torch.ones(2, 4, 3).long(),
        },
        ValueError,
        ["labels", "dimension 1", "movedim"],
    ),
    "leading shapes": (
        {"teacher": torch.ones(N + 1, V)},
        ValueError,
        ["teacher_logits", f"({N},)", f"({N + 1},)"],
    ),
    "leading dimensions": ({"teacher": torch.ones(1, N, V)}, ValueError, ["teacher_logits"]),
    "teacher would broadcast": ({"teacher": torch.ones(1, V)}, ValueError, ["teacher_logits"]),
    "devices": (
        {"teacher": torch.ones(N, V, device="meta")},
        ValueError,
        ["teacher_logits", "meta"],
    ),
    "teacher wants a gradient": (
        {"teacher": torch.ones(N, V, requires_grad=True)},
        ValueError,
        ["teacher_logits", "detach"],
    ),
    "vocabularies": (
        {"teacher": torch.ones(N, V + 3)},
        ValueError,
        [str(V), str(V + 3), "vocab_size"],
    ),
    # vocab_size
    "vocab_size 0": ({"vocab_size": 0}, ValueError, ["vocab_size", "got 0"]),
    "vocab_size -1": ({"vocab_size": -1}, ValueError, ["vocab_size", "-1"]),
    "vocab_size large": ({"vocab_size": V + 1}, ValueError, ["vocab_size", str(V + 1)]),
    "vocab_size float": ({"vocab_size": 4.0}, TypeError, ["vocab_size", "float"]),
    "vocab_size bool": ({"vocab_size": True}, TypeError, ["vocab_size", "bool"]),
    # temperature
    **{
        f"{name} {value}": ({name: value}, ValueError, [name, str(value)])
        for name in ("temperature", "teacher_temperature")
        for value in (0.0, 0, -1.0, NAN, -INF)
    },
    **{
        f"{name} alone infinite": ({name: INF, other: 2.0}, ValueError, [name, other, "inf", "2.0"])
        for name, other in (
            ("temperature", "teacher_temperature"),
            ("teacher_temperature", "temperature"),
        )
    },
    "temperature str": ({"temperature": "2"}, TypeError, ["temperature", "str"]),
    "temperature None": ({"temperature": None}, TypeError, ["temperature", "NoneType"]),
    "temperature bool": ({"temperature": True}, TypeError, ["temperature", "bool"]),
    "temperature list": ({"temperature": [1.0] * N}, TypeError, ["temperature", "list"]),
    "temperature int tensor": (
        {"temperature": torch.ones(N).long()},
        TypeError,
        ["temperature", "int64"],
    ),
    **{
        f"{name} row {value}": ({name: temperatures(value)}, ValueError, [name, str(value)])
        for name in ("temperature", "teacher_temperature")
        for value in (0.0, -1.0, NAN, INF)
    },
    "temperature rows": ({"temperature": torch.ones(N + 1)}, ValueError, ["temperature", "(5,)"]),
    "temperature matrix": (
        {"temperature": torch.ones(N, 2)},
        ValueError,
        ["temperature", "(4, 2)"],
    ),
    "temperature row of columns": ({"temperature": torch.ones(1, N)}, ValueError, ["(1, 4)"]),
    "temperature 0-dim 0": ({"temperature": torch.tensor(0.0)}, ValueError, ["temperature", "0.0"]),
    "temperature device": (
        {"temperature": torch.ones(N, device="meta")},
        ValueError,
        ["temperature", "meta"],
    ),
    "temperature learns": (
        {"temperature": torch.ones(N, requires_grad=True)},
        ValueError,
        ["temperature", "gradient"],
    ),
    # beta and alpha
    **{
        f"{name} {value}": ({name: value}, ValueError, [name, str(value)])
        for name in ("alpha", "beta")
        for value in (-0.1, 1.1, NAN, INF)
    },
    **{
        f"{name} {type(value).__name__}": ({name: value}, TypeError, [name, type(value).__name__])
        for name in ("alpha", "beta")
        for value in (None, "0.5", True, torch.tensor(0.5), [0.5])
    },
    "alpha without labels": (
        {"alpha": 0.5, "labels": None},
        ValueError,
        ["alpha", "0.5", "labels"],
    ),
    # pruning
    "top_k 0": ({"top_k": 0}, ValueError, ["top_k", "got 0"]),
    "top_k -3": ({"top_k": -3}, ValueError, ["top_k", "-3"]),
    "top_k float": ({"top_k": 2.0}, TypeError, ["top_k", "float"]),
    "top_k bool": ({"top_k": True}, TypeError, ["top_k", "bool"]),
    "top_k float tensor": ({"top_k": torch.tensor(2.0)}, TypeError, ["top_k", "Tensor"]),
    "top_k tensor 0": ({"top_k": torch.tensor(0)}, ValueError, ["top_k", "got 0"]),
    "top_k tensor of two": ({"top_k": torch.tensor([2, 3])}, TypeError, ["top_k", "Tensor"]),
    **{
        f"bottom_percentile {value}": (
            {"bottom_percentile": value},
            ValueError,
            ["bottom_percentile", str(value)],
        )
        for value in (-1.0, 100, 100.0, 250.0, NAN)
    },
    "percentile None": ({"bottom_percentile": None}, TypeError, ["bottom_percentile", "NoneType"]),
    "percentile str": ({"bottom_percentile": "20"}, TypeError, ["bottom_percentile", "str"]),
    # labels
    "labels list": ({"labels": [0] * N}, TypeError, ["labels", "list"]),
    "labels float": ({"labels": torch.ones(N)}, TypeError, ["labels", "float32"]),
    "labels bool": ({"labels": torch.ones(N).bool()}, TypeError, ["labels", "bool"]),
    "labels shape": ({"labels": LABELS[:3]}, ValueError, ["labels", "(3,)"]),
    "labels onehot": ({"labels": torch.ones(N, V).long()}, ValueError, ["labels", f"({N}, {V})"]),
    "labels device": (
        {"labels": torch.ones(N, device="meta").long()},
        ValueError,
        ["labels", "meta"],
    ),
    "label V": ({"labels": labels_with(V)}, ValueError, ["labels", f"got {V}", "-100"]),
    "label -1": ({"labels": labels_with(-1)}, ValueError, ["labels", "got -1"]),
    "label huge": ({"labels": labels_with(2**62)}, ValueError, ["labels", str(2**62)]),
    "label V beside vocab_size": (
        {"labels": labels_with(V), "vocab_size": 7},
        ValueError,
        ["labels", f"got {V}", f"[0, {V})"],
    ),
    "label -100 of another ignore_index": (
        {"labels": labels_with(-100), "ignore_index": -1},
        ValueError,
        ["labels", "-100"],
    ),
    "ignore_index float": ({"ignore_index": -100.0}, TypeError, ["ignore_index", "float"]),
    "ignore_index None": ({"ignore_index": None}, TypeError, ["ignore_index", "NoneType"]),
    # token_weights and num_items
    "weights list": ({"token_weights": [1.0] * N}, TypeError, ["token_weights", "list"]),
    "weights number": ({"token_weights": 0.5}, TypeError, ["token_weights", "float"]),
    "weights shape": ({"token_weights": torch.ones(3)}, ValueError, ["token_weights", "(3,)"]),
    "weights column": ({"token_weights": torch.ones(N, 1)}, ValueError, ["token_weights"]),
    "weights device": (
        {"token_weights": torch.ones(N, device="meta")},
        ValueError,
        ["token_weights", "meta"],
    ),
    "weights learn": (
        {"token_weights": torch.ones(N, requires_grad=True)},
        ValueError,
        ["token_weights", "gradient"],
    ),
    **{
        f"num_items {value}": ({"num_items": value}, ValueError, ["num_items", str(value)])
        for value in (0, 0.0, -4, NAN, INF)
    },
    **{
        f"num_items tensor {value}": (
            {"num_items": torch.tensor(value)},
            ValueError,
            ["num_items", str(value)],
        )
        for value in (0, 0.0, -4, NAN)
    },
    "num_items str": ({"num_items": "4"}, TypeError, ["num_items", "str"]),
    "num_items bool": ({"num_items": True}, TypeError, ["num_items", "bool"]),
    "num_items shape": ({"num_items": torch.ones(2)}, ValueError, ["num_items", "(2,)"]),
    "num_items with sum": (
        {"num_items": 4, "reduction": "sum"},
        ValueError,
        ["num_items", "batchmean", "sum"],
    ),
    "num_items with none": (
        {"num_items": 4, "reduction": "none"},
        ValueError,
        ["num_items", "none"],
    ),
    # the rest
    "reduction mean": ({"reduction": "mean"}, ValueError, ["reduction", "'mean'", "batchmean"]),
    "reduction None": ({"reduction": None}, ValueError, ["reduction", "None"]),
    "reduction list": ({"reduction": ["sum"]}, ValueError, ["reduction", "sum"]),
}


def arguments(changes: dict) -> tuple[tuple, dict]:
    """Good arguments but for `changes`; the student is no leaf, so that inplace=True is allowed."""
    root = normal(N, V, seed=1).requires_grad_()
    given = {"student": root * 1, "teacher": normal(N, V), "labels": LABELS.clone(), **changes}
    return tuple(given.pop(k) for k in ("student", "teacher", "labels")), given


def snapshot(values) -> list:
    return [
        (v, v._version, _bytes(v))
        for v in values
        if isinstance(v, torch.Tensor) and v.layout == torch.strided and not v.is_meta
    ]


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def untouched(before: list) -> None:
    for tensor, version, copy in before:
        assert tensor._version == version
        assert _bytes(tensor) == copy


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("case", BAD)
def test_bad_argument(case, inplace):
    changes, exception, words = BAD[case]
    messages = set()
    for backend in ("auto", *(b.name for b in BACKENDS)):
        positional, keywords = arguments(changes)
        before = snapshot([*positional, *keywords.values()])
        with pytest.raises(exception) as caught:
            kd_loss(*positional, inplace=inplace, backend=backend, **keywords)
        assert type(caught.value) is exception
        untouched(before)
        messages.add(str(caught.value))
    assert len(messages) == 1, messages
    message = messages.pop()
    for word in words:
        assert word in message, (word, message)


@pytest.mark.parametrize("changes", [{}, {"labels": None}], ids=["labels", "no labels"])
def test_good_arguments_are_good(changes, backend):
    """The cases above fail for what they change, not for what they share."""
    positional, keywords = arguments(changes)
    positional = [x.to(backend.device) if torch.is_tensor(x) else x for x in positional]
    assert kd_loss(*positional, inplace=True, backend=backend.name, **keywords).isfinite()


BATCH = torch.full((N, 3), 2, dtype=torch.long)
ROWS = torch.linspace(1, 2, N)
ACCEPTED = {  # what is given, and what it means
    "temperature of one value": ({"temperature": torch.tensor(2.0)}, {"temperature": 2.0}),
    "temperature [1]": ({"temperature": torch.tensor([2.0])}, {"temperature": 2.0}),
    "temperature float64": ({"temperature": torch.tensor(2.0).double()}, {"temperature": 2.0}),
    "teacher_temperature of one": (
        {"teacher_temperature": torch.tensor(3.0)},
        {"teacher_temperature": 3.0},
    ),
    "temperature keepdim": ({"temperature": ROWS[:, None]}, {"temperature": ROWS}),
    "temperature expanded": (
        {"temperature": torch.tensor(2.0).expand(N)},
        {"temperature": torch.full((N,), 2.0)},
    ),
    "temperature strided": (
        {"temperature": torch.stack([ROWS, ROWS + 1], 1)[:, 0]},
        {"temperature": ROWS},
    ),
    "top_k of numpy": ({"top_k": np.int64(3)}, {"top_k": 3}),
    "top_k tensor": ({"top_k": torch.tensor(3)}, {"top_k": 3}),
    "vocab_size of numpy": ({"vocab_size": np.int32(9)}, {"vocab_size": 9}),
    "vocab_size tensor": ({"vocab_size": torch.tensor(9)}, {"vocab_size": 9}),
    "ignore_index of numpy": ({"ignore_index": np.int64(2)}, {"ignore_index": 2}),
    "labels strided": ({"labels": BATCH[:, 0]}, {"labels": BATCH[:, 0].clone()}),
    "labels expanded": (
        {"labels": torch.tensor(2).expand(N)},
        {"labels": torch.full((N,), 2)},
    ),
    **{
        f"labels {dtype}": ({"labels": BATCH[:, 0].to(dtype)}, {"labels": BATCH[:, 0].clone()})
        for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16)
    },
    "labels uint8, 255 ignored": (
        {"labels": torch.tensor([1, 2, 255, 3], dtype=torch.uint8), "ignore_index": 255},
        {"labels": torch.tensor([1, 2, -100, 3])},
    ),
    "labels uint16, 65535 ignored": (
        {"labels": torch.tensor([1, 2, 65535, 3]).to(torch.uint16), "ignore_index": 65535},
        {"labels": torch.tensor([1, 2, -100, 3])},
    ),
    "weights strided": (
        {"token_weights": torch.stack([ROWS, ROWS], 1)[:, 0], "reduction": "sum"},
        {"token_weights": ROWS, "reduction": "sum"},
    ),
    "weights expanded": (
        {"token_weights": torch.tensor(0.5).expand(N), "reduction": "sum", "labels": None},
        {"token_weights": torch.full((N,), 0.5), "reduction": "sum", "labels": None},
    ),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(case, backend):
    """As a number, a flat contiguous tensor or one of int64 means it."""
    results = []
    for changes in ACCEPTED[case]:
        changes = {"alpha": 0.5, "reduction": "none", **changes}
        if changes.get("labels", LABELS) is None:
            changes["alpha"] = 1.0
        positional, keywords = arguments(changes)
        before = snapshot([*positional, *keywords.values()])
        loss = at_backend(kd_loss)(*positional, backend=backend.name, **keywords)
        results.append((loss, *torch.autograd.grad(loss.sum(), positional[0])))
        untouched(before)
    for given, meant in zip(*results, strict=True):
        assert torch.equal(given, meant)


@pytest.mark.parametrize("bad", ["mps", "", "CPU", None, 3, ["cpu"]])
def test_unknown_backend(bad):
    positional, _ = arguments({})
    before = snapshot(positional)
    with pytest.raises((ValueError, TypeError), match="backend"):
        kd_loss(*positional, inplace=True, backend=bad)
    untouched(before)


def test_a_backend_that_cannot_run_says_why_and_nothing_falls_back():
    positional, _ = arguments({})
    for name, reasons in fastkd.backends().items():
        if not reasons:
            continue
        before = snapshot(positional)
        with pytest.raises(RuntimeError) as caught:
            kd_loss(*positional, inplace=True, backend=name)
        untouched(before)
        assert repr(name) in str(caught.value)
        for reason in reasons:
            assert reason in str(caught.value)


def test_backends_lists_all_four():
    # First of all: tests/cuda_kernels/emulation adds its own.
    assert list(fastkd.backends())[:4] == ["cuda", "triton", "cpu", "reference"]
    assert fastkd.backends()["reference"] == []
    fastkd.backends()["reference"].append("changed by a caller")
    assert fastkd.backends()["reference"] == []


def test_the_cpu_backend_refuses_other_devices():
    s = torch.ones(2, 3, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        kd_loss(s, s, backend="cpu")


def test_inplace_refuses_leaves_and_shared_memory(backend):
    leaf = normal(N, V).to(backend.device).requires_grad_()
    teacher = torch.zeros(N, V, device=backend.device)
    expanded = (normal(V).to(backend.device).requires_grad_() * 1).expand(N, V)
    for student, words in (
        (leaf, "leaf"),
        (leaf[:], "leaf"),
        (leaf.view(1, N, V)[0], "leaf"),
        (expanded, "expanded"),
    ):
        before = snapshot([student, leaf])
        with pytest.raises(ValueError, match=words) as caught:
            kd_loss(student, teacher, inplace=True, backend=backend.name)
        assert "inplace" in str(caught.value)
        untouched(before)


def test_inplace_refuses_rows_that_overlap(backend):
    """Rows that share elements cannot each hold a gradient."""
    base = normal(V + N).to(backend.device).requires_grad_() * 1
    overlapping = base.unfold(0, V, 1)[:N]
    with pytest.raises(ValueError, match="inplace"):
        kd_loss(overlapping, torch.zeros_like(overlapping), inplace=True, backend=backend.name)


def test_labels_and_options_are_keyword_only_where_they_are_options():
    positional, _ = arguments({})
    with pytest.raises(TypeError):
        kd_loss(*positional, 2.0)
    with pytest.raises(TypeError, match="temprature"):
        kd_loss(*positional, temprature=2.0)


def test_module_refuses_unknown_options():
    with pytest.raises(TypeError, match="temprature"):
        KDLoss(temprature=2.0)
    with pytest.raises(TypeError, match="T"):
        KDLoss()(torch.ones(2, 3), torch.ones(2, 3), T=2.0)


# The second: the reference goes over the rows in two parts, and the loss is summed in two.
@pytest.mark.parametrize("size", [(N, V), (17_000, 250)], ids=["", "in parts"])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (), (1, 1, 1)])
def test_num_items_is_any_tensor_of_one(backend, shape, size):
    """A 0-dim loss, and the bits that a number gives."""
    if size[0] > N and (shape != (1, 1) or backend.emulated or backend.interpreted):
        pytest.skip("once is enough, and where it is quick")
    s = normal(*size).to(backend.device).requires_grad_()
    t = torch.zeros(size, device=backend.device)
    labels = some_labels(*size).to(backend.device)
    weights = torch.ones(size[0], device=backend.device)
    for given in ((), (labels,)) if size[0] == N else ((labels,),):
        for options in ({}, {"token_weights": weights}, {"temperature": 2 * weights}):
            results = []
            for items in (8, torch.full(shape, 8.0, device=backend.device)):
                out = kd_loss(s, t, *given, num_items=items, alpha=0.5 if given else 1.0,
                              return_terms=True, backend=backend.name, **options)  # fmt: skip
                terms = [x for x in out if x is not None]
                assert all(x.shape == () for x in terms)
                results.append((*terms, *torch.autograd.grad(out.loss, s)))
            for a, b in zip(*results, strict=True):
                assert torch.equal(a, b)
