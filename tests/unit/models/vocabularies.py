"""Small tokenizers of the two kinds in use, trained on the spot."""

import json
from collections.abc import Mapping, Sequence
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from node.models import tokenizer_worker

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Don't stop now!",
    "def add(a, b):\n    return a + b\n",
    "Grüße aus München, señor; déjà vu — “quoted”.",
    "日本語のテキスト と 中文 🎉🎉 👩‍👩‍👧",
] * 4


@cache
def byte_level() -> str:
    """As in GPT-2, Llama 3, Qwen, Falcon, GPT-NeoX: every token is some bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=["<|end|>", "<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<tool>", "        ", "é̂ß"])  # added tokens stand for themselves, not for bytes
    return tokenizer.to_str()


@cache
def byte_fallback() -> str:
    """As in Llama 2, Mistral and Gemma: pieces with ▁ for the space, and <0xNN> for what the vocabulary lacks."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # Named in full: a bare limit leaves it to chance which of equally frequent characters become bytes.
    alphabet = sorted({character for text in CORPUS for character in text if character < "\u0100"} | {"▁"})
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    definition = json.loads(tokenizer.to_str())
    # Training made the bytes special tokens, which they are not.
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["id"] < 3]
    return json.dumps(definition)


@cache
def metaspace() -> str:
    """As byte_fallback, with the decoder that strips the first space by itself."""
    tokenizer = Tokenizer.from_str(byte_fallback())
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    return tokenizer.to_str()


class InThisProcess:
    """A tokenizer that answers at once."""

    is_absent = False
    marks: Mapping[int, str] = {}

    def __init__(self, tokenizer: tokenizer_worker.Tokenizer) -> None:
        self.vocabulary = tokenizer.vocabulary()
        self._tokenizer = tokenizer
        self.decoded: list[int] = []
        """Tokens of each call."""

    async def decode(self, *sequences: Sequence[int]) -> list[str]:
        self.decoded.append(sum(map(len, sequences)))
        return [self._tokenizer.decode(tokens) for tokens in sequences]

    async def token_bytes(self, tokens: Sequence[int]) -> list[bytes]:
        return [self._tokenizer.token_bytes(token) for token in tokens]
