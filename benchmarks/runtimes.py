"""How near a compressed model's fast runtimes are to its reference: logits token by token on real text.

    python benchmarks/runtimes.py CHECKPOINT --text heldout.txt --tokens 512

Tokens are read one by one with a cache, as in decoding, so that the kernels for few rows run. All runtimes, the
reference included, are compared with the reference in float32, so that what bfloat16 alone costs shows: the largest
relative difference of a row of logits, the mean, and the share of positions with the same most likely token.
"""

import argparse
from pathlib import Path

import torch

from spectrim.checkpoint import load, load_processor
from spectrim.storage.runtime import RUNTIMES, set_runtime


@torch.inference_mode()
def decoded(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits float32 [tokens, vocabulary], from one step for each token."""
    cache, rows = None, []
    for token in ids:
        out = model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits[0, -1].float())
    return torch.stack(rows)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    processor = load_processor(args.checkpoint)
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = torch.tensor(tokenizer(args.text.read_text())["input_ids"][: args.tokens])
    expected = decoded(load(args.checkpoint, dtype=torch.float32, runtime="reference"), ids)
    model = load(args.checkpoint)
    print(f"{len(ids)} tokens, {str(model.dtype).removeprefix('torch.')}, torch {torch.__version__}\n")
    print("| runtime | layouts | largest difference | mean | same token |\n|---|---|---|---|---|")
    for runtime in reversed(RUNTIMES):
        layouts = set_runtime(model, runtime)
        found = decoded(model, ids)
        apart = (found - expected).norm(dim=1) / expected.norm(dim=1)
        same = (found.argmax(1) == expected.argmax(1)).float().mean()
        listed = ", ".join(f"{count} {name}" for name, count in sorted(layouts.items()))
        print(f"| {runtime} | {listed} | {apart.max():.1e} | {apart.mean():.1e} | {same:.2%} |")


if __name__ == "__main__":
    main()
