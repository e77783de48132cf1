"""Random numbers as a pure function of (seed, purpose, position).

So there is no state to save, and numbers are the same for every world size, batch size and after
every restart. A position is the slot of an image, counted over the global batches since the start
of the run; each rank draws its own slice.

The bits come from Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as
1, 2, 3", SC 2011), equal on every device, since it uses integer arithmetic only. The four counter
words are position (64 bits), column block and purpose; the key is the seed. Numbers that a device
makes for every pixel (`uniform_noise`, `ganscale.random`) come from Squares, which takes a tenth of
the launches.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ganscale.tensor_cache import cached_tensors

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
_FEISTEL_ROUNDS = 24


def purpose_id(purpose: str) -> int:
    """A 32-bit hash, which gives every purpose its own draws."""
    return int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "little")


def derived_seed(seed: int, purpose: str) -> int:
    """A 63-bit seed for torch's or Python's generators (weight initialization)."""
    text = f"{seed}:{purpose}".encode("utf-8", "surrogateescape")  # a file's name need not be UTF-8
    digest = hashlib.sha256(text).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def philox(counter: Int64[Tensor, "4 *shape"], key: tuple[int, int]) -> Int64[Tensor, "4 *shape"]:
    """Four random 32-bit words (as int64) for each counter of four 32-bit words."""
    if counter.device.type == "cpu":
        return torch.from_numpy(_philox_on_host(counter.numpy(), key))
    return _philox_on_device(counter, key)


def _philox_on_device(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """With few operators. int64 products wrap around, but their low 64 bits are right; bits above
    the words are removed where they would matter."""
    even, odd = counter[0::2], counter[1::2]
    factors, *round_keys = (
        pair.view(2, *[1] * (counter.ndim - 1)) for pair in _round_constants(key, counter.device)
    )
    for keys in round_keys:
        products = even * factors
        even = ((products >> 32).flip(0) ^ odd ^ keys) & _WORD
        odd = products.flip(0)
    return torch.stack([even, odd & _WORD], dim=1).flatten(0, 1)


@cached_tensors(maxsize=16)
def _round_constants(key: tuple[int, int], device: torch.device) -> tuple[Tensor, ...]:
    """The factors, and the keys of the ten rounds, a pair each; copied to the device once."""
    pairs = [(_MULTIPLIER_0, _MULTIPLIER_1)]
    pairs += [
        tuple((k + n * w) & _WORD for k, w in zip(key, _WEYL, strict=True)) for n in range(10)
    ]
    return torch.tensor(pairs, device=device).unbind(0)


def _philox_on_host(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """In NumPy, where an operation on a few thousand numbers takes half as long as in torch."""
    words = counter.reshape(4, -1).astype(np.uint64)
    even, odd = words[0::2], words[1::2]
    factors = np.array([[_MULTIPLIER_0], [_MULTIPLIER_1]], dtype=np.uint64)
    keys = np.array([[key[0]], [key[1]]], dtype=np.uint64)
    weyl = np.array(_WEYL, dtype=np.uint64)[:, None]
    word, half = np.uint64(_WORD), np.uint64(32)
    for _ in range(10):
        products = even * factors
        even = (products >> half)[::-1] ^ odd ^ keys
        odd = (products & word)[::-1]
        keys = (keys + weyl) & word
    output = np.stack([even[0], odd[0], even[1], odd[1]])
    return output.reshape(counter.shape).astype(np.int64)


def random_words(
    seed: int, purpose: str, positions: Int64[Tensor, " batch"], columns: int
) -> Int64[Tensor, "batch columns"]:
    """`columns` random 32-bit words (0 <= word < 2**32, as int64) for each position."""
    blocks = -(-columns // 4)
    rows = positions[:, None].expand(-1, blocks)
    block = torch.arange(blocks, device=positions.device).expand(len(positions), -1)
    counter = torch.stack(
        [rows & _WORD, (rows >> 32) & _WORD, block, torch.full_like(block, purpose_id(purpose))]
    )
    words = philox(counter, (seed & _WORD, (seed >> 32) & _WORD))
    return words.permute(1, 2, 0).reshape(len(positions), 4 * blocks)[:, :columns]


def uniform(
    seed: int, purpose: str, positions: Int64[Tensor, " batch"], columns: int = 1
) -> Float[Tensor, "batch columns"]:
    """float32 in [0, 1), 24 random bits each."""
    return (random_words(seed, purpose, positions, columns) >> 8).float() * 2**-24


def normal(
    seed: int, purpose: str, positions: Int64[Tensor, " batch"], columns: int
) -> Float[Tensor, "batch columns"]:
    """Standard normal float32 by the Box-Muller transform of two 24-bit uniforms; between kinds of
    device, logarithm and cosine may differ by a unit in the last place."""
    pairs = -(-columns // 2)
    words = random_words(seed, purpose, positions, 2 * pairs) >> 8
    radius = torch.sqrt(-2.0 * torch.log((words[:, :pairs].float() + 0.5) * 2**-24))
    angle = words[:, pairs:].float() * (2 * math.pi * 2**-24)
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)[:, :columns]


def uniform_noise(
    seed: int, purpose: str, positions: Int64[Tensor, " batch"], columns: int
) -> Float[Tensor, "batch columns"]:
    """float32 in [0, 1), 24 random bits each, for many columns; other numbers than `uniform`'s.

    The generator is `squares`. Its counter numbers all elements of all positions; the key is made
    of seed and purpose. Numbers repeat after 2^64 / columns positions.
    """
    elements = torch.arange(columns, device=positions.device)
    counter = torch.add(elements, positions[:, None], alpha=columns)
    return squares(counter, squares_key(f"{seed}:{purpose}"))


def squares(
    counter: Int64[Tensor, "*#shape"],
    key: int | Int64[Tensor, "*#shape"],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*shape"]:
    """A number in [0, 1) of 24 random bits for each counter and key.

    Squares with 32-bit output (Widynski: "Squares: a fast counter-based RNG", arXiv:2004.06278):
    four rounds of squaring a 64-bit word, adding to it and swapping its halves; of the last one,
    the upper half.
    """
    first = counter * key
    second = first + key
    word = _swapped_halves(torch.addcmul(first, first, first))
    for term in (second, first):
        word = _swapped_halves(torch.addcmul(term, word, word, out=word))
    bits = _halves(torch.addcmul(second, word, word, out=word))[..., 1] >> 8  # in [-2^23, 2^23)
    return bits.to(dtype).mul_(2**-24).add_(0.5)


def _swapped_halves(words: Tensor) -> Tensor:
    lower, upper = _halves(words).unbind(-1)  # on a CPU, `flip` would take ten times as long
    return torch.stack([upper, lower], dim=-1).view(torch.int64).view(words.shape)


def _halves(words: Tensor) -> Tensor:
    """The lower and the upper 32 bits, (*shape, 2)."""
    return words.view(torch.int32).view(*words.shape, 2)


@lru_cache(maxsize=1024)
def squares_key(name: str) -> int:
    """Irregular, as Squares needs its keys: in each half, eight different hexadecimal digits."""
    digits = ""
    for half in ("upper", "lower"):
        salt = f"{name}:{half}:".encode()
        order = sorted("123456789abcdef", key=lambda d: hashlib.sha256(salt + d.encode()).digest())
        digits += "".join(order[:8])
    key = int(digits, 16) | 1
    return key - 2**64 if key >= 2**63 else key  # as an int64


@dataclass(frozen=True)
class Draw:
    """Random numbers that every image of a run needs, `columns` of them; uniform or normal."""

    purpose: str
    columns: int = 1
    is_normal: bool = False

    def at(self, seed: int, positions: Int64[Tensor, " batch"]) -> Float[Tensor, "batch columns"]:
        function = normal if self.is_normal else uniform
        return function(seed, self.purpose, positions, self.columns)


def draw_together(
    draws: Sequence[Draw], seed: int, positions: Int64[Tensor, " batch"]
) -> Float[Tensor, " values"]:
    """All `draws` as one tensor, for one copy to a device; `split_draws` undoes it."""
    return torch.cat([torch.zeros(0), *(draw.at(seed, positions).flatten() for draw in draws)])


def split_draws(draws: Sequence[Draw], values: Tensor, batch: int) -> dict[str, Tensor]:
    """Views of `draw_together`'s result by purpose, (batch, columns) each."""
    parts = values.split([batch * draw.columns for draw in draws])
    return {d.purpose: part.view(batch, -1) for d, part in zip(draws, parts, strict=True)}


def permutation(seed: int, purpose: str, stream: tuple[int, int, int], length: int) -> np.ndarray:
    """A permutation of range(length), (length,) int64; `stream` (epoch, lane, window) selects one
    of the purpose's. It sorts Philox4x64 words, since NumPy may change `Generator.permutation`."""
    return np.argsort(_philox_stream(seed, purpose, stream, length), kind="stable")


def permuted(
    seed: int,
    purpose: str,
    stream: tuple[int, int, int],
    indices: np.ndarray,
    length: int,
    *,
    inverse: bool = False,
) -> np.ndarray:
    """Where a random permutation of range(length), or its inverse, sends `indices`; (n,) int64.

    Each index is computed by itself, so a permutation of billions takes no memory. It is not the
    one that `permutation` returns. Raises ValueError for an index outside range(length).

    A Feistel network over pairs (left, right) of numbers below two moduli, and cycle walking where
    their product is above `length`: Black and Rogaway, "Ciphers with arbitrary finite domains",
    CT-RSA 2002. The round function is word number x of the generator SplitMix64 (Steele, Lea,
    Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014) seeded with the round's
    key, a Philox4x64 word. There are 24 rounds, as in "Bandwidth-optimal random shuffling for GPUs"
    (Mitchell, Stokes, Frank, Holmes, 2021). Tiny lengths need that many: with ideal round functions
    their total variation distance to a uniform permutation is then below 0.0004.
    """
    if len(indices) and (indices.min() < 0 or indices.max() >= length):
        raise ValueError(f"indices from {indices.min()} to {indices.max()}, length {length}")
    keys = _philox_stream(seed, purpose, stream, _FEISTEL_ROUNDS)
    # Both about the square root of the length. An even one makes odd permutations possible.
    right_modulus = max(2, 2 * ((math.isqrt(length) + 1) // 2))
    moduli = -(-length // right_modulus), right_modulus
    values = _feistel(indices.astype(np.uint64), keys, moduli, inverse)
    while len(outside := np.flatnonzero(values >= length)):
        values[outside] = _feistel(values[outside], keys, moduli, inverse)
    return values.astype(np.int64)


def _philox_stream(seed: int, purpose: str, stream: tuple[int, int, int], count: int) -> np.ndarray:
    """(count,) uint64 words of NumPy's Philox4x64."""
    key = np.array([seed & (2**64 - 1), purpose_id(purpose)], dtype=np.uint64)
    return np.random.Philox(key=key, counter=[0, *stream]).random_raw(count)


def _feistel(
    values: np.ndarray, keys: np.ndarray, moduli: tuple[int, int], inverse: bool
) -> np.ndarray:
    """A bijection of range(product of moduli), on (n,) uint64."""
    halves = list(np.divmod(values, np.uint64(moduli[1])))
    rounds = range(len(keys))
    for i in reversed(rounds) if inverse else rounds:
        half, modulus = i % 2, np.uint64(moduli[i % 2])
        shift = _splitmix(keys[i], halves[1 - half]) % modulus
        halves[half] = (halves[half] + (modulus - shift if inverse else shift)) % modulus
    return halves[0] * np.uint64(moduli[1]) + halves[1]


def _splitmix(key: np.uint64, numbers: np.ndarray) -> np.ndarray:
    """Word number x, counted from 0, of SplitMix64 seeded with `key`, for each x in `numbers`."""
    words = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
