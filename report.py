"""The report on a dataset: the numbers of its manifest as a page, and in a line for the screen."""

import json
from collections import Counter
from pathlib import Path

import files
from dedupe import CONTAMINATION_WORDS


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
    kept = f"{documents['kept']:,} of {documents['in']:,} documents, {text_bytes / 1e6:.1f} MB"
    tokens = f"{train['tokens']:,} training tokens and {val['tokens']:,} for validation"
    lines = [f"{kept}, {ratio:.2f} bytes per token: {tokens}"]
    lines.append(f"dropped: {dropped}" if dropped else "")
    return "\n".join(filter(None, [*lines, special_tokens(manifest)]))


def report_page(manifest: dict, examples: dict) -> str:
    """What was read, kept and dropped, as a page in Markdown."""
    lines = [f"# {manifest['name']}", "", "| | documents | bytes |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {count:,} | {size:,} |" for name, count, size in table_rows(manifest)]
    lines += ["", "Bytes read, and dropped by a rule, are counted before cleaning."]
    lines.append("Skipped files count as documents.")
    if manifest.get("documents_cut_in_two"):
        lines.append("The documents are too few to hold some out: the end of each is validation.")
    separator = manifest["made_from"].get("separator")
    if separator and not manifest["separator_found"]:
        lines.append(f"No text file has the separator `{separator}` as a line.")
    for rule, count in manifest.get("lines_dropped", {}).items():
        lines.append(f"Of documents that cleaning kept, {rule} dropped {count:,} lines.")
    if "validation_overlap" in manifest:
        share = f"{manifest['validation_overlap']:.2%} of the {CONTAMINATION_WORDS}-grams"
        lines.append(f"Of the first MB of validation text, {share} are in the training text, too.")
    lines += filter(None, [special_tokens(manifest)])
    for reason, shown in examples.items():
        lines += ["", f"## dropped: {reason}", ""]
        for where, text in shown:
            quoted = " ".join(text.split()).replace("`", "'")
            lines.append(f"- `{where}`" + (f": `{quoted}`" if quoted else ""))
    made_from = json.dumps(manifest["made_from"], indent=2)
    return "\n".join([*lines, "", "Made with:", "", "```json", made_from, "```"]) + "\n"


def special_tokens(manifest: dict) -> str:
    """How often the text contains which special tokens, and what became of them; "" for none."""
    counts = (Counter(entry.get("special_tokens")) for entry in manifest["splits"].values())
    names = [f"{n:,} `{name}`" for name, n in sum(counts, Counter()).most_common()]
    is_kept = manifest["tokenizer"]["special_tokens"] == "keep"
    outcome = "special tokens" if is_kept else "plain text; --special_tokens=keep keeps them"
    return f"In the text {', '.join(names)} became {outcome}." if names else ""


def table_rows(manifest: dict) -> list[tuple[str, int, int]]:
    """(name, documents, bytes) of what was read, dropped for each reason, kept, and each split."""
    documents, sizes = manifest["documents"], manifest["bytes"]
    rows = [("read", documents["in"], sizes["in"])]
    for reason, count in documents["dropped"].items():
        rows.append((f"dropped: {reason}", count, sizes["dropped"].get(reason, 0)))
    rows.append(("kept", documents["kept"], sizes["kept"]))
    for split, entry in manifest["splits"].items():
        rows.append((f"{split}: {entry['tokens']:,} tokens", entry["documents"], entry["bytes"]))
    return rows
