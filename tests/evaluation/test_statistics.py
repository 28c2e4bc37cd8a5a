"""Streaming moments, and the files that keep statistics."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.compare import assert_close
from vapi_jax.common.npz import NpzError
from vapi_jax.evaluation import statistics as S
from vapi_jax.evaluation.statistics import (
    Gaussian,
    Moments,
    Statistics,
    StatisticsError,
    load_statistics,
    merge,
    save_statistics,
)


def rows(count=50, dim=4, seed=0, offset=1000.0):
    """Correlated rows far from zero, where sums of squares would lose their digits."""
    rng = np.random.default_rng(seed)
    return offset + rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim))


def moments_of(*parts):
    found = Moments(parts[0].shape[1])
    for part in parts:
        found.update(part)
    return found


def close(a, b):
    """Equal to 1e-10 of the largest entry."""
    assert_close(a, b, 1e-10)


def test_moments_equal_numpy():
    x = rows()
    found = moments_of(x)
    assert found.count == 50 and found.mean.dtype == found.scatter.dtype == np.float64
    close(found.mean, x.mean(axis=0))
    close(found.covariance(), np.cov(x, rowvar=False, ddof=1))
    close(found.scatter, 49 * np.cov(x, rowvar=False, ddof=1))


def test_literal_values():
    found = moments_of(np.array([[0.0, 0.0], [2.0, 4.0]]))
    assert found.mean.tolist() == [1.0, 2.0]
    assert found.covariance().tolist() == [[2.0, 4.0], [4.0, 8.0]]


@settings(max_examples=30)
@given(
    cuts=st.lists(st.integers(0, 50), max_size=8), merged=st.booleans(), block=st.integers(1, 60)
)
def test_however_the_rows_are_cut_up_the_result_is_the_same(cuts, merged, block):
    x = rows(offset=1e6)
    parts = np.split(x, sorted(cuts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S, "_ROWS", block)
        if merged:
            found = moments_of(parts[0])
            for part in parts[1:]:
                found = merge(moments_of(part), found)
        else:
            found = moments_of(*parts)
        close(found.mean, x.mean(axis=0))
        close(found.covariance(), np.cov(x, rowvar=False))
    assert found.count == 50


def test_batches_of_a_stream_give_the_very_same_bits(monkeypatch):
    monkeypatch.setattr(S, "_ROWS", 16)
    x = rows()
    whole, cut = moments_of(x), moments_of(*np.split(x, [3, 3, 20, 49]))
    np.testing.assert_array_equal(whole.covariance(), cut.covariance())
    np.testing.assert_array_equal(whole.mean, cut.mean)


def test_looking_in_between_changes_nothing():
    x = rows()
    found = Moments(4)
    for part in np.split(x, 5):
        found.update(part)
        assert found.mean.shape == (4,) and np.isfinite(found.scatter).all()
    close(found.covariance(), np.cov(x, rowvar=False))


def test_a_caller_may_use_its_buffer_again():
    x, buffer = rows(), np.empty((10, 4))
    found = Moments(4)
    for part in np.split(x, 5):
        buffer[:] = part
        found.update(buffer)
    close(found.covariance(), np.cov(x, rowvar=False))


def test_merging_leaves_both_parts_as_they_were():
    a, b = moments_of(rows(seed=1)), moments_of(rows(seed=2))
    before = [(part.count, part.mean.copy(), part.scatter.copy()) for part in (a, b)]
    both = merge(a, b)
    both.update(rows(seed=3))
    for part, (count, mean, scatter) in zip((a, b), before, strict=True):
        assert part.count == count
        np.testing.assert_array_equal(part.mean, mean)
        np.testing.assert_array_equal(part.scatter, scatter)
    assert merge(Moments(4), a).count == 50
    close(merge(Moments(4), a).covariance(), a.covariance())


def test_float32_features_are_summed_in_float64():
    x = rows(offset=1e4).astype(np.float32)
    close(moments_of(x).covariance(), np.cov(x.astype(np.float64), rowvar=False))


def test_memory_does_not_grow_with_the_number_of_rows(monkeypatch):
    monkeypatch.setattr(S, "_ROWS", 64)
    found, batch = Moments(32), np.random.default_rng(0).normal(size=(64, 32))
    found.update(batch)
    tracemalloc.start()
    try:
        for _ in range(300):
            found.update(batch)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.count == 301 * 64
    assert peak < 20 * batch.nbytes


def test_bad_features_are_named():
    found = moments_of(rows())
    for bad, message in [
        (np.zeros((3, 5)), r"features \[N, 4\]"),
        (np.zeros(4), r"features \[N, 4\]"),
        (np.array([[1, 2, np.nan, 3]]), "NaN"),
        (np.array([[1, 2, np.inf, 3]]), "infinity"),
    ]:
        with pytest.raises(StatisticsError, match=message):
            found.update(bad)
    assert found.count == 50
    with pytest.raises(StatisticsError, match="at least 2"):
        moments_of(rows(1)).covariance()
    with pytest.raises(StatisticsError, match="cannot be merged"):
        merge(Moments(2), Moments(3))
    with pytest.raises(StatisticsError, match="0 values"):
        Moments(0)


def test_a_file_brings_everything_back(tmp_path):
    pool, spatial = moments_of(rows()).gaussian(), moments_of(rows(dim=3)).gaussian()
    vectors = rows(7).astype(np.float32)
    facts = {"features": "toy", "größe": [1, 2]}
    save_statistics(tmp_path / "s.npz", Statistics(pool, spatial, vectors, facts))
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]
    back = load_statistics(tmp_path / "s.npz")
    for one, other in ((back.pool, pool), (back.spatial, spatial)):
        np.testing.assert_array_equal(one.mean, other.mean)
        np.testing.assert_array_equal(one.covariance, other.covariance)
    np.testing.assert_array_equal(back.features, vectors)
    assert back.facts == facts
    with np.load(tmp_path / "s.npz", allow_pickle=False) as file:  # others read it as they do
        np.testing.assert_array_equal(file["mu"], pool.mean)
        np.testing.assert_array_equal(file["sigma_s"], spatial.covariance)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_files_of_pytorch_fid_and_of_the_adm_evaluator_are_read(tmp_path, save):
    pool, spatial = moments_of(rows()).gaussian(), moments_of(rows(dim=3)).gaussian()
    save(tmp_path / "fid.npz", mu=pool.mean, sigma=pool.covariance)
    found = load_statistics(tmp_path / "fid.npz")
    assert found.spatial is found.features is found.facts is None
    np.testing.assert_array_equal(found.pool.covariance, pool.covariance)
    save(
        tmp_path / "adm.npz",
        mu=pool.mean.astype(np.float32),
        sigma=np.asfortranarray(pool.covariance).T.copy(),
        mu_s=spatial.mean,
        sigma_s=spatial.covariance,
        arr_0=np.zeros((2, 4, 4, 3), np.uint8),
        features=np.array(["somebody else's"]),
    )
    found = load_statistics(tmp_path / "adm.npz")
    assert found.pool.mean.dtype == np.float64 and found.features is None
    np.testing.assert_array_equal(found.spatial.mean, spatial.mean)


def broken(**changes):
    good = {"mu": np.zeros(2), "sigma": np.eye(2)}
    return {name: value for name, value in {**good, **changes}.items() if value is not None}


FACTS = np.frombuffer(b"{}", np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (broken(sigma=None), "no array 'sigma'"),
        (broken(mu=np.zeros((2, 2))), "'mu' is float64 (2, 2)"),
        (broken(mu=np.zeros(2, int)), "'mu' is int64"),
        (broken(sigma=np.eye(3)[:2]), "at most 32 are read"),
        (broken(sigma=np.ones(4)), "'sigma' is float64 (4,)"),
        (broken(sigma=np.array([[1.0, 0.5], [0.0, 1.0]])), "not symmetric"),
        (broken(sigma=-np.eye(2)), "negative"),
        (broken(sigma=np.full((2, 2), np.nan)), "NaN"),
        (broken(mu=np.array([np.inf, 0])), "infinity"),
        (broken(mu=np.array([object(), 1])), "Python objects"),
        (broken(facts=np.frombuffer(b"{", np.uint8)), "no JSON text"),
        (broken(facts=np.frombuffer(b"[1]", np.uint8)), "no JSON object"),
        (broken(facts=np.array(["{}"])), "no JSON object"),
        (broken(facts=FACTS, features=np.zeros((3, 2))), "'features' is float64"),
        (broken(facts=FACTS, features=np.zeros((3, 4), np.float32)), "needed is finite"),
        (broken(facts=FACTS, features=np.full((3, 2), np.nan, np.float32)), "needed is finite"),
    ],
)
def test_files_that_hold_something_else_are_refused(tmp_path, arrays, message):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises((NpzError, StatisticsError)) as caught:
        load_statistics(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "s.npz"
    gaussian = Gaussian(np.zeros(2), np.eye(2))
    save_statistics(path, Statistics(gaussian, facts={"version": 1}))

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", stop)
    with pytest.raises(KeyboardInterrupt):
        save_statistics(path, Statistics(gaussian, facts={"version": 2}))
    assert load_statistics(path).facts == json.loads('{"version": 1}')
