"""How fast text becomes data, next to what one process of the tokenizer alone does, and how much memory that takes.

    python tests/bench_data.py stdlib --tokenizer=gpt2
    python tests/bench_data.py books --source=books.jsonl.xz --tokenizer=gpt2 --merges=32768 --file_bytes=1000000000

Takes the settings of prepare_data.py and a few more; writes into a temporary folder. Each figure is the median of three
runs by turns, with the least and the most.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

import config
import prepare_data
from prepare_data import PrepareConfig

RUNS = 3


@dataclass
class BenchConfig(PrepareConfig):
    """How fast text becomes data. Takes the settings of prepare_data.py as well."""

    merges: int = 4096  # entries of a tokenizer to train, timed on one process
    file_bytes: int = 0  # size of the two files, of one line and of many, whose preparation's memory is taken; 0 = none


def seconds(function, *values) -> float:
    started = time.perf_counter()
    function(*values)
    return time.perf_counter() - started


def show(name: str, values, unit: str):
    print(f"{name:<52} {statistics.median(values):8.2f} {unit} ({min(values):.2f} to {max(values):.2f})", flush=True)


def reader_of(settings: PrepareConfig) -> prepare_data.Reader:
    return prepare_data.Reader(settings, settings.source) if settings.source else prepare_data.open_named(settings)


def read(settings: PrepareConfig, workers: prepare_data.Workers, work: Path) -> prepare_data.Corpus:
    return prepare_data.collect(settings, reader_of(settings), None, workers, work)


def bench_stages(settings: BenchConfig, work: Path):
    """Tokenising on all cores, against one process; cleaning and deduplication, against tokenising."""
    with prepare_data.Workers(settings.processes) as workers:
        corpus = read(replace(settings, clean="none", dedupe="none"), workers, work)
        spans = corpus.spans()
        texts = list(prepare_data.read_texts(corpus.texts, spans))
        megabytes = prepare_data.sizes_of(spans).sum() / 1e6
        print(f"{len(texts):,} documents, {megabytes:.1f} MB of text, {settings.processes} processes")
        with open(work / "plain.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        plain = replace(settings, name="plain", source=str(work / "plain.jsonl"), text_field="text", format="")
        variants = {
            f"reading, clean {clean}, dedupe {dedupe}": replace(plain, clean=clean, dedupe=dedupe)
            for clean, dedupe in (("none", "none"), ("basic", "exact"), ("basic", "near"), ("web", "near"))
        }
        encoding = prepare_data.load_tokenizer(settings.tokenizer, Path(settings.data_dir))

        def tokenize():
            folder = work / "shards"  # the same each time, so that the processes know the tokenizer already
            folder.mkdir()
            tokenizer = prepare_data.save_tokenizer(encoding, folder)
            prepare_data.write_shards(settings, workers, corpus.texts, spans, tokenizer, folder)
            shutil.rmtree(folder)

        def clean(variant: PrepareConfig):
            with tempfile.TemporaryDirectory(dir=work) as folder:
                prepare_data.deduplicate(variant, read(variant, workers, Path(folder)))

        tokenize()  # now the processes have started and hold the tokenizer
        alone, shards, cleaned = [], [], {name: [] for name in variants}
        for _ in range(RUNS):
            alone.append(seconds(lambda: [encoding.encode_ordinary(text) for text in texts]))
            shards.append(seconds(tokenize))
            for name, variant in variants.items():
                cleaned[name].append(seconds(clean, variant))
    show("encode_ordinary, one process", megabytes / np.array(alone), "MB/s")
    show("tokenising into shards", megabytes / np.array(shards), "MB/s")
    show("  of processes x encode_ordinary", np.array(alone) / np.array(shards) / settings.processes, "")
    for name, times in cleaned.items():
        show(name, megabytes / np.array(times), "MB/s")
        show("  its time of tokenising's", np.array(times) / np.array(shards), "")


def bench_merges(settings: BenchConfig, work: Path):
    """The training of a tokenizer on one process, its pieces counted already and with counting."""
    with prepare_data.Workers(1) as workers:
        corpus = read(replace(settings, clean="none", dedupe="none", processes=1), workers, work)
    counting, merging = [], []
    for _ in range(RUNS):
        started = time.perf_counter()
        counts = prepare_data.count_pieces(corpus.texts, prepare_data.PATTERNS["gpt2"], corpus.spans())
        counting.append(time.perf_counter() - started)
        merging.append(seconds(prepare_data.train_bpe, counts, settings.merges))
    show(f"counting {len(counts):,} pieces for a tokenizer", counting, "s")
    show(f"learning {settings.merges:,} entries", merging, "s")


def bench_memory(settings: BenchConfig, work: Path):
    """The most memory that prepare_data.py and its processes hold together while they prepare one large file."""
    words = " ".join(" ".join(text.split()) for text, _ in reader_of(settings))
    for lines in ("one line", "many lines"):
        source = work / "large.txt"
        with open(source, "w", encoding="utf-8") as file:
            while file.tell() < settings.file_bytes:
                file.write(words + " " if lines == "one line" else words.replace(". ", ".\n") + "\n")
        options = [f"--source={source}", f"--tokenizer={settings.tokenizer}", f"--data_dir={work}", "--dedupe=near"]
        command = [sys.executable, prepare_data.__file__, "large", *options, f"--processes={settings.processes}"]
        started, most = time.perf_counter(), 0
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                most = max(most, memory_of(process.pid))
                time.sleep(0.1)
        if process.returncode:
            sys.exit(f"prepare_data.py ended with {process.returncode}")
        took = time.perf_counter() - started
        print(f"{source.stat().st_size / 1e6:,.0f} MB in {lines}: {most / 1e6:,.0f} MB of memory, {took:.0f} s in all")
        shutil.rmtree(work / "large")


def memory_of(pid: int) -> int:
    """Bytes that a process and its children hold, what they share counted once (Linux)."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    pss = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
    return pss + sum(memory_of(int(child)) for child in children)


def main(settings: BenchConfig):
    with tempfile.TemporaryDirectory(dir=settings.data_dir) as folder:
        bench_stages(settings, Path(folder))
        bench_merges(settings, Path(folder))
        if settings.file_bytes:
            bench_memory(settings, Path(folder))


if __name__ == "__main__":
    settings = config.load(BenchConfig, sys.argv[1:], positional="name")
    with config.exit_codes():
        main(settings)
