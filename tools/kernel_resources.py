"""What our Triton kernels take of a GPU, without one: registers, spilled bytes and shared memory for three targets.

    python tools/kernel_resources.py [--json] [--all]

Exits with 1 if a kernel spills more than 16 bytes or takes more shared memory than a program can have on a target.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton's default today; it warns where nobody says so

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spectrim.kernels import latent_decode_triton, unpack_triton

STEPS = ("row_k", "token_k", "row_v", "token_v", "row_cos", "token_cos", "split_size")
TARGETS = {80: 163, 90: 227, 120: 99}  # KiB of shared memory that one program can have
SPILLED = 16  # bytes by thread that are let pass: some versions of Triton put a constant or two of a loop there
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Kernel:
    """One kernel with the types of its arguments and its constants."""

    name: str
    function: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Resources:
    """Of one kernel on one target; registers by thread, bytes of local memory by thread, bytes shared by program."""

    kernel: str
    target: str
    registers: int
    spilled: int
    shared: int
    limit: int

    @property
    def fits(self) -> bool:
        """Whether nothing to speak of is spilled and shared memory suffices."""
        return self.spilled <= SPILLED and self.shared <= self.limit


def kernels(every: bool) -> list[Kernel]:
    """Those of the package, in some variants, or in all that matter."""
    return [*unpacking(), *decoding(every)]


def unpacking() -> list[Kernel]:
    """Codes that lie across words, which take most."""
    types = {"words": "*i32", "scales": "*bf16", "zeros": "*i8", "weight": "*bf16"}
    types |= dict.fromkeys(("out", "size", "row_words", "groups", "group"), "i32")
    constants = {"BITS": 3, "HAS_ZEROS": True, "ROWS": unpack_triton.ROWS, "COLUMNS": unpack_triton.COLUMNS}
    return [Kernel("unpack 3 bits", unpack_triton.unpack_kernel, types, constants, {"num_warps": 4})]


ROWS = ("k", "v", "cos", "rms", "scale", "mask")
EVERY = ("cos", "sin", "b_k", "inverse_rms", "mask", "starts", "lengths", "window", "softcap")  # that a key can meet
SHAPES = ((64, 8, 32), (80, 2, 32), (96, 1, 48), (128, 7, 32), (128, 7, 64), (128, 4, 96), (256, 2, 64), (256, 4, 256))


def decoding(every: bool) -> list[Kernel]:
    """Widths of heads, queries that share one, and ranks; plain, with all options, and int8."""
    plain = ("cos", "sin", "lengths")
    found = [
        split(64, 4, 16, "fp16", "fp16", plain),
        split(80, 1, 32, "bf16", "bf16", EVERY),
        split(128, 7, 48, "bf16", "bf16", plain),
        split(128, 7, 48, "bf16", "i8", (*plain, "scale_k", "scale_v")),
        split(96, 2, 32, "bf16", "i8", (*EVERY, "scale_k", "scale_v"), half=24),
        split(256, 4, 128, "bf16", "bf16", EVERY),
    ]
    if every:
        for shape in SHAPES:
            found.append(split(*shape, "fp16", "fp16", plain))
            found.append(split(*shape, "bf16", "bf16", EVERY))
            found.append(split(*shape, "bf16", "i8", (*EVERY, "scale_k", "scale_v")))
    return [*found, merge(128, 64), merge(256, 256), merge(128, 64, folded=True)]


def split(width: int, group: int, rank: int, dtype: str, latents: str, given: Sequence[str], half: int = 0) -> Kernel:
    """`split_kernel` for four key/value heads, as 8 sequences of 8192 tokens call it; `half` of what is rotated."""
    block = triton.next_power_of_2(rank)
    tiles = latent_decode_triton.Tiles.fitting(8, 8192, 4, block, half or width // 2, "b_k" in given, 132)
    types = dict.fromkeys(("z_k", "z_v"), f"*{latents}") | dict.fromkeys(("columns_k", "columns_v"), "*i32")
    types |= dict.fromkeys(("q", "a_k", "cos", "sin", "b_k", "inverse_rms", "scale_k", "scale_v"), f"*{dtype}")
    types |= {"mask": "*i1", "starts": "*i64", "lengths": "*i64"} | dict.fromkeys(("parts", "peaks", "totals"), "*fp32")
    types |= dict.fromkeys(("scaling", "softcap"), "fp32") | dict.fromkeys(("tokens", "window", "split_size"), "i32")
    types |= {f"{what}_{of}": "i32" for what in ("row", "token") for of in ROWS}
    constants: dict[str, Any] = dict.fromkeys({*EVERY, "scale_k", "scale_v"} - {*given})
    constants |= {"TILE": tiles.tile, "CHUNK": tiles.chunk, "PROGRAM_HEADS": tiles.heads, "HEADS": 4, "GROUP": group}
    constants |= {
        "GROUP_BLOCK": latent_decode_triton.QUERIES,
        "D": width,
        "HALF": half or width // 2,
        "RANK_K": block,
        "RANK_V": block,
    }
    constants |= {"ALIGNED": 16, "PRECISION": "tf32"}
    part = f", {2 * half} rotated" * bool(half)
    name = f"decode {width} × {group}, rank {rank}, {latents}{part}{', all options' * ('softcap' in given)}"
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return Kernel(name, latent_decode_triton.split_kernel, types, constants, options)


def merge(width: int, block: int, folded: bool = False) -> Kernel:
    """`merge_kernel` of many splits, with A_v or without."""
    types = dict.fromkeys(("parts", "peaks", "totals"), "*fp32") | {"columns_v": "*i32", "splits": "i32"}
    types |= dict.fromkeys(("a_v", "b_v", "o"), "*bf16")
    constants: dict[str, Any] = {"HEADS": 4, "GROUP": 7, "D": width, "RANK_V": block, "SPLITS_BLOCK": 1024}
    constants |= {"a_v": None, "b_v": None} if folded else {}
    name = f"merge {width}, rank {block}{', folded' * folded}"
    return Kernel(name, latent_decode_triton.merge_kernel, types, constants, {"num_warps": 4})


def resources(kernel: Kernel, target: int) -> Resources:
    """Compile a kernel for sm_`target` and read what its code takes."""
    signature = {
        name: "constexpr" if name in kernel.constants else kernel.types[name] for name in kernel.function.arg_names
    }
    # As at run time, where Triton sees that pointers and the strides of rows are multiples of 16.
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in STEPS
    }
    source = ASTSource(kernel.function, signature, kernel.constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=kernel.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    spilled = usage["STACK"] + usage["LOCAL"]
    limit = 1024 * TARGETS[target]
    return Resources(kernel.name, f"sm_{target}", usage["REG"], spilled, compiled.metadata.shared, limit)


def main() -> None:
    """Print the table and say by the exit code whether all fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="JSON in place of a table")
    parser.add_argument("--all", action="store_true", help="every variant; takes minutes")
    options = parser.parse_args()
    if not options.json:
        print("| kernel | target | registers | spilled, bytes | shared, KiB | of |\n|---|---|---|---|---|---|")
    rows = []
    for kernel in kernels(options.all):
        for target in TARGETS:
            rows.append(r := resources(kernel, target))
            shared, limit = r.shared / 1024, r.limit // 1024
            cells = f"| {r.kernel} | {r.target} | {r.registers} | {r.spilled} | {shared:.1f} | {limit} |"
            print(json.dumps(asdict(r)) if options.json else cells, flush=True)
    sys.exit(not all(row.fits for row in rows))


if __name__ == "__main__":
    main()
