"""The example of a detector: average precision, suppression and targets by hand, its loss literally; and it trains."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import imbalance_kernels as ik

ROOT = Path(__file__).parent.parent
NOTHING = torch.zeros(0, 4)


@pytest.fixture(scope="module")
def detection():
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import detection
    finally:
        sys.path.remove(str(ROOT / "examples"))
    return detection


@pytest.fixture(scope="module")
def boxes(detection):
    return sys.modules["boxes"]


@pytest.fixture(scope="module")
def digit_canvases(detection):
    return sys.modules["digit_canvases"]


def box(*sides):
    return torch.tensor([sides], dtype=torch.float32)


# ---------------------------------------------------------------- average precision


@pytest.mark.parametrize(
    "scores, right, num_truths, expected",
    [
        ([0.9], [True], 1, 1),
        ([0.9, 0.8], [True, True], 4, 1 / 2),  # two are never found
        ([0.9, 0.8, 0.7], [True, False, True], 2, 1 / 2 * 1 + 1 / 2 * 2 / 3),
        ([0.7, 0.9, 0.8], [True, True, False], 2, 1 / 2 * 1 + 1 / 2 * 2 / 3),  # the same, not sorted
        ([0.9, 0.8, 0.7], [False, True, True], 2, 2 / 3),  # 1/2 at recall 1/2, but 2/3 at a higher one
        ([0.9, 0.8, 0.7, 0.6], [True, False, False, True], 3, 1 / 3 * 1 + 1 / 3 * 1 / 2),
        ([0.9, 0.8], [False, False], 2, 0),
        ([0.9, 0.9], [True, False], 1, 1 / 2),  # equal scores: the order of neither
        ([0.9, 0.9], [False, True], 1, 1 / 2),
        ([], [], 3, 0),
        ([], [], 0, math.nan),
    ],
)
def test_average_precision_by_hand(boxes, scores, right, num_truths, expected):
    value = boxes.average_precision(torch.tensor(scores), torch.tensor(right, dtype=torch.bool), num_truths)
    assert value == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_iou_by_hand(boxes):
    first = torch.cat([box(0, 0, 4, 2), box(0, 0, 0, 0)])
    second = torch.cat([box(0, 0, 4, 2), box(2, 1, 6, 3), box(4, 0, 5, 1), box(0, 0, 0, 0)])
    expected = torch.tensor([[1, 2 / 14, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(boxes.iou(first, second), expected)


def test_a_truth_is_found_once_and_by_the_surest(boxes):
    truths = boxes.Truths(torch.cat([box(0, 0, 10, 10), box(0, 20, 10, 30)]), torch.tensor([3, 4]))
    found = boxes.Detections(
        torch.cat([box(0, 0, 10, 10), box(0, 0, 10, 9), box(0, 0, 10, 10), box(0, 25, 10, 35), box(0, 22, 10, 32)]),
        torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]),
        torch.tensor([4, 3, 3, 4, 4]),  # wrong class, right, a second time, too far off (1/3), right (2/3)
    )
    assert boxes.hits(found, truths, 0.5).tolist() == [False, True, False, False, True]


def test_a_detection_takes_its_best_truth_and_leaves_the_other(boxes):
    truths = boxes.Truths(torch.cat([box(0, 0, 10, 10), box(3, 0, 13, 10)]), torch.tensor([0, 0]))
    found = boxes.Detections(
        torch.cat([box(2, 0, 12, 10), box(3, 0, 13, 10)]), torch.tensor([0.9, 0.8]), torch.zeros(2)
    )
    assert boxes.hits(found, truths, 0.5).tolist() == [True, True]
    third = boxes.Detections(*(torch.cat([part, part[:1]]) for part in vars(found).values()))
    assert boxes.hits(third, truths, 0.5).tolist() == [True, True, False]


def test_average_precision_of_images_together(boxes):
    """A box is right in its own image alone; scores are ranked over all images; a class without truths is NaN."""
    here, there = box(0, 0, 10, 10), box(50, 50, 60, 60)
    truths = [
        boxes.Truths(here, torch.tensor([0])),
        boxes.Truths(there, torch.tensor([0])),
        boxes.Truths(here, torch.tensor([1])),
    ]
    found = [
        boxes.Detections(there, torch.tensor([0.9]), torch.tensor([0])),  # right in the second image, not here
        boxes.Detections(there, torch.tensor([0.8]), torch.tensor([0])),
        boxes.Detections(torch.cat([here, here]), torch.tensor([0.7, 0.6]), torch.tensor([1, 2])),
    ]
    ap = boxes.average_precision_per_class(found, truths, num_classes=3)
    assert ap[:2].tolist() == pytest.approx([1 / 2 * 1 / 2, 1]) and ap[2].isnan()


# ---------------------------------------------------------------- non-maximum suppression


def random_boxes(count):
    corner, size = 60 * torch.rand(count, 2), 5 + 30 * torch.rand(count, 2)
    return torch.cat([corner, corner + size], 1), torch.rand(count)


def suppressed_literally(boxes, scores, threshold):
    """One box after another, the best first: kept unless a kept one overlaps it by more; plain numbers."""
    kept = []
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        for j in kept:
            a, b = boxes[i], boxes[j]
            width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
            height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
            union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
            if width * height > threshold * union:
                break
        else:
            kept.append(i)
    return kept


@pytest.mark.parametrize("count", [0, 1, 2, 200])
@pytest.mark.parametrize("threshold", [0.2, 0.5])
def test_nms(boxes, count, threshold):
    where, scores = random_boxes(count)
    expected = suppressed_literally(where.tolist(), scores.tolist(), threshold)
    assert count < 200 or 5 < len(expected) < 150
    assert boxes.own_nms(where, scores, threshold).tolist() == expected
    assert boxes.nms(where, scores, threshold).tolist() == expected


def test_nms_is_torchvisions(boxes):
    if boxes.nms is boxes.own_nms:
        pytest.skip("torchvision is not installed, or not for this torch")
    where, scores = random_boxes(300)
    assert boxes.nms.__module__.startswith("torchvision")
    assert torch.equal(boxes.own_nms(where, scores, 0.5), boxes.nms(where, scores, 0.5))


def test_classes_do_not_suppress_one_another(boxes):
    where, scores = random_boxes(200)
    labels = torch.randint(3, (200,))
    expected = []
    for k in range(3):
        of_class = (labels == k).nonzero()[:, 0]
        kept = suppressed_literally(where[of_class].tolist(), scores[of_class].tolist(), 0.5)
        expected += of_class[kept].tolist()
    expected.sort(key=lambda i: -scores[i])
    assert boxes.nms_per_class(where, scores, labels, 0.5).tolist() == expected
    assert boxes.nms_per_class(NOTHING, torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0.5).tolist() == []


# ---------------------------------------------------------------- images and targets


def test_images(digit_canvases):
    train, test = digit_canvases.load_canvases(60, 40, imbalance_factor=100, seed=5)
    again, _ = digit_canvases.load_canvases(60, 40, imbalance_factor=100, seed=5)
    other, _ = digit_canvases.load_canvases(60, 40, imbalance_factor=100, seed=6)
    assert torch.equal(train.images, again.images) and torch.equal(train.boxes, again.boxes)
    assert not torch.equal(train.images, other.images)
    for canvases in (train, test):
        there = canvases.labels >= 0
        assert set(there.sum(1).tolist()) <= set(range(2, 9)) and 3 < there.sum(1).double().mean() < 7
        assert canvases.boxes[there].amin() >= 0 and canvases.boxes[there].amax() <= digit_canvases.CANVAS_SIZE
        assert (canvases.boxes[~there] == 0).all()
    counts = train.labels[train.labels >= 0].bincount(minlength=10)
    assert counts[:3].sum() > 10 * counts[-3:].sum()
    assert test.labels[test.labels >= 0].bincount(minlength=10).min() > 5


def test_digits_of_test_images_are_no_training_digits(digit_canvases, monkeypatch):
    train, train_labels, test, test_labels = digit_canvases.read_digits()
    assert len(train) + len(test) == 1797
    assert torch.cdist(train.flatten(1).double(), test.flatten(1).double()).min() > 0
    marked = torch.full_like(train, 16), train_labels, torch.full_like(test, 8), test_labels
    monkeypatch.setattr(digit_canvases, "read_digits", lambda: marked)
    monkeypatch.setattr(digit_canvases, "NOISE", 0.0)
    train_set, test_set = digit_canvases.load_canvases(9, 9, imbalance_factor=100, seed=0)
    assert 0.8 < train_set.images.max() <= 1 and 0.4 < test_set.images.max() <= 0.5


def test_boxes_hold_the_ink(digit_canvases, monkeypatch):
    monkeypatch.setattr(digit_canvases, "NOISE", 0.0)
    train, _ = digit_canvases.load_canvases(20, 1, imbalance_factor=100, seed=0)
    for image, boxes, labels in zip(train.images, train.boxes, train.labels, strict=True):
        outside = image[0].clone()
        for left, top, right, bottom in boxes[labels >= 0].int().tolist():
            inside = image[0, top:bottom, left:right]
            for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert side.max() > digit_canvases.INK * digit_canvases.CONTRASTS[0]
            outside[top:bottom, left:right] = 0
        assert outside.max() <= digit_canvases.INK


def test_targets_by_hand(detection):
    """Points lie at 2, 6, 10, ... pixels. A centre at (24, 24): 22 and 26 are 2 away, 18 and 30 are 6."""
    sides = torch.stack([box(16, 14, 32, 34)[0], torch.zeros(4)])[None]
    labels, distances = detection.assign(sides, torch.tensor([[7, -1]]))
    expected = torch.full((24, 24), detection.BACKGROUND)
    expected[4:8, 4:8] = detection.IGNORED
    expected[5:7, 5:7] = 7
    assert torch.equal(labels[0], expected)
    assert distances[0, :, 6, 5].tolist() == [22 - 16, 26 - 14, 32 - 22, 34 - 26]


def test_targets_of_neighbours_and_narrow_boxes(detection):
    """Each point goes to the nearer centre; one beside its box can say nothing of the sides: ignored."""
    sides = torch.stack([box(4, 4, 20, 20)[0], box(10, 4, 26, 20)[0], box(59, 40, 61, 60)[0]])[None]
    labels, distances = detection.assign(sides, torch.tensor([[1, 2, 3]]))
    assert labels[0, 3, :8].tolist() == [10, -100, 1, 1, 2, -100, 10, 10]
    assert distances[0, :, 3, 4].tolist() == [18 - 10, 14 - 4, 26 - 18, 20 - 14]
    assert labels[0, 12, 12:18].tolist() == [10, -100, -100, -100, -100, 10]


def test_an_empty_image_is_background(detection):
    labels, distances = detection.assign(torch.zeros(1, 2, 4), torch.full((1, 2), -1))
    assert (labels == detection.BACKGROUND).all() and distances.isfinite().all()


def test_prior_counts_points(detection):
    labels = torch.full((2, 24, 24), detection.BACKGROUND)
    labels[0, 0, :5] = 3
    labels[1, 1, :7] = detection.IGNORED
    prior = detection.class_prior(labels)
    points = 2 * 24 * 24 - 7
    assert prior.probabilities[3] == pytest.approx((5 + 1) / (points + 2))
    assert prior.probabilities[4] == pytest.approx(1 / (points + 2))


# ---------------------------------------------------------------- loss and training


def literal_loss(method, prior, logits, sides, labels, truth):
    """In float64, of one-hot labels, one positive point after another."""
    num_positive = int(((labels >= 0) & (labels < 10)).sum())
    valid = labels != -100
    one_hot = F.one_hot(labels[valid], 11)[:, :10].double()
    x = logits.movedim(1, -1)[valid]
    if "prior" in method:
        x = x + torch.log(prior.probabilities / (1 - prior.probabilities))
    loss = F.binary_cross_entropy_with_logits(x, one_hot, reduction="none")
    if "focal" in method:
        p_t = one_hot * torch.sigmoid(x) + (1 - one_hot) * torch.sigmoid(-x)
        loss = loss * (0.25 * one_hot + 0.75 * (1 - one_hot)) * (1 - p_t) ** 2
    total = loss.sum()
    for image, row, column in ((labels >= 0) & (labels < 10)).nonzero().tolist():
        ours, its = (distances[image, :, row, column] for distances in (sides, truth))
        ours, its = ([-left, -top, right, bottom] for left, top, right, bottom in (ours, its))
        width = torch.minimum(ours[2], its[2]) - torch.maximum(ours[0], its[0])
        height = torch.minimum(ours[3], its[3]) - torch.maximum(ours[1], its[1])
        areas = [(right - left) * (bottom - top) for left, top, right, bottom in (ours, its)]
        total = total + 1 - width * height / (sum(areas) - width * height)
    return total / num_positive


@pytest.mark.parametrize("name", ["BCE", "focal", "focal + prior"])
def test_the_loss_literally(detection, name):
    (method,) = [method for method in detection.METHODS if method.name == name]
    labels, truth = detection.assign(torch.stack([box(16, 14, 32, 34), box(40, 40, 58, 60)]), torch.tensor([[7], [2]]))
    prior = detection.class_prior(labels)
    logits = torch.randn(2, 10, 24, 24, dtype=torch.float64, requires_grad=True)
    sides = (8 * torch.rand(2, 4, 24, 24, dtype=torch.float64) + 4).requires_grad_()
    truth = truth.double()
    expected = literal_loss(name, prior, logits, sides, labels, truth)
    expected_gradients = torch.autograd.grad(3 * expected, (logits, sides))
    loss = detection.detector_loss(method.make_loss(prior), (logits, sides), labels, truth)
    gradients = torch.autograd.grad(3 * loss, (logits, sides))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    for gradient, exact in zip(gradients, expected_gradients, strict=True):
        assert (gradient - exact).abs().max() <= 1e-10 * exact.abs().max()


def test_images_without_positives_cost_nothing(detection):
    """The normaliser is 0 there: the loss is 0, not NaN, and so is its gradient."""
    labels, truth = detection.assign(torch.zeros(1, 1, 4), torch.tensor([[-1]]))
    for method in detection.METHODS:
        model = detection.Detector(method.bias_start)
        class_loss = method.make_loss(ik.BinaryPrior([5] * 10, total_count=1000))
        loss = detection.detector_loss(class_loss, model(torch.randn(1, 1, 96, 96)), labels, truth)
        loss.backward()
        assert loss.item() == 0
        assert all((parameter.grad == 0).all() for parameter in model.parameters())


def test_the_loss_of_every_method_falls(detection, digit_canvases):
    train_set, _ = digit_canvases.load_canvases(16, 1, imbalance_factor=10, seed=0)
    labels, distances = detection.assign(train_set.boxes, train_set.labels)
    for method in detection.METHODS:
        torch.manual_seed(0)
        model = detection.Detector(method.bias_start)
        class_loss = method.make_loss(detection.class_prior(labels))
        optimizer = torch.optim.Adam(model.parameters(), 4e-3)
        losses = []
        for _ in range(20):
            loss = detection.detector_loss(class_loss, model(train_set.images), labels, distances)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert max(losses[-3:]) < 0.6 * losses[0], (method.name, losses)


def test_the_example_runs(detection, tmp_path, capsys):
    small = [
        "--steps",
        "3",
        "--seeds",
        "2",
        "--batch",
        "2",
        "--train-images",
        "6",
        "--test-images",
        "3",
        "--device",
        "cpu",
    ]
    summary = detection.main([*small, "--output", str(tmp_path / "out")])
    for name in ("detection_ap.png", "detections.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "detection.json").read_text())["steps"] == summary["steps"] == [1, 2, 3]
    for result in summary["results"].values():
        losses = torch.tensor(result["losses"])
        assert losses.shape == (2, 3) and losses.isfinite().all()
    printed = capsys.readouterr().out
    for part in ("at step 3", "frequent", "named right", "rare", "focal + prior", "focal against BCE, step 3", "± "):
        assert part in printed


def test_detections_are_decoded(detection):
    """A model that is sure of one point finds that box, first, with its class and shifted score."""
    model = detection.Detector(0.0)
    logits = torch.full((1, 10, 24, 24), -20.0)
    logits[0, 6, 5, 3] = 1.5
    sides = torch.full((1, 4, 24, 24), 3.0)
    sides[0, :, 5, 3] = torch.tensor([1.0, 2.0, 5.0, 6.0])
    model.forward = lambda images: (logits, sides)
    (found,) = detection.detect(model, torch.zeros(1, 1, 96, 96), score_shift=-1.0)
    assert found.boxes[0].tolist() == [14 - 1, 22 - 2, 14 + 5, 22 + 6]
    assert found.labels[0] == 6 and found.scores[0] == pytest.approx(1 / (1 + math.exp(-0.5)))
    assert len(found.scores) <= detection.AFTER_NMS and (found.scores.diff() <= 0).all()


def test_named_right_by_hand(detection, boxes):
    """Of two boxes over a digit the surer one counts, whatever their classes; one beside it does not."""
    here, there = box(0, 0, 10, 10), box(50, 50, 60, 60)
    truths = [boxes.Truths(torch.cat([here, there]), torch.tensor([1, 2])), boxes.Truths(here, torch.tensor([1]))]
    found = [
        boxes.Detections(torch.cat([here, here, there]), torch.tensor([0.9, 0.8, 0.7]), torch.tensor([3, 1, 2])),
        boxes.Detections(torch.cat([there, here]), torch.tensor([0.9, 0.8]), torch.tensor([4, 1])),
    ]
    share = detection.named_right(found, truths)
    assert share[1:3].tolist() == [1 / 2, 1] and share[3:].isnan().all()
    nothing = boxes.Detections(there, torch.tensor([0.9]), torch.tensor([0]))
    assert detection.named_right([nothing], [boxes.Truths(here, torch.tensor([0]))])[0] == 0
