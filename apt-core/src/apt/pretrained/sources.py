"""Where pretrained weights come from: one description of a safetensors folder and of a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from apt.builtin.pretrained import FILE, PretrainedTokenizer, read_settings
from apt.errors import UserError
from apt.pretrained.llama import LlamaShape, read_ids

if TYPE_CHECKING:
    from torch import Tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Source:
    """A pretrained model: its shape, its tokenizer, and its tensors under transformers' names."""

    name: str
    shape: LlamaShape
    tokenizer: PretrainedTokenizer
    add_bos: bool
    names: frozenset[str]
    get: Callable[[str], Tensor]


def open_folder(path: Path, stack: ExitStack) -> Source:
    """A folder as transformers writes it. The files stay open, and are mapped, until the stack ends.

    Raises `UserError` where a file is missing or the model is not of the Llama family.
    """
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: holds no config.json; give the folder that transformers' save_pretrained wrote")
    if not (path / FILE).is_file():
        raise UserError(
            f"{path}: holds no {FILE}; write one with transformers: "
            f"AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})"
        )
    shape = LlamaShape.from_hf(_read(path / "config.json"), str(path / "config.json"))
    if (path / "generation_config.json").is_file():
        try:
            more = read_ids(_read(path / "generation_config.json").get("eos_token_id"))
        except ValueError as error:
            raise UserError(f"{path / 'generation_config.json'}: eos_token_id: {error}") from error
        shape = replace(shape, eos=tuple(dict.fromkeys((*shape.eos, *more))))
    where = _shards(path)
    files: dict[str, Any] = {}

    def get(name: str) -> Tensor:
        if name not in where:
            raise UserError(f"{path}: has no tensor {name}, which a Llama has")
        file = where[name]
        if file not in files:
            files[file] = stack.enter_context(_open(path / file))
        try:
            tensor: Tensor = files[file].get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{path / file}: {name} cannot be read, which {INDEX} says is there: {error}") from error
        return tensor

    tokenizer = _tokenizer(path)
    return Source(path.resolve().name, shape, tokenizer, tokenizer.starts_with(shape.bos), frozenset(where), get)


def _shards(path: Path) -> dict[str, str]:
    """Tensor -> the file that holds it."""
    if (path / INDEX).is_file():
        shards = _read(path / INDEX).get("weight_map")
        if not isinstance(shards, dict):
            raise UserError(f"{path / INDEX}: has no weight_map, which says what file holds a tensor")
        return {str(name): str(file) for name, file in shards.items()}
    if not (path / SINGLE).is_file():
        raise UserError(
            f"{path}: holds neither {SINGLE} nor {INDEX}; weights in pickles (.bin) are not read: convert them with "
            "transformers' save_pretrained"
        )
    with _open(path / SINGLE) as file:
        return dict.fromkeys(file.keys(), SINGLE)


def _open(path: Path) -> Any:
    """The tensors of a file, as a context. Raises `UserError` where it is missing, or holds something else."""
    if not path.is_file():
        raise UserError(f"{path}: is not there, and {INDEX} says that it holds tensors")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{path}: is not a safetensors file: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _tokenizer(path: Path) -> PretrainedTokenizer:
    from tokenizers import Tokenizer

    try:
        trained = Tokenizer.from_file(str(path / FILE))
    except Exception as error:  # the library has no kind for it
        raise UserError(f"{path / FILE}: is no file of the tokenizers library: {error}") from error
    return PretrainedTokenizer(trained, read_settings(path))


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not an object")
    return content
