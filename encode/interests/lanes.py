"""Sixteen floats that Numba treats as one value: explicit vector code without a compiler on the user's machine.

LLVM lowers them to what the processor has: one register of AVX-512, two of AVX2, four of NEON. Lanes never mix, and
each operation rounds as IEEE says, so results do not depend on which it is. Arrays are one-dimensional and
contiguous, an index counts elements, and nothing checks bounds.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)


class _Lanes(types.Type):  # type: ignore[misc]
    def __init__(self, name: str, vector: ir.VectorType) -> None:
        super().__init__(name)
        self.vector = vector


floats = _Lanes("lanes(float32)", _FLOATS)
ints = _Lanes("lanes(int32)", _INTS)


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, lanes: _Lanes) -> None:
        super().__init__(manager, lanes, lanes.vector)


def _address(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Pointer to element `args[1]` of array `args[0]`."""
    index = context.cast(builder, args[1], signature.args[1], types.intp)
    return builder.gep(context.make_array(signature.args[0])(context, builder, args[0]).data, [index])


def _repeat(builder: Any, value: Any, vector: ir.VectorType) -> Any:
    nothing = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(_INTS, [0] * LANES))


@intrinsic  # type: ignore[untyped-decorator]
def load(_: Any, array: Any, index: Any) -> Any:
    """Return array[index : index + 16]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature, args)
        return builder.load(builder.bitcast(address, _FLOATS.as_pointer()), align=4)

    return floats(array, index), generate


@intrinsic  # type: ignore[untyped-decorator]
def store(_: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index : index + 16] = value."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature, args)
        builder.store(args[2], builder.bitcast(address, args[2].type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, index, value), generate


@intrinsic  # type: ignore[untyped-decorator]
def splat(_: Any, array: Any, index: Any) -> Any:
    """Return array[index] in every lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _repeat(builder, builder.load(_address(context, builder, signature, args)), _FLOATS)

    return floats(array, index), generate


@intrinsic  # type: ignore[untyped-decorator]
def every(_: Any, value: Any) -> Any:
    """Return a float, or an integer, in every lane."""
    lanes, scalar = (ints, types.int32) if isinstance(value, types.Integer) else (floats, types.float32)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _repeat(builder, context.cast(builder, args[0], signature.args[0], scalar), lanes.vector)

    return lanes(value), generate


@intrinsic  # type: ignore[untyped-decorator]
def columns(_: Any, matrix: Any, width: Any, rows: Any, first: Any, column: Any) -> Any:
    """Return four columns of sixteen rows, `rows[first]` and on, of a matrix given flat: a transposed load."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        quad = ir.VectorType(ir.FloatType(), 4)
        kinds, intp = signature.args, types.intp
        width, first, column = (context.cast(builder, args[k], kinds[k], intp) for k in (1, 3, 4))
        data = context.make_array(kinds[0])(context, builder, args[0]).data
        index = builder.gep(context.make_array(kinds[2])(context, builder, args[2]).data, [first])

        def row(lane: int) -> Any:
            number = builder.load(builder.gep(index, [ir.Constant(ir.IntType(64), lane)]))
            address = builder.gep(data, [builder.add(builder.mul(number, width), column)])
            return builder.load(builder.bitcast(address, quad.as_pointer()), align=4)

        def mix(a: Any, b: Any, order: list[int]) -> Any:
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order))

        def four(places: list[int]) -> list[int]:
            """The same within each four lanes; from 16 on they are those of the second vector."""
            return [place + 4 * quarter for quarter in range(4) for place in places]

        # Rows q, q + 4, q + 8, q + 12 side by side; then a transpose of 4 x 4 in each quarter.
        side = []
        for q in range(4):
            a, b, c, d = (row(q + 4 * quarter) for quarter in range(4))
            side.append(mix(mix(a, b, list(range(8))), mix(c, d, list(range(8))), list(range(LANES))))
        low, high = [0, 16, 1, 17], [2, 18, 3, 19]
        pairs = [[mix(side[q], side[q + 1], four(half)) for q in (0, 2)] for half in (low, high)]
        found = [mix(a, b, four(half)) for a, b in pairs for half in ([0, 1, 16, 17], [2, 3, 18, 19])]
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(floats, 4)(matrix, width, rows, first, column), generate


@intrinsic  # type: ignore[untyped-decorator]
def add(_: Any, a: Any, b: Any) -> Any:
    """Return a + b."""
    return floats(floats, floats), lambda context, builder, signature, args: builder.fadd(*args)


@intrinsic  # type: ignore[untyped-decorator]
def subtract(_: Any, a: Any, b: Any) -> Any:
    """Return a - b."""
    return floats(floats, floats), lambda context, builder, signature, args: builder.fsub(*args)


@intrinsic  # type: ignore[untyped-decorator]
def fma(_: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32"), args)

    return floats(floats, floats, floats), generate


@intrinsic  # type: ignore[untyped-decorator]
def where_greater(_: Any, a: Any, b: Any, yes: Any, no: Any) -> Any:
    """Return lane by lane `yes` where a > b, else `no`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[2], args[3])

    return yes(floats, floats, yes, no), generate


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typing: Any, table: Any, row: Any, column: Any) -> Any:
    """Have the processor fetch the cache line of `table[row, column]`; numba has no word for it, LLVM has."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        array = context.make_array(table)(context, builder, values[0])
        address = cgutils.get_item_pointer(context, builder, table, array, values[1:])
        address = builder.bitcast(address, cgutils.voidptr_t)
        kind = ir.FunctionType(ir.VoidType(), [address.type] + 3 * [ir.IntType(32)])
        line = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(line, [address, *(ir.IntType(32)(flag) for flag in (0, 3, 1))])  # to read, soon again, data
        return context.get_dummy_value()

    return types.void(table, row, column), emit
