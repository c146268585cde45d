"""The tokenizer of a GGUF file, as one of the `tokenizers` library.

GGUF keeps tokens, merges or scores, and the *name* of the rule that cuts a text into words; the rules themselves are code in
llama.cpp. Those that are known here are listed; another one is refused, since wrong words would make wrong ids in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from apt.errors import UserError, nearest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Words of Llama 3 (Grattafiori et al. 2024, arXiv:2407.21783); Qwen 2 cuts numbers into single digits."""
WORDS = {
    "gpt-2": "",
    "default": "",
    "smollm": "digits",
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "qwen2": LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
}
"""`tokenizer.ggml.pre` -> an expression; "" is GPT-2's own, "digits" is GPT-2's after single digits are cut off."""
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
"""Types of tokens in GGUF."""


def build_tokenizer(fields: Mapping[str, Any], where: str) -> Tokenizer:
    """Raises `UserError` where the file has no tokenizer of a kind that is known here."""
    model = fields.get("tokenizer.ggml.model")
    tokens: Sequence[str] = fields.get("tokenizer.ggml.tokens", ())
    types: Sequence[int] = fields.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if model == "gpt2":
        built = _byte_level(tokens, fields.get("tokenizer.ggml.merges", ()), fields.get("tokenizer.ggml.pre"), where)
    elif model == "llama":
        built = _sentencepiece(
            tokens,
            fields.get("tokenizer.ggml.scores", ()),
            fields.get("tokenizer.ggml.add_space_prefix", True),
            fields.get("tokenizer.ggml.unknown_token_id"),
        )
    else:
        raise UserError(f"{where}: tokenizer.ggml.model: {model!r} is not known here; gpt2 and llama are")
    from tokenizers import AddedToken

    added = [
        AddedToken(token, special=kind != USER, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, USER, UNKNOWN)
    ]
    built.add_tokens(added)
    built.add_special_tokens([token for token in added if token.special])
    return built


def _byte_level(tokens: Sequence[str], merges: Sequence[str], words: str | None, where: str) -> Tokenizer:
    """GPT-2's kind (Radford et al. 2019): bytes as letters, merged in pairs within words."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if words not in WORDS:
        raise UserError(
            f"{where}: tokenizer.ggml.pre: the rule {words!r} for words is not known here; "
            f"{nearest(str(words), WORDS)} known are: {', '.join(WORDS)}; import the safetensors folder instead"
        )
    built = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[(left, right) for left, _, right in (merge.partition(" ") for merge in merges)],
            ignore_merges=WORDS[words] == LLAMA3,
        )
    )
    rule = WORDS[words]
    if rule == "":
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif rule == "digits":
        built.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        built.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(rule), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    built.decoder = decoders.ByteLevel()
    return built


def _sentencepiece(tokens: Sequence[str], scores: Sequence[float], prefix: bool, unknown: int | None) -> Tokenizer:
    """SentencePiece's BPE (Kudo and Richardson 2018, arXiv:1808.06226): of all neighbours the best-scored piece is joined.

    The `tokenizers` library wants ranked pairs: every way to cut a piece in two pieces, best piece first.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs: list[tuple[float, int, int, str, str]] = []
    for piece, score in zip(tokens, scores, strict=True):
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in vocabulary and right in vocabulary:
                pairs.append((-score, vocabulary[left], vocabulary[right], left, right))
    built = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(left, right) for *_, left, right in sorted(pairs)],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps = [normalizers.Prepend("▁")] if prefix else []
    built.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return built
