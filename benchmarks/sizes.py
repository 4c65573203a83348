"""Ten sizes on three models: what was asked for, and what the weight files take.

    python benchmarks/sizes.py OUT [--smollm2 FILE.gguf --text FILE]

The built-in model, a random Qwen2.5-VL of 4 blocks in tower and backbone, and SmolLM2 where its file is given. Each
is calibrated once and compressed to ten sizes from a fifth of the dense files to nine tenths, by the default recipe
without compensation, which changes no size. Prints one table; OUT keeps the statistics, so that the command goes on
where it was stopped.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from spectrim.checkpoint import load, load_processor
from spectrim.demo import resolve
from spectrim.errors import BudgetError
from spectrim.evaluate.footprint import stored_bytes
from spectrim.pipeline import compression

SHARES = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
CHANGES = {"quantize.bits": "auto", "quantize.embeddings": "auto", "compensate.kind": "none"}


def qwen2_5_vl() -> Any:
    """A random model of the shape of Qwen2.5-VL, narrower and with few blocks; text is what it is calibrated on."""
    torch.manual_seed(0)
    text = {
        "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        "image_token_id": 4090, "video_token_id": 4091, "vision_start_token_id": 4092, "vision_end_token_id": 4093,
    }  # fmt: skip
    vision = {
        "depth": 4, "hidden_size": 256, "intermediate_size": 688, "num_heads": 4, "out_hidden_size": 512,
        "fullatt_block_indexes": [3], "window_size": 56,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16).eval()


def models(arguments: argparse.Namespace) -> Iterator[tuple[str, Any, Any, dict[str, Any]]]:
    """Name, model, processor and how it is calibrated."""
    demo = resolve("demo")
    yield "built-in", load(demo), load_processor(demo), {"samples": 16}
    yield "Qwen2.5-VL, random", qwen2_5_vl(), load_processor(demo).tokenizer, {"samples": 16, "images": None}
    if arguments.smollm2 is not None:
        how = {"samples": 16, "seqlen": 256, "text": arguments.text, "images": None}
        model = load(arguments.smollm2, dtype=torch.bfloat16)
        yield "SmolLM2-135M", model, load_processor(arguments.smollm2), how


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--smollm2", help="SmolLM2's GGUF file")
    parser.add_argument("--text", help="what it is calibrated on")
    arguments = parser.parse_args()
    print("| model | asked, bytes | found, bytes | below, % | embedding and head | predicted loss |\n|" + "---|" * 6)
    rows = []
    for name, model, processor, how in models(arguments):
        home = arguments.out / name.replace(" ", "-").replace(",", "")
        with compression(
            model, "spectrim", changes=CHANGES, processor=processor, keep=home / "statistics", **how
        ) as prepared:
            for share in SHARES:
                asked = int(share * prepared.sizes.dense)
                try:
                    plan = prepared.plan(size=asked)
                except BudgetError as error:
                    print(f"| {name} | {asked:,} | – | – | {error} | |", flush=True)
                    continue
                found = stored_bytes(prepared.save(plan, home / f"{share:.0%}", overwrite=True))
                assert found <= asked
                tables = ", ".join(
                    "dense" if row.form == "dense" else f"{row.spec['bits']} bits" for row in plan.tables.values()
                )
                rows.append({"model": name, "asked": asked, "found": found, "tables": tables, "loss": plan.loss})
                below = f"{1 - found / asked:.2%}".rstrip("%")
                print(f"| {name} | {asked:,} | {found:,} | {below} | {tables} | {plan.loss:.4f} |", flush=True)
    (arguments.out / "sizes.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
