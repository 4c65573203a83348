"""Train the built-in model from nothing: `prepare` the text and tokenizer, `train`, then `assemble` the checkpoint.

    python tools/train_demo.py prepare --work W --docs Django-5.2/docs --easy-vqa easy_vqa/data
    python tools/train_demo.py train --work W
    python tools/train_demo.py assemble --work W --out src/spectrim/demo/dense

`train` runs on the CPU by the clock: first the tower alone, then the whole model on questions and text. It draws every
sample anew, and `--init` continues from earlier weights. docs/demo-model.md says what was run.
"""

import argparse
import ast
import json
import math
import sysconfig
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from spectrim.demo import tasks
from spectrim.demo.scene import COLOURS, GRID, SHAPES, SIZE, draw_icon, draw_scene, draw_word, icon_names
from spectrim.demo.text import split_text

SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<image>"]
PAD, END, USER, ASSISTANT, IMAGE = range(5)
VOCABULARY = 2048  # of the byte-level BPE
PLACES = ("top", "bottom", "left", "right", "above", "below")
EXTREMES = ("smallest", "largest")
NAMES = (*COLOURS, *SHAPES, *(tasks.plural(shape) for shape in SHAPES), *PLACES, *EXTREMES)
PATCH = 28
IMAGE_TOKENS = (SIZE // PATCH) ** 2
TEXT_LENGTH = 256
POINTER = 1  # the query head of the first block that is taught to point; it reads key head 0
HINTS = 3  # prompt tokens before the last one that are to predict the answer too: name, question mark, end
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# How often each kind of question is drawn in the second stage.
SHARES = dict.fromkeys(tasks.TASKS, 1.0) | {"describe": 0.4}
SHARES |= {"count": 2.0, "position": 2.0, "relation": 2.5, "existence": 2.0, "reading": 1.3}
EASY_SHARE = 0.8
# Its first part (`--early`) is for finding an object by its name, which most other tasks build on: the tasks that need
# little else come more often by these factors, and text, whose gradients are the larger ones, is one window to a step.
EARLY = {"colour": 4.0, "shape": 2.0, "count": 3.0, "position": 3.0}


def configuration() -> Any:
    """The architecture: 7 M parameters, a ViT tower of 4 blocks and a Llama backbone of 6."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=3,
        image_size=SIZE, patch_size=PATCH, projection_dim=192,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=VOCABULARY + len(NAMES), hidden_size=256, intermediate_size=640, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=END, pad_token_id=PAD,
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
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

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
    # What is seen is named by whole tokens, the same in questions and answers, so that attention can match them.
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in NAMES])
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


def _ids(tokenizer: Any, question: str, answer: str) -> tuple[list[int], int]:
    """Token ids of a question and its answer, and the position where the answer begins."""
    prompt = [USER] + [IMAGE] * IMAGE_TOKENS + tokenizer.encode(question).ids + [END, ASSISTANT]
    return prompt + tokenizer.encode(answer).ids + [END], len(prompt)


def _pixels(images: list[Image.Image]) -> torch.Tensor:
    """Images as the processor gives them: [n, 3, SIZE, SIZE] in [-1, 1]."""
    stacked = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


class Tower:
    """The first stage: the tower alone. One head for all tokens names what is in their patch.

    The cells of a scene are the patches of the tower, so that a token holds one object; it names its own place too,
    which a tower that learns objects alone would drop. Icons are read from the mean of the tokens.
    """

    def __init__(self, rng: np.random.Generator, width: int) -> None:
        self.rng = rng
        self.sizes = (len(SHAPES) + 1, len(COLOURS) + 1, 4)  # none first; sizes in steps of 3 pixels
        self.head = torch.nn.ModuleDict(
            {
                "patch": torch.nn.Linear(width, sum(self.sizes)),
                "letter": torch.nn.Linear(width, 27),
                "icon": torch.nn.Linear(width, len(icon_names())),
                "place": torch.nn.Linear(width, IMAGE_TOKENS),
            }
        )

    def loss(self, model: Any, size: int) -> torch.Tensor:
        """Sum of the cross-entropies on `size` images: half scenes, a quarter words, a quarter icons."""
        images: list[Image.Image] = []
        targets = torch.zeros(3, size // 2, IMAGE_TOKENS, dtype=torch.long)
        for row in range(size // 2):
            items = tasks._items(self.rng, int(self.rng.integers(1, 8)))
            items = [replace(item, radius=float(self.rng.uniform(5.5, 13.5))) for item in items]
            images.append(draw_scene(items, self.rng))
            for item in items:
                named = (list(SHAPES).index(item.shape), list(COLOURS).index(item.colour), int((item.radius - 5) / 3))
                targets[:, row, GRID * item.row + item.column] = 1 + torch.tensor(named)
        letters = torch.zeros(size // 4, IMAGE_TOKENS, dtype=torch.long)
        for number in range(size // 4):
            word = tasks.WORDS[self.rng.integers(len(tasks.WORDS))]
            row, column = int(self.rng.integers(GRID)), int(self.rng.integers(GRID + 1 - len(word)))
            images.append(draw_word(word, row, column, self.rng))
            first = GRID * row + column
            letters[number, first : first + len(word)] = torch.tensor([ord(letter) - 96 for letter in word])
        icons = torch.from_numpy(self.rng.integers(len(icon_names()), size=size // 4))
        images += [draw_icon(icon_names()[i], self.rng) for i in icons.tolist()]
        tokens = model.model.vision_tower(pixel_values=_pixels(images)).last_hidden_state[:, 1:]
        scene, word, icon = tokens.split([size // 2, size // 4, size // 4])
        cross = torch.nn.functional.cross_entropy
        named = self.head["patch"](scene).float().flatten(0, 1).split(self.sizes, 1)
        losses = [cross(logits, target.flatten()) for logits, target in zip(named, targets, strict=True)]
        losses.append(cross(self.head["letter"](word).float().flatten(0, 1), letters.flatten()))
        losses.append(cross(self.head["icon"](icon.mean(1)).float(), icons))
        places = torch.arange(IMAGE_TOKENS).repeat(len(scene))
        losses.append(cross(self.head["place"](scene).float().flatten(0, 1), places))
        return torch.stack(losses).sum()


def alignment(model: Any, place: torch.nn.Linear, questions: "Questions", size: int) -> torch.Tensor:
    """Cross-entropy that ties the connector's tokens to words: an object's token means its shape and colour.

    The connector's output goes through the output head, whose weights are the word embeddings; the target is equal
    mass on all words that hold (the letter alone, in images of words). It puts what is seen next to what is asked, so
    that attention finds one by the other; without it, training stalls on the set of colours. Every token is
    asked for its place as well, by the head `place` and between the words of each axis: nothing else keeps it in the
    connector while no question of places is understood.
    """
    images, rows, columns, shares = [], [], [], []
    drawn: list[list[Any]] = []

    def add(number: int, row: int, column: int, *words: str) -> None:
        rows.extend([number * IMAGE_TOKENS + GRID * row + column] * len(words))
        columns.extend(questions.tokenizer.token_to_id(word) for word in words)
        shares.extend([1 / len(words)] * len(words))

    rng = questions.rng
    for number in range(size):
        if number % 4 == 0:
            word = tasks.WORDS[rng.integers(len(tasks.WORDS))]
            row, first = int(rng.integers(GRID)), int(rng.integers(GRID + 1 - len(word)))
            images.append(draw_word(word, row, first, rng))
            drawn.append([])
            for offset, letter in enumerate(word):
                add(number, row, first + offset, letter)
            continue
        items = tasks._items(rng, int(rng.integers(1, 8)))
        items = [replace(item, radius=float(rng.uniform(5.5, 13.5))) for item in items]
        images.append(draw_scene(items, rng))
        drawn.append(items)
        for item in items:
            extreme = ["smallest"] if item.radius < 7.5 else ["largest"] if item.radius > 11.5 else []
            add(number, item.row, item.column, item.shape, item.colour, *extreme)
    tokens = model.model.vision_tower(pixel_values=_pixels(images)).last_hidden_state[:, 1:]
    tokens = model.model.multi_modal_projector(tokens)
    cross, logits = torch.nn.functional.cross_entropy, model.lm_head(tokens).float().flatten(0, 1)
    weights = torch.tensor(shares)
    named = -(logits.log_softmax(-1)[rows, columns] * weights).sum() / weights.sum()
    cell = torch.arange(IMAGE_TOKENS).repeat(size)
    places = cross(place(tokens).float().flatten(0, 1), cell)
    half = GRID // 2
    for words, where in ((("top", "bottom"), cell // GRID // half), (("left", "right"), cell % GRID // half)):
        places = places + cross(logits[:, [questions.tokenizer.token_to_id(word) for word in words]], where)
    scenes = [number for number, items in enumerate(drawn) if items]
    return named + places + pointing(model, tokens[scenes], [drawn[number] for number in scenes], questions)


def pointing(model: Any, tokens: torch.Tensor, scenes: list[list[Any]], questions: "Questions") -> torch.Tensor:
    """Cross-entropy of the attention that one head of the first block pays from a shape's name to the shape's patch.

    Colours find their patch without this; shapes, whose words lie closer together, did not in an hour.

    Args:
        tokens: [scenes, IMAGE_TOKENS, hidden], the connector's output.
        scenes: the items of each.
    """
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    plural = bool(questions.rng.integers(2))
    before = questions.tokenizer.encode("How many " if plural else "What colour is the ").ids
    chosen = [items[questions.rng.integers(len(items))] for items in scenes]
    names = [questions.tokenizer.token_to_id(tasks.plural(x.shape) if plural else x.shape) for x in chosen]
    targets = torch.tensor([1 + GRID * x.row + x.column for x in chosen])
    embed, backbone = model.get_input_embeddings(), model.model.language_model
    ids = torch.tensor([[USER, *before, name] for name in names])
    words = embed(ids)
    states = torch.cat([words[:, :1], tokens.to(words.dtype), words[:, 1:]], dim=1)
    layer, size = backbone.layers[0], backbone.config.hidden_size // backbone.config.num_attention_heads
    states = layer.input_layernorm(states)
    query = layer.self_attn.q_proj(states).unflatten(-1, (-1, size)).transpose(1, 2)
    key = layer.self_attn.k_proj(states).unflatten(-1, (-1, size)).transpose(1, 2)
    cos, sin = backbone.rotary_emb(states, torch.arange(states.shape[1])[None])
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    scores = (key[:, 0] @ query[:, POINTER, -1, :, None])[..., 0].float() / size**0.5
    return torch.nn.functional.cross_entropy(scores, targets)


class Questions:
    """The second stage: endless questions of all kinds by their shares, easy-VQA's training questions among them."""

    def __init__(self, work: Path, rng: np.random.Generator, seed: int) -> None:
        from tokenizers import Tokenizer

        self.rng = rng
        self.tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
        self.streams = [tasks.stream(task, "train", seed) for task in SHARES]
        self.easy = json.loads((work / "easy_questions.json").read_text())
        self.images = np.load(work / "easy_images.npz")["pixels"]
        self.early = True

    def draw(self, kind: int) -> tuple[Image.Image, str, str]:
        """One question: its image, its text and its answer."""
        if kind < len(self.streams):
            found = next(self.streams[kind])
            return found.image, found.question, found.answer
        question, answer, index = self.easy[self.rng.integers(len(self.easy))]
        image = Image.fromarray(self.images[index]).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        return image, question[0].upper() + question[1:], answer

    def batch(self, size: int) -> dict[str, torch.Tensor]:
        """Pixels, ids padded on the right, and labels (-100 for none).

        Labels cover the answer. The last tokens of the question have its first token as their label as well: the
        token that names an object then learns to find it by itself, one step of attention instead of two.
        """
        wanted = [share * (EARLY.get(task, 1.0) if self.early else 1.0) for task, share in SHARES.items()]
        shares = np.array([*wanted, EASY_SHARE if self.easy else 0.0])
        kinds = self.rng.choice(len(shares), size, p=shares / shares.sum()).tolist()
        drawn = [self.draw(kind) for kind in kinds]
        rows = [_ids(self.tokenizer, question, answer) for _, question, answer in drawn]
        width = max(len(ids) for ids, _ in rows)
        padded, labels = torch.full((size, width), PAD), torch.full((size, width), -100)
        for i, (ids, start) in enumerate(rows):
            padded[i, : len(ids)] = torch.tensor(ids)
            labels[i, start : len(ids)] = torch.tensor(ids[start:])
            labels[i, start - HINTS : start] = ids[start]
        return {"pixel_values": _pixels([image for image, _, _ in drawn]), "input_ids": padded, "labels": labels}


def losses(model: Any, batch: dict[str, torch.Tensor], text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy of the answer tokens, and of the text tokens."""
    hidden = model.model(
        input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], use_cache=False
    ).last_hidden_state
    keep = batch["labels"][:, 1:] != -100
    cross = torch.nn.functional.cross_entropy
    answers = cross(model.lm_head(hidden[:, :-1][keep]).float(), batch["labels"][:, 1:][keep])
    hidden = model.model(input_ids=text[:, :-1], use_cache=False).last_hidden_state
    return answers, cross(model.lm_head(hidden).float().flatten(0, 1), text[:, 1:].flatten())


def optimiser(modules: list[torch.nn.Module]) -> torch.optim.Optimizer:
    """AdamW with decay on matrices only."""
    parameters = {id(p): p for module in modules for p in module.parameters()}.values()
    decay, other = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def train(args: argparse.Namespace) -> None:
    """Train both stages; the rate follows the clock (see `--tower-minutes` and `--minutes`); logs to W/train.jsonl."""
    from safetensors.torch import save_file
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    if args.init is None:
        model = LlavaForConditionalGeneration(configuration())
    else:
        model = LlavaForConditionalGeneration.from_pretrained(args.init, dtype=torch.float32)
    tower = Tower(rng, model.config.vision_config.hidden_size)
    questions = Questions(args.work, rng, args.seed)
    place = torch.nn.Linear(model.config.text_config.hidden_size, IMAGE_TOKENS)
    corpus = torch.from_numpy(np.load(args.work / "text.npy").astype(np.int64))

    def first() -> dict[str, torch.Tensor]:
        return {"tower": tower.loss(model, args.tower_batch)}

    def second() -> dict[str, torch.Tensor]:
        windows = 1 if questions.early else args.text_batch
        starts = torch.from_numpy(rng.integers(len(corpus) - TEXT_LENGTH - 1, size=windows))
        text = corpus[starts[:, None] + torch.arange(TEXT_LENGTH + 1)]
        answers, language = losses(model, questions.batch(args.batch), text)
        return {"answers": answers, "text": language, "align": alignment(model, place, questions, args.batch // 3)}

    stages = [
        (first, args.tower_minutes, args.tower_rate, [model.model.vision_tower, tower.head]),
        (second, args.minutes, args.rate, [model, place]),
    ]
    weight = {"tower": 1.0, "answers": 1.0, "align": 0.5}
    with (args.work / "train.jsonl").open("a") as log:
        for number, (compute, minutes, peak, modules) in enumerate(stages):
            optimizer, began, step = optimiser(modules), time.time(), 0
            while (spent := time.time() - began) < minutes * 60:
                done = spent / (minutes * 60)
                questions.early = done < args.early
                rate = peak * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
                for group in optimizer.param_groups:
                    group["lr"] = rate
                with torch.autocast("cpu", torch.bfloat16):
                    found = compute()
                weight["text"] = args.text_weight / (2 if questions.early else 1)
                torch.stack([weight[name] * value for name, value in found.items()]).sum().backward()
                torch.nn.utils.clip_grad_norm_([p for m in modules for p in m.parameters()], 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                if step % args.log_every == 0:
                    values = {name: round(value.item(), 4) for name, value in found.items()}
                    if not all(math.isfinite(value) for value in values.values()):
                        raise SystemExit(f"the loss is not finite at step {step}")
                    line = json.dumps({"stage": number + 1, "step": step, "seconds": round(spent), **values})
                    log.write(line + "\n")
                    log.flush()
                    print(line, flush=True)
                if step % 500 == 0:
                    save_file(_weights(model), args.work / "model.safetensors")
    save_file(_weights(model), args.work / "model.safetensors")
    print(f"wrote {args.work / 'model.safetensors'}", flush=True)


def _weights(model: Any) -> dict[str, torch.Tensor]:
    return {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}


def assemble(args: argparse.Namespace) -> None:
    """Write the ordinary Hugging Face directory: bf16 weights, tokenizer, chat template, processor, model card."""
    from safetensors.torch import load_file, save_file
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
    # LLaVA files on the hub have one more level in the names of the tower; vLLM 0.32 knows only those names.
    tensors = load_file(args.out / "model.safetensors")
    names = {name: name.replace("vision_tower.", "vision_tower.vision_model.", 1) for name in tensors}
    save_file({names[name]: x for name, x in tensors.items()}, args.out / "model.safetensors", {"format": "pt"})
    processor.save_pretrained(args.out)
    for path in args.out.iterdir():  # safetensors keeps its files from other users
        path.chmod(0o644)


def main() -> None:
    """Parse the command line and run one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("prepare", "train", "assemble"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--docs", type=Path, help="the docs folder of Django's source distribution (BSD licence)")
    parser.add_argument("--easy-vqa", type=Path, help="the data folder of the PyPI package easy-vqa (MIT licence)")
    parser.add_argument("--out", type=Path, help="where `assemble` writes the model directory")
    parser.add_argument("--init", type=Path, help="model directory to continue from")
    parser.add_argument("--tower-minutes", type=float, default=10.0)
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--tower-batch", type=int, default=64, help="images in a step of the first stage")
    parser.add_argument("--batch", type=int, default=64, help="questions in a step of the second stage")
    parser.add_argument("--text-batch", type=int, default=3, help="text windows of 256 tokens in such a step")
    parser.add_argument("--text-weight", type=float, default=0.4)
    parser.add_argument("--early", type=float, default=0.25, help="share of the second stage for finding objects")
    parser.add_argument("--tower-rate", type=float, default=1.5e-3)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=50)
    args = parser.parse_args()
    {"prepare": prepare, "train": train, "assemble": assemble}[args.stage](args)


if __name__ == "__main__":
    main()
