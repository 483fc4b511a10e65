"""How fast text becomes data, compared with the tokenizer alone, and how much memory it needs.

    python tests/bench_data.py stdlib --tokenizer=gpt2
    python tests/bench_data.py books --source=books.jsonl.xz --tokenizer=gpt2 --merges=32768 \\
        --file_bytes=1000000000

Takes the settings of prepare_data.py and a few more; writes into a temporary folder. Each figure is
the median of three runs (least to most); what is compared runs by turns.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

import config
import prepare_data
from prepare_data import PrepareConfig
from readers import Reader
from tokenizer import Tokenizer, count_pieces, train_bpe
from tokenizer_files import load_tokenizer
from workers import Workers

RUNS = 3
VARIANTS = [("none", "none"), ("basic", "exact"), ("basic", "near"), ("web", "near")]


@dataclass
class BenchConfig(PrepareConfig):
    """How fast text becomes data. Takes the settings of prepare_data.py as well."""

    merges: int = 4096  # entries of a tokenizer that is trained on one process
    file_bytes: int = 0  # size of the large files whose preparation's memory is measured; 0 = none


def main(settings: BenchConfig):
    settings = prepare_data.with_defaults(settings)
    Path(settings.data_dir).mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.data_dir) as folder:
        texts = [text for text, _ in open_source(settings)]
        bench_stages(texts, settings, Path(folder))
        bench_bpe(texts, settings)
        if settings.file_bytes:
            bench_memory(texts, settings, Path(folder))


def open_source(settings: BenchConfig) -> Reader:
    sources = settings.source or prepare_data.download_named(settings)
    return prepare_data.make_reader(settings, sources)


def bench_stages(texts: list[str], settings: BenchConfig, work: Path):
    """Tokenising with all processes and with one; reading, cleaning and deduplication."""
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts):,} documents, {megabytes:.1f} MB of text")
    downloads = Path(settings.data_dir) / "downloads"
    tokenizer = load_tokenizer(settings.tokenizer, settings.split_pattern, downloads)
    with open(work / "plain.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    plain = replace(settings, source=str(work / "plain.jsonl"), text_field="text", format="")
    with Workers(settings.processes) as workers:
        print(f"{workers.count} processes")
        stages = {
            "encode, one process": lambda: [tokenizer.encode(text) for text in texts],
            "tokenising into shards": tokenizing(plain, workers, tokenizer, work),
        }
        for clean, dedupe in VARIANTS:
            variant = replace(plain, clean=clean, dedupe=dedupe)
            name = f"reading, clean={clean}, dedupe={dedupe}"
            stages[name] = partial(read_and_clean, variant, workers, work)
        stages["tokenising into shards"]()  # now the processes run and have the tokenizer
        taken = {name: [] for name in stages}
        for _ in range(RUNS):
            for name, stage in stages.items():
                taken[name].append(seconds(stage))
    alone, shards, *_ = (np.array(times) for times in taken.values())
    for name, times in taken.items():
        show(name, megabytes / np.array(times), "MB/s")
        if name.startswith("reading"):
            show("  share of tokenising's time", np.array(times) / shards, "")
    show("tokenising / processes / encode", alone / shards / workers.count, "")


def read_and_clean(settings: BenchConfig, workers: Workers, work: Path):
    """All of prepare_data.py before tokenising."""
    reader = prepare_data.make_reader(settings, settings.source)
    corpus = prepare_data.collect(settings, reader, None, workers, work)
    prepare_data.deduplicate(settings, corpus)


def tokenizing(settings: BenchConfig, workers: Workers, tokenizer: Tokenizer, work: Path):
    """A function that tokenises all text of the source into shards."""
    (work / "whole").mkdir()
    settings = replace(settings, clean="none", dedupe="none")
    reader = prepare_data.make_reader(settings, settings.source)
    corpus = prepare_data.collect(settings, reader, None, workers, work / "whole")
    splits, folder = {"train": corpus.spans()}, work / "shards"

    def tokenize():
        folder.mkdir()  # always the same, so that the processes keep the tokenizer
        prepare_data.write_shards(settings, corpus, splits, tokenizer, folder)
        shutil.rmtree(folder)

    return tokenize


def bench_bpe(texts: list[str], settings: BenchConfig):
    """Training a tokenizer on one process: counting pieces, then merging."""
    counting, merging = [], []
    for _ in range(RUNS):
        started = time.perf_counter()
        counts = count_pieces(texts, settings.split_pattern or "gpt2")
        counting.append(time.perf_counter() - started)
        merging.append(seconds(partial(train_bpe, counts, settings.merges)))
    show(f"counting {len(counts):,} pieces for a tokenizer", counting, "s")
    show(f"learning {settings.merges:,} entries", merging, "s")


def bench_memory(texts: list[str], settings: BenchConfig, work: Path):
    """The peak memory of prepare_data.py and its processes with one large file."""
    (work / "downloads").symlink_to(Path(settings.data_dir, "downloads").resolve())
    words = " ".join(" ".join(text.split()) for text in texts)
    for lines in ("one line", "many lines"):
        source = work / "large.txt"
        text = words + " " if lines == "one line" else words.replace(". ", ".\n") + "\n"
        with open(source, "w", encoding="utf-8") as file:
            while file.tell() < settings.file_bytes:
                file.write(text)
        options = [f"--source={source}", f"--tokenizer={settings.tokenizer}", "--dedupe=near"]
        options += [f"--data_dir={work}", f"--processes={settings.processes}"]
        command = [sys.executable, prepare_data.__file__, "large", *options]
        started = time.perf_counter()
        peak_bytes = peak_memory(command)
        taken, size = time.perf_counter() - started, source.stat().st_size
        memory = f"{peak_bytes / 1e6:,.0f} MB of memory"
        print(f"{size / 1e6:,.0f} MB in {lines}: {memory}, {taken:.0f} s in all")
        shutil.rmtree(work / "large")


def peak_memory(command: list[str]) -> int:
    """Run a command; return the most bytes that it and its processes held at once."""
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid))
            time.sleep(0.1)
    if process.returncode:
        raise config.Failure(f"prepare_data.py ended with {process.returncode}")
    return peak


def memory_of(pid: int) -> int:
    """Bytes that a process and its children hold, shared pages counted once (Linux)."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    pss = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
    return pss + sum(memory_of(int(child)) for child in children)


def seconds(function: Callable) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def show(name: str, values, unit: str):
    low, median, high = min(values), statistics.median(values), max(values)
    print(f"{name:<48} {median:8.2f} {unit} ({low:.2f} to {high:.2f})", flush=True)


if __name__ == "__main__":
    with config.exit_on_failure():
        main(config.load(BenchConfig, sys.argv[1:], positional="name"))
