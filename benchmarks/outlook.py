"""Passes and disk of calibrations of large models, as the estimate computes them from shapes alone; nothing runs.

    python benchmarks/outlook.py

256 samples of each modality with 2048 tokens (images: 1024), one at a time, with curvature. Time is not printed: it
would be that of the CPU here.
"""

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig, Qwen3VLMoeConfig

from guide import MODELS
from spectrim.anatomy import anatomy
from spectrim.calibrate.outlook import outlook
from spectrim.errors import UsageError
from spectrim.settings import CalibrationOptions

MIXTURE = Qwen3VLMoeConfig(
    text_config={
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "vocab_size": 151936,
    },
    vision_config={
        "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 2048,
        "deepstack_visual_indexes": [8, 16, 24],
    },
)  # fmt: skip
SKETCHES = {"gate": "sketch:256", "up": "sketch:256"}
ROWS: tuple[tuple[str, PreTrainedConfig, str, dict[str, str]], ...] = (
    ("Qwen2.5-VL-7B", MODELS["Qwen2.5-VL-7B"], "20GiB", {}),
    ("Qwen2.5-VL-7B, gate and up as sketch:256", MODELS["Qwen2.5-VL-7B"], "20GiB", SKETCHES),
    ("Qwen2.5-VL-7B", MODELS["Qwen2.5-VL-7B"], "64GiB", {}),
    ("Qwen3-VL-30B-A3B", MIXTURE, "20GiB", {}),
    ("Qwen3-VL-30B-A3B", MIXTURE, "64GiB", {}),
)


def main() -> None:
    """Print the table."""
    print("| model | `--memory` | text / image / text gradients / image gradients | disk |\n|---|---|---|---|")
    for name, config, memory, forms in ROWS:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        model.tie_weights()
        options = CalibrationOptions(samples=256, seqlen=2048, batch_size=1, memory=memory, curvature_forms=forms)
        try:
            passes, found = outlook(model, anatomy(model), None, options)
            print(f"| {name} | {memory} | {' / '.join(map(str, passes.values()))} | {found.disk / 1e9:.0f} GB |")
        except UsageError as error:
            print(f"| {name} | {memory} | refused: {error} | |")


if __name__ == "__main__":
    main()
