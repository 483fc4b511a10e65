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
import shutil
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

import config
import dedupe
import files
from clean import LINE_RULES, RULES, clean_text, hash_words, normalize
from config import INPUT_OUTPUT, Failure, Progress
from corpus import DOCUMENT, Corpus, count_bytes, first_bytes, in_parts, write_corpus
from dataset import MANIFEST_VERSION, SPLITS, ShardWriter, read_manifest, read_tokenizer
from readers import Reader, Tally
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
    format: str = ""  # text, jsonl, csv or parquet; "" = by each file's name, else text
    text_field: str = "text"  # field or column with the document in jsonl, csv and parquet
    separator: str = ""  # line that separates documents in a text file; "" = one document per file
    on_error: str = "stop"  # at a file, line or bytes that cannot be read: stop, or skip and count
    tokenizer: str = ""  # gpt2 (default), bytes, bpe:N (trained here), .tiktoken file, HF model
    split_pattern: str = ""  # how bpe:N or a .tiktoken file splits text: gpt2, gpt4 or qwen
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
        is_plain = Path(self.name).name == self.name and not self.name.startswith(".")
        if not self.name or not is_plain or self.name == "downloads":
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
        if self.takes_shards and idle:
            raise ValueError(f"{idle[0]} has no effect here: shards are taken as they are")
        self.check_values()

    def check_values(self):
        """Raise ValueError where a single value makes no sense."""
        config.check_choices(self, on_error="stop skip", clean="none basic web")
        config.check_choices(self, dedupe="none exact near", format="text jsonl csv parquet")
        config.check_choices(self, split_pattern=" ".join(PATTERNS))
        config.check_bounds(self, 0, "processes")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction {self.val_fraction} must be at least 0 and below 1")
        if not 0 < self.near_threshold <= 1:
            raise ValueError(f"near_threshold {self.near_threshold} must be above 0 and at most 1")
        if not 1 <= self.shard_tokens < 2**31:
            raise ValueError(f"shard_tokens {self.shard_tokens} must be from 1 to {2**31 - 1}")
        rules = [*RULES, *LINE_RULES]
        for name in filter(None, self.web_off.split(",")):
            if name not in rules:
                raise ValueError(f"web_off: {name} is not one of {', '.join(rules)}")
        if self.tokenizer:
            bpe_size(self.tokenizer)  # raises for a name without meaning

    @property
    def is_tokenised(self) -> bool:
        """Whether the dataset is shards on the Hub, which become one as they are."""
        return self.name in NAMED and NAMED[self.name].is_tokenised

    @property
    def takes_shards(self) -> bool:
        """Whether the dataset is made of existing shards, and no text is read."""
        return bool(self.merge) or self.is_tokenised

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
    is_tokenised: bool = False  # its files are shards


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
    where = f" --data_dir={settings.data_dir}" if settings.data_dir != "data" else ""
    recipe = "config/gpt2_124m.py" if settings.is_tokenised else "config/small.py"
    options = f"--dataset={folder.name}{where} --out_dir=out/{folder.name}"
    print(f"train on it: python train.py {recipe} {options}")


def prepare(settings: PrepareConfig) -> Path:
    """Make the dataset and return its folder. What a killed run left is removed by the next."""
    settings = with_defaults(settings)
    folder = Path(settings.data_dir) / settings.name
    work = folder.with_name(f".{settings.name}")
    with files.locked(folder.with_name(f".{settings.name}.lock")):
        shutil.rmtree(work, ignore_errors=True)
        if exists(folder, settings):
            return folder
        try:
            (work / "dataset").mkdir(parents=True)
            print(f"preparing {folder}", flush=True)
            if settings.is_tokenised:
                link_shards(settings, work / "dataset")
            else:
                manifest = merge(settings, work) if settings.merge else build(settings, work)
                report = f"what was kept and dropped, and why: {folder / 'report.md'}"
                print(f"{summary(manifest)}\n{report}", flush=True)
            (work / "dataset").rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def with_defaults(settings: PrepareConfig) -> PrepareConfig:
    """The settings with those that are off replaced by the named dataset's, or by the machine's."""
    named = NAMED.get(settings.name, Named())
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return replace(
        settings,
        tokenizer=settings.tokenizer or named.tokenizer,
        val_fraction=settings.val_fraction or named.val_fraction,
        separator=settings.separator or named.separator,
        processes=settings.processes or cores,
    )


def exists(folder: Path, settings: PrepareConfig) -> bool:
    """Whether the dataset is there already. Raises Failure where its folder holds another."""
    if not folder.exists():
        return False
    if not settings.is_tokenised:
        made_from, wanted = read_manifest(folder)["made_from"], deciding_settings(settings)
        defaults = deciding_settings(with_defaults(PrepareConfig(settings.name)))
        for name, value in wanted.items():
            before = made_from.get(name, defaults.get(name))
            if before != value:
                message = f"was made with {name} {before!r}, not {value!r}"
                raise Failure(f"{folder} {message}; delete it or choose another name")
    print(f"{folder} exists; delete it to read the text again")
    return True


def deciding_settings(settings: PrepareConfig) -> dict:
    """The settings that decide what a dataset holds, for its manifest."""
    names = ("merge",) if settings.merge else DECIDING
    return {name: getattr(settings, name) for name in names}


# From documents to a dataset


def build(settings: PrepareConfig, work: Path) -> dict:
    """Turn the text that the settings name into a dataset in work/dataset; return its manifest."""
    contamination = collect_contamination(settings, work)
    # open the user's files first: a wrong path fails before a download
    reader = make_reader(settings, settings.source) if settings.source else None
    tokenizer = None
    if not bpe_size(settings.tokenizer):
        pattern, downloads = settings.split_pattern, settings.downloads
        tokenizer = load_tokenizer(settings.tokenizer, pattern, downloads)
    reader = reader or open_named(settings)
    with Workers(settings.processes) as workers:
        corpus = collect(settings, reader, contamination, workers, work)
        kept = deduplicate(settings, corpus)
        splits, is_cut = split_documents(corpus, kept, settings.val_fraction)
        on_texts = partial(corpus.map, workers)
        tokenizer = tokenizer or new_tokenizer(settings, on_texts, splits["train"])
        entries = write_shards(settings, on_texts, splits, tokenizer, work / "dataset")
        overlap = measure_overlap(corpus, on_texts, splits, work)
    entries["val"]["compressed_bits_per_byte"] = compress(corpus, splits["val"])
    tally, kept_bytes = corpus.tally, int(corpus.documents["bytes"][kept].sum())
    documents = {"in": len(kept) + tally.documents.total(), "kept": len(kept)}
    manifest = make_manifest(settings, tokenizer, entries) | {
        "documents": documents | {"dropped": dict(tally.documents)},
        "bytes": {"in": tally.bytes_read, "kept": kept_bytes, "dropped": dict(tally.bytes)},
        "lines_dropped": dict(tally.lines),
        "documents_cut_in_two": is_cut,
        "validation_overlap": overlap,
    }
    write_manifest(manifest, work / "dataset", tally.examples)
    return manifest


def make_manifest(settings: PrepareConfig, tokenizer: Tokenizer, splits: dict) -> dict:
    """What every manifest has, however its shards were made."""
    return {
        "format_version": MANIFEST_VERSION,
        "name": settings.name,
        "made_from": deciding_settings(settings),
        "tokenizer": tokenizer.record(),
        "splits": splits,
    }


def make_reader(settings: PrepareConfig, sources, setting: str = "source") -> Reader:
    on_error = settings.on_error if setting == "source" else "stop"
    names = (settings.format, settings.text_field, settings.separator)
    return Reader(sources, *names, on_error=on_error, setting=setting)


def open_named(settings: PrepareConfig) -> Reader:
    """A reader of a named dataset, downloaded first where it is from elsewhere."""
    if settings.name == "stdlib":
        return make_reader(settings, stdlib_files())
    if settings.name == "shakespeare":
        path = settings.downloads / "tinyshakespeare.txt"
        files.fetch(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256, SHAKESPEARE_BYTES)
        return make_reader(settings, [path])
    return make_reader(settings, download_named(settings))


def stdlib_files() -> list[Path]:
    """The modules of the running Python's standard library, without tests: 12 MB of real text."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    modules = sorted(root.rglob("*.py"))
    modules = [path for path in modules if not left_out & set(path.relative_to(root).parts)]
    if not modules:
        hint = "this Python keeps its library zipped; use another, or --source=PATH"
        raise Failure(f"{root} has no .py files: {hint}")
    return modules


def download_named(settings: PrepareConfig) -> list[Path]:
    """The files of a named dataset on the Hugging Face Hub, kept in data/downloads."""
    named, folder = NAMED[settings.name], settings.downloads / settings.name
    source = dict(repo_type="dataset", revision=named.revision, folder=folder)
    folder = files.hub_snapshot(named.repository, [named.pattern], **source)
    paths = sorted(folder.glob(named.pattern))
    if not paths:
        raise Failure(f"{named.repository} has no files {named.pattern}", INPUT_OUTPUT)
    return paths


# Reading and cleaning


def collect_contamination(settings: PrepareConfig, work: Path) -> Path | None:
    """A file of the n-grams in the texts that --decontaminate names; None where it names none."""
    if not settings.decontaminate:
        return None
    ngrams = []
    for text, _ in make_reader(settings, settings.decontaminate, "decontaminate"):
        ngrams.append(dedupe.text_ngrams(normalize(text) if settings.clean != "none" else text))
    short, words = sum(not len(hashes) for hashes in ngrams), dedupe.CONTAMINATION_WORDS
    if short == len(ngrams):
        raise Failure(f"--decontaminate={settings.decontaminate}: no text of {words} words or more")
    note = f"; {short:,} have fewer than {words} words and cannot be found" if short else ""
    print(f"looking for {len(ngrams):,} texts of {settings.decontaminate}{note}", flush=True)
    return dedupe.save_hashes(np.concatenate(ngrams), work)


def collect(settings, reader: Reader, contamination: Path | None, workers, work: Path) -> Corpus:
    """Read and clean all documents. Raises Failure."""
    clean = partial(clean_part, settings, contamination)
    signature_bytes = dedupe.SIGNATURE_BYTES if settings.dedupe == "near" else 0
    with Progress("bytes read", reader.total) as progress:

        def cleaned_parts():
            for part in workers.map(clean, in_parts(reader)):
                yield part
                progress.update(reader.done)

        corpus = write_corpus(cleaned_parts(), work, signature_bytes)
    corpus.tally.add(reader.tally)
    if not len(corpus.documents):
        reasons = ", ".join(f"{n} {reason}" for reason, n in corpus.tally.documents.items())
        raise Failure(f"{settings.source or settings.name}: no text is left ({reasons})")
    return corpus


def clean_part(settings: PrepareConfig, contamination: Path | None, part: list) -> tuple:
    """Clean documents (text, where); return texts, DOCUMENTs, signatures and tally for a Corpus."""
    tally, texts, documents, signatures = Tally(), [], [], []
    rules_off = frozenset(settings.web_off.split(","))
    needs_words = settings.dedupe == "near" or contamination
    for original, where in part:
        tally.bytes_read += len(original.encode())
        cleaned = clean_text(original, settings.clean, rules_off)
        reason, words = cleaned.reason, cleaned.words
        if words is None and needs_words:
            words = hash_words(cleaned.text)[0]
        if not reason and contamination and dedupe.is_contaminated(words, contamination):
            reason = "contaminated"
        if reason:
            tally.drop(reason, where, original)
            continue
        tally.lines += cleaned.lines
        data, digest = cleaned.text.encode(), dedupe.text_digest(cleaned.text)
        texts.append(data)
        documents.append((len(data), is_for_validation(data, settings.val_fraction), digest))
        if settings.dedupe == "near":
            words = words if len(words) else np.frombuffer(digest, np.uint64)
            signatures.append(dedupe.minhash_signature(words).tobytes())
    return b"".join(texts), np.array(documents, dtype=DOCUMENT), b"".join(signatures), tally


def is_for_validation(text: bytes, val_fraction: float) -> bool:
    """Whether a document is held out: its own hash decides, so other documents cannot move it."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64 < val_fraction


# Deduplication and the split


def deduplicate(settings: PrepareConfig, corpus: Corpus) -> np.ndarray:
    """Indices of the documents to keep: the first of repeated ones, validation before training."""
    order = np.argsort(~corpus.documents["is_val"], kind="stable")
    if settings.dedupe != "none":
        originals = dedupe.find_exact(corpus.documents["digest"][order])
        order = drop_repeated("exact duplicate", corpus, order, originals)
    if settings.dedupe == "near":
        originals = dedupe.find_near(corpus.signatures[order], settings.near_threshold)
        order = drop_repeated("near duplicate", corpus, order, originals)
    return np.sort(order)


def drop_repeated(reason: str, corpus: Corpus, order: np.ndarray, originals: np.ndarray):
    """Tally documents that repeat another; return the others. originals: positions in `order`."""
    is_repeated, is_val = originals != np.arange(len(order)), corpus.documents["is_val"]
    for dropped, kept in zip(order[is_repeated], order[originals[is_repeated]]):
        name = reason + (" of validation text" if is_val[kept] > is_val[dropped] else "")
        corpus.tally.documents[name] += 1
        corpus.tally.bytes[name] += int(corpus.documents["bytes"][dropped])
        if corpus.tally.documents[name] <= 3:
            texts = corpus.texts(corpus.spans()[[dropped, kept]])
            corpus.tally.show(name, "dropped ⟷ kept", " ⟷ ".join(text[:300] for text in texts))
    return order[~is_repeated]


MIN_SHARE, MAX_SHARE = 1 / 8, 4  # of val_fraction; beyond, documents are cut


def split_documents(corpus: Corpus, kept: np.ndarray, val_fraction: float) -> tuple[dict, bool]:
    """The spans of the training and of the validation documents, and whether they are cut.

    With very few documents their hashes can leave a split empty, or far from its share. Then the
    end of each document is held out instead.
    """
    spans, is_val = corpus.spans()[kept], corpus.documents["is_val"][kept]
    splits = {"train": spans[~is_val], "val": spans[is_val]}
    share = count_bytes(splits["val"]) / count_bytes(spans)
    is_cut = bool(not MIN_SHARE < share / val_fraction < MAX_SHARE or share == 1)
    if is_cut:
        count, end = f"documents: {len(spans)}, too few to hold some out", f"{val_fraction:.1%}"
        print(
            f"{count}: the last {end} of each is for validation (with more documents, whole ones)"
        )
        halves = corpus.cut(spans, val_fraction)
        splits = {name: half[np.diff(half)[:, 0] > 0] for name, half in zip(SPLITS, halves)}
    if not all(map(count_bytes, splits.values())):
        raise Failure("there is too little text for a training and a validation split")
    return splits, is_cut


# Tokenising

BPE_BYTES = 1_000_000_000  # of training text that a tokenizer is trained on
OVERLAP_BYTES = 1_000_000  # of validation text that is looked for in the training text
COMPRESSED_BYTES = 16_000_000  # of validation text; lzma takes too long for more


def new_tokenizer(settings: PrepareConfig, on_texts: Callable, spans: np.ndarray) -> Tokenizer:
    """A tokenizer of the size that the settings name, trained on the training documents.

    on_texts(function, spans, unit) yields function(texts) for parts of the texts: Corpus.map.
    """
    vocab_size, pattern = bpe_size(settings.tokenizer), settings.split_pattern or "gpt2"
    spans, counts = first_bytes(spans, BPE_BYTES), Counter()
    for part in on_texts(partial(count_pieces, pattern=pattern), spans, "bytes split"):
        counts.update(part)
    pieces = f"{len(counts):,} different pieces of text"
    print(f"training a tokenizer of {vocab_size:,} entries on {pieces}", flush=True)
    tokens = train_bpe(counts, vocab_size)
    return Tokenizer.from_tokens(tokens, settings.tokenizer, pattern)


def write_shards(settings, on_texts: Callable, splits: dict, tokenizer: Tokenizer, folder: Path):
    """Tokenise the documents into shards in `folder`; return the manifest's entry of each split."""
    path, entries = folder / "tokenizer.tiktoken", {}
    path.write_text(tokenizer.to_text(), "ascii", newline="")
    tokenize = partial(tokenize_texts, path, tuple(tokenizer.record().items()))
    for split, spans in splits.items():
        prefix, sizes = f"{settings.name}_{split}", (settings.shard_tokens, tokenizer.vocab_size)
        with ShardWriter(folder, prefix, *sizes) as writer:
            for tokens in on_texts(tokenize, spans, f"bytes of {split} tokenised"):
                writer.add(tokens)
            shards = writer.finish()
        tokens = sum(shard["tokens"] for shard in shards)
        counts = {"documents": len(spans), "bytes": count_bytes(spans), "tokens": tokens}
        entries[split] = counts | {"shards": shards}
    return entries


def tokenize_texts(path: Path, record: tuple, texts: Iterable[str]) -> np.ndarray:
    """The tokens of documents, uint32, an end-of-text before each."""
    tokenizer = cached_tokenizer(path, record)
    return np.concatenate([tokenizer.encode_document(text) for text in texts])


@lru_cache(maxsize=1)
def cached_tokenizer(path: Path, record: tuple) -> Tokenizer:
    """A dataset's tokenizer, read once per worker."""
    return Tokenizer.from_record(dict(record), path.read_text(encoding="ascii"))


def measure_overlap(corpus: Corpus, on_texts: Callable, splits: dict, work: Path) -> float:
    """The share of n-grams of the validation text that are in the training text, too."""
    ngrams = dedupe.ngrams_of(corpus.texts(first_bytes(splits["val"], OVERLAP_BYTES)))
    find = partial(dedupe.find_shared, path=dedupe.save_hashes(ngrams, work))
    return dedupe.overlap(ngrams, on_texts(find, splits["train"], "bytes compared"))


def compress(corpus: Corpus, spans: np.ndarray) -> dict[str, float]:
    """Bits per byte that two compressors need, to compare a model with; none for a long text."""
    if count_bytes(spans) > COMPRESSED_BYTES:
        return {}
    text = "".join(corpus.texts(spans)).encode()
    compressed = {"lzma -9": lzma.compress(text, preset=9), "gzip -9": gzip.compress(text, 9)}
    return {name: 8 * len(data) / len(text) for name, data in compressed.items()}


# Datasets made of shards


def link_shards(settings: PrepareConfig, folder: Path):
    """A dataset of the Hub's shards, as they are: train on it with --tokenizer=gpt2."""
    for path in download_named(settings):
        link_or_copy(path, folder / path.name)


def merge(settings: PrepareConfig, work: Path) -> dict:
    """Join the shards of several datasets, as links where the disk can; return the manifest."""
    folder, names = work / "dataset", filter(None, settings.merge.split(","))
    paths = [Path(os.path.expanduser(name)) for name in names]
    if not paths or len({path.resolve() for path in paths}) < len(paths):
        raise Failure(f"--merge={settings.merge}: name at least one folder, and none twice")
    manifests = [read_manifest(path) for path in paths]
    tokenizers = [read_tokenizer(p, manifest["tokenizer"]) for p, manifest in zip(paths, manifests)]
    for path, tokenizer in zip(paths, tokenizers):
        if not tokenizer.same_ids(tokenizers[0]):
            raise Failure(f"--merge: {path} and {paths[0]} have different tokenizers")
    link_or_copy(paths[0] / "tokenizer.tiktoken", folder / "tokenizer.tiktoken")
    entries = {}
    for split in SPLITS:
        parts, shards = [manifest["splits"][split] for manifest in manifests], []
        for path, record in ((path, r) for path, part in zip(paths, parts) for r in part["shards"]):
            shards.append(record | {"file": f"{settings.name}_{split}_{len(shards):06d}.bin"})
            link_or_copy(path / record["file"], folder / shards[-1]["file"])
        entries[split] = sum_counts(parts, "documents", "bytes", "tokens") | {"shards": shards}
    manifest = make_manifest(settings, tokenizers[0], entries)
    is_cut = any(other.get("documents_cut_in_two") for other in manifests)
    manifest["documents_cut_in_two"] = is_cut
    for unit in ("documents", "bytes"):
        counts = [other[unit] for other in manifests]
        dropped = sum((Counter(count["dropped"]) for count in counts), Counter())
        manifest[unit] = sum_counts(counts, "in", "kept") | {"dropped": dict(dropped)}
    write_manifest(manifest, folder, {})
    return manifest


def sum_counts(counts: list[dict], *names: str) -> dict:
    return {name: sum(count[name] for count in counts) for name in names}


def link_or_copy(source: Path, target: Path):
    """Make `target` another name of the file `source`, or a copy where the disk cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


# The report


def write_manifest(manifest: dict, folder: Path, examples: dict):
    """Write manifest.json, and its numbers with examples of what was dropped as report.md."""
    page = report_page(manifest, examples).encode(errors="backslashreplace")  # odd file names
    (folder / "report.md").write_bytes(page)
    files.write_json(folder / "manifest.json", manifest)


def summary(manifest: dict) -> str:
    """The dataset in a line or two for the screen."""
    documents, train, val = manifest["documents"], *manifest["splits"].values()
    text_bytes = train["bytes"] + val["bytes"]
    ratio = text_bytes / (train["tokens"] + val["tokens"])
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in documents["dropped"].items())
    return (
        f"{documents['kept']:,} of {documents['in']:,} documents, {text_bytes / 1e6:.1f} MB, "
        f"{ratio:.2f} bytes per token: {train['tokens']:,} training tokens and {val['tokens']:,} "
        f"for validation" + (f"\ndropped: {dropped}" if dropped else "")
    )


def report_page(manifest: dict, examples: dict) -> str:
    """What was read, kept and dropped, as a page in Markdown."""
    documents, sizes = manifest["documents"], manifest["bytes"]
    rows = [("read", documents["in"], sizes["in"])]
    for reason, count in documents["dropped"].items():
        rows.append((f"dropped: {reason}", count, sizes["dropped"].get(reason, 0)))
    rows.append(("kept", documents["kept"], sizes["kept"]))
    for split, entry in manifest["splits"].items():
        rows.append((f"{split}: {entry['tokens']:,} tokens", entry["documents"], entry["bytes"]))
    lines = [f"# {manifest['name']}", "", "| | documents | bytes |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {count:,} | {size:,} |" for name, count, size in rows]
    lines += ["", "Bytes read, and dropped by a rule, are counted before cleaning."]
    lines.append("Skipped files count as documents.")
    if manifest.get("documents_cut_in_two"):
        lines.append("The documents are too few to hold some out: the end of each is validation.")
    for rule, count in manifest.get("lines_dropped", {}).items():
        lines.append(f"Of documents that cleaning kept, {rule} dropped {count:,} lines.")
    if "validation_overlap" in manifest:
        share = f"{manifest['validation_overlap']:.2%} of the {dedupe.CONTAMINATION_WORDS}-grams"
        lines.append(f"Of the first MB of validation text, {share} are in the training text, too.")
    for reason, shown in examples.items():
        lines += ["", f"## dropped: {reason}", ""]
        for where, text in shown:
            quoted = " ".join(text.split()).replace("`", "'")
            lines.append(f"- `{where}`" + (f": `{quoted}`" if quoted else ""))
    made_from = json.dumps(manifest["made_from"], indent=2)
    return "\n".join([*lines, "", "Made with:", "", "```json", made_from, "```"]) + "\n"


if __name__ == "__main__":
    with config.exit_on_failure():
        main(config.load(PrepareConfig, sys.argv[1:], positional="name"))
