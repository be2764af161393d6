"""RunningPrior: what it counts and when, in every loss, in every state of a module, compiled, and over processes."""

import copy
import inspect
import math
import pickle
import queue
from collections import Counter

import pytest
import torch

import imbalance_kernels as ik
from imbalance_kernels import functional as F
from imbalance_kernels.priors import class_counts, effective_prior, prior_bias

C = 5


def batch(num_rows=23, ignored=0.2, dtype=torch.float32):
    """Logits, and targets of a long tail; class 4 never occurs."""
    target = torch.multinomial(torch.tensor([0.6, 0.25, 0.1, 0.05, 0.0]), num_rows, replacement=True)
    target[torch.rand(num_rows) < ignored] = -100
    return torch.randn(num_rows, C, dtype=dtype), target


def counted(*targets):
    """Counts by Python, of targets in [0, C)."""
    found = Counter(int(t) for target in targets for t in target.flatten())
    return [found[j] for j in range(C)]


def log_prior(counts, pseudo_count=1.0):
    total = math.fsum(n + pseudo_count for n in counts)
    return torch.tensor([math.log((n + pseudo_count) / total) for n in counts], dtype=torch.float64)


# ---------------------------------------------------------------- what is counted


@pytest.mark.parametrize("tau", [1.0, 0.5, -1.0, 0.0])
def test_the_batch_is_in_its_own_prior(tau):
    """The loss is cross-entropy of logits with the prior of all batches so far, this one included."""
    prior = ik.RunningPrior(C, tau=tau, pseudo_count=0.5)
    loss = ik.CrossEntropyLoss(prior=prior)
    seen = []
    for _ in range(3):
        x, target = batch(dtype=torch.float64)
        x.requires_grad_()
        seen.append(target)
        value = loss(x, target)
        assert prior.counts.tolist() == counted(*seen) and prior.counts.dtype == torch.int64
        want = torch.nn.functional.cross_entropy(x + tau * log_prior(counted(*seen), 0.5), target)
        torch.testing.assert_close(value, want, rtol=1e-13, atol=0)
        gradients = [torch.autograd.grad(v, x)[0] for v in (value, want)]
        torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-15)
    torch.testing.assert_close(prior.bias, tau * log_prior(counted(*seen), 0.5), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(prior.probabilities, log_prior(counted(*seen), 0.5).exp(), rtol=1e-14, atol=0)
    assert prior.num_classes == C


def test_before_the_first_batch_all_classes_are_alike():
    x, target = batch(dtype=torch.float64)
    loss = ik.FocalLoss(prior=ik.RunningPrior(C)).eval()
    torch.testing.assert_close(loss(x, target), ik.FocalLoss()(x, target), rtol=1e-13, atol=0)
    assert torch.isfinite(loss.running_prior.bias).all()


def test_evaluation_reads_and_training_counts():
    """Also where only the prior is frozen; without a gradient training counts all the same, as batch norm does."""
    prior = ik.RunningPrior(C)
    loss = ik.LogitAdjustedLoss(prior=prior)
    x, target = batch()
    loss(x, target)
    held = prior.counts.clone()
    for module in (loss, prior):
        module.eval()
        fixed = ik.LogitAdjustedLoss(held + 1)
        assert torch.equal(loss(x, target), fixed(x, target)) and torch.equal(prior.counts, held)
        loss.train()
    with torch.no_grad():
        loss(x, target)
    assert torch.equal(prior.counts, 2 * held)
    prior.reset()
    assert prior.counts.tolist() == [0] * C


def test_a_function_reads_the_prior_as_it_stands():
    prior = ik.RunningPrior(C)
    x, target = batch()
    prior.update(target)
    held = prior.counts.clone()
    value = F.focal_loss(x, target, prior=prior)
    assert torch.equal(prior.counts, held) and held.tolist() == counted(target)
    assert torch.equal(value, F.focal_loss(x, target, prior=ik.Prior(held, zero_count="laplace")))
    assert torch.equal(F.logit_adjusted_loss(x, target, prior=prior), F.cross_entropy(x, target, prior=prior))


def test_counts_do_not_drift():
    """At 2^24 float32 stops counting, at 2^53 float64 does."""
    for start in (2**24, 2**53):
        prior = ik.RunningPrior(2)
        prior.counts.fill_(start)
        for _ in range(3):
            prior.update(torch.tensor([1]))
        assert prior.counts.tolist() == [start, start + 3]


@pytest.mark.parametrize("momentum", [0.9, 0.25, 1.0])
def test_momentum_is_what_is_kept(momentum):
    prior = ik.RunningPrior(C, momentum=momentum)
    loss = ik.CrossEntropyLoss(prior=prior)
    want = [0.0] * C
    for _ in range(4):
        x, target = batch(dtype=torch.float64)
        want = [momentum * a + b for a, b in zip(want, counted(target), strict=True)]
        value = loss(x, target)
        assert prior.counts.dtype == torch.float64
        torch.testing.assert_close(prior.counts, torch.tensor(want, dtype=torch.float64), rtol=1e-15, atol=0)
        adjusted = torch.nn.functional.cross_entropy(x + log_prior(want), target)
        torch.testing.assert_close(value, adjusted, rtol=1e-13, atol=0)


@pytest.mark.parametrize("ignore_index", [-100, 2, 255, -1])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_what_is_ignored_does_not_count(dtype, ignore_index):
    x, target = batch()
    target[target == -100] = ignore_index
    loss = ik.FocalLoss(prior=ik.RunningPrior(C), ignore_index=ignore_index)
    loss(x, target.to(dtype))
    want = counted(target[target != ignore_index])
    assert loss.running_prior.counts.tolist() == want
    loss(x[:4], torch.full((4,), ignore_index, dtype=dtype))
    loss(x[:0], target[:0].to(dtype))
    assert loss.running_prior.counts.tolist() == want


def test_rows_of_weight_zero_do_not_count_and_others_count_once():
    x, target = batch()
    weight = torch.rand(len(target)) * (torch.rand(len(target)) < 0.6)
    hard, soft = (ik.CrossEntropyLoss(prior=ik.RunningPrior(C, momentum=m)) for m in (None, 1.0))
    hard(x, target, sample_weight=weight)
    assert hard.running_prior.counts.tolist() == counted(target[weight != 0])
    probabilities = x.softmax(1)
    soft(x, probabilities, sample_weight=weight)
    want = probabilities[weight != 0].double().sum(0)
    torch.testing.assert_close(soft.running_prior.counts, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("shape", "class_dim"),
    [((C,), 1), ((7, C), 1), ((7, C), -1), ((2, C, 3), 1), ((2, C, 3, 2), 1), ((2, 3, C), -1), ((2, 3, C), 2)],
)
def test_shapes(shape, class_dim):
    """Class indices and class probabilities, along the classes' dimension."""
    dim = 0 if len(shape) == 1 else class_dim
    x = torch.randn(shape)
    target = torch.randint(C, x.movedim(dim, -1).shape[:-1])
    loss = ik.CrossEntropyLoss(prior=ik.RunningPrior(C), class_dim=class_dim)
    loss(x, target)
    assert loss.running_prior.counts.tolist() == counted(target)
    loss = ik.CrossEntropyLoss(prior=ik.RunningPrior(C, momentum=1.0), class_dim=class_dim)
    probabilities = torch.randn(shape).softmax(dim)
    loss(x, probabilities)
    want = probabilities.double().movedim(dim, -1).reshape(-1, C).sum(0)
    torch.testing.assert_close(loss.running_prior.counts, want, rtol=1e-14, atol=0)
    ours = ik.RunningPrior(C, momentum=1.0)
    ours.update(probabilities, class_dim=class_dim)
    assert torch.equal(ours.counts, loss.running_prior.counts)


def test_what_is_no_probability_is_not_kept():
    """A row of NaN or below 0 makes its own loss what it is, and no later one."""
    prior = ik.RunningPrior(2, momentum=1.0)
    prior.update(torch.tensor([[0.25, 0.75]]))
    held = prior.counts.clone()
    prior.update(torch.tensor([[math.nan, 0.5]]))
    prior.update(torch.tensor([[0.5, math.inf]]))
    assert torch.equal(prior.counts, held)
    prior.update(torch.tensor([[-3.0, 0.5]]))
    assert prior.counts.tolist() == [0.25, 1.25]


# ---------------------------------------------------------------- every loss

OWN = {
    "LDAMLoss": {"class_counts": [9, 5, 3, 2, 1], "scale": 3.0},
    "CosFaceLoss": {"scale": 4.0},
    "ArcFaceLoss": {"scale": 4.0},
    "CircleLoss": {"scale": 4.0},
    "RadiusMarginLoss": {"radius": 0.1},
    "SoftTruncationLoss": {"sharpness": 2.0},
}
WITHOUT = {"VSLoss", "BalancedSoftmaxLoss"}  # made of counts, which are their prior
EVERY = sorted(
    value.__name__
    for value in vars(ik).values()
    if inspect.isclass(value) and issubclass(value, ik.SoftmaxLoss) and value.__name__ not in WITHOUT
)


@pytest.mark.parametrize(
    ("name", "fused"),
    [(name, fused) for name in EVERY for fused in (False, True) if fused or name != "RadiusMarginLoss"],
)
def test_every_loss_takes_one(name, fused):
    """It is the loss of the fixed prior with the same counts."""
    make = getattr(ik, name)
    loss = make(**OWN.get(name, {}), prior=ik.RunningPrior(C, tau=1.5))
    counts = torch.zeros(C, dtype=torch.int64)
    for training in (True, True, False):
        loss.train(training)
        x, target = batch(9)
        counts += training * torch.tensor(counted(target))
        fixed = make(**OWN.get(name, {}), prior=ik.Prior(counts, tau=1.5, zero_count="laplace"))
        x = torch.nn.functional.normalize(x).requires_grad_()
        if fused:
            head = torch.nn.functional.normalize(torch.randn(C, C))
            values = [ours.linear(x, head, target) for ours in (loss, fixed)]
        else:
            values = [ours(x, target) for ours in (loss, fixed)]
        assert torch.equal(*values) and values[0].isfinite()
        assert torch.equal(*(torch.autograd.grad(value, x)[0] for value in values))
        assert torch.equal(loss.running_prior.counts, counts)


@pytest.mark.parametrize("form", ["softmax_neg", "one_minus_softmax", "log_odds"])
def test_every_form_of_soft_truncation_counts_once(form):
    loss = ik.SoftTruncationLoss(form=form, prior=ik.RunningPrior(C))
    x, target = batch()
    loss(x, target)
    loss.linear(x, torch.randn(C, C), target)
    assert loss.running_prior.counts.tolist() == counted(target, target)


def test_a_layer_with_its_loss():
    loss = ik.LinearLoss(8, C, ik.FocalLoss(prior=ik.RunningPrior(C)))
    _, target = batch(12)
    loss(torch.randn(3, 4, 8), target.view(3, 4)).backward()
    assert loss.loss.running_prior.counts.tolist() == counted(target)
    assert set(loss.state_dict()) == {"loss.running_prior.counts", "linear.weight"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_two_batches_before_one_backward(dtype):
    """Each loss keeps the prior that it had: gradient accumulation with one backward, every route of the gradient."""
    for reduction in ("mean", "none"):
        loss = ik.FocalLoss(prior=ik.RunningPrior(C), reduction=reduction)
        seen, values, inputs = [], [], []
        for _ in range(2):
            x, target = batch(dtype=dtype)
            seen.append(target)
            inputs.append(x.requires_grad_())
            values.append(loss(x, target).sum())
        gradients = torch.autograd.grad(sum(values), inputs)
        for i, (x, gradient) in enumerate(zip(inputs, gradients, strict=True)):
            prior = ik.Prior(counted(*seen[: i + 1]), zero_count="laplace")
            fixed = ik.FocalLoss(prior=prior, reduction=reduction)(x, seen[i]).sum()
            assert torch.equal(values[i], fixed) and torch.equal(gradient, torch.autograd.grad(fixed, x)[0])


def test_it_combines_with_everything_else():
    x, target = batch()
    options = {
        "weight": torch.linspace(0.5, 2, C),
        "label_smoothing": 0.1,
        "z_loss": 1e-3,
        "softcap": 5.0,
        "scale": 1.3,
        "factor": torch.linspace(0.5, 1, C),
        "margin": 0.2,
    }
    loss = ik.FocalLoss(prior=ik.RunningPrior(C), **options)
    fixed = ik.FocalLoss(prior=ik.Prior(counted(target), zero_count="laplace"), **options)
    assert torch.equal(loss(x, target), fixed(x, target))


# ---------------------------------------------------------------- state

MOMENTA = [None, 0.9]
CONVERSIONS = {
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "type": lambda m: m.type(torch.float16),
    "to(device, dtype)": lambda m: m.to("cpu", torch.float16),
    "within a parent": lambda m: torch.nn.Sequential(m).half()[0],
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "deepcopy of half": lambda m: copy.deepcopy(m.half()),
}


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_counts_survive_conversions_exactly(conversion, momentum):
    loss = ik.FocalLoss(prior=ik.RunningPrior(C, momentum=momentum))
    loss.running_prior.counts.copy_(torch.tensor([2**40 + 1, 70001, 3, 1, 0]))
    if momentum is not None:
        loss.running_prior.counts.div_(3)
    held, x, target = loss.running_prior.counts.clone(), *batch()
    want = loss.eval()(x, target)
    module = CONVERSIONS[conversion](loss)
    counts = module.running_prior.counts
    assert counts.dtype == held.dtype and torch.equal(counts, held)
    assert torch.equal(module(x, target), want)
    module.train()(x, target)
    assert not torch.equal(module.running_prior.counts, held)
    if conversion in ("deepcopy", "pickle", "deepcopy of half"):
        assert torch.equal(loss.running_prior.counts, held)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_the_counts_are_the_state_dict(momentum):
    loss, other = (ik.FocalLoss(prior=ik.RunningPrior(C, momentum=momentum)) for _ in range(2))
    x, target = batch()
    loss(x, target)
    state = copy.deepcopy(loss.state_dict())
    assert list(state) == ["running_prior.counts"]
    other.load_state_dict(state)
    for _ in range(2):  # resumed training goes on alike
        assert torch.equal(other(x, target), loss(x, target))
    assert not ik.FocalLoss(prior=ik.Prior([1, 2])).state_dict()


@pytest.mark.parametrize("momentum", MOMENTA)
def test_made_on_meta_it_begins_at_zero(momentum):
    with torch.device("meta"):
        loss = ik.FocalLoss(prior=ik.RunningPrior(C, momentum=momentum))
    assert loss.running_prior.counts.is_meta
    loss = loss.to_empty(device="cpu")
    assert loss.running_prior.counts.tolist() == [0] * C
    x, target = batch()
    assert torch.equal(loss(x, target), ik.FocalLoss(prior=ik.RunningPrior(C))(x, target)) or momentum is not None


def test_repr_names_what_is_set():
    shown = repr(ik.FocalLoss(prior=ik.RunningPrior(7, tau=0.5, momentum=0.99)))
    assert "RunningPrior(num_classes=7, tau=0.5, momentum=0.99)" in shown
    assert repr(ik.RunningPrior(3)) == "RunningPrior(num_classes=3)"


def test_tau_can_be_changed():
    x, target = batch()
    loss = ik.CrossEntropyLoss(prior=ik.RunningPrior(C))
    loss(x, target)
    loss.eval()
    for tau in (0.0, 0.5, 2.0):
        loss.running_prior.tau = tau
        fixed = ik.Prior(counted(target), tau=tau, zero_count="laplace")
        assert torch.equal(loss(x, target), ik.CrossEntropyLoss(prior=fixed)(x, target))


# ---------------------------------------------------------------- what raises changes nothing

X, T = torch.randn(4, C), torch.tensor([0, 1, 2, 0])
WRONG = {
    "target above": (lambda loss: loss(X, torch.tensor([0, 1, C, 0])), IndexError, "5 is out of bounds"),
    "target below": (lambda loss: loss(X, torch.tensor([0, -1, 2, 0])), IndexError, "-1 is out of bounds"),
    "fused target above": (
        lambda loss: loss.linear(X, torch.randn(C, C), torch.tensor([0, 1, C, 0])),
        IndexError,
        "5 is out of bounds",
    ),
    "target's shape": (lambda loss: loss(X, T[:3]), ValueError, r"target has shape \(3,\)"),
    "target's dtype": (lambda loss: loss(X, T > 0), TypeError, "target has dtype torch.bool"),
    "a list": (lambda loss: loss(X, [0, 1, 2, 0]), TypeError, "target is a list"),
    "more classes": (lambda loss: loss(torch.randn(4, C + 1), T), ValueError, r"prior has shape \(5,\)"),
    "sample_weight's shape": (
        lambda loss: loss(X, T, sample_weight=torch.ones(3)),
        ValueError,
        r"sample_weight has shape \(3,\)",
    ),
    "normalizer": (lambda loss: loss(X, T, normalizer=torch.ones(2)), ValueError, "normalizer has shape"),
    "probabilities without momentum": (lambda loss: loss(X, X.softmax(1)), ValueError, "no integer counts.*momentum"),
    "update above": (
        lambda loss: loss.running_prior.update(torch.tensor([1, C])),
        IndexError,
        "5 is out of bounds.*ignore_index=-100",
    ),
    "update's dtype": (lambda loss: loss.running_prior.update(T > 0), TypeError, "target has dtype torch.bool"),
    "another device": (lambda loss: loss.to("meta")(X, T), ValueError, "RunningPrior is on meta"),
}


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("case", WRONG)
def test_what_raises_changes_nothing(case, impl):
    call, error, message = WRONG[case]
    loss = ik.FocalLoss(prior=ik.RunningPrior(C), impl=impl)
    if "momentum" in case:
        loss = ik.CrossEntropyLoss(prior=ik.RunningPrior(C), impl=impl)
    loss(X, T)
    with pytest.raises(error, match=message):
        call(loss)
    if not loss.running_prior.counts.is_meta:
        assert loss.running_prior.counts.tolist() == counted(T)


def test_class_probabilities_of_another_shape():
    prior = ik.RunningPrior(C, momentum=1.0)
    for wrong in (torch.rand(4, C + 1), torch.rand(C + 1), torch.tensor(0.5)):
        with pytest.raises(ValueError, match="class probabilities of shape"):
            prior.update(wrong)
    with pytest.raises(ValueError, match="objective is focal"):
        ik.FocalLoss(prior=prior)(X, X.softmax(1))
    assert prior.counts.tolist() == [0] * C


ARGUMENTS = {
    "no classes": (lambda: ik.RunningPrior(0), ValueError, "num_classes is 0"),
    "counts": (lambda: ik.RunningPrior([1, 2]), TypeError, "num_classes is a list"),
    "true": (lambda: ik.RunningPrior(True), TypeError, "num_classes is a bool"),
    "momentum 0": (lambda: ik.RunningPrior(3, momentum=0.0), ValueError, "momentum is 0.0"),
    "momentum above 1": (lambda: ik.RunningPrior(3, momentum=1.1), ValueError, "momentum is 1.1"),
    "momentum NaN": (lambda: ik.RunningPrior(3, momentum=math.nan), ValueError, "momentum is nan"),
    "tau": (lambda: ik.RunningPrior(3, tau=math.inf), ValueError, "tau is inf"),
    "pseudo_count": (lambda: ik.RunningPrior(3, pseudo_count=0), ValueError, "pseudo_count is 0"),
    "as counts": (
        lambda: ik.LogitAdjustedLoss(ik.RunningPrior(3)),
        TypeError,
        "class_counts is a RunningPrior.*prior=",
    ),
    "as balanced counts": (lambda: ik.BalancedSoftmaxLoss(ik.RunningPrior(3)), TypeError, "class_counts is a Running"),
    "tau twice": (
        lambda: ik.LogitAdjustedLoss(prior=ik.RunningPrior(3), tau=2.0),
        ValueError,
        r"tau is given with a RunningPrior.*RunningPrior\(..., tau",
    ),
    "in a sigmoid loss": (
        lambda: ik.SigmoidFocalLoss(prior=ik.RunningPrior(3)),
        TypeError,
        "prior is a RunningPrior.*BinaryPrior",
    ),
    "in a sigmoid function": (
        lambda: F.sigmoid_focal_loss(X, X, prior=ik.RunningPrior(C)),
        TypeError,
        "prior is a RunningPrior.*BinaryPrior",
    ),
    "in a multi-label loss": (
        lambda: ik.MultilabelSoftmaxLoss(prior=ik.RunningPrior(3)),
        TypeError,
        "prior is a RunningPrior.*BinaryPrior",
    ),
    "a binary prior in a softmax": (
        lambda: ik.FocalLoss(prior=ik.BinaryPrior([1, 2], 5)),
        TypeError,
        r"prior is a BinaryPrior.*Prior\(class_counts\)",
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_an_error_names_the_argument(case):
    make, error, message = ARGUMENTS[case]
    with pytest.raises(error, match=message):
        make()


# ---------------------------------------------------------------- compiled


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
def test_compiles_as_one_graph(fused, momentum):
    """And counts as eagerly does, in training, then in evaluation."""
    ours, eager = (ik.FocalLoss(prior=ik.RunningPrior(C, momentum=momentum)) for _ in range(2))
    head = torch.randn(C, C)

    def step(loss):
        return lambda x, target: loss.linear(x, head, target) if fused else loss(x.sin(), target)

    torch._dynamo.reset()
    run = torch.compile(step(ours), fullgraph=True, backend="aot_eager")
    for training in (True, True, False):
        ours.train(training), eager.train(training)
        x, target = batch()
        x.requires_grad_()
        values = [call(x, target) for call in (run, step(eager))]
        assert torch.equal(ours.running_prior.counts, eager.running_prior.counts)
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in values))
    assert ours.running_prior.counts.sum() > 0


# ---------------------------------------------------------------- several processes

STEPS, SPLIT = 3, 9


def _losses(process_group):
    options = {"process_group": process_group}
    return {
        "counts": ik.FocalLoss(reduction="sum", prior=ik.RunningPrior(C, **options)),
        "momentum": ik.CrossEntropyLoss(reduction="sum", prior=ik.RunningPrior(C, 0.5, momentum=0.5, **options)),
        "probabilities": ik.CrossEntropyLoss(reduction="sum", prior=ik.RunningPrior(C, momentum=1.0, **options)),
    }


def _run(name, loss, model, weight, inputs, labels):
    """Values, the gradients' sums over steps, and the counts."""
    values = []
    for x, target in zip(inputs, labels, strict=True):
        target = torch.nn.functional.one_hot(target.clamp_min(0), C).double() if name == "probabilities" else target
        values.append(loss(model(x), target))
        values[-1].backward()
    return [value.item() for value in values], weight.grad.tolist(), loss.running_prior.counts.tolist()


def _layer(weight):
    head = torch.nn.Linear(6, C, bias=False, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(weight)
    return head


def _work(rank, address, weight, inputs, labels, results):
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        torch.set_num_threads(1)
        group = torch.distributed.group.WORLD
        share = (slice(None), slice(0, SPLIT) if rank == 0 else slice(SPLIT, None))
        for name, loss in _losses(group).items():
            head = _layer(weight)
            model = torch.nn.parallel.DistributedDataParallel(head)
            loss = copy.deepcopy(loss)  # which shares the group
            assert loss.running_prior.process_group is group
            results.put((rank, name, _run(name, loss, model, head.weight, inputs[share], labels[share])))
        counts = class_counts(list(labels[share]), C, process_group=group, progress=False)
        results.put((rank, "class_counts", counts.tolist()))
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_are_one_with_both_batches(tmp_path):
    """Under DistributedDataParallel, with batches of different sizes: one prior, one loss, one gradient."""
    inputs = torch.randn(STEPS, 14, 6, dtype=torch.float64)
    labels = torch.stack([batch(14)[1] for _ in range(STEPS)])
    weight = torch.randn(C, 6, dtype=torch.float64)
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (f"file://{tmp_path / 'rendezvous'}", weight, inputs, labels, results)
    workers = [context.Process(target=_work, args=(rank, *arguments)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = {}
    while len(found) < 2 * (len(_losses(None)) + 1):
        try:
            rank, name, result = results.get(timeout=5)
            found[rank, name] = result
        except queue.Empty:
            assert not any(worker.exitcode for worker in workers)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert found[0, "class_counts"] == found[1, "class_counts"] == counted(labels)
    for name, loss in _losses(None).items():
        head = _layer(weight)
        values, gradient, counts = _run(name, loss, head, head.weight, inputs, labels)
        of_both = [found[rank, name] for rank in range(2)]
        assert of_both[0][2] == of_both[1][2]
        if name == "counts":
            assert of_both[0][2] == counts == counted(labels)
        assert of_both[0][2] == pytest.approx(counts, rel=1e-14)
        assert [sum(pair) for pair in zip(*(r[0] for r in of_both), strict=True)] == pytest.approx(values, rel=1e-12)
        for _, theirs, _ in of_both:  # the average of DistributedDataParallel, of two sums
            theirs = 2 * torch.tensor(theirs, dtype=torch.float64)
            torch.testing.assert_close(theirs, torch.tensor(gradient, dtype=torch.float64), rtol=1e-10, atol=1e-13)


# ---------------------------------------------------------------- as a prior elsewhere


def test_it_is_a_prior_elsewhere():
    prior = ik.RunningPrior(C, tau=0.5)
    prior.update(torch.tensor([0, 0, 1, 3, 0]))
    fixed = ik.Prior(prior.counts, tau=0.5, zero_count="laplace")
    assert torch.equal(prior_bias(prior), fixed.bias) and torch.equal(prior_bias(prior, 2.0), 2 * fixed.log_prior)
    ours = effective_prior(prior, weight=[1, 2, 3, 4, 5])
    theirs = effective_prior(fixed, weight=[1, 2, 3, 4, 5])
    assert torch.equal(ours.bias, theirs.bias) and ours.tau == 0.5
