"""What a quantized array is made by: one frozen rule a format. Plain data, no numba.

A rule decides every byte: which numbers share a scale, how that is computed and rounded, how a number becomes a code
and how codes are packed. `ref.py` is what a rule means, in NumPy; the other backends give the same bytes.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

FLOATS = ("float32", "float16", "bfloat16")
FP8_MAX = {
    "e4m3": 448.0,
    "e5m2": 57344.0,
}  # largest finite number; e4m3 is the variant without infinities (fn)
CODES = ("int", *FP8_MAX)  # their order is the number that compiled code knows them by
ROUNDINGS = ("half-even", "half-away", "trunc")
ZEROS = ("none", "min", "middle", "integer")


class Rule(NamedTuple):
    """How groups of numbers become codes of `bits`, with a scale and perhaps a zero a group.

    `codes`: "int" (8, 4, 3 or 2 bits), "e4m3" or "e5m2". `axis` -1 groups neighbours of the last axis, -2 those of the
    axis before it (a channel over tokens); `group` is how many, the last group may be shorter, 0 is the whole axis.
    Reshape for the rest: `x.reshape(1, -1)` per tensor, `(tokens, -1)` per token, `(tokens, heads, dim)` per token and
    head, axis -2 with group 0 per channel.

    The scale of "none" and of fp8 is max|x| / `divisor` (0: the largest code), of others (max - min) / (2**bits - 1).
    It is at least `floor`, is rounded to `scale_dtype`, and the codes are those of the rounded scale. What is zero:

    - "none": code = round(x / scale), signed.
    - "min": code = round((x - min) / scale), unsigned; min is kept in `scale_dtype`.
    - "middle": code = round((x - (min + max) / 2) / scale), signed.
    - "integer": code = round(x / scale) + zero with zero = round(-min / scale), all in 0 ... 2**bits - 1.
      `spans_zero` widens the range to hold 0; `is_sum_rounded` is round(x / scale + zero) instead.

    `is_division` divides by the scale, else its fp32 reciprocal is multiplied with. With `is_stepwise` every
    intermediate result is rounded to `scale_dtype`, as a framework computes that has whole arrays of it; it divides,
    whatever `is_division` says. With `is_zero_hidden` the lowest four bits of an fp32 scale hold the integer zero.
    """

    bits: int = 8
    codes: str = "int"
    group: int = 0
    axis: int = -1
    zero: str = "none"
    rounding: str = "half-even"
    divisor: float = 0.0
    floor: float = 0.0
    scale_dtype: str = "float32"
    spans_zero: bool = True
    is_sum_rounded: bool = False
    is_division: bool = False
    is_stepwise: bool = False
    is_zero_hidden: bool = False

    @property
    def is_signed(self) -> bool:
        """Codes are two's complement."""
        return self.codes == "int" and self.zero in ("none", "middle")

    @property
    def scale_divisor(self) -> float:
        """What max|x|, or max - min, is divided by."""
        if self.codes != "int":
            return self.divisor or FP8_MAX[self.codes]
        return self.divisor or (2 ** (self.bits - 1) - 1 if self.zero == "none" else 2**self.bits - 1)

    def num_groups(self, length: int) -> int:
        """Groups along an axis of `length` numbers."""
        return -(-length // (self.group or length)) if length else 0

    def packed(self, length: int) -> int:
        """Bytes that the codes of `length` numbers take along their axis: a stream of bits, the first number lowest."""
        return -(-length * self.bits // 8)


def checked(rule: Rule) -> Rule:
    """The rule, or a ValueError that says in one sentence what no rule can be."""
    if not isinstance(rule, Rule):
        raise ValueError(f"rule is a Rule, such as Rule(4, group=32), not a {type(rule).__name__}")
    if rule.codes not in CODES:
        raise ValueError(f"codes are int, e4m3 or e5m2, not {rule.codes!r}")
    if rule.bits not in ((8, 4, 3, 2) if rule.codes == "int" else (8,)):
        raise ValueError(f"{rule.codes} codes have no {rule.bits} bits; int has 8, 4, 3 or 2, fp8 has 8")
    if rule.zero not in ZEROS or (rule.codes != "int" and rule.zero != "none"):
        raise ValueError(f"zero is one of {', '.join(ZEROS)}, for fp8 none, not {rule.zero!r}")
    if rule.rounding not in ROUNDINGS or (rule.codes != "int" and rule.rounding != "half-even"):
        raise ValueError(
            f"rounding is one of {', '.join(ROUNDINGS)}, for fp8 half-even, not {rule.rounding!r}"
        )
    if rule.axis not in (-1, -2):
        raise ValueError(f"groups lie along axis -1 or -2, not {rule.axis}; reshape for others")
    if rule.group < 0 or (rule.bits < 8 and rule.group % 8):
        raise ValueError(
            f"group {rule.group} of {rule.bits}-bit codes is no multiple of 8, so they share bytes"
        )
    if rule.scale_dtype not in FLOATS:
        raise ValueError(f"scale_dtype is one of {', '.join(FLOATS)}, not {rule.scale_dtype!r}")
    if rule.is_zero_hidden and (rule.zero, rule.bits, rule.scale_dtype) != ("integer", 4, "float32"):
        raise ValueError("only a 4-bit integer zero fits into the lowest bits of an fp32 scale")
    if rule.is_stepwise and rule.zero != "min":
        raise ValueError(f"is_stepwise is defined for zero min, not {rule.zero}")
    if not (rule.floor >= 0 and rule.divisor >= 0):
        raise ValueError(f"floor {rule.floor} and divisor {rule.divisor} are not negative")
    if 0 < rule.divisor <= 2.0**-150:
        raise ValueError(
            f"divisor {rule.divisor} is nothing in fp32; give a larger one, or 0 for the largest code"
        )
    return rule


INT8 = Rule()
# vLLM 0.33, triton_reshape_and_cache_flash.py: one fp32 scale a token and head.
VLLM_INT8 = Rule(8, floor=1e-6, rounding="half-away")
VLLM_FP8 = Rule(8, codes="e4m3", floor=1e-6)
# vLLM 0.33, int4_per_token_head.py, of keys and values that are rotated before.
VLLM_INT4 = Rule(
    4, zero="integer", floor=1e-6, rounding="half-away", spans_zero=False, is_sum_rounded=True, is_zero_hidden=True
)  # fmt: skip
# SGLang --int8-kv-cache: fp16 scale and middle a token and head.
SGLANG_INT8 = Rule(8, zero="middle", scale_dtype="float16", is_division=True)


def kivi(bits: int, side: str, group: int = 32, dtype: str = "float16") -> Rule:
    """KIVI's quantizer (its new_pack.py) of "keys", a channel over `group` tokens, or of "values", a token over `group`
    channels, with `dtype` the model's: scale and minimum have it, and so has every step of the arithmetic.

    KIVI keeps the codes of keys with the token axis last, in int32 words: `codes.swapaxes(-1, -2)`, contiguous, viewed
    as int32, is its array."""
    if side not in ("keys", "values"):
        raise ValueError(f"side is keys or values, not {side!r}")
    axis = -2 if side == "keys" else -1
    return checked(Rule(bits, group=group, axis=axis, zero="min", scale_dtype=dtype, is_stepwise=True))


class KiviSplit(NamedTuple):
    """How many of a sequence's oldest tokens are quantized; the rest stays as it is."""

    keys: int
    values: int


def kivi_split(tokens: int, residual: int = 128) -> KiviSplit:
    """KIVI quantizes keys by whole windows of `residual` tokens and keeps the newest `residual` values."""
    try:
        is_possible = operator.index(tokens) >= 0 and operator.index(residual) >= 1
    except TypeError:
        is_possible = False
    if not is_possible:
        raise ValueError(
            f"tokens are a whole number from 0 and residual one from 1, not {tokens!r} and {residual!r}"
        )
    return KiviSplit(tokens - tokens % residual, max(tokens - residual, 0))
