"""What a traced function computes."""

import jax


def every_equation(jaxpr):
    """All equations of a jaxpr and of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from every_equation(inner)


def largest_intermediate(jaxpr):
    """Elements of the largest array of a jaxpr, those inside loops included."""
    outputs = [variable for equation in every_equation(jaxpr) for variable in equation.outvars]
    return max(v.aval.size for v in outputs if hasattr(v.aval, "size"))
