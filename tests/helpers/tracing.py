"""How little is traced for what tests ask of a model."""

import functools

import numpy as np
from flax.core import meta
from flax.core.scope import Scope


def trace_quickly():
    """In this process, the shape of a parameter is compared with the one that its use asks for.

    Flax traces the initializer to know that shape, at every use of every parameter, which takes an eighth
    of the time in which programs are traced. Where the shapes differ it still does, and complains.
    """
    plain = Scope.param

    @functools.wraps(plain)
    def param(self, name, init_fn, *asked, unbox=True, **more):
        if self.has_variable("params", name):
            value = self.get_variable("params", name)
            if asked and np.shape(meta.unbox(value)) == asked[0]:
                self.reserve(name, "params")
                return meta.unbox(value) if unbox else value
        return plain(self, name, init_fn, *asked, unbox=unbox, **more)

    Scope.param = param
