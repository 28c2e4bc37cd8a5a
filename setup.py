"""Puts configs/ with its studies into the wheel, as vapi_jax/configs; all else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["vapi_jax", "vapi_jax.*"]),
        "vapi_jax.configs",
        "vapi_jax.configs.studies",
    ],
    package_dir={"vapi_jax.configs": "configs", "vapi_jax.configs.studies": "configs/studies"},
)
