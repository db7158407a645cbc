"""InternLM2's tokenizer, from the files of a checkpoint and without the code beside it.

That code (InternLM2Tokenizer) encodes with sentencepiece, part by part between added tokens, and decodes with it, and
then takes the blanks in front of punctuation away. Here tokenizer.model becomes a tokenizer of the library `tokenizers`
which does the same, as transformers has it for Llama's; sentencepiece itself is not needed, protobuf is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf

from vte_compile.errors import InputError

MODEL = "tokenizer.model"
_CLASS = "InternLM2Tokenizer"
_NORMAL, _USER_DEFINED = 1, 4
"""Kinds of pieces, in sentencepiece's format."""
_BPE = 2
"""A kind of model there."""
_BLANK = "▁"
_DEFAULTS = {"unk_token": "<unk>", "pad_token": "</s>"}
_CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
"""What loses its blanks in texts: transformers' clean_up_tokenization(), which that code calls whatever is set."""


def is_internlm2(folder: Path) -> bool:
    """Whether a folder has InternLM2's tokenizer, and none that transformers could load."""
    if (folder / "tokenizer.json").is_file() or not (folder / MODEL).is_file():
        return False
    return str(_fields(folder / "tokenizer_config.json").get("tokenizer_class", "")).startswith(_CLASS)


def load_internlm2_tokenizer(folder: Path, **options: Any) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder with tokenizer.model, tokenizer_config.json, and what there is of added_tokens.json and
    special_tokens_map.json.

    Ids, and texts without special tokens, are those of the authors' class. Texts with special tokens are not: it puts
    blanks around them.

    Args:
        folder: It.
        options: Of transformers' PreTrainedTokenizerFast (``extra_special_tokens`` ...).

    Raises:
        InputError: A file cannot be read or makes no sense, or protobuf is missing.
    """
    said = {name: value for name, value in _fields(folder / "tokenizer_config.json").items() if value is not None}
    config = _fields(folder / "special_tokens_map.json") | said
    proto = _read_model(folder / MODEL)
    added = _added_tokens(folder, config)
    names = [piece.piece for piece in proto.pieces]
    for token, known in added.items():
        if token < len(names):
            names[token] = known.content  # a piece that was kept for it
    bos, eos = (names[token] for token in (proto.trainer_spec.bos_id, proto.trainer_spec.eos_id))
    special = {"bos_token": bos, "eos_token": eos}
    special |= {kind: _text(config.get(kind) or token) for kind, token in _DEFAULTS.items()}
    made = _tokenizer(proto, names)
    made.add_special_tokens([AddedToken(name, normalized=False) for name in special.values() if name in names])
    for token, known in sorted(added.items()):
        (made.add_special_tokens if known.special else made.add_tokens)([known])
        if (here := made.token_to_id(known.content)) != token:
            raise InputError(f"{folder}: {known.content} has id {token} in its files, but {here} follows from {MODEL}.")
    ends = [f"{bos} " if config.get("add_bos_token", True) else "", f" {eos}" if config.get("add_eos_token") else ""]
    ids = [(name, names.index(name)) for name in (bos, eos)]
    made.post_processor = TemplateProcessing(single=f"{ends[0]}$A{ends[1]}", special_tokens=ids)
    known_length = {"model_max_length": config["model_max_length"]} if "model_max_length" in config else {}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special, **known_length, **options)


def _fields(file: Path) -> dict[str, Any]:
    """Of a JSON file; none if it is not there."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot read it: {error}: copy it again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected an object.")
    return content


def _read_model(file: Path) -> Any:
    """sentencepiece's ModelProto."""
    try:
        proto = import_protobuf().ModelProto()
    except ImportError as error:
        raise InputError(f"{file}: reading it needs protobuf: pip install protobuf.") from error
    from google.protobuf.message import DecodeError

    try:
        proto.ParseFromString(file.read_bytes())
    except (OSError, DecodeError) as error:
        raise InputError(f"{file}: cannot read it: {error}: copy it again.") from error
    if proto.trainer_spec.model_type != _BPE or len({piece.piece for piece in proto.pieces}) != len(proto.pieces):
        raise InputError(f"{file}: expected sentencepiece's model of byte pairs, as InternLM2 has it.")
    return proto


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """By id, what the folder's files say of tokens beside the model's pieces, and of those that replace some."""
    named = [config.get(f"{kind}_token") for kind in ("bos", "eos", "unk", "pad")]
    special = {_text(token) for token in (*named, *(config.get("additional_special_tokens") or ())) if token}
    decoder = config.get("added_tokens_decoder")
    if decoder is None:  # as former transformers wrote it
        found = _fields(folder / "added_tokens.json")
        return {token: AddedToken(text, normalized=False, special=text in special) for text, token in found.items()}
    known = {}
    for token, fields in decoder.items():
        text, flags = fields["content"], {name: fields.get(name, False) for name in ("lstrip", "rstrip", "single_word")}
        is_special = fields.get("special", False) or text in special
        known[int(token)] = AddedToken(text, normalized=False, special=is_special, **flags)
    return known


def _text(token: Any) -> str:
    """Of a token's name, or of its fields."""
    return str(token["content"] if isinstance(token, dict) else token)


def _tokenizer(proto: Any, names: list[str]) -> Tokenizer:
    """What encodes and decodes as sentencepiece does with a model, whose pieces have these names."""
    kinds, spec = [piece.type for piece in proto.pieces], proto.normalizer_spec
    whole = [name for name, kind in zip(names, kinds, strict=True) if kind == _USER_DEFINED]
    ids = {name: token for token, name in enumerate(names)}
    # Pieces that are always whole are taken out before the model comes, which then takes them as they are.
    taking = {"ignore_merges": True} if whole else {}
    fallback = bool(proto.trainer_spec.byte_fallback)
    unknown = names[proto.trainer_spec.unk_id]
    merges = list(_merges(proto))
    made = Tokenizer(BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=fallback, **taking))
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:  # blanks only
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_BLANK))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _BLANK))
    made.normalizer = normalizers.Sequence(steps)
    if whole:
        longest_first = sorted(map(re.escape, whole), key=len, reverse=True)
        made.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(longest_first)), "isolated")
    said: list[Any] = [decoders.Replace(_BLANK, " "), *([decoders.ByteFallback()] if fallback else []), decoders.Fuse()]
    if spec.add_dummy_prefix:
        said.append(decoders.Strip(" ", 1, 0))
    said += [decoders.Replace(text, text.strip()) for text in _CLEANED]
    made.decoder = decoders.Sequence(said)
    return made


def _merges(proto: Any) -> Iterator[tuple[str, str]]:
    """Pairs of pieces that make a third, in the order in which sentencepiece joins them: by that one's score."""
    scores = {p.piece: (-p.score, rank) for rank, p in enumerate(proto.pieces) if p.type == _NORMAL}
    ranked = []
    for piece, rank in scores.items():
        for at in range(1, len(piece)):
            if piece[:at] in scores and piece[at:] in scores:
                ranked.append((rank, piece[:at], piece[at:]))
    return ((left, right) for _, left, right in sorted(ranked))
