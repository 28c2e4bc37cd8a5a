"""Comparisons of floats whose tolerances hold on every processor.

One rounding moves a float32 by up to 2^-24 = 6e-8 of itself. What a sum loses depends on the order in
which a processor's instructions add, and is a share of its largest terms, not of its result. So errors
are measured here in units of an array's magnitude, which is its largest absolute value, and a
tolerance is a few times what was seen to be lost with SSE 4.2, AVX2 and AVX-512.
"""

import ast
import functools

import jax
import numpy as np

COMPARISONS = frozenset({
    "assert_close", "assert_close_in_norm", "assert_trees_all_close", "assert_allclose", "approx",
})  # fmt: skip


@functools.cache
def comparing(path):
    """Names of the functions of a Python file that compare floats, or call one that does."""
    functions = [
        node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)
    ]
    calls = {
        function.name: {getattr(n, "attr", getattr(n, "id", None)) for n in ast.walk(function)}
        for function in functions
    }
    found = COMPARISONS
    while more := {name for name, names in calls.items() if names & found} - found:
        found |= more
    return found


def assert_close(got, want, within, *, scale=None):
    """No number in `got` is further from its fellow in `want` than `within` times the magnitude.

    Args:
      got: a number, an array, a list of numbers, or a tree of these.
      want: the same structure and shapes; a number may stand for an array of it. Where it is not
        finite, `got` must be the same.
      within: the largest error, as a share of the magnitude of each array in `want`.
      scale: the magnitude instead, where larger numbers than the result were rounded: the terms of
        a sum that is near zero, or the logits of which a probability is made.
    """
    for name, a, b in _pairs(got, want):
        finite = np.isfinite(b)
        np.testing.assert_array_equal(a[~finite], b[~finite], err_msg=name)
        magnitude = np.abs(b[finite]).max(initial=0.0) if scale is None else scale
        _judge(name, np.abs(a[finite] - b[finite]).max(initial=0.0), magnitude, within)


def assert_close_in_norm(got, want, within):
    """The Euclidean norm of each array's error is at most `within` times the norm of the array.

    For gradients, most of whose numbers are far smaller than the largest. An array of zeros in `want`
    fails: comparing it says nothing.
    """
    for name, a, b in _pairs(got, want):
        assert np.any(b), f"{name or 'it'} is zero everywhere, so the comparison says nothing"
        _judge(name, np.linalg.norm(a - b), np.linalg.norm(b), within)


def _pairs(got, want):
    """(name, array, array) of two trees, in float64. A list is an array, and no tree."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(want, is_leaf=_is_list)
    for (path, b), a in zip(leaves, structure.flatten_up_to(got), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        b = np.broadcast_to(b, a.shape) if b.ndim == 0 else b
        assert a.shape == b.shape, f"{name or 'it'} has shape {a.shape}, {b.shape} is wanted"
        yield name, a, b


def _is_list(node):
    return isinstance(node, list)


def _judge(name, error, magnitude, within):
    share = error / magnitude if magnitude else np.inf
    assert error <= within * magnitude, (
        f"{name or 'it'} is off by {error:.3g}, which is {share:.2g} of its magnitude "
        f"{magnitude:.3g}; {within:.2g} is allowed"
    )
