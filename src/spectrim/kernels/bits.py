"""Integers of 2 to 8 bits in words of 32, as compressed-tensors' format ``pack-quantized`` has them.

The layout is that of compressed-tensors from 0.18 on, whatever release is installed: one row after the other, the low
bits of a word first, codes across words where 32 is no multiple of the bits.
"""

import torch
from torch import nn


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Words int32 [rows, ⌈columns · bits / 32⌉] of signed codes int8 [rows, columns], one row after the other."""
    # Eight codes are `bits` bytes; a word has its low byte first.
    count = codes.shape[1]
    eights = nn.functional.pad(codes.long() + (1 << bits - 1), (0, -count % 8)).unflatten(1, (-1, 8))
    joined = (eights << _steps(8, bits, eights)).sum(2, keepdim=True)
    stream = (joined >> _steps(bits, 8, joined) & 255).to(torch.uint8).flatten(1)
    words = stream.new_zeros(len(codes), -(-count * bits // 32) * 4)
    size = min(stream.shape[1], words.shape[1])
    words[:, :size] = stream[:, :size]
    return words.view(torch.int32)


def unpack(words: torch.Tensor, bits: int, count: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    """The inverse of `pack`: codes [rows, count] in int8, or in another dtype of numbers.

    Codes of 2 and 4 bits are looked up by byte and those of 3 bits by 12 bits, several at once, as int8 or as floats of
    16 bits; 8 bits are bytes.
    """
    words = words.flatten().view(words.shape)  # a single column has any stride, and its bytes need one of 1
    stream = words.view(torch.uint8)
    if bits == 8:
        return (stream ^ 128).view(torch.int8)[:, :count].to(dtype)
    if bits in (2, 4):
        index = stream.int()
    elif bits == 3:
        index = _twelves(words)
    else:  # 5, 6 and 7 bits, which spectrim reads and does not write
        groups = nn.functional.pad(stream, (0, -stream.shape[1] % bits)).unflatten(1, (-1, bits)).long()
        joined = (groups << _steps(bits, 8, groups)).sum(2, keepdim=True)
        codes = joined >> _steps(8, bits, joined) & (1 << bits) - 1
        return (codes.flatten(1)[:, :count] - (1 << bits - 1)).to(dtype)
    looked = dtype if (bits, dtype) in _TABLES else torch.int8
    found = _TABLES[bits, looked].to(words.device).index_select(0, index.flatten())
    return found.view(looked).view(len(words), -1)[:, :count].to(dtype)


def _twelves(words: torch.Tensor) -> torch.Tensor:
    """The bits of words int32 [rows, n] by twelve, int32 [rows, 8 ⌈n / 3⌉]: three words are eight of them."""
    a, b, c = nn.functional.pad(words, (0, -words.shape[1] % 3)).unflatten(1, (-1, 3)).unbind(2)
    a, b, c = a.contiguous(), b.contiguous(), c.contiguous()
    whole = [(a, 0), (a, 12), (b, 4), (b, 16), (c, 8), (c, 20)]
    first, second, fourth, fifth, seventh, eighth = (word >> shift & 4095 for word, shift in whole)
    third, sixth = a >> 24 & 255 | (b & 15) << 8, b >> 28 & 15 | (c & 255) << 4  # across two words
    return torch.stack([first, second, third, fourth, fifth, sixth, seventh, eighth], dim=2).flatten(1)


def _table(bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The codes of every byte (2 and 4 bits) or 12-bit word (3 bits), as one number of as many bytes as they take."""
    size = 12 if bits == 3 else 8
    words = torch.arange(1 << size)[:, None]
    codes = (words >> _steps(size // bits, bits, words) & (1 << bits) - 1) - (1 << bits - 1)
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size // bits * dtype.itemsize]
    return codes.to(dtype).contiguous().view(kind).flatten()


def _steps(count: int, step: int, like: torch.Tensor) -> torch.Tensor:
    return step * torch.arange(count, dtype=like.dtype, device=like.device)


_TABLES = {  # some kilobytes each
    (bits, dtype): _table(bits, dtype) for bits in (2, 3, 4) for dtype in (torch.int8, torch.float16, torch.bfloat16)
}
