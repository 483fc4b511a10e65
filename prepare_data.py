"""Turn text into clean, deduplicated shards of tokens in data/NAME, ready to train on.

    python prepare_data.py stdlib                              a named dataset (--help lists them)
    python prepare_data.py mine --source=~/texts               your own files, folders or globs
    python prepare_data.py mine --source=a.jsonl.gz --clean=web --dedupe=near --tokenizer=bpe:8192
    zcat *.gz | python prepare_data.py mine --source=-         standard input

Text is read and cleaned once; then repeated documents are dropped, and the rest is tokenised into
shards. The invariant: data/NAME appears only when all of it is complete, and it does not depend on
the number of processes.
"""

import gzip
import hashlib
import json
import lzma
import os
import shlex
import shutil
import sysconfig
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

import config
import dedupe
import files
from clean import LINE_RULES, RULES, clean_text, hash_words, normalize
from config import Failure
from corpus import DOCUMENT, Corpus, count_bytes, first_bytes, read_texts, write_corpus
from dataset import MANIFEST_VERSION, SPLITS, Dataset, ShardWriter, read_manifest, read_tokenizer
from readers import Reader, Tally
from report import summary, write_manifest
from tokenizer import PATTERNS, Tokenizer, count_pieces, train_bpe
from tokenizer_files import bpe_size, load_tokenizer
from workers import Workers


@dataclass
class PrepareConfig:
    """Turn text into clean, deduplicated shards of tokens in data/NAME, ready to train on.

    Named datasets: stdlib (this Python's own library, 12 MB, no network), shakespeare (1 MB),
    tinystories (2.2 GB), fineweb-edu-10b (28.5 GB of parquet, 100 GB of disk in all),
    fineweb-10b-gpt2 (20.8 GB, shards of GPT-2's tokens).
    """

    name: str = ""  # a named dataset, or a name of your own for --source or --merge
    source: str = ""  # files, folders, globs, separated by commas; - reads standard input
    merge: str = ""  # folders of datasets to join, separated by commas, without reading text again
    format: str = ""  # text, lines (a document each), jsonl, csv, tsv, parquet; "" = by file name
    text_field: str = "text"  # field or column with the document in jsonl, csv, tsv and parquet
    separator: str = ""  # line between documents of a text file, \n\n = blank; "" = one per file
    encoding: str = ""  # of text without a byte-order mark, as in Python: gb18030; "" = UTF-8
    on_error: str = "stop"  # at a file, line or bytes that cannot be read: stop, or skip and count
    tokenizer: str = ""  # gpt2 (default), bytes, bpe:N (trained here), .tiktoken file, HF model
    split_pattern: str = ""  # how bpe:N or a .tiktoken file splits text: gpt2, gpt4 or qwen
    special_tokens: str = "text"  # where text contains one: text = its characters, keep = its id
    val_fraction: float = 0.0  # share of documents for validation; 0 = 0.1, or the dataset's own
    clean: str = "basic"  # none, basic (NFC, line ends, no control characters), web (and rules)
    web_off: str = "unfinished_lines"  # rules of clean=web to leave out, separated by commas
    dedupe: str = "exact"  # none, exact (up to case and white space), near (similar documents, too)
    near_threshold: float = 0.8  # near: Jaccard similarity of 5-grams that drops a document
    decontaminate: str = ""  # files like --source; documents that share 13 words with them go
    processes: int = 0  # worker processes; 0 = one per core
    shard_tokens: int = 100_000_000  # most tokens of a shard
    data_dir: str = "data"  # folder of the datasets

    def check(self):
        """Raise ValueError where a value, or two together, make no sense."""
        is_plain = self.name.isprintable() and not set("/:,") & set(self.name)  # a:1 is a mixture
        if not is_plain or self.name.startswith(".") or self.name in ("", "downloads"):
            example = "give the dataset a plain name, as in: python prepare_data.py stdlib"
            raise ValueError(f"name {self.name!r}: {example}")
        has_own = bool(self.source or self.merge)
        if not has_own and self.name not in NAMED:
            names = ", ".join(NAMED)
            raise ValueError(f"{self.name} is not one of {names}; for your own text --source=PATH")
        if has_own and self.name in NAMED:
            raise ValueError(f"{self.name} is a named dataset; give your own text another name")
        if self.source and self.merge:
            raise ValueError(f"source {self.source} and merge {self.merge}: give one of the two")
        if self.source == self.decontaminate == "-":
            raise ValueError("source and decontaminate cannot both be standard input")
        idle = [name for name in DECIDING if getattr(self, name) != getattr(PrepareConfig, name)]
        if (self.merge or self.named.is_tokenised) and idle:
            raise ValueError(f"{idle[0]} has no effect here: shards are taken as they are")
        self.check_values()

    def check_values(self):
        """Raise ValueError where a single value makes no sense."""
        config.check_choices(self, format="text lines jsonl csv tsv parquet", on_error="stop skip")
        config.check_choices(self, split_pattern=" ".join(PATTERNS), special_tokens="text keep")
        config.check_choices(self, clean="none basic web", dedupe="none exact near")
        config.check_bounds(self, 0, "processes")
        config.check_bounds(self, 0, "val_fraction", below=1)
        config.check_bounds(self, 1, "shard_tokens", below=2**31)
        separator = self.separator.replace("\\n", "\n")
        if separator.isspace() and separator != "\n\n":
            hint = r"\n\n is a blank line; with --format=lines each line is a document"
            raise ValueError(f"separator {self.separator!r} is white space: {hint}")
        try:
            "a".encode(self.encoding or "utf-8")
        except (LookupError, ValueError):
            hint = "is not known to Python; examples are cp1252, gb18030, shift_jis and utf-16"
            raise ValueError(f"encoding {self.encoding!r} {hint}") from None
        if not 0 < self.near_threshold <= 1:
            raise ValueError(f"near_threshold {self.near_threshold} must be above 0 and at most 1")
        rules = [*RULES, *LINE_RULES]
        if unknown := set(self.web_off.split(",")) - {"", *rules}:
            raise ValueError(f"web_off: {min(unknown)} is not one of {', '.join(rules)}")
        if self.tokenizer:
            bpe_size(self.tokenizer)  # raises for a name without meaning

    @property
    def named(self) -> "Named":
        """The named dataset; for your own text the defaults."""
        return NAMED.get(self.name, Named())

    @property
    def downloads(self) -> Path:
        """The folder that keeps what is downloaded."""
        return Path(self.data_dir) / "downloads"


# Settings that decide what a dataset holds
NOT_DECIDING = ("name", "merge", "processes", "data_dir")
DECIDING = [field.name for field in fields(PrepareConfig) if field.name not in NOT_DECIDING]


@dataclass
class Named:
    """A dataset known by name: its settings, and where its files are on the Hub, if they are."""

    tokenizer: str = "gpt2"
    val_fraction: float = 0.1
    separator: str = ""
    repository: str = ""
    revision: str = ""  # a commit, so that the files stay the same
    pattern: str = ""  # of the names of its files
    is_tokenised: bool = False  # its files are shards, which become a dataset as they are


NAMED = {
    "stdlib": Named("bpe:1024"),
    "shakespeare": Named("bytes"),
    "tinystories": Named(
        "bpe:8192",
        val_fraction=0.01,
        separator="<|endoftext|>",
        repository="roneneldan/TinyStories",
        revision="f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
        pattern="TinyStoriesV2-GPT4-train*",
    ),
    "fineweb-edu-10b": Named(
        val_fraction=0.005,
        repository="HuggingFaceFW/fineweb-edu",
        revision="87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
        pattern="sample/10BT/*",
    ),
    "fineweb-10b-gpt2": Named(
        repository="kjj0/fineweb10B-gpt2",
        revision="889765ea1f903759787add96995d81171b632d0c",
        pattern="fineweb_*.bin",
        is_tokenised=True,
    ),
}
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394


def main(settings: PrepareConfig):
    """Prepare a dataset and say how to train on it. Raises Failure."""
    folder = prepare(settings)
    where = [f"--data_dir={settings.data_dir}"] if settings.data_dir != "data" else []
    recipe = "config/gpt2_124m.py" if settings.named.is_tokenised else "config/small.py"
    options = [f"--dataset={folder.name}", *where, f"--out_dir=out/{folder.name}"]
    print(f"train on it: python train.py {recipe} {shlex.join(options)}")


def prepare(settings: PrepareConfig) -> Path:
    """Make the dataset and return its folder. What a killed run left is removed by the next."""
    settings = with_defaults(settings)
    folder = Path(settings.data_dir) / settings.name
    work = folder.with_name(f".{settings.name}")
    with files.locked(folder.with_name(f".{settings.name}.lock")):
        shutil.rmtree(work, ignore_errors=True)
        if folder.exists() or folder.is_symlink():  # a link can lead to a disk not mounted
            if not settings.named.is_tokenised:
                check_same_settings(folder, settings)
            print(f"{folder} exists; delete it to read the text again")
            return folder
        try:
            (work / "dataset").mkdir(parents=True)
            print(f"preparing {folder}", flush=True)
            if settings.named.is_tokenised:
                for path in download_named(settings):
                    files.link_or_copy(path, work / "dataset" / path.name)
            else:
                with files.naming(folder):  # where the disk is full
                    content, examples = (merge if settings.merge else build)(settings, work)
                manifest = {"format_version": MANIFEST_VERSION, "name": settings.name}
                manifest |= {"made_from": deciding_settings(settings)} | content
                write_manifest(manifest, work / "dataset", examples)
                print(summary(manifest))
                print(f"what was kept and dropped, and why: {folder / 'report.md'}", flush=True)
            files.publish(work / "dataset", folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def with_defaults(settings: PrepareConfig) -> PrepareConfig:
    """The settings with those that are off replaced by the named dataset's."""
    names = ("tokenizer", "val_fraction", "separator")
    values = {name: getattr(settings, name) or getattr(settings.named, name) for name in names}
    return replace(settings, **values)


def check_same_settings(folder: Path, settings: PrepareConfig):
    """Raise Failure where `folder` was made with other settings, or holds no dataset."""
    made_from = read_manifest(folder)["made_from"]
    for name, value in deciding_settings(settings).items():
        before = made_from.get(name, getattr(PrepareConfig, name))
        if before != value:
            message = f"was made with {name} {before!r}, not {value!r}"
            raise Failure(f"{folder} {message}; delete it or choose another name")


def deciding_settings(settings: PrepareConfig) -> dict:
    """The settings that decide what a dataset holds, for its manifest."""
    names = ("merge",) if settings.merge else DECIDING
    return {name: getattr(settings, name) for name in names}


# From documents to a dataset


def build(settings: PrepareConfig, work: Path) -> tuple[dict, dict]:
    """Turn text into shards in work/dataset; return its manifest, and examples of dropped text."""
    contamination = collect_contamination(settings, work)
    tokenizer = None
    if not bpe_size(settings.tokenizer):
        tokenizer = load_tokenizer(settings.tokenizer, settings.split_pattern, settings.downloads)
    reader = make_reader(settings, settings.source or download_named(settings))
    with Workers(settings.processes) as workers:
        corpus = collect(settings, reader, contamination, workers, work)
        kept = deduplicate(settings, corpus)
        splits, is_cut = corpus.split(kept, settings.val_fraction)
        tokenizer = tokenizer or new_tokenizer(settings, corpus, splits["train"])
        tokenizer = replace(tokenizer, special_tokens=settings.special_tokens)
        entries = write_shards(settings, corpus, splits, tokenizer, work / "dataset")
        overlap = measure_overlap(corpus, splits, work)
    entries["val"]["compressed_bits_per_byte"] = compress(corpus, splits["val"])
    tally, kept_bytes = corpus.tally, int(corpus.documents["bytes"][kept].sum())
    documents = {"in": len(kept) + tally.documents.total(), "kept": len(kept)}
    manifest = {
        "tokenizer": tokenizer.record(),
        "splits": entries,
        "documents": documents | {"dropped": dict(tally.documents)},
        "bytes": {"in": tally.bytes_read, "kept": kept_bytes, "dropped": dict(tally.bytes)},
        "lines_dropped": dict(tally.lines),
        "separator_found": reader.separator_found,
        "documents_cut_in_two": is_cut,
        "validation_overlap": overlap,
    }
    return manifest, tally.examples


def make_reader(settings: PrepareConfig, sources, **options) -> Reader:
    names = ("format", "text_field", "separator", "encoding", "on_error")
    return Reader(sources, *(getattr(settings, name) for name in names), **options)


def download_named(settings: PrepareConfig) -> list[Path]:
    """The files of a named dataset: of this Python, or kept in data/downloads."""
    named, downloads = settings.named, settings.downloads
    if settings.name == "stdlib":  # without its tests
        root = Path(sysconfig.get_path("stdlib"))
        left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
        modules = sorted(root.rglob("*.py"))
        return [path for path in modules if not left_out & set(path.relative_to(root).parts)]
    if settings.name == "shakespeare":
        path = downloads / "tinyshakespeare.txt"
        return [files.fetch(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256, SHAKESPEARE_BYTES)]
    source = dict(repo_type="dataset", revision=named.revision, folder=downloads / settings.name)
    folder = files.hub_snapshot(named.repository, [named.pattern], **source)
    return sorted(folder.glob(named.pattern))


# Reading, cleaning, deduplication


def collect_contamination(settings: PrepareConfig, work: Path) -> Path | None:
    """A file of the n-grams in the texts that --decontaminate names; None where it names none."""
    if not settings.decontaminate:
        return None
    source, strict = settings.decontaminate, replace(settings, on_error="stop")
    advice = "it is read with the settings of --source, and skips no errors"
    reader = make_reader(strict, source, setting="decontaminate", advice=advice)
    clean = normalize if settings.clean != "none" else str
    ngrams = [dedupe.text_ngrams(clean(text)) for text, _ in reader]
    short, words = sum(not len(hashes) for hashes in ngrams), dedupe.CONTAMINATION_WORDS
    skipped = f"; skipped: {reader.tally}" if reader.tally.documents else ""
    if short == len(ngrams):
        raise Failure(f"--decontaminate={source}: no text of {words} words or more{skipped}")
    note = f"; {short:,} have fewer than {words} words and cannot be found" if short else ""
    print(f"looking for {len(ngrams):,} texts of {source}{note}{skipped}", flush=True)
    return dedupe.save_hashes(np.concatenate(ngrams), work)


def collect(settings, reader: Reader, contamination: Path | None, workers, work: Path) -> Corpus:
    """Read and clean all documents. Raises Failure."""
    corpus = write_corpus(reader, partial(clean_part, settings, contamination), workers, work)
    if not len(corpus.documents):
        examples = [f"; {shown[0][0]}" for shown in corpus.tally.examples.values()]
        reasons = f"({corpus.tally}){''.join(examples[:1])}"
        raise Failure(f"{settings.source or settings.name}: no text is left {reasons}")
    if settings.separator and not reader.separator_found:
        print(f"--separator={settings.separator}: no text file has such a line", flush=True)
    return corpus


def clean_part(settings: PrepareConfig, contamination: Path | None, part: list) -> tuple:
    """Clean documents (text, where); return what `write_corpus` takes."""
    tally, texts, documents, signatures = Tally(), [], [], []
    rules_off = frozenset(settings.web_off.split(","))
    for original, where in part:
        tally.bytes_read += len(original.encode())
        text, reason, words, lines = clean_text(original, settings.clean, rules_off)
        if words is None and (contamination or settings.dedupe == "near"):
            words = hash_words(text)[0]
        if not reason and contamination and dedupe.is_contaminated(words, contamination):
            reason = "contaminated"
        if reason:
            tally.drop(reason, where, original)
            continue
        tally.lines += lines
        data, digest = text.encode(), dedupe.text_digest(text)
        texts.append(data)
        documents.append((len(data), is_for_validation(data, settings.val_fraction), digest))
        if settings.dedupe == "near":
            words = words if len(words) else np.frombuffer(digest, np.uint64)
            signatures.append(dedupe.minhash_signature(words).tobytes())
    return b"".join(texts), np.array(documents, dtype=DOCUMENT), b"".join(signatures), tally


def is_for_validation(text: bytes, val_fraction: float) -> bool:
    """Whether a document is held out: its own hash decides, so other documents cannot move it."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64 < val_fraction


def deduplicate(settings: PrepareConfig, corpus: Corpus) -> np.ndarray:
    """Indices of the documents to keep: the first of repeated ones, validation before training."""
    order = np.argsort(~corpus.documents["is_val"], kind="stable")
    if settings.dedupe != "none":
        originals = dedupe.find_exact(corpus.documents["digest"][order])
        order = corpus.drop_repeated("exact duplicate", order, originals)
    if settings.dedupe == "near":
        originals = dedupe.find_near(corpus.signatures()[order], settings.near_threshold)
        order = corpus.drop_repeated("near duplicate", order, originals)
    return np.sort(order)


# Tokenising

BPE_BYTES = 1_000_000_000  # of training text that a tokenizer is trained on
OVERLAP_BYTES = 1_000_000  # of validation text that is looked for in the training text
COMPRESSED_BYTES = 16_000_000  # of validation text; lzma takes too long for more


def new_tokenizer(settings: PrepareConfig, corpus: Corpus, spans: np.ndarray) -> Tokenizer:
    """A tokenizer of the size that the settings name, trained on the training documents."""
    vocab_size, pattern = bpe_size(settings.tokenizer), settings.split_pattern or "gpt2"
    spans, counts = first_bytes(spans, BPE_BYTES), Counter()
    for part in corpus.map(partial(count_pieces, pattern=pattern), spans, "bytes split"):
        counts.update(part)
    print(f"training a tokenizer of {vocab_size:,} entries on {len(counts):,} pieces", flush=True)
    tokens = train_bpe(counts, vocab_size)
    if len(tokens) + 1 < vocab_size:
        print(f"it has only {len(tokens) + 1:,}: no pair of tokens is left to merge", flush=True)
    return Tokenizer.from_tokens(tokens, settings.tokenizer, pattern)


def write_shards(settings, corpus: Corpus, splits: dict, tokenizer: Tokenizer, folder: Path):
    """Tokenise the documents into shards in `folder`; return the manifest's entry of each split."""
    path, entries = folder / "tokenizer.tiktoken", {}
    path.write_text(tokenizer.to_text(), "ascii", newline="")
    token_bytes = np.array([len(tokenizer.token_bytes(n)) for n in range(tokenizer.vocab_size)])
    tokenize = partial(tokenize_texts, path, json.dumps(tokenizer.record()))
    for split, spans in splits.items():
        prefix, sizes = f"{settings.name}_{split}", (settings.shard_tokens, tokenizer.vocab_size)
        text_bytes, special = 0, Counter()  # bytes of what tokens stand for: text is normalised
        with ShardWriter(folder, prefix, *sizes) as writer:
            for tokens, found in corpus.map(tokenize, spans, f"bytes of {split} tokenised"):
                writer.add(tokens)
                text_bytes += int(token_bytes[tokens].sum())
                special += found
            shards = writer.finish()
        tokens = sum(shard["tokens"] for shard in shards)
        counts = {"documents": len(spans), "bytes": text_bytes, "tokens": tokens}
        entries[split] = counts | {"special_tokens": dict(special), "shards": shards}
    return entries


def tokenize_texts(path: Path, record: str, texts: Iterable[str]) -> tuple[np.ndarray, Counter]:
    """The tokens of documents, uint32, an end-of-text before each; special tokens in the texts."""
    tokenizer, tokens, special = cached_tokenizer(path, record), [], Counter()
    for text in texts:
        tokens.append(tokenizer.encode_document(text))
        special.update(tokenizer.special_regex.findall(text))
    return np.concatenate(tokens), special


@lru_cache(maxsize=1)
def cached_tokenizer(path: Path, record: str) -> Tokenizer:
    """A dataset's tokenizer, read once per worker. record: its record as JSON."""
    return Tokenizer.from_record(json.loads(record), path.read_text(encoding="ascii"))


def measure_overlap(corpus: Corpus, splits: dict, work: Path) -> float:
    """The share of n-grams of the validation text that are in the training text, too."""
    texts = read_texts(corpus.path, first_bytes(splits["val"], OVERLAP_BYTES))
    ngrams = dedupe.ngrams_of(texts)
    find = partial(dedupe.find_shared, path=dedupe.save_hashes(ngrams, work))
    return dedupe.overlap(ngrams, corpus.map(find, splits["train"], "bytes compared"))


def compress(corpus: Corpus, spans: np.ndarray) -> dict[str, float]:
    """Bits per byte that two compressors need, to compare a model with; none for a long text."""
    if count_bytes(spans) > COMPRESSED_BYTES:
        return {}
    text = "".join(read_texts(corpus.path, spans)).encode()
    compressed = {"lzma -9": lzma.compress(text, preset=9), "gzip -9": gzip.compress(text, 9)}
    return {name: 8 * len(data) / len(text) for name, data in compressed.items()}


# Datasets made of shards


def merge(settings: PrepareConfig, work: Path) -> tuple[dict, dict]:
    """Join the shards of datasets, as links where the disk can; return the same as `build`."""
    paths = [Path(os.path.expanduser(name)) for name in settings.merge.split(",") if name]
    if not paths or len({path.resolve() for path in paths}) < len(paths):
        raise Failure(f"--merge={settings.merge}: name at least one folder, and none twice")
    manifests = [read_manifest(path) for path in paths]
    tokenizers = [read_tokenizer(p, manifest["tokenizer"]) for p, manifest in zip(paths, manifests)]
    for path, own in zip(paths, tokenizers):
        if own.special_tokens != tokenizers[0].special_tokens or not own.same_ids(tokenizers[0]):
            raise Failure(f"--merge: {path} and {paths[0]} differ in tokenizer or --special_tokens")
        Dataset(path, block_size=1).verify(hash_all=False, is_known=False)
    folder, entries = work / "dataset", {}
    files.link_or_copy(paths[0] / "tokenizer.tiktoken", folder / "tokenizer.tiktoken")
    for split in SPLITS:
        parts, shards = [manifest["splits"][split] for manifest in manifests], []
        for path, part in zip(paths, parts):
            for record in part["shards"]:
                name = f"{settings.name}_{split}_{len(shards):06d}.bin"
                files.link_or_copy(path / record["file"], folder / name)
                shards.append(record | {"file": name})
        special = sum((Counter(part.get("special_tokens")) for part in parts), Counter())
        entries[split] = sum_counts(parts, "documents", "bytes", "tokens")
        entries[split] |= {"special_tokens": dict(special), "shards": shards}
    manifest = {"tokenizer": tokenizers[0].record(), "splits": entries}
    manifest["documents_cut_in_two"] = any(m.get("documents_cut_in_two") for m in manifests)
    for unit in ("documents", "bytes"):
        counts = [other[unit] for other in manifests]
        dropped = sum((Counter(count["dropped"]) for count in counts), Counter())
        manifest[unit] = sum_counts(counts, "in", "kept") | {"dropped": dict(dropped)}
    return manifest, {}


def sum_counts(counts: list[dict], *names: str) -> dict:
    return {name: sum(count[name] for count in counts) for name in names}


if __name__ == "__main__":
    config.run(main, PrepareConfig, "lower --processes, or leave out --dedupe=near", "name")
