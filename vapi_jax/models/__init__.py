"""Flax linen models. Every module is applied to parameters that the caller passes in."""
