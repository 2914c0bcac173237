"""Randomness that depends on what it is for, never on batch size, order or number of processes.

Training draws from a `torch.Generator` made anew for each step (`step_generator`), so a resumed run needs no
saved generator state. Outliers draw from a counter-based generator (`uniform`, `normal`): every number is a hash
of (seed, image index, draw, element), after SplitMix64 (Steele, Lea & Flood, OOPSLA 2014).
"""

from __future__ import annotations

import hashlib
import math

import torch

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def derive_seed(seed: int, *names: object) -> int:
    """A seed in [0, 2^63) for one purpose, from the run's root seed and the purpose's name."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def step_generator(seed: int, name: str, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of one training step: the same for a run that was killed and resumed."""
    return torch.Generator(device).manual_seed(derive_seed(seed, name, step))


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts keep the sign; SplitMix64 wants zeros


def _mix(value: torch.Tensor) -> torch.Tensor:
    value = (value ^ _shift_right(value, 30)) * _MIX1
    value = (value ^ _shift_right(value, 27)) * _MIX2
    return value ^ _shift_right(value, 31)


def random_bits(seed: int, index: torch.Tensor, draw: int, size: int) -> torch.Tensor:
    """Hashed counters.

    Args:
        seed: Any seed of `derive_seed`.
        index: int64 (B,), the identity of each image.
        draw: Which of the image's draws this is; different draws are independent.
        size: Numbers an image.

    Returns:
        int64 (B, size), uniform over all 64-bit values; row b depends on `index[b]` only.
    """
    offset = (draw * _GOLDEN + (1 << 63)) % (1 << 64) - (1 << 63)  # wrapped to signed 64 bits, as tensors wrap
    stream = _mix(_mix(index + seed) + offset)
    counter = torch.arange(1, size + 1, device=index.device, dtype=torch.int64)
    return _mix(stream[:, None] + counter * _GOLDEN)


def uniform(seed: int, index: torch.Tensor, draw: int, size: int) -> torch.Tensor:
    """float64 (B, size) in (0, 1): 53 random bits and a half, so that neither end is reached."""
    return (_shift_right(random_bits(seed, index, draw, size), 11).double() + 0.5) * 2.0**-53


def normal(seed: int, index: torch.Tensor, draw: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal numbers by Box-Muller: float32 (B, *shape), row b depending on `index[b]` only."""
    size = math.prod(shape)
    half = (size + 1) // 2
    values = uniform(seed, index, draw, 2 * half)
    radius = torch.sqrt(-2.0 * torch.log(values[:, :half]))
    angle = 2.0 * math.pi * values[:, half:]
    pair = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    return pair[:, :size].reshape(-1, *shape).float()
