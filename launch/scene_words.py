"""Writes the sizes and the tokenizer of the text encoder that configs/scenes_base.py trains.

    python launch/scene_words.py

The tokenizer knows the words of the captions of drawn scenes and no others. Both go to
vapi_jax/assets/scenes_encoder, in Hugging Face's layout.
"""

from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers

import vapi_jax
from vapi_jax.data.scenes.grammar import words
from vapi_jax.models.t5 import T5Config
from vapi_jax.models.text_encoder import write_config
from vapi_jax.models.text_tokens import FAST

SIZES = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}


def main() -> None:
    folder = Path(vapi_jax.__file__).parent / "assets" / "scenes_encoder"
    pieces = ["<pad>", "</s>", "<unk>", *words()]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    write_config(folder, T5Config(**SIZES, vocab_size=len(pieces)))
    tokenizer.save(str(folder / FAST))


if __name__ == "__main__":
    main()
