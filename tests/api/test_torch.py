"""As part of torch: opcheck, compile, autocast, grad modes, graphs, fake tensors, the module."""

import copy
import pickle

import pytest
import torch
from lib.backends import BACKENDS, BETAS
from lib.compare import run
from lib.logits import normal, on, pair, some_labels
from torch.autograd import forward_ad
from torch.library import opcheck

from fastkd import (
    DKDLoss,
    KDLoss,
    KDLossOutput,
    TopKKDLoss,
    dkd_loss,
    kd_loss,
    topk_kd_loss,
    topk_teacher,
)
from fastkd.spec import MIXTURE

DENSE_ROWS = ("dense_rows", "dense_rows_reference")
SCALE_ROWS = ("scale_rows_", "scale_rows_reference_")


@pytest.mark.parametrize("op", DENSE_ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("terms", ["soft", "hard", "both"])
def test_opcheck_dense_rows(op, dtype, gradient, terms):
    s, t = normal(2, 3, 9, dtype=dtype), normal(2, 3, 11, dtype=dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32

    def vector(value: float) -> torch.Tensor:
        return torch.full((6,), value, dtype=compute)

    args = (
        s, t, None if terms == "soft" else some_labels(6, 8), vector(0.5), vector(0.25),
        None if terms == "hard" else vector(1.0), None if terms == "soft" else vector(2.0),
        torch.empty_like(s) if gradient else None, torch.full((6,), 5), 8, MIXTURE, vector(0.3),
    )  # fmt: skip
    opcheck(getattr(torch.ops.fastkd, op).default, args)


@pytest.mark.parametrize("op", SCALE_ROWS)
@pytest.mark.parametrize("count", [1, 6])
def test_opcheck_scale_rows(op, count):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        scale = torch.linspace(0.5, 2.0, count, dtype=torch.float32)
        opcheck(getattr(torch.ops.fastkd, op).default, (normal(2, 3, 9, dtype=dtype), scale))


def step(w, x, t, y, T, options):
    logits = x @ w
    out = kd_loss(logits, t, y, temperature=T, return_terms=True, **options)
    return out.loss, out.soft, out.hard


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_compile(backend, dynamic, inplace):
    """fullgraph, forward and backward, against eager, over changing N and V."""
    if backend.name == "emulated_ticket":
        pytest.skip("differs from emulated_cluster inside of the op alone")
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for options in ({"alpha": 0.3, "top_k": 4}, {"beta": 0.5, "alpha": 0.5, "vocab_size": 8}):
        options = {**options, "inplace": inplace, "backend": backend.name}
        for N, V in ((4, 9), (6, 9), (6, 13)):
            x, t = on(backend, normal(N, 5), normal(N, V, seed=1))
            y = some_labels(N, 8, ignored=(1,)).to(backend.device)
            results = []
            for function in (compiled, step):
                w = normal(5, V, seed=2, scale=1.0).to(backend.device).requires_grad_()
                terms = function(w, x, t, y, 2.0, options)
                (3 * terms[0]).backward()
                results.append((*terms, w.grad))
            for actual, expected in zip(*results, strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compile_of_half_logits(backend, dtype):
    """The float16 gradient is stored scaled: the compiled product must undo it as well."""
    torch._dynamo.reset()

    def loss(s, t, reduction):
        return kd_loss(s, t, num_items=None, reduction=reduction, backend=backend.name)

    compiled = torch.compile(loss, fullgraph=True)
    for reduction in ("batchmean", "none"):
        s, t = on(backend, *pair(6, 300, dtype=dtype))
        gradients = []
        for function in (compiled, loss):
            leaf = s.clone().requires_grad_()
            out = function(leaf, t, reduction)
            out.backward(torch.full_like(out, 2**-10))
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients, rtol=2**-7, atol=2**-20)


@pytest.mark.slow  # compiles
def test_compile_checks_what_it_can_and_never_reads_back(backend):
    """A bad label is not looked at inside a graph: NaN for its row, 0 for the ignored one."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda s, t, y: kd_loss(s, t, y, reduction="none", backend=backend.name), fullgraph=True
    )
    s, t = on(backend, *pair(3, 5))
    s.requires_grad_()
    loss = compiled(s, t, torch.tensor([0, 7, -100], device=backend.device))
    loss.sum().backward()
    assert loss[0].isfinite() and loss[1].isnan() and loss[2] == 0
    assert s.grad[0].isfinite().all() and s.grad[1].isnan().all() and (s.grad[2] == 0).all()
    with pytest.raises(Exception, match=r"vocab_size|5 classes|exception"):
        compiled(s, t[:, :4], torch.zeros(3, dtype=torch.long, device=backend.device))


SCHEDULES = {
    "temperature": (1.0, 2.0, 3.0, 4.5),
    "teacher_temperature": (1.0, 2.0, 3.0, 4.5),
    "alpha": (0.1, 0.2, 0.7, 1.0),
    "beta": (0.0, 0.2, 0.7, 1.0),
    "bottom_percentile": (0.0, 20.0, 45.0, 60.0),
    "top_k": (5, 4, 3, 2),
    "num_items": (3, 7, 8.5, 10),
}


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("labelled", [False, True], ids=["", "labels"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_compiled_module_follows_a_schedule(backend, name, labelled):
    """A number that changes between steps becomes symbolic; none may stay at an earlier value."""
    if name == "alpha" and not labelled:
        pytest.skip("alpha needs labels")
    torch._dynamo.reset()
    module = KDLoss(backend=backend.name)
    compiled = torch.compile(module, fullgraph=True)
    s, t = on(backend, *pair(3, 5))
    labels = some_labels(3, 5).to(backend.device) if labelled else None
    for value in SCHEDULES[name]:
        setattr(module, name, value)
        expected = kd_loss(s, t, labels, backend=backend.name, **{name: value})
        actual = compiled(s, t, labels)
        torch.testing.assert_close(actual, expected, msg=lambda m, v=value: f"{name}={v}: {m}")


@pytest.mark.slow  # compiles
def test_compile_refuses_inplace_on_a_value_that_is_still_needed(backend):
    torch._dynamo.reset()

    def loss(w, t):
        return kd_loss(w.exp(), t, inplace=True, backend=backend.name)

    w, t = on(backend, normal(3, 5, scale=1.0), normal(3, 5))
    compiled = torch.compile(loss, fullgraph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        compiled(w.requires_grad_(), t).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(backend, dtype):
    s, t = on(backend, *pair(4, 50))
    labels = some_labels(4, 50).to(backend.device)
    for beta in BETAS:
        results = []
        for enabled in (False, True):
            leaf = s.clone().requires_grad_()
            with torch.autocast(backend.device, dtype=dtype, enabled=enabled):
                out = kd_loss(leaf, t, labels, beta=beta, alpha=0.5, temperature=2.0,
                              return_terms=True, backend=backend.name)  # fmt: skip
            out.loss.backward()
            results.append((*out, leaf.grad))
        for plain, cast in zip(*results, strict=True):
            assert torch.equal(plain, cast) and plain.dtype == cast.dtype


def test_autocast_logits_of_a_linear_layer(backend):
    head = torch.nn.Linear(8, 50).to(backend.device)
    x, t = on(backend, normal(4, 8), normal(4, 50))
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        logits = head(x)
        assert logits.dtype == torch.bfloat16
        kd_loss(logits, t, inplace=True, backend=backend.name).backward()
    assert head.weight.grad.dtype == torch.float32 and head.weight.grad.isfinite().all()


def test_default_dtype_decides_nothing(backend):
    s, t = on(backend, *pair(4, 50))
    labels = some_labels(4, 50).to(backend.device)
    results = []
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            for beta in BETAS:
                leaf = s.clone().requires_grad_()
                loss = kd_loss(leaf, t, labels, beta=beta, alpha=0.3, temperature=3.0, top_k=9,
                               backend=backend.name)  # fmt: skip
                loss.backward()
                results.append((loss.detach(), leaf.grad))
        finally:
            torch.set_default_dtype(torch.float32)
    for first, second in zip(results[:4], results[4:], strict=True):
        assert first[0].dtype == second[0].dtype == torch.float32
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradient_nothing_is_written(backend, mode):
    s, t = on(backend, *pair(4, 50))
    expected = kd_loss(s.clone().requires_grad_(), t, beta=0.5, backend=backend.name)
    for student in (s, s.clone().requires_grad_()):
        before = student.detach().clone()
        with mode():
            loss = kd_loss(student, t, beta=0.5, inplace=True, backend=backend.name)
        assert torch.equal(loss, expected.detach()) and not loss.requires_grad
        assert torch.equal(student, before) and student._version == 0
    assert not kd_loss(s, t, inplace=True, backend=backend.name).requires_grad
    with torch.no_grad():
        kd_loss(s, t.clone().requires_grad_(), backend=backend.name)  # a constant in any case


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_terms_are_detached_and_share_no_memory(backend, labelled, gradient):
    s, t = on(backend, *pair(4, 50))
    s.requires_grad_(gradient)
    labels = (some_labels(4, 50).to(backend.device),) if labelled else ()
    for reduction in ("batchmean", "none"):
        for alpha in (0.0, 0.5, 1.0) if labelled else (1.0,):
            out = kd_loss(s, t, *labels, return_terms=True, alpha=alpha, reduction=reduction,
                          backend=backend.name)  # fmt: skip
            assert isinstance(out, KDLossOutput) and (out.hard is None) == (not labelled)
            terms = [x for x in (out.soft, out.hard) if x is not None]
            assert out.loss.requires_grad == gradient
            assert not any(x.requires_grad for x in terms)
            before = [x.clone() for x in terms]
            with torch.no_grad():
                out.loss.detach().div_(4)  # as for gradient accumulation
            assert all(torch.equal(x, y) for x, y in zip(terms, before, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_head(backend, use_reentrant):
    head = torch.nn.Linear(8, 50).to(backend.device)
    x, t = on(backend, normal(4, 8), normal(4, 50))

    def loss(x, inplace):
        return kd_loss(head(x), t, inplace=inplace, backend=backend.name)

    gradients = []
    for inplace, wrapped in ((False, False), (True, True)):
        head.weight.grad = None
        leaf = x.clone().requires_grad_()
        if wrapped:
            torch.utils.checkpoint.checkpoint(
                loss, leaf, inplace, use_reentrant=use_reentrant
            ).backward()
        else:
            loss(leaf, inplace).backward()
        gradients.append((leaf.grad, head.weight.grad))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_saved_tensor_hooks(backend):
    s, t = on(backend, *pair(4, 50))
    expected = run(backend, s, t, grad_output=3.0).gradient
    for inplace in (False, True):
        leaf = s.clone().requires_grad_()
        with torch.autograd.graph.save_on_cpu():
            loss = kd_loss(leaf * 1, t, inplace=inplace, backend=backend.name)
        (3 * loss).backward()
        assert torch.equal(leaf.grad.cpu(), expected)


def test_second_order_gradient_raises(backend):
    """Also where grad_output requires no gradient: a gradient penalty is never dropped."""
    t = normal(4, 50).to(backend.device)

    def gradient(grad_output=None):
        s = normal(4, 50, seed=1).to(backend.device).requires_grad_()
        loss = kd_loss(s, t, backend=backend.name)
        return s, loss, torch.autograd.grad(loss, s, grad_output, create_graph=True)[0]

    s, loss, g = gradient(torch.ones((), device=backend.device, requires_grad=True))
    with pytest.raises(RuntimeError):
        g.square().sum().backward()
    s, loss, g = gradient()
    with pytest.raises(RuntimeError):
        torch.autograd.grad(g.square().sum(), s)
    s, loss, g = gradient()
    with pytest.raises(RuntimeError):
        (loss + g.square().sum()).backward()


def losses(backend, t, y):
    """Every loss, of one argument, and with what might keep its graph apart from the student's."""
    name = backend.name
    teacher = topk_teacher(t, 3)
    return {
        "kd": lambda z: kd_loss(z, t, backend=name),
        "kd, terms": lambda z: kd_loss(z, t, y, return_terms=True, backend=name).loss,
        "kd, none": lambda z: kd_loss(z, t, reduction="none", backend=name).sum(),
        "kd, in place": lambda z: kd_loss(z * 1, t, inplace=True, backend=name),
        "dkd": lambda z: dkd_loss(z, t, y, backend=name),
        "topk": lambda z: topk_kd_loss(z, *teacher, backend=name),
    }


@pytest.mark.parametrize("name", losses(BACKENDS[0], torch.zeros(1, 3), None))
def test_second_derivative_raises_whatever_asks_for_it(backend, name):
    """An engine that is asked for some inputs visits only what leads to them: a gradient that does
    not hang from the student would count as constant there."""
    dtype = backend.finest
    t, x, w = (normal(*shape, seed=i, dtype=dtype, scale=1.0).to(backend.device)
               for i, shape in enumerate([(4, 7), (4, 5), (5, 7)]))  # fmt: skip
    y = torch.tensor([1, 2, 0, 3], device=backend.device)
    loss = losses(backend, t, y)[name]

    def inner_step(w):
        (g,) = torch.autograd.grad(loss(x @ w), w, create_graph=True)
        return torch.nn.functional.cross_entropy(x @ (w - g), y)

    def meta_gradient():
        leaf = w.clone().requires_grad_()
        return torch.autograd.grad(inner_step(leaf), leaf)

    def meta_backward():
        leaf = w.clone().requires_grad_()
        inner_step(leaf).backward(inputs=[leaf])

    z, functional = x @ w, torch.autograd.functional
    for call in (
        meta_gradient,
        meta_backward,
        lambda: functional.hessian(loss, z),
        lambda: functional.hvp(loss, z, z),
        lambda: functional.vhp(loss, z, z),
        lambda: functional.jvp(loss, z, z),
    ):
        with pytest.raises(RuntimeError, match="differentiated a second time"):
            call()
    leaf = z.clone().requires_grad_()
    loss(leaf).backward()
    assert torch.equal(functional.vjp(loss, z)[1], leaf.grad)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_raises(backend, requires_grad):
    """The loss has no tangent: it would come out as 0."""
    s, t = on(backend, *pair(4, 50))
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda s: kd_loss(s, t, backend=backend.name), (s,), (s,))
    s.requires_grad_(requires_grad)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(s, torch.ones_like(s))
        with pytest.raises((RuntimeError, NotImplementedError)):
            kd_loss(dual, t, backend=backend.name)
        assert kd_loss(s, t, backend=backend.name).item() > 0


def test_create_graph_alone_is_right(backend):
    s, t = on(backend, *pair(4, 50))
    s.requires_grad_()
    loss = kd_loss(s, t, backend=backend.name)
    (g,) = torch.autograd.grad(loss, s, create_graph=True)
    assert torch.equal(g.detach().cpu(), run(backend, s.detach(), t).gradient)


def test_gradient_does_not_share_memory_with_what_a_later_backward_needs(backend):
    s, t = on(backend, *pair(4, 50))
    s.requires_grad_()
    loss = kd_loss(s, t, backend=backend.name)
    loss.backward(retain_graph=True)
    first = s.grad.clone()
    s.grad.zero_()  # as optimizer.zero_grad(set_to_none=False) does
    loss.backward()
    assert torch.equal(s.grad, first)


def test_fake_tensors(backend):
    """Shapes and dtypes without values, also of labels and row temperatures."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        s = torch.empty(2, 3, 9, dtype=torch.bfloat16, device=backend.device, requires_grad=True)
        t = torch.empty(2, 3, 9, device=backend.device)
        y = torch.zeros(2, 3, dtype=torch.long, device=backend.device)
        T = torch.ones(2, 3, device=backend.device)
        for arguments, options in (
            ((), {}),
            ((), {"reduction": "none"}),
            ((y,), {"alpha": 0.5}),
            ((), {"temperature": T}),
        ):
            loss = kd_loss(s, t, *arguments, backend=backend.name, **options)
            assert loss.dtype == torch.float32
            assert loss.shape == ((2, 3) if "reduction" in options else ())
            s.grad = None
            loss.sum().backward()
            assert s.grad.shape == s.shape and s.grad.dtype == s.dtype


def test_meta_tensors():
    s = torch.empty(2, 9, device="meta", requires_grad=True)
    loss = kd_loss(s, torch.empty(2, 9, device="meta"), temperature=2.0)
    loss.backward()
    assert loss.shape == () and s.grad.shape == (2, 9)


def test_module_is_the_function(backend):
    s, t = on(backend, *pair(4, 50))
    labels = some_labels(4, 50).to(backend.device)
    module = KDLoss(temperature=2.0, alpha=0.5, top_k=9, backend=backend.name)
    options = {"alpha": 0.5, "top_k": 9, "backend": backend.name}
    assert torch.equal(module(s, t, labels), kd_loss(s, t, labels, temperature=2.0, **options))
    module.temperature = 4.0
    assert torch.equal(module(s, t, labels), kd_loss(s, t, labels, temperature=4.0, **options))
    weights = torch.rand(4, device=backend.device)
    expected = kd_loss(s, t, labels, temperature=4.0, token_weights=weights, **options)
    assert torch.equal(module(s, t, labels, token_weights=weights), expected)
    assert module.token_weights is None
    module.temperature = -1.0
    with pytest.raises(ValueError, match="temperature"):
        module(s, t, labels)


def test_module_is_a_loss_of_torch():
    for module in (KDLoss(), DKDLoss(), TopKKDLoss()):
        assert isinstance(module, torch.nn.modules.loss._Loss)
        assert module.reduction == "batchmean" and repr(module) == f"{type(module).__name__}()"


@pytest.mark.parametrize("name", ["temperature", "teacher_temperature", "token_weights"])
def test_a_tensor_of_a_module_is_a_buffer(name):
    """It moves with the module, is in its state, and gives way to a number again."""
    s, t = pair(3, 9)
    value = torch.tensor([1.0, 2.0, 3.0])
    module = KDLoss(**{name: value})
    expected = kd_loss(s, t, **{name: value})
    assert module(s, t) == expected and set(module.state_dict()) == {name}
    assert getattr(copy.deepcopy(module).to("meta"), name).is_meta
    other = KDLoss(**{name: torch.zeros(3)})
    other.load_state_dict(module.state_dict())
    assert other(s, t) == pickle.loads(pickle.dumps(other))(s, t) == expected
    plain = None if name == "token_weights" else 2.0
    setattr(module, name, plain)
    assert module.state_dict() == {} and module(s, t) == kd_loss(s, t, **{name: plain})
    setattr(module, name, value)
    assert module(s, t) == expected


def test_module_refuses_an_attribute_that_looks_like_an_option():
    module = KDLoss()
    misspelt = {"temprature": "temperature", "temp": "temperature", "top_K": "top_k",
                "betas": "beta", "bottom_percent": "bottom_percentile"}  # fmt: skip
    for name, meant in misspelt.items():
        with pytest.raises(AttributeError, match=f"no option '{name}'.*'{meant}'"):
            setattr(module, name, 3.0)
    module.ds_grads_remaining = 0  # as frameworks keep their books
    module._is_wrapped = True
    module.train(False)
    module.temperature = 3.0


def test_module_as_a_module():
    module = KDLoss(temperature=2.0, beta=0.5)
    assert repr(KDLoss()) == "KDLoss()"
    assert repr(module) == "KDLoss(temperature=2.0, beta=0.5)"
    assert module.state_dict() == {} and not list(module.parameters())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(other) == repr(module)
        s, t = pair(2, 5)
        assert torch.equal(other(s, t), module(s, t))
    module.temperature = 1.0
    module.beta = 1 - 1.0  # the default, by value
    assert repr(module) == "KDLoss()"
    torch.nn.Sequential(module).to(torch.bfloat16).eval()
