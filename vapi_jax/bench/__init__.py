"""How fast a recipe's training step is, where its time goes and what it communicates.

`python -m vapi_jax.bench --config=...` runs it; see `__main__` for the options.
"""
