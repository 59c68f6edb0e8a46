"""Scores against references written out here."""
import numpy as np
import pytest

from sage_nb.core import DataError
from sage_nb.metrics import (bootstrap_by_group, calibration_curve, ccc, ccc_from_moments, ccc_per_video, ccc_per_window, coverage,
                             ence, moments, pearson, rmse, sharpness, va_scores)


def reference_ccc(pred, target):
    "Lin's coefficient, term by term in float64, moments divided by n."
    x, y = [float(v) for v in pred], [float(v) for v in target]
    n = len(x)
    mean_x, mean_y = sum(x) / n, sum(y) / n
    var_x = sum((v - mean_x) ** 2 for v in x) / n
    var_y = sum((v - mean_y) ** 2 for v in y) / n
    cov = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / n
    return 2 * cov / (var_x + var_y + (mean_x - mean_y) ** 2) if var_x and var_y else 0.0


@pytest.mark.parametrize("count", [2, 3, 17, 2000])
@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_ccc_is_lins(count, kind):
    rng = np.random.default_rng(count)
    pred, target = rng.normal(0.3, 0.5, count).astype(kind), rng.normal(-0.1, 0.2, count).astype(kind)
    assert ccc(pred, target) == pytest.approx(reference_ccc(pred, target), abs=1e-12)
    mask = rng.random(count) < 0.6
    mask[:2] = True
    spoilt = np.where(mask, pred, np.nan)
    assert ccc(spoilt, target, mask) == pytest.approx(reference_ccc(pred[mask], target[mask]), abs=1e-12)


def test_population_moments_not_sample_moments():
    pred, target = np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, 4.0])
    assert ccc(pred, target) == pytest.approx(2 * 1 / (2 / 3 + 2 + 1))  # with n - 1 it were 3 / 5 instead of 6 / 11


def test_exact_far_from_zero():
    rng = np.random.default_rng(0)
    pred, target = 1e6 + rng.normal(size=500), 1e6 + rng.normal(size=500)
    assert ccc(pred, target) == pytest.approx(reference_ccc(pred, target), abs=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -1.0])
def test_constant_input_scores_zero(value):
    truth = np.random.default_rng(0).normal(size=1001)
    constant = np.full(1001, value, np.float32)
    for pred, target in ((constant, truth), (truth, constant), (constant, constant)):
        assert ccc(pred, target) == 0 and pearson(pred, target) == 0
        assert ccc_from_moments(moments(pred, target)) == 0


def test_an_empty_set_has_no_score():
    for call in (ccc, pearson, rmse):
        with pytest.raises(DataError, match="no labelled frame"):
            call([], [])
        with pytest.raises(DataError, match="no labelled frame"):
            call([0.1, 0.2], [0.1, 0.2], mask=[False, False])
    with pytest.raises(DataError, match="no labelled frame"):
        bootstrap_by_group(np.zeros((3, 2)), np.zeros((3, 2)), np.zeros(3), np.zeros(3, bool))
    with pytest.raises(DataError, match="no labelled frame"):
        ccc_from_moments(moments(np.zeros(0), np.zeros(0)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_input_that_is_not_finite_is_refused(bad):
    with pytest.raises(DataError, match="prediction is not finite in 1 of 3"):
        ccc([0, bad, 1], [0, 1, 2])
    with pytest.raises(DataError, match="truth is not finite"):
        ccc([0, 1, 2], [0, bad, 1])


def test_shapes_must_agree():
    with pytest.raises(DataError, match=r"\(3,\), the truth \(2,\)"):
        ccc([0, 1, 2], [0, 1])
    with pytest.raises(DataError, match="mask has shape"):
        ccc([0, 1, 2], [0, 1, 2], mask=[True])


def test_conventions():
    rng = np.random.default_rng(1)
    videos = np.repeat(["b", "a", "c"], [70, 100, 30])
    pred, target = rng.normal(size=200), rng.normal(size=200)
    mask = rng.random(200) < 0.8
    mask[170:] = False  # nothing of c is labelled
    own = [reference_ccc(pred[mask & (videos == name)], target[mask & (videos == name)]) for name in "ab"]
    assert ccc_per_video(pred, target, videos, mask) == pytest.approx(np.mean(own))
    starts = [(0, 40), (40, 70), (70, 110), (110, 150), (150, 170)]  # windows of 40 within videos
    own = [reference_ccc(pred[a:b][mask[a:b]], target[a:b][mask[a:b]]) for a, b in starts]
    assert ccc_per_window(pred, target, videos, mask, window=40) == pytest.approx(np.mean(own))
    both = np.stack([pred, target], 1)
    scores = va_scores(both, both[:, ::-1], mask)
    assert scores["p"] == pytest.approx(reference_ccc(pred[mask], target[mask]))


def test_pearson_and_rmse():
    rng = np.random.default_rng(2)
    pred, target = rng.normal(size=300), rng.normal(size=300)
    assert pearson(pred, target) == pytest.approx(np.corrcoef(pred, target)[0, 1])
    assert rmse([0, 1], [3, 1]) == pytest.approx(np.sqrt(4.5))


def test_calibration_measures():
    pred, target = np.array([0.1, -0.2, 0.4, 0.0]), np.array([0.0, 0.0, 0.0, 0.2])
    variance = np.array([0.01, 0.04, 0.09, 0.04])
    stated, observed = calibration_curve(pred, target, variance, bins=2)
    assert stated == pytest.approx(np.sqrt([0.025, 0.065]))
    assert observed == pytest.approx(np.sqrt([0.025, 0.10]))
    assert ence(pred, target, variance, bins=2) == pytest.approx((0 + abs(np.sqrt(0.065) - np.sqrt(0.1)) / np.sqrt(0.065)) / 2)
    low, high = np.array([0.0, -1, 2]), np.array([1.0, 1, 3])
    assert coverage(low, high, np.array([1.0, 2, 2.5])) == pytest.approx(2 / 3)
    assert coverage(low, high, np.array([1.0, 2, np.nan]), mask=[True, True, False]) == 0.5
    assert sharpness(low, high) == pytest.approx(4 / 3)
    with pytest.raises(DataError, match="not positive"):
        ence(pred, target, -variance, bins=2)


@pytest.fixture
def people():
    rng = np.random.default_rng(3)
    groups = rng.permutation(np.repeat([f"s{i}" for i in range(9)], rng.integers(3, 40, 9)))
    target = rng.normal(size=(len(groups), 2))
    pred = target[None] + rng.normal(0.1, 0.5, (2, len(groups), 2))
    return pred, target, groups, rng.random(len(groups)) < 0.8


def test_bootstrap_equals_pooling_the_frames(people):
    pred, target, groups, mask = people
    result = bootstrap_by_group(pred, target, groups, mask, resamples=25, seed=4)
    names = np.unique(groups[mask])
    draws = np.random.default_rng(4).multinomial(len(names), np.full(len(names), 1 / len(names)), 25)
    for draw, sample in zip(draws, result.samples):
        rows = np.concatenate([np.tile(np.flatnonzero(mask & (groups == name)), times) for name, times in zip(names, draw)])
        naive = np.mean([[reference_ccc(run[rows, d], target[rows, d]) for d in range(2)] for run in pred], axis=0)
        assert sample == pytest.approx([*naive, naive.mean()], abs=1e-10)
    whole = np.mean([[reference_ccc(run[mask, d], target[mask, d]) for d in range(2)] for run in pred], axis=0)
    assert result.value == pytest.approx([*whole, whole.mean()], abs=1e-10)


def test_bootstrap_pairs_models(people):
    pred, target, groups, mask = people
    result = bootstrap_by_group(pred, target, groups, mask)
    again = bootstrap_by_group(pred, target, groups, mask)
    assert (result.samples == again.samples).all() and (result.samples != bootstrap_by_group(pred, target, groups, mask, seed=1).samples).any()
    nothing = result - again
    assert (nothing.value == 0).all() and (np.array(nothing.interval()) == 0).all()
    worse = bootstrap_by_group(0.8 * pred, target, groups, mask)
    low, high = (result - worse).interval()
    apart = np.ptp(result.interval(), axis=0)
    assert (high - low < apart).all() and (result - worse).value == pytest.approx(result.value - worse.value)
