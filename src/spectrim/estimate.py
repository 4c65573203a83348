"""How long a job will take, and how much memory and disk: from its shapes and the rates of this machine.

Functions of numbers alone; what measures the rates is beside what it measures.
"""

WRITE = 200e6  # bytes of tensors that are written, synced and read again in a second


def amount(nbytes: float) -> str:
    """Bytes as a person says them: 512 bytes, 120 MB, 2.1 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.{0 if nbytes >= 20 * size else 1}f} {unit}"
    return f"{nbytes:.0f} bytes"


def duration(seconds: float) -> str:
    """A time as a person says it: 40 s, 3 minutes, 2.5 hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 100 * 60 else f"{seconds / 3600:.1f} hours"
