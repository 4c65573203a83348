"""What the levels of ``--effort`` are worth: perplexity, VQA accuracy and seconds of one model at two limits.

    python benchmarks/effort.py demo --out effort.json

Each level calibrates and compresses from nothing, by the recipe `spectrim`, to one share of the bytes of the linears by
ranks and to one size with integers. The seconds are those of both together. Prints a Markdown table.
"""

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import spectrim
from spectrim.checkpoint import load, load_processor
from spectrim.demo import resolve
from spectrim.evaluate import evaluate
from spectrim.evaluate.results import versions
from spectrim.settings import EFFORTS


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--retain", type=float, default=0.3)
    parser.add_argument("--size", default="4.8MB")
    parser.add_argument("--questions", type=int, default=60, help="of each task")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of held-out text")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    source, rows = resolve(args.model), []
    for level in EFFORTS:
        for limit in ({"retain": args.retain}, {"size": args.size}):
            with TemporaryDirectory() as folder:
                out, began = Path(folder) / "small", time.perf_counter()
                spectrim.compress(load(source), out, processor=load_processor(source), effort=level, **limit)
                seconds = time.perf_counter() - began
                report = evaluate([out], samples=args.questions, max_tokens=args.max_tokens, batch_size=40, blind=False)
            (result,) = report.results
            row = {"effort": level, **limit, "perplexity": result.perplexity.per_token, "vqa": result.vqa.mean}
            rows.append(row | {"seconds": seconds, "bytes": result.bytes})
            print(json.dumps(rows[-1]), flush=True)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    content = {"date": date, "versions": versions("torch", "transformers"), "rows": rows}
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    print(markdown(rows))


def markdown(rows: list[dict]) -> str:
    """The rows as a table, one level to a line."""
    lines = [
        "| effort | limit | weight files, MB | VQA accuracy, % | perplexity | seconds, calibration included |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        limit = f"{row['retain']:.0%}" if "retain" in row else row["size"]
        cells = [row["effort"], limit, f"{row['bytes'] / 1e6:.2f}", f"{100 * row['vqa']:.1f}"]
        cells += [f"{row['perplexity']:.2f}", f"{row['seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
