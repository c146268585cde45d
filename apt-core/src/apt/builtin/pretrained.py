"""The tokenizer of a pretrained model: a file of the `tokenizers` library, with the chat template that came with it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from apt.core.providers import Tokenizer, TokenizerProvider
from apt.data.files import expanded
from apt.errors import DataError, UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Trained

FILE, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"


class Pretrained(TokenizerProvider):
    """A tokenizer that exists already: a `tokenizer.json`, alone or in a folder with `tokenizer_config.json`.

    Its special ids are the model's: pad_token_id, bos_token_id and eos_token_id of the profile must be set to them.
    """

    api_level: ClassVar[int] = 1

    path: str | None = Field(
        default=None,
        description="a tokenizer.json or its folder; none: the one that the run holds, as imported models do",
    )
    vocab_size: int | None = Field(default=None, ge=1, description="the number of its ids; none: counted in the file")
    add_bos: bool = Field(default=True, description="whether a prompt starts with bos_token_id")
    stop_ids: list[int] = Field(default=[], description="ids that end a text, beside eos_token_id")

    @classmethod
    def get_dependencies(cls) -> list[str]:
        """The extra `bpe` brings it."""
        return ["tokenizers>=0.20"]

    def train(self, texts: Iterable[str]) -> Tokenizer:
        """Nothing is learnt: the file is read. Raises `DataError` where it is missing."""
        return self._read(self._path())

    def load(self, folder: Path) -> Tokenizer:
        """The copy that the run holds. Raises `DataError` where it is missing."""
        return self._read(folder / FILE)

    def get_vocab_size(self) -> int:
        """What was stated, or the highest id of the file and one."""
        if self.vocab_size is not None:
            return self.vocab_size
        return self._read(self._path()).vocab_size

    def starts_with_bos(self) -> bool:
        """As the model was trained."""
        return self.add_bos

    def get_stop_ids(self) -> tuple[int, ...]:
        """Such as a chat model's end of a turn."""
        return tuple(self.stop_ids)

    def _path(self) -> Path:
        if self.path is None:
            raise DataError("data.tokenizer.path: is not given; name a tokenizer.json, or the folder that holds one")
        path = expanded(self.path, "data.tokenizer.path")
        return path / FILE if path.is_dir() else path

    def _read(self, path: Path) -> PretrainedTokenizer:
        from tokenizers import Tokenizer as Trained

        content = read_text(path)
        try:
            trained = Trained.from_str(content)
        except Exception as error:
            raise DataError(f"{path}: is no file of the tokenizers library: {error}") from error
        return PretrainedTokenizer(trained, read_settings(path.parent))


class PretrainedTokenizer:
    """`settings` is tokenizer_config.json's content: special tokens by their role, and the chat template."""

    def __init__(self, trained: Trained, settings: Mapping[str, object]) -> None:
        self._trained, self.settings = trained, dict(settings)
        self.vocab_size = max(trained.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def chat_template(self) -> str | None:
        """The Jinja text that turns a conversation into a prompt; of several, which have names, the default."""
        template = self.settings.get("chat_template")
        if isinstance(template, list):
            named = {each.get("name"): each.get("template") for each in template if isinstance(each, Mapping)}
            template = named.get("default")
        return template if isinstance(template, str) else None

    def encode(self, text: str) -> Sequence[int]:
        """Ids of the text; words that look like special ids stay text."""
        return self._encode(text, as_text=True)

    def encode_marked(self, text: str) -> Sequence[int]:
        """Ids of a text in which special tokens stand as such: what a chat template made."""
        return self._encode(text, as_text=False)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ones vanish."""
        return str(self._trained.decode(list(ids), skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json."""
        (folder / FILE).write_text(self._trained.to_str(), encoding="utf-8")
        (folder / SETTINGS).write_text(json.dumps(self.settings, indent=1, ensure_ascii=False), encoding="utf-8")

    def starts_with(self, bos: int | None) -> bool:
        """Whether the tokenizer itself puts `bos` before a text."""
        ids: list[int] = self._trained.encode("", add_special_tokens=True).ids
        return bos is not None and ids[:1] == [bos]

    def id_of(self, token: str) -> int | None:
        """The id of a token, if it has one."""
        found: int | None = self._trained.token_to_id(token)
        return found

    def _encode(self, text: str, *, as_text: bool) -> list[int]:
        self._trained.encode_special_tokens = as_text
        ids: list[int] = self._trained.encode(text, add_special_tokens=False).ids
        return ids


def read_settings(folder: Path) -> dict[str, object]:
    """tokenizer_config.json of a folder, with the chat template where it lies in a file of its own; {} where neither is."""
    settings: dict[str, object] = {}
    if (folder / SETTINGS).is_file():
        try:
            settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{folder / SETTINGS}: is not JSON: {error}") from error
        if not isinstance(settings, dict):
            raise UserError(f"{folder / SETTINGS}: holds a {type(settings).__name__}, not an object")
    if (folder / TEMPLATE).is_file():
        settings["chat_template"] = read_text(folder / TEMPLATE)
    return settings


def read_text(path: Path) -> str:
    """What a file says. Raises `DataError` where it cannot be read, or is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8: {error}") from error
