"""Dense against compressed, in transformers and (where it is installed) in vLLM, by `spectrim bench`.

    python benchmarks/serving.py demo
    python benchmarks/serving.py random:1024x8 --batch 1,8 --prompt 256 --new 64
    python benchmarks/serving.py MODEL_DIRECTORY --recipe svd --retain 0.8,0.6,0.4 --set quantize.bits=auto

``random:WIDTHxLAYERS`` is a Llama with random weights, since speed asks for shapes only. Prints a Markdown table for
each engine; ratios are to the dense model in the same engine.
"""

import argparse
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from integers import random_llama
from spectrim.bench import bench
from spectrim.checkpoint import load, load_processor, save
from spectrim.demo import resolve
from spectrim.errors import ModelError
from spectrim.files import parse_yaml
from spectrim.pipeline import compression


def checkpoints(args: argparse.Namespace, home: Path) -> dict[str, Path]:
    """The dense model and one compressed model for each budget, by the name of the row."""
    source, processor = None, None
    if args.model.startswith("random:"):
        model: Any = random_llama(args.model.removeprefix("random:"))
        found = {"dense": save(model, home / "dense")}
    else:
        source = resolve(args.model)
        model, found = load(source), {"dense": Path(source)}
        try:
            processor = load_processor(source)
        except ModelError:
            processor = None
    changes = {key: parse_yaml(value.encode()) for key, _, value in (pair.partition("=") for pair in args.set)}
    with compression(model, args.recipe, processor=processor, changes=changes) as prepared:
        for retain in args.retain.split(","):
            plan = prepared.plan(float(retain))
            found[f"{float(retain):.0%}"] = prepared.save(plan, home / retain, processor=source)
    return found


def main() -> None:
    """Compress, time all in turn in each engine, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--recipe", default="svd")
    parser.add_argument("--set", action="append", default=[], help="change the recipe: key=value")
    parser.add_argument("--retain", default="0.8,0.6,0.4")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", help="the files' own if not given")
    args = parser.parse_args()
    options: dict[str, Any] = {name: getattr(args, name) for name in ("prompt", "new", "repeats")}
    options["batches"] = [int(batch) for batch in args.batch.split(",")]
    options["dtype"] = None if args.dtype is None else getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as scratch:
        found = checkpoints(args, Path(scratch))
        for engine in ("transformers", *(("vllm",) if find_spec("vllm") else ())):
            result = bench(list(found.values()), names=list(found), engine=engine, **options)
            print(f"{engine}, {args.model}, recipe {args.recipe}\n\n{result.markdown()}")


if __name__ == "__main__":
    main()
