"""Tokenizers as files: by name, GPT-2's own, and Hugging Face's tokenizer.json in and out."""

import re
from dataclasses import replace
from itertools import pairwise, zip_longest
from pathlib import Path

import files
from config import Failure
from tokenizer import BYTES, END_OF_TEXT, PATTERNS, Tokenizer, pattern_of

GPT2_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
GPT2_BYTES = 835_554
CL100K_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
KNOWN_FILES = {  # OpenAI's, by their SHA-256: what they do not say
    GPT2_SHA256: {"pattern": "gpt2"},
    CL100K_SHA256: {"pattern": "gpt4", "end_of_text": 100257},
}
HF_FILES = ["tokenizer.json", "tokenizer_config.json"]
NORMALIZERS = {"qwen": {"type": "NFC"}}  # of a tokenizer.json with this pattern
# the patterns of transformers' classes, and of the models that have these where no class is named
CLASSES = {"GPT2Tokenizer": "gpt2", "gpt2": "gpt2", "Qwen2Tokenizer": "qwen", "qwen3": "qwen"}
# what its "model" must not have, as it would give other ids
OFF = ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")


def bpe_size(name: str) -> int:
    """N of bpe:N, 0 for another tokenizer. Raises ValueError for a name without meaning."""
    if re.fullmatch(r"bpe:[0-9]+", name) and 257 <= int(name[4:]) <= 1_000_000:
        return int(name[4:])
    is_model = files.hub_repo(name) or (name and Path(name).is_dir())
    if name != "bytes" and not name.endswith(".tiktoken") and not is_model:
        kinds = "gpt2, bytes, bpe:N (257 to 1000000), a .tiktoken file, a folder or OWNER/NAME"
        raise ValueError(f"tokenizer {name!r} is none of {kinds}")
    return 0


def load_tokenizer(name: str, pattern: str, downloads: Path) -> Tokenizer:
    """The tokenizer gpt2, bytes, a .tiktoken file, a Hugging Face folder or OWNER/NAME.

    pattern: how a .tiktoken file splits text, where nothing else says it; "" = it is known.
    downloads: the folder that keeps GPT-2's file. Raises Failure.
    """
    if name == "bytes":
        return Tokenizer.from_tokens(BYTES, name, choose_pattern(name, "gpt2", pattern))
    path = Path(name)
    if name == "gpt2":
        path = files.fetch(GPT2_URL, downloads / "gpt2.tiktoken", GPT2_SHA256, GPT2_BYTES)
    elif path.suffix != ".tiktoken":
        tokenizer = load_hf_tokenizer(files.model_folder(name, HF_FILES, has_hf_tokenizer), name)
        choose_pattern(name, tokenizer.pattern, pattern)
        return tokenizer
    if not path.is_file():
        raise Failure(f"tokenizer {name}: there is no file {path}")
    text = path.read_text(encoding="ascii", errors="replace")
    known = known_fields(path)
    pattern = choose_pattern(name, known.get("pattern", ""), pattern)
    return replace(Tokenizer.from_text(text, name, pattern), **known)


def choose_pattern(name: str, known: str, given: str) -> str:
    """The known pattern, else the given one. Raises Failure if they differ or none is."""
    if known and given not in ("", known):
        raise Failure(f"tokenizer {name} splits text as {known}, not as --split_pattern={given}")
    if not known and not given:
        raise Failure(f"tokenizer {name}: choose --split_pattern ({', '.join(PATTERNS)})")
    return known or given


def known_fields(path: Path) -> dict:
    """The fields of a Tokenizer that its .tiktoken file lacks, from a manifest or by its hash."""
    sha256 = files.sha256_of(path)
    record = read_optional(path.with_name("manifest.json")).get("tokenizer")
    if isinstance(record, dict) and record.get("sha256") == sha256:
        return {"pattern": pattern_of(record), "added_tokens": record.get("added_tokens", {})}
    return KNOWN_FILES.get(sha256, {})


def has_hf_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file()


def load_hf_tokenizer(folder: Path, name: str) -> Tokenizer:
    """The byte-level BPE tokenizer in a Hugging Face folder, with the same ids.

    Its end-of-sequence token is our end-of-text. Raises Failure if ids could differ: another
    algorithm, pattern or normalizer, merges out of order, tokens in only one of its files.
    """
    if not has_hf_tokenizer(folder):
        raise Failure(f"{folder} has no tokenizer.json; transformers' save_pretrained writes it")
    try:
        vocab, merges, added, pattern = read_hf(folder)
        numbers, config = vocab | added, read_optional(folder / "config.json")
        eos, named = read_settings(folder, pattern, config.get("model_type"))
        if missing := named - numbers.keys():
            raise Failure(f"{folder}: tokenizer.json lacks {min(missing)!r:.99} of another file")
        end_of_text = numbers.get(eos, numbers.get(END_OF_TEXT, config.get("eos_token_id")))
        if type(end_of_text) is not int:
            raise Failure(f"{folder}: neither an eos_token nor {END_OF_TEXT} has an id")
        added |= {eos: end_of_text} if eos else {}
        if added.get(END_OF_TEXT) == end_of_text:
            del added[END_OF_TEXT]
        ids = merged_ids(vocab, merges, {END_OF_TEXT, *added}, folder)
        return Tokenizer(name, pattern, ids, end_of_text, added)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"its tokenizer is damaged or of another kind: {error!r:.200}"
        raise Failure(f"{folder}: {problem}") from None


def read_settings(folder: Path, pattern: str, model_type) -> tuple[str | None, set[str]]:
    """The eos_token in a folder's tokenizer_config.json, and all the tokens that it names."""
    settings = read_optional(folder / "tokenizer_config.json")
    if settings.get("add_prefix_space"):
        raise Failure(f"{folder}: add_prefix_space, a space before each text, is not supported")
    kind = str(settings.get("tokenizer_class") or model_type)  # transformers 5 splits text by it
    if CLASSES.get(kind.removesuffix("Fast"), pattern) != pattern:
        raise Failure(f"{folder}: tokenizer.json splits text as {pattern}, not as {kind:.100}")
    tokens = {key: value for key, value in settings.items() if key.endswith("_token")}
    tokens |= settings.get("added_tokens_decoder", {})
    names = {k: v["content"] if isinstance(v, dict) else v for k, v in tokens.items()}
    return names.get("eos_token"), {name for name in names.values() if isinstance(name, str)}


def read_hf(folder: Path) -> tuple[dict[str, int], list, dict[str, int], str]:
    """A folder's vocabulary, its merges, the ids of added tokens, and the pattern."""
    file = files.read_json(folder / "tokenizer.json")
    model, pattern = file["model"], pattern_in(file.get("pre_tokenizer") or {}, folder)
    settings = {"type": "BPE"} | model | {"normalizer": file.get("normalizer")}
    supported = {"type": "BPE", "normalizer": NORMALIZERS.get(pattern)} | dict.fromkeys(OFF)
    for name, value in supported.items():
        if (settings.get(name) or None) != value:
            raise Failure(f"{folder}: tokenizer of {name} {settings[name]!r:.99} is not supported")
    added = {token["content"]: token["id"] for token in file.get("added_tokens", [])}
    for token in file.get("added_tokens", []):
        if not token["content"] or any(map(token.get, ("single_word", "lstrip", "rstrip"))):
            raise Failure(f"{folder}: an added token like {token!s:.150} is not supported")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return model["vocab"], merges, added, pattern


def pattern_in(pre_tokenizer: dict, folder: Path) -> str:
    """The key in PATTERNS of how a tokenizer.json splits text. Raises Failure."""
    *splits, level = pre_tokenizer.get("pretokenizers", [pre_tokenizer])  # of a Sequence
    if level.get("type") != "ByteLevel" or level.get("add_prefix_space", True):
        raise Failure(f"{folder}: its tokenizer is not byte-level, or has add_prefix_space")
    uses_regex = level.get("use_regex", True)  # GPT-2's pattern is a part of the step ByteLevel
    for pattern in PATTERNS:
        if (splits, uses_regex) == (split_steps(pattern), pattern == "gpt2"):
            return pattern
    raise Failure(f"{folder} splits text by {splits!s:.200}, not as {', '.join(PATTERNS)} do")


def split_steps(pattern: str) -> list[dict]:
    """The steps of a tokenizer.json before ByteLevel, which has GPT-2's pattern built in."""
    split = {"type": "Split", "pattern": {"Regex": PATTERNS[pattern]}}
    return [] if pattern == "gpt2" else [split | {"behavior": "Isolated", "invert": False}]


def merged_ids(vocab: dict, merges: list, special: set[str], folder: Path) -> dict[bytes, int]:
    """The ids of bytes and merged tokens. Raises Failure unless ids say what merges do.

    Hugging Face makes the merge that is listed first; we make the one whose token has the lowest
    id. They agree if the merges that ids imply are those listed. Not so for "x q", "q z", "x qz":
    there "xqz" stays "xq z", as "x q" comes first and "xq z" is not listed; we would go on to
    "xqz", which has an id.
    """
    characters = byte_characters()
    made = {*characters} | {left + right for left, right in merges}
    if others := vocab.keys() - made - special:
        raise Failure(f"{folder}: {min(others)!r:.100} is neither byte, nor merged, nor special")
    ids = {bytes(characters[c] for c in entry): vocab[entry] for entry in made}
    for merge, implied in zip_longest(merges, implied_merges(ids)):
        if [bytes(characters[c] for c in part) for part in merge] != implied:
            raise Failure(f"{folder}: merge {' '.join(merge)!r} is out of order or never made")
    return ids


def implied_merges(ids: dict[bytes, int]) -> list[list[bytes]]:
    """The parts that byte-pair encoding merges last into each token, in the order of ids.

    These are more than two if it never makes the token, or its id does not fit.
    """
    return [last_merge(token, ids) for token in sorted(ids, key=ids.get) if len(token) > 1]


def last_merge(token: bytes, ids: dict[bytes, int]) -> list[bytes]:
    parts, limit = [token[i : i + 1] for i in range(len(token))], ids[token]
    while len(parts) > 2:
        pairs = enumerate(pairwise(parts))
        number, i = min((ids.get(left + right, limit), i) for i, (left, right) in pairs)
        if number >= limit:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def save_hf_tokenizer(tokenizer: Tokenizer, folder: Path):
    """Write tokenizer.json and tokenizer_config.json, with which transformers makes the same ids.

    There as here a text is prefixed with end-of-text, and special tokens in it are kept or not.
    """
    vocab, merges = spelled_vocab(tokenizer)
    names = {number: name for name, number in tokenizer.special_ids.items()}
    end = names[tokenizer.end_of_text]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": number, "content": names[number], "special": True} for number in sorted(names)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    level["use_regex"] = tokenizer.pattern == "gpt2"
    steps = [*split_steps(tokenizer.pattern), level]
    content = {"version": "1.0", "added_tokens": [token | flags for token in added]}
    content["normalizer"] = NORMALIZERS.get(tokenizer.pattern)
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    content["post_processor"] = prefix_step(end, tokenizer.end_of_text)
    content["decoder"] = level
    content["model"] = {"type": "BPE", "vocab": vocab | tokenizer.special_ids, "merges": merges}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {"bos_token": end, "eos_token": end}
    settings["split_special_tokens"] = tokenizer.special_tokens == "text"
    files.write_json(folder / "tokenizer.json", content)
    files.write_json(folder / "tokenizer_config.json", settings)


def spelled_vocab(tokenizer: Tokenizer) -> tuple[dict[str, int], list[str]]:
    """The vocabulary and the merges of a tokenizer.json. Raises Failure."""
    characters = {byte: character for character, byte in byte_characters().items()}
    spelled = {token: "".join(characters[byte] for byte in token) for token in tokenizer.ids}
    merges = implied_merges(tokenizer.ids)
    is_special = tokenizer.special_ids.keys() & spelled.values()
    if is_special or any(len(merge) > 2 for merge in merges):
        raise Failure(f"{tokenizer.name} cannot be written as the merges of a tokenizer.json")
    vocab = {spelled[token]: number for token, number in tokenizer.ids.items()}
    return vocab, [" ".join(spelled[part] for part in merge) for merge in merges]


def prefix_step(end: str, end_of_text: int) -> dict:
    """The step of a tokenizer.json that prefixes a text, or each of two, with end-of-text."""
    prefix = {"SpecialToken": {"id": end, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    step = {"type": "TemplateProcessing", "single": [prefix, first]}
    step["pair"] = [prefix, first, prefix, second]
    return step | {"special_tokens": {end: {"id": end, "ids": [end_of_text], "tokens": [end]}}}


def byte_characters() -> dict[str, int]:
    """The printable characters for the 256 bytes in such files, as GPT-2 chose them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): byte for byte in printable}
    return characters | {chr(256 + i): byte for i, byte in enumerate(others)}


def read_optional(path: Path) -> dict:
    return files.read_json(path) if path.is_file() else {}
