"""What can be trained: a file a method, on the one trainer.

`vapi_jax.methods.vapi` is VA-π on one page; start there. `vapi_jax.methods.method` is the contract.
"""

from __future__ import annotations

from jax.sharding import Mesh

from vapi_jax.common.plugins import find
from vapi_jax.methods.ar_grpo import ARGRPO
from vapi_jax.methods.cca import CCA
from vapi_jax.methods.config import TrainConfig
from vapi_jax.methods.method import HealthError, Method
from vapi_jax.methods.next_token import NextToken
from vapi_jax.methods.sft import SFT
from vapi_jax.methods.ste import STE
from vapi_jax.methods.text_base import TextBase
from vapi_jax.methods.tokenizer import TokenizerTraining
from vapi_jax.methods.tokenizer_post import TokenizerPost
from vapi_jax.methods.vapi_method import VAPi

__all__ = ["METHODS", "HealthError", "Method", "find_method", "make_method"]

METHODS: dict[str, type[Method]] = {
    "vapi": VAPi,
    "tokenizer": TokenizerTraining,
    "tokenizer_post": TokenizerPost,
    "base": NextToken,
    "ar_grpo": ARGRPO,
    "sft": SFT,
    "ste": STE,
    "cca": CCA,
    "text_base": TextBase,
}


def find_method(name: str) -> type[Method]:
    """The class of a method: of `METHODS`, or a user's own as "module:Class".

    Raises:
      UnknownNameError: there is none of that name.
    """
    return find(name, METHODS, "method")


def make_method(config: TrainConfig, mesh: Mesh) -> Method:
    """The method that `config.method` names, on these devices."""
    return find_method(config.method)(config, mesh)
