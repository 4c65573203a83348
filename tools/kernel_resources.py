"""What our Triton kernels take of a GPU, without one: registers, spilled bytes and shared memory for three targets.

    python tools/kernel_resources.py [--json]

Exits with 1 if a kernel spills or takes more shared memory than a program can have on a target.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton's default today; it warns where nobody says so

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spectrim.kernels import unpack_triton

TARGETS = {80: 163, 90: 227, 120: 99}  # KiB of shared memory that one program can have
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
        """Whether nothing is spilled and shared memory suffices."""
        return not self.spilled and self.shared <= self.limit


def kernels() -> list[Kernel]:
    """Those of the package, in the variants that matter."""
    found = []
    for bits in (2, 3, 4, 8):
        types = {"words": "*i32", "scales": "*bf16", "zeros": "*i8", "weight": "*bf16"}
        types |= dict.fromkeys(("out", "size", "row_words", "groups", "group"), "i32")
        constants = {"BITS": bits, "HAS_ZEROS": True, "ROWS": unpack_triton.ROWS, "COLUMNS": unpack_triton.COLUMNS}
        found.append(Kernel(f"unpack {bits} bits", unpack_triton.unpack_kernel, types, constants, {"num_warps": 4}))
    return found


def resources(kernel: Kernel, target: int) -> Resources:
    """Compile a kernel for sm_`target` and read what its code takes."""
    signature = {
        name: "constexpr" if name in kernel.constants else kernel.types[name] for name in kernel.function.arg_names
    }
    # Pointers and strides are multiples of 16 at run time, and Triton finds that out; so do we.
    attributes = {
        (place,): [["tt.divisibility", 16]] for place, kind in enumerate(signature.values()) if kind.startswith("*")
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
    json_wanted = parser.parse_args().json
    rows = [resources(kernel, target) for kernel in kernels() for target in TARGETS]
    if json_wanted:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        print("| kernel | target | registers | spilled, bytes | shared, KiB | of |\n|---|---|---|---|---|---|")
        for r in rows:
            shared, limit = r.shared / 1024, r.limit // 1024
            print(f"| {r.kernel} | {r.target} | {r.registers} | {r.spilled} | {shared:.1f} | {limit} |")
    sys.exit(not all(row.fits for row in rows))


if __name__ == "__main__":
    main()
