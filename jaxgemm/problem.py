"""`GemmProblem`: what is to be computed, checked once, before anything runs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxgemm.elementwise import ACTIVATIONS, FUNCTIONS
from jaxgemm.layout import aligned_capacity
from jaxgemm.scaled_array import FP8_DTYPES, ScaledArray, stored_scales_shape, stored_values_shape

Kind = Literal["dense", "grouped", "masked", "k_grouped", "k_masked"]

IMPLEMENTATIONS: tuple[str, ...] = ("mosaic", "triton", "xla")
FILLS: tuple[str, ...] = ("zero", "unspecified")
FLOAT_DTYPES: tuple[Any, ...] = tuple(np.dtype(d) for d in (jnp.bfloat16, jnp.float16, jnp.float32))
"""What may be quantised, and what a product may be returned as."""


@dataclasses.dataclass(frozen=True)
class GemmProblem:
    """One FP8 matrix product: everything static about it. Hashable; a parameter of the primitives.

    Attributes:
        kind: "dense" `[m, k] x [n, k] -> [m, n]`; "grouped" `[m, k] x [g, n, k] -> [m, n]`, the rows split by
            `group_sizes`; "masked" `[g, m, k] x [g, n, k] -> [g, m, n]`, rows past `masked_m[g]` not computed;
            "k_grouped" `[m, k] x [n, k] -> [g, m, n]`, the contracted axis split by `group_sizes`;
            "k_masked" `[g, m, k] x [g, n, k] -> [g, m, n]`, columns past `masked_k[g]` not summed.
        m: rows of lhs (of one group, if each has its own).
        n: rows of rhs (of one group).
        k: the contracted axis; for "k_grouped" the columns of all groups, with their alignment.
        num_groups: 1 if dense.
        lhs_dtype: FP8 dtype.
        rhs_dtype: FP8 dtype; may differ from lhs_dtype.
        lhs_block_shape: scaling block of lhs.
        rhs_block_shape: scaling block of rhs.
        out_dtype: bfloat16, float16 or float32.
        has_bias: whether a bias `[n]` (grouped: `[g, n]`) is added.
        activation: what is applied to the float32 accumulator, after the bias.
        segment_alignment: for "k_grouped": each group's columns start at a multiple of this (1: no padding).
        expected_m: for "masked": a static hint of the usual `masked_m`, to choose tiles by.
        fill: for "masked": what rows past `masked_m` hold.
        accumulate: for "k_grouped": whether the product is added to a given array.
        label: its part in the program, for the name of its kernel: "fprop", "dgrad", "wgrad", ...; "" if unknown.
    """

    kind: Kind
    m: int
    n: int
    k: int
    lhs_dtype: np.dtype
    rhs_dtype: np.dtype
    lhs_block_shape: tuple[int, int]
    rhs_block_shape: tuple[int, int]
    out_dtype: np.dtype
    num_groups: int = 1
    has_bias: bool = False
    activation: str | None = None
    segment_alignment: int = 1
    expected_m: int | None = None
    fill: str = "zero"
    accumulate: bool = False
    label: str = ""

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The logical shape of the product."""
        return (self.m, self.n) if self.kind in ("dense", "grouped") else (self.num_groups, self.m, self.n)

    @property
    def operands_have_groups(self) -> tuple[bool, bool]:
        """Whether lhs and rhs have a leading axis of groups."""
        every_group = self.kind in ("masked", "k_masked")
        return every_group, every_group or self.kind == "grouped"

    @property
    def flops(self) -> int:
        """Floating-point operations, counting every row and column as valid."""
        groups = self.num_groups if self.operands_have_groups[0] else 1
        return 2 * groups * self.m * self.n * self.k


@dataclasses.dataclass(frozen=True)
class QuantizeProblem:
    """One quantising pass over an array `[..., rows, cols]`: everything static about it but the shape. Hashable.

    With a function in front, what is quantised are its results, rounded to the inputs' dtype.

    Attributes:
        block_shape: scaling block, resolved against the shape.
        dtype: FP8 dtype of the values.
        power_of_two: whether scales are rounded up to powers of two.
        natural: whether to return values and scales of the array as it lies (scaled along its columns).
        transposed: whether to return values and scales of its transpose (for blocks of one row these are scaled along
            the rows, which no transposing of the natural ones could give).
        column_sum: whether to return the float32 sum over the rows.
        function: a name in `jaxgemm.elementwise.FUNCTIONS`, or None.
        joined: for a gated function: whether gate and up are one input `[..., rows, 2 cols]`, side by side, and their
            gradients one result likewise.
        hidden: for a backward function: whether to return the forward function's result too, transposed alone.
        rows: which rows count. "all"; "masked": the first ones of each matrix, as many as a last input says, int32 of
            the leading axes; "segments": those of contiguous groups, whose sizes are a last input, int32 `[g]`: what is
            returned is transposed alone, its columns in segments that start at multiples of 128. Rows that do not
            count are zeros to the results, whatever they hold; kernels do not read them.
        num_groups: for "segments": the number of groups.
        label: its part in the program, for the name of its kernel; "" if unknown.
    """

    block_shape: tuple[int, int]
    dtype: np.dtype
    power_of_two: bool = False
    natural: bool = True
    transposed: bool = False
    column_sum: bool = False
    function: str | None = None
    joined: bool = False
    hidden: bool = False
    rows: str = "all"
    num_groups: int = 0
    label: str = ""

    def split_inputs(self, inputs: Sequence[Any]) -> tuple[Sequence[Any], Any]:
        """Returns the arrays among the inputs of a pass, and the sizes; None if every row counts."""
        return (inputs, None) if self.rows == "all" else (inputs[:-1], inputs[-1])

    def columns(self, shapes: Sequence[tuple[int, ...]]) -> int:
        """Returns the columns of the arrays that the function takes, gate and up apart from one another."""
        is_halved = self.joined and len(shapes) == 1
        return shapes[0][-1] // 2 if is_halved else shapes[0][-1]

    def results(self, shapes: Sequence[tuple[int, ...]]) -> "list[tuple[QuantizeProblem, tuple[int, ...]]]":
        """Returns what is quantised of arrays of these shapes: of each, the plain pass over it and its shape."""
        if self.rows != "all":
            plain = dataclasses.replace(self, rows="all", num_groups=0)
            if self.rows == "segments":
                rows, cols = shapes[0]
                shapes = [(aligned_capacity(rows, self.num_groups), cols)]
            return plain.results(shapes)
        if self.function is None:
            return [(self, tuple(shapes[0]))]
        function = FUNCTIONS[self.function]
        lead, cols = shapes[0][:-1], self.columns(shapes)
        plain = dataclasses.replace(self, function=None, joined=False, hidden=False)
        count, width = (1, function.num_outputs * cols) if self.joined else (function.num_outputs, cols)
        results = [(plain, (*lead, width))] * count
        if self.hidden:
            transposed = dataclasses.replace(plain, natural=False, transposed=True, column_sum=False)
            results.append((transposed, (*lead, cols)))
        return results


@dataclasses.dataclass(frozen=True)
class RowSums:
    """Sums over the rows of groups, computed already, and how to compute them from the rows themselves. Hashable.

    Attributes:
        function: of lhs `[m, k]`, rhs `[m, n]` and group_sizes: the sums in float32, `[g, k, n]` or `[g, n]` each.
            Hashable by value, and with all that it depends on in its `repr`.
    """

    function: Callable[[jax.Array, jax.Array, jax.Array], list[jax.Array]]


def make_problem(
    kind: Kind,
    lhs: ScaledArray,
    rhs: ScaledArray,
    bias: Any = None,
    sizes: Any = None,
    *,
    out_dtype: Any,
    activation: str | None = None,
    **options: Any,
) -> GemmProblem:
    """Checks the operands of a product and describes it.

    Args:
        kind: see `GemmProblem`.
        lhs: `[m, k]`; masked and k_masked: `[g, m, k]`.
        rhs: `[n, k]`; grouped, masked and k_masked: `[g, n, k]`.
        bias: None or float `[n]`; grouped and masked: `[g, n]`.
        sizes: `group_sizes`, `masked_m` or `masked_k`, integer `[g]`; None if dense.
        out_dtype: bfloat16, float16 or float32.
        activation: None, "relu", "gelu" or "silu".
        **options: further fields of `GemmProblem`.

    Returns:
        The problem.

    Raises:
        TypeError: for a wrong dtype, or operands that are not `ScaledArray`.
        ValueError: for a wrong rank or shape, or an unknown activation.
    """
    sizes_name = {"masked": "masked_m", "k_masked": "masked_k"}.get(kind, "group_sizes")
    every_group = kind in ("masked", "k_masked")
    _check_scaled_operand("lhs", lhs, ("g", "m", "k") if every_group else ("m", "k"))
    _check_scaled_operand("rhs", rhs, ("g", "n", "k") if every_group or kind == "grouped" else ("n", "k"))
    check_activation(activation)
    if lhs.shape[-1] != rhs.shape[-1]:
        raise ValueError(
            f"lhs and rhs must agree in k, the last axis: lhs is {list(lhs.shape)} with k = {lhs.shape[-1]}, "
            f"rhs is {list(rhs.shape)} with k = {rhs.shape[-1]}"
        )
    (m, k), n = lhs.shape[-2:], rhs.shape[-2]
    num_groups = 1
    if every_group or kind == "grouped":
        num_groups = rhs.shape[0]
        if every_group and lhs.shape[0] != num_groups:
            raise ValueError(
                f"lhs and rhs must agree in g, the first axis: lhs is {list(lhs.shape)}, rhs is {list(rhs.shape)}"
            )
        check_sizes(sizes_name, sizes, num_groups)
    elif kind == "k_grouped":
        check_sizes(sizes_name, sizes, None)
        num_groups = sizes.shape[0]
        if lhs.segment_alignment != rhs.segment_alignment:
            raise ValueError(
                f"lhs and rhs must lay their groups out alike: segment_alignment is {lhs.segment_alignment} for lhs, "
                f"{rhs.segment_alignment} for rhs; quantise both with jaxgemm.quantize_grouped, or neither"
            )
        options["segment_alignment"] = lhs.segment_alignment
    check_bias(bias, (n,) if kind == "dense" else (num_groups, n))
    return GemmProblem(
        kind=kind, m=m, n=n, k=k, num_groups=num_groups,
        lhs_dtype=lhs.dtype, rhs_dtype=rhs.dtype,
        lhs_block_shape=lhs.block_shape, rhs_block_shape=rhs.block_shape,
        out_dtype=check_float_dtype("preferred_element_type", out_dtype),
        has_bias=bias is not None, activation=activation, **options,
    )  # fmt: skip


def stored_operands(problem: GemmProblem) -> list[jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of lhs values and scales, rhs values and scales, as they are stored."""
    sides = (
        (problem.m, problem.lhs_dtype, problem.lhs_block_shape),
        (problem.n, problem.rhs_dtype, problem.rhs_block_shape),
    )
    arrays = []
    for (rows, dtype, block), has_groups in zip(sides, problem.operands_have_groups, strict=True):
        lead = (problem.num_groups,) if has_groups else ()
        shapes = stored_values_shape(rows, problem.k), stored_scales_shape(rows, problem.k, block)
        arrays += [
            jax.ShapeDtypeStruct((*lead, *shape), d) for shape, d in zip(shapes, (dtype, jnp.float32), strict=True)
        ]
    return arrays


def check_activation(activation: Any) -> None:
    """Raises ValueError unless `activation` is None or a known name."""
    _check_choice("activation", activation, (None, *ACTIVATIONS))


def check_implementation(implementation: Any) -> None:
    """Raises ValueError unless `implementation` is None or a known name."""
    _check_choice("implementation", implementation, (None, *IMPLEMENTATIONS))


def check_fill(fill: Any) -> None:
    """Raises ValueError unless `fill` is a known name."""
    _check_choice("fill", fill, FILLS)


def check_float_dtype(name: str, dtype: Any) -> np.dtype:
    """Returns `dtype` as a numpy dtype; raises TypeError unless it is bfloat16, float16 or float32."""
    return _check_dtype(name, dtype, FLOAT_DTYPES, "bfloat16, float16 or float32")


def check_fp8_dtype(name: str, dtype: Any) -> np.dtype:
    """Returns `dtype` as a numpy dtype; raises TypeError unless it is an FP8 one that Hopper multiplies."""
    return _check_dtype(name, dtype, FP8_DTYPES, "float8_e4m3fn or float8_e5m2")


def check_float_array(name: str, array: Any, axes: Sequence[str]) -> None:
    """Checks rank and dtype of a high-precision operand.

    Args:
        name: what the message calls it.
        array: anything with a shape and a dtype.
        axes: names of its axes; a leading "..." stands for any number of them.

    Raises:
        TypeError: if it is no array of bfloat16, float16 or float32.
        ValueError: if its rank is not that of `axes`.
    """
    if not hasattr(array, "dtype") or not hasattr(array, "shape"):
        raise TypeError(f"{name} must be an array of bfloat16, float16 or float32, got {type(array).__name__}")
    check_float_dtype(f"{name}.dtype", array.dtype)
    open_ended = axes[0] == "..."
    rank = len(axes) - open_ended
    if len(array.shape) < rank or (len(array.shape) > rank and not open_ended):
        raise ValueError(f"{name} must be [{', '.join(axes)}], got shape {list(array.shape)}")


def check_sizes(name: str, sizes: Any, num_groups: int | None) -> None:
    """Checks `group_sizes`, `masked_m` or `masked_k`: one axis of integers, `num_groups` of them.

    Raises:
        TypeError: if they are not integers.
        ValueError: if there are not `num_groups` of them (None: at least one).
    """
    if not hasattr(sizes, "dtype") or not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise TypeError(f"{name} must be an integer array, got {getattr(sizes, 'dtype', type(sizes).__name__)}")
    wanted = f"[g] = [{num_groups}]" if num_groups is not None else "[g] with g >= 1"
    if len(sizes.shape) != 1 or sizes.shape[0] != (num_groups if num_groups is not None else max(sizes.shape[0], 1)):
        raise ValueError(f"{name} must be {wanted}, got shape {list(sizes.shape)}")


def check_bias(bias: Any, shape: tuple[int, ...], name: str = "bias", axes: tuple[str, ...] | None = None) -> None:
    """Checks a bias: None, or floats of `shape` (`[n]`, or `[g, n]`, unless `axes` names them otherwise)."""
    if bias is None:
        return
    axes = axes or (("n",) if len(shape) == 1 else ("g", "n"))
    check_float_array(name, bias, axes)
    if tuple(bias.shape) != shape:
        raise ValueError(f"{name} must be [{', '.join(axes)}] = {list(shape)}, got {list(bias.shape)}")


def _check_scaled_operand(name: str, operand: Any, axes: tuple[str, ...]) -> None:
    if not hasattr(operand, "stored_values"):
        what = f"an array of {operand.dtype}" if hasattr(operand, "dtype") else type(operand).__name__
        raise TypeError(
            f"{name} must be a ScaledArray of FP8 values: quantize it first, or join values and scales with "
            f"ScaledArray.from_parts; got {what}"
        )
    if operand.ndim != len(axes):
        raise ValueError(f"{name} must be [{', '.join(axes)}], got shape {list(operand.shape)}")


def _check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(repr(c) for c in choices)}, got {value!r}")


def _check_dtype(name: str, dtype: Any, allowed: Sequence[np.dtype], names: str) -> np.dtype:
    try:
        resolved = np.dtype(dtype if dtype is not None else "None")  # which numpy takes for float64
    except TypeError:
        raise TypeError(f"{name} must be {names}, got {dtype!r}") from None
    if resolved not in allowed:
        raise TypeError(f"{name} must be {names}, got {resolved}")
    return resolved
