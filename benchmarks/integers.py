"""Dense, factored and integer weights of a Llama with random weights, by `spectrim bench`.

    python benchmarks/integers.py OUT                       # 1024x8, bfloat16, writes the checkpoints and the table
    python benchmarks/integers.py OUT --shape 2048x4 --batch 1,4,8 --runtime memory
    python benchmarks/integers.py OUT --engine vllm         # in an environment with vLLM

Speed asks for shapes only. Checkpoints that are in OUT already are taken.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spectrim.anatomy import Anatomy
from spectrim.bench import bench
from spectrim.checkpoint import save
from spectrim.pipeline import compression
from spectrim.plan.plan import Plan, plan_row
from spectrim.plan.units import units_of

FORMS: dict[str, tuple[float, dict[str, Any]]] = {
    "factors at 40 %": (0.4, {}),
    "8 bits by channel": (0.52, {"quantize.bits": 8, "quantize.group": None}),
    "8 bits by groups of 128": (0.53, {"quantize.bits": 8}),
    "4 bits": (0.27, {"quantize.bits": 4}),
    "3 bits": (0.21, {"quantize.bits": 3}),
    "2 bits": (0.15, {"quantize.bits": 2}),
}
NARROW: dict[str, tuple[str, float]] = {  # MLPs of the form with a share of their units
    "factors at 40 %, narrow MLPs": ("factors at 40 %", 0.4),
    "4 bits, narrow MLPs (3/4)": ("4 bits", 0.75),
}


def with_narrow_mlps(plan: Plan, parts: Anatomy, share: float) -> Plan:
    """The plan with so many of the units of every MLP, in the integers that it has for them."""
    rows = dict(plan.linears)
    for reader, first in units_of(parts.linears).items():
        count = int(share * parts.linear(reader).in_features) // 128 * 128
        for name in (*first, reader):
            grid = {"grid": rows[name].spec} if rows[name].form == "integers" else {}
            spec = {"inputs" if name == reader else "outputs": count} | grid
            rows[name] = plan_row(parts.linear(name), "narrow", spec)
    return plan.model_copy(update={"linears": rows})


def random_llama(shape: str) -> LlamaForCausalLM:
    """Of WIDTHxLAYERS, with heads of 64 and twice as many queries as keys."""
    width, layers = (int(number) for number in shape.split("x"))
    config = LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=width * 8 // 3 // 32 * 32, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=max(1, width // 128), max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).bfloat16().eval()


def main() -> None:
    """Write the checkpoints, run them in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="1024x8")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--runtime")
    parser.add_argument("--engine", default="transformers")
    args = parser.parse_args()
    model = random_llama(args.shape)
    found = {"dense": args.out / "dense"}
    if not found["dense"].exists():
        save(model, found["dense"])
    for name in (*FORMS, *NARROW):
        form, share = NARROW.get(name, (name, None))
        retain, changes = FORMS[form]
        found[name] = args.out / re.sub(r"\W+", "-", name.replace("%", "percent")).strip("-")
        if not found[name].exists():
            with compression(model, "svd", changes={**changes, "quantize.method": "rtn"}) as prepared:
                plan = prepared.plan(retain)
                plan = plan if share is None else with_narrow_mlps(plan, prepared.parts, share)
                prepared.save(plan, found[name])
    batches = [int(batch) for batch in args.batch.split(",")]
    sizes = {"prompt": args.prompt, "new": args.new, "repeats": args.repeats}
    how = {"engine": args.engine, "runtime": args.runtime, **sizes}
    print(bench(list(found.values()), names=list(found), batches=batches, **how).markdown())


if __name__ == "__main__":
    main()
