"""Which ranges of scales are tried with error feedback: some blocks of a language model in integers, by excess nats.

    python benchmarks/ranges.py MODEL --stats STATS --text calibration.txt --blocks 10,11,12

Every linear of these blocks is rounded with feedback in the recipe's metric, the others stay dense. Nats are of the
text, above the dense model's. Give a text that no result is reported on: the constants are chosen by it.
"""

import argparse
import math
from pathlib import Path

import torch

from spectrim.anatomy import anatomy
from spectrim.calibrate import Statistics
from spectrim.checkpoint import load, load_processor
from spectrim.evaluate import perplexity
from spectrim.maths import rounding
from spectrim.metrics.metric import layer_metric
from spectrim.recipe import Recipe
from spectrim.samples import load_text

RANGES = ((1.2, 0.7), (1.1, 0.6), (1.0, 0.5))


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--stats", type=Path, required=True)
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--blocks", default="10,11,12")
    parser.add_argument("--bits", default="3,2")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=6144)
    args = parser.parse_args()
    model, processor = load(args.model, dtype=torch.float32), load_processor(args.model)
    statistics, recipe = Statistics.open(args.stats), Recipe.read("spectrim")
    parts, text = anatomy(model), load_text(args.text)
    blocks = [parts.blocks()[int(number)] for number in args.blocks.split(",")]
    linears = [linear for linear in parts.linears if linear.block in blocks]
    metrics = {linear.name: layer_metric(recipe.metric, linear, statistics) for linear in linears}
    dense = {linear.name: model.get_submodule(linear.name).weight.detach().clone() for linear in linears}

    def nats() -> float:
        tokenizer = getattr(processor, "tokenizer", processor)
        return math.log(perplexity(model, tokenizer, text, seqlen=512, max_tokens=args.max_tokens).per_token)

    start = nats()
    print("| bits | ranges | excess nats |\n|---|---|---|")
    for bits in map(int, args.bits.split(",")):
        for most, least in RANGES:
            rounding._FED = (most, least)
            for name, weight in dense.items():
                metric = metrics[name]
                assert metric.output is not None
                grid = rounding.Grid(bits, rounding.fitting_group(weight.shape[1], args.group))
                output = metric.output.dense(len(weight))
                made = rounding.quantize(weight, grid, metric.value, output, dtype=torch.bfloat16)
                model.get_submodule(name).weight.data = made.dense().float()
            print(f"| {bits} | {most} to {least} | {nats() - start:.4f} |", flush=True)


if __name__ == "__main__":
    main()
