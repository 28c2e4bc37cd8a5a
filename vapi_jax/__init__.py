"""VA-π in JAX: post-train an autoregressive generator so that its tokens decode into the right pixels."""

__version__ = "0.1.0"
