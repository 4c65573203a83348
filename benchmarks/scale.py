"""Time, peak memory and disk of every verb on the shape of a large model with random weights, under a memory limit.

    python benchmarks/scale.py WORK [--shape 3B] [--blocks 1] [--memory 8GiB] [--verbs calibrate,compress,evaluate]

Writes a model into WORK, shard by shard, that has the backbone of Qwen2.5-VL-3B or 7B, or of Qwen3-VL-30B-A3B, behind a
CLIP tower of the widths of the first two (their own processors need torchvision), and runs the command line on it, each
verb in a process of its own: `calibrate` with curvature on 4 windows of 256 tokens and 4 images of 256 tokens,
`compress --recipe curvature --retain 0.4`, and `evaluate`. Calibration and decomposition go on where an earlier run of
the same command stopped.

With --blocks the model has so many blocks of each kind alone. Each row is then followed by one that is extrapolated and
says so: the time that its blocks took, times all blocks, and passes as they are computed for all blocks. Without
--blocks all are run.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3MoeConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from spectrim.anatomy import anatomy
from spectrim.calibrate.forms import choose_forms
from spectrim.calibrate.groups import passes
from spectrim.calibrate.manifest import Manifest
from spectrim.calibrate.memory import batch_bytes
from spectrim.calibrate.probe import written_bytes
from spectrim.calibrate.size import statistics_bytes
from spectrim.settings import UNITS, CalibrationOptions, read_bytes

WORDS = 4096
SHARD = 1 << 30
HELD = 900 * 2**20  # what python, torch and transformers hold, as measured here
SHAPES: dict[str, dict[str, Any]] = {
    "3B": {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "30B-A3B": {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 151936, "tie_word_embeddings": False, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "head_dim": 128,
    },
    "small": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 4200, "tie_word_embeddings": True,
    },
}  # fmt: skip
SIDE, PATCH = 448, 28  # 256 tokens for an image
TOWER = {"num_hidden_layers": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_attention_heads": 16}
SMALL_TOWER = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
TEMPLATE = (
    "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<image> "
    "{% else %} {{ c.text }}{% endif %}{% endfor %}{% endfor %}"
)


def config(shape: str, blocks: int | None) -> LlavaConfig:
    """Of a shape with all or so many blocks."""
    text = dict(SHAPES[shape])
    tower = dict(SMALL_TOWER if shape == "small" else TOWER)
    if blocks is not None:
        text["num_hidden_layers"] = blocks
        tower["num_hidden_layers"] = min(blocks + 1, tower["num_hidden_layers"])  # the last one is not used
    text |= {"bos_token_id": None, "eos_token_id": WORDS + 1}
    kind = Qwen3MoeConfig if "num_experts" in text else Qwen2Config
    return LlavaConfig(
        text_config=kind(**text),
        vision_config=CLIPVisionConfig(**tower, image_size=SIDE, patch_size=PATCH),
        image_token_index=WORDS,
        image_token_id=WORDS,
        tie_word_embeddings=text["tie_word_embeddings"],
        dtype="bfloat16",
    )


def empty(shape: str, blocks: int | None) -> Any:
    """The model on the meta device."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config(shape, blocks), dtype=torch.bfloat16)
    model.tie_weights()
    return model.eval()


def write(directory: Path, shape: str, blocks: int | None) -> None:
    """The model with random weights, its processor, text and images; one shard at a time is in memory."""
    directory.mkdir(parents=True, exist_ok=True)
    model, torch_rng = empty(shape, blocks), torch.Generator().manual_seed(0)
    names, shard, index = dict(model.named_parameters()), {}, {}
    held, number = 0, 1
    for position, (name, like) in enumerate(names.items()):
        value = torch.ones(like.shape) if like.ndim < 2 else torch.randn(like.shape, generator=torch_rng) * 0.02
        shard[name] = value.to(torch.bfloat16)
        index[name], held = f"model-{number:05d}.safetensors", held + like.nbytes
        if held > SHARD or position == len(names) - 1:
            save_file(shard, directory / index[name], metadata={"format": "pt"})
            shard, held, number = {}, 0, number + 1
    record = {"metadata": {}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(record))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    vocabulary = {f"w{i}": i for i in range(WORDS)} | {"<image>": WORDS, "<end>": WORDS + 1}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "w0", "eos_token": "<end>", "extra_special_tokens": {"image_token": "<image>"}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, **special)
    size = {"height": SIDE, "width": SIDE}
    image = CLIPImageProcessorPil(size=size, crop_size=size)
    how = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(image, tokenizer, chat_template=TEMPLATE, **how).save_pretrained(directory)
    words = random.Random(0)
    (directory.parent / "words.txt").write_text(" ".join(f"w{words.randrange(WORDS)}" for _ in range(4000)))
    rows = []
    for number in range(4):
        pixels = torch.randint(0, 256, (448, 448, 3), generator=torch_rng, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(directory.parent / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "w5 w6", "answer": "w7 w8 w9"})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory.parent / "images.jsonl").write_text(text)


def run(arguments: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of one command."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "spectrim", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"spectrim {' '.join(arguments)} ended with {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - began, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def computed(shape: str, blocks: int | None, memory: str) -> tuple[dict[str, int], int]:
    """Passes of each kind, of shapes alone, for a model that is read block by block; and the bytes of statistics."""
    model = empty(shape, blocks)
    parts, options = anatomy(model), CalibrationOptions(samples=4, seqlen=256, memory=memory)
    positions: Any = {"text": {"backbone": 1024}, "image": {"backbone": 1100, "tower": 1024, "connector": 1024}}
    number, unit = read_bytes(memory)
    outside = sum(x.nbytes for name, x in model.named_parameters() if ".layers." not in name)
    batch, expected = batch_bytes(model, parts, positions, options, recomputes=True), dict(positions)
    forms, settings = choose_forms(parts.linears, {}), options.settings
    groups = passes(
        parts, settings, ["text", "image"], forms, int(number * UNITS[unit]) - HELD - outside - batch, 1100, expected
    )
    counts = {kind: len(several) for kind, several in groups.items()}
    return counts, statistics_bytes(parts, settings, ("text", "image"), expected)


def main(given: list[str] | None = None) -> None:
    """Write the model where it is missing, run the verbs, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="3B")
    parser.add_argument("--blocks", type=int, help="of backbone and tower; all without it")
    parser.add_argument("--memory", default="8GiB")
    parser.add_argument(
        "--verbs", default="calibrate,compress,evaluate", help="of these three, or none: computed alone"
    )
    parser.add_argument("--dtype", default="bfloat16", help="of the weights in memory; files are bfloat16")
    parser.add_argument("--batch-size", default="8", help="of the calibration")
    args = parser.parse_args(given)
    whole, nbytes = computed(args.shape, None, args.memory)
    print(
        f"{args.shape}, {args.memory}: computed for all blocks: passes {whole}, {nbytes / 2**30:.0f} GiB of statistics"
    )
    if not args.verbs:
        return
    home = args.work / f"{args.shape}-{args.blocks or 'all'}"
    model, small, stats = home / "model", home / "small", home / "stats"
    if not (home / "images.jsonl").exists():
        write(model, args.shape, args.blocks)
    commands = {
        "calibrate": ["calibrate", str(model), "-o", str(stats), "--text", str(home / "words.txt"), "--images",
                      str(home / "images.jsonl"), "--samples", "4", "--seqlen", "256", "--batch-size", args.batch_size],
        "compress": ["compress", str(model), "-o", str(small), "--overwrite", "--stats", str(stats), "--recipe",
                     "curvature", "--retain", "0.4"],
        "evaluate": ["evaluate", str(model), str(small), "--tasks", "perplexity", "--text", str(home / "words.txt"),
                     "--seqlen", "128", "--max-tokens", "256", "--device", "cpu"],
    }  # fmt: skip
    kept = home / f"{args.memory}.json"
    rows = json.loads(kept.read_text()) if kept.exists() else {}
    for verb in args.verbs.split(","):
        seconds, peak = run([*commands[verb], "--memory", args.memory, "--dtype", args.dtype])
        disk = written_bytes({"calibrate": stats, "compress": small}.get(verb, home / "none"))
        passed = sum(map(len, Manifest.read(stats).groups.values())) if verb == "calibrate" else 0
        rows[verb] = {"seconds": seconds, "peak": peak, "disk": disk, "passes": passed}
        kept.write_text(json.dumps(rows, indent=1))
    every = SHAPES[args.shape]["num_hidden_layers"]
    print("| verb | blocks | seconds | passes | peak RAM, GiB | disk, GiB |\n|---|---|---|---|---|---|")
    for verb, row in rows.items():
        size = f"{row['peak'] / 2**30:.2f} | {row['disk'] / 2**30:.2f}"
        print(f"| {verb} | {args.blocks or every} | {row['seconds']:.0f} | {row['passes'] or ''} | {size} |")
        if args.blocks is not None and args.blocks < every:
            times = every / args.blocks
            more = sum(whole.values()) if verb == "calibrate" else ""
            disk = nbytes if verb == "calibrate" else row["disk"] * times
            print(
                f"| {verb}, *extrapolated* | {every} | {row['seconds'] * times:.0f}, more for passes through blocks "
                f"before a group | {more} | not measured | {disk / 2**30:.0f} |"
            )


if __name__ == "__main__":
    main()
