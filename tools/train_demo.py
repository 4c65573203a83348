"""Train the built-in model from nothing: `prepare` the text and tokenizer, `train`, then `assemble` the checkpoint.

    python tools/train_demo.py prepare --work W --docs Django-5.2/docs --easy-vqa easy_vqa/data
    python tools/train_demo.py train --work W --steps 24000
    python tools/train_demo.py assemble --work W --out src/spectrim/demo/model

`prepare` and `assemble` need no accelerator. `train` runs anywhere; the schedule in docs/demo-model.md took an H100
about twenty minutes. It can be stopped and started again: the state is written to W/state.pt every `--save` seconds.
"""

import argparse
import ast
import json
import math
import random
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from spectrim.demo import tasks
from spectrim.demo.scene import SIZE
from spectrim.demo.text import split_text

SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<image>"]
PAD, END, USER, ASSISTANT, IMAGE = range(5)
VOCABULARY = 4096
PATCH = 16
IMAGE_TOKENS = (SIZE // PATCH) ** 2
TEXT_LENGTH = 256
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Share of each task among the image samples: captions first teach the tower, the harder tasks get more later.
EARLY = {"describe": 5, "reading": 2, "icon": 2}
LATE = {"describe": 1, "reading": 3, "icon": 1.5, "count": 1.5, "relation": 1.5, "size": 1.5}


def configuration() -> Any:
    """The architecture: 10 M parameters, a ViT tower of 6 blocks and a Llama backbone of 8."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=3,
        image_size=SIZE, patch_size=PATCH, projection_dim=192,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=END, pad_token_id=PAD,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_index=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="default", image_seq_length=IMAGE_TOKENS, tie_word_embeddings=True,
        eos_token_id=END, pad_token_id=PAD,
    )  # fmt: skip


def docstrings() -> str:
    """Docstrings of the standard library, without its tests."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), set()
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"} & set(path.parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) > 80:
                    found.add(text)
    return "\n\n".join(sorted(found))


def clean(text: str) -> str:
    """Drop the paragraphs that stand in the calibration or held-out text too."""
    kept = {" ".join(p.split()) for s in ("calibration", "heldout") for p in split_text(s).split("\n\n")}
    return "\n\n".join(p for p in text.split("\n\n") if len(p) < 40 or " ".join(p.split()) not in kept)


def prepare(args: argparse.Namespace) -> None:
    """Write the tokenizer, the token ids of the training text, and the easy-VQA training questions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    args.work.mkdir(parents=True, exist_ok=True)
    docs = "\n\n".join(p.read_text() for p in sorted(args.docs.rglob("*.txt")))
    parts = {"topics": split_text("train"), "docstrings": clean(docstrings()), "django": clean(docs)}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet)
    lines = [f"{q.question}\n{q.answer}" for t in (*tasks.TASKS, "describe") for q in tasks.questions(t, "train", 300)]
    tokenizer.train_from_iterator(
        [parts["topics"]] * 3 + [parts["docstrings"], parts["django"][:2_000_000], *lines], trainer
    )
    tokenizer.save(str(args.work / "tokenizer.json"))
    ids = [tokenizer.encode(text).ids for text in parts.values()]
    np.save(args.work / "text.npy", np.array([token for part in ids for token in (*part, END)], dtype=np.uint16))
    root = args.easy_vqa / "train"
    pixels = [np.asarray(Image.open(root / "images" / f"{i}.png").convert("RGB")) for i in range(4000)]
    np.savez_compressed(args.work / "easy_images.npz", pixels=np.stack(pixels))
    (args.work / "easy_questions.json").write_text((root / "questions.json").read_text())
    sizes = {name: [len(text), len(i)] for (name, text), i in zip(parts.items(), ids, strict=True)}
    (args.work / "corpus.json").write_text(json.dumps(sizes))
    print("characters and tokens:", sizes)


def _chunk(job: tuple[str, int, int, str]) -> tuple[np.ndarray, list[tuple[list[int], int]]]:
    """Questions of one task: pixels, and token ids with the position where the answer begins."""
    from tokenizers import Tokenizer

    task, seed, count, path = job
    tokenizer = Tokenizer.from_file(path)
    found = tasks.questions(task, "train", count, seed + 1)
    return np.stack([np.asarray(q.image) for q in found]), [_ids(tokenizer, q.question, q.answer) for q in found]


def _ids(tokenizer: Any, question: str, answer: str) -> tuple[list[int], int]:
    prompt = [USER] + [IMAGE] * IMAGE_TOKENS + tokenizer.encode(question).ids + [END, ASSISTANT]
    return prompt + tokenizer.encode(answer).ids + [END], len(prompt)


class Pool:
    """Generated samples on the device: uint8 pixels, padded ids, and labels that cover the answer alone."""

    def __init__(self, args: argparse.Namespace, device: str) -> None:
        started, path, size = time.time(), str(args.work / "tokenizer.json"), 1000
        counts = {t: max(1, int(args.pool * (LATE.get(t, 1) + EARLY.get(t, 0)) / 30 / size)) for t in tasks._MAKERS}
        jobs = [(task, seed, size, path) for task, n in counts.items() for seed in range(n)]
        random.Random(0).shuffle(jobs)
        pixels, rows, kinds = [], [], []
        with ProcessPoolExecutor(args.workers) as pool:
            for job, (images, ids) in zip(jobs, pool.map(_chunk, jobs, chunksize=2), strict=True):
                pixels.append(torch.from_numpy(images))
                rows += ids
                kinds += [list(tasks._MAKERS).index(job[0])] * len(ids)
        easy = json.loads((args.work / "easy_questions.json").read_text())
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(path)
        stored = np.load(args.work / "easy_images.npz")["pixels"]
        enlarged = [np.asarray(Image.fromarray(p).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for p in stored]
        first = sum(len(p) for p in pixels)
        pixels.append(torch.from_numpy(np.stack(enlarged)))
        self.source = torch.tensor(list(range(first)) + [first + index for _, _, index in easy], device=device)
        rows += [_ids(tokenizer, question[0].upper() + question[1:], answer) for question, answer, _ in easy]
        kinds += [len(tasks._MAKERS)] * len(easy)
        width = max(len(ids) for ids, _ in rows)
        padded = torch.full((len(rows), width), PAD)
        labels = torch.full((len(rows), width), -100)
        for i, (ids, start) in enumerate(rows):
            padded[i, : len(ids)] = torch.tensor(ids)
            labels[i, start : len(ids)] = torch.tensor(ids[start:])
        self.pixels, self.ids, self.labels = torch.cat(pixels).to(device), padded.to(device), labels.to(device)
        kind = torch.tensor(kinds, device=device)
        self.members = [torch.nonzero(kind == k).flatten() for k in range(len(tasks._MAKERS) + 1)]
        print(f"pool: {len(rows)} questions, width {width}, {time.time() - started:.0f} s", flush=True)

    def batch(self, size: int, early: bool, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Draw a batch: the kinds by their shares, the members of a kind uniformly. Pixels are scaled to [-1, 1]."""
        device = self.ids.device
        shares = [(EARLY if early else LATE).get(t, 0.5 if early else 1) for t in tasks._MAKERS] + [0.7]
        kinds = torch.multinomial(torch.tensor(shares), size, replacement=True, generator=generator)
        draws = [
            self.members[k][torch.randint(len(self.members[k]), (n,), generator=generator).to(device)]
            for k, n in enumerate(torch.bincount(kinds, minlength=len(shares)).tolist())
        ]
        rows = torch.cat(draws)
        pixels = self.pixels[self.source[rows]].permute(0, 3, 1, 2).float() / 127.5 - 1
        return {"pixel_values": pixels, "input_ids": self.ids[rows], "labels": self.labels[rows]}


def losses(model: Any, batch: dict[str, torch.Tensor], text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy of the answer tokens, and of the text tokens."""
    hidden = model.model(
        input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], attention_mask=None, use_cache=False
    ).last_hidden_state
    keep = batch["labels"][:, 1:] != -100
    answers = torch.nn.functional.cross_entropy(
        model.lm_head(hidden[:, :-1][keep]).float(), batch["labels"][:, 1:][keep]
    )
    hidden = model.model(input_ids=text[:, :-1], use_cache=False).last_hidden_state
    language = torch.nn.functional.cross_entropy(model.lm_head(hidden).float().flatten(0, 1), text[:, 1:].flatten())
    return answers, language


def train(args: argparse.Namespace) -> None:
    """Train on the generated pool; logs JSON lines to W/train.jsonl, writes W/model.safetensors in bf16 at the end."""
    from safetensors.torch import save_file
    from transformers import LlavaForConditionalGeneration

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model = LlavaForConditionalGeneration(configuration()).to(device)
    decay = [p for p in model.parameters() if p.ndim >= 2]
    other = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.98), fused=device == "cuda",
    )  # fmt: skip
    step, seconds = 0, 0.0
    state_file = args.work / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
    pool = Pool(args, device)
    corpus = torch.from_numpy(np.load(args.work / "text.npy").astype(np.int64)).to(device)
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    began = saved = time.time()
    with (args.work / "train.jsonl").open("a") as log:
        while step < args.steps and time.time() - began < args.limit:
            warm = min(1.0, (step + 1) / 500)
            rate = args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            starts = torch.randint(len(corpus) - TEXT_LENGTH - 1, (args.text_batch,), generator=generator).to(device)
            text = corpus[starts[:, None] + torch.arange(TEXT_LENGTH + 1, device=device)]
            batch = pool.batch(args.batch, step < args.steps * 0.2, generator)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                answers, language = losses(model, batch, text)
            (answers + args.text_weight * language).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % args.log_every == 0 or step == args.steps:
                spent = seconds + time.time() - began
                line = {"step": step, "answers": answers.item(), "text": language.item(), "seconds": round(spent, 1)}
                if not math.isfinite(line["answers"] + line["text"]):
                    raise SystemExit(f"the loss is not finite at step {step}")
                log.write(json.dumps(line) + "\n")
                log.flush()
                print(line, flush=True)
            if time.time() - saved > args.save or step == args.steps or time.time() - began >= args.limit:
                spent = seconds + time.time() - began
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**state, "step": step, "seconds": spent}, state_file)
                saved = time.time()
    weights = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, args.work / "model.safetensors")
    print(f"step {step} of {args.steps}: wrote {args.work / 'model.safetensors'}", flush=True)


def assemble(args: argparse.Namespace) -> None:
    """Write the ordinary Hugging Face directory: bf16 weights, tokenizer, chat template, processor, model card."""
    from safetensors.torch import load_file
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = LlavaForConditionalGeneration(configuration()).to(torch.bfloat16)
    missing, unexpected = model.load_state_dict(load_file(args.work / "model.safetensors"), strict=False)
    if missing != ["lm_head.weight"] or unexpected:
        raise SystemExit(f"the weights do not fit the model: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = END, PAD
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(args.work / "tokenizer.json"), pad_token="<|pad|>", eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<image>"], model_max_length=1024,
        padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip
    size = {"height": SIZE, "width": SIZE}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size=size, crop_size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        tokenizer=tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)


def main() -> None:
    """Parse the command line and run one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("prepare", "train", "assemble"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--docs", type=Path, help="the docs folder of Django's source distribution (BSD licence)")
    parser.add_argument("--easy-vqa", type=Path, help="the data folder of the PyPI package easy-vqa (MIT licence)")
    parser.add_argument("--out", type=Path, help="where `assemble` writes the model directory")
    parser.add_argument("--steps", type=int, default=24000)
    parser.add_argument("--batch", type=int, default=512, help="questions in a step")
    parser.add_argument("--text-batch", type=int, default=16, help="text windows of 256 tokens in a step")
    parser.add_argument("--text-weight", type=float, default=0.5)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=int, default=900_000, help="generated questions, 38 kB each on the device")
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--save", type=float, default=120.0, help="seconds between writes of the state")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds of training in this call")
    parser.add_argument("--log-every", type=int, default=200)
    args = parser.parse_args()
    {"prepare": prepare, "train": train, "assemble": assemble}[args.stage](args)


if __name__ == "__main__":
    main()
