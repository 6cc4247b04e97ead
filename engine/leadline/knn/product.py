"""The product of a few queries with a panel of bank rows, and which of its entries reach a threshold, in one step.

The products live and die in the processor's registers: what comes out is one bit a pair. It is written in LLVM's own
terms through numba, because neither a matrix library, which writes its products to memory, nor a compiled loop, which
cannot name the instructions for pairs of bfloat16 or int16 and fours of int8, does it. On two cores with AVX512-BF16 it
multiplies faster than the matrix library does (benchmarks/results).
"""

from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def _features() -> set[str]:
    """What numba compiles for: this processor, unless NUMBA_CPU_FEATURES says otherwise."""
    told = numba.config.CPU_FEATURES
    if told is None:
        return {name for name, has in llvm.get_host_cpu_features().items() if has}
    return {feature[1:] for feature in told.split(",") if feature.startswith("+")}


_FEATURES = _features()
_WIDE = "avx512f" in _FEATURES
HAS_BFLOAT16 = _WIDE and "avx512bf16" in _FEATURES
HAS_INT8 = _WIDE and "avx512vnni" in _FEATURES
HAS_INT16 = ("avx512bw" if _WIDE else "avx2") in _FEATURES
LONGEST_INT8 = 1 << 17  # values of a row whose products of 127 x 127 an int32 can add up

LANES = 16  # float32 values of one vector
VECTORS = 4 if _WIDE else 1  # of a panel: what the processor's registers hold beside the queries
GROUP = 6  # queries of one step
PANEL = LANES * VECTORS  # bank rows of one step
WORD = np.int64 if PANEL == 64 else np.int16  # a bit for each row


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite cannot name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_INT16, _INT32, _INT64, _FLOAT = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT32, LANES)
_PAIRS, _SHORTS = ir.VectorType(_BFloat(), 2 * LANES), ir.VectorType(_INT16, 2 * LANES)
_KINDS = {types.float32: _FLOATS, types.uint16: _PAIRS, types.int16: _SHORTS, types.int8: _INTS}


@intrinsic
def reach(
    context: Any, queries: Any, query: Any, panels: Any, panel: Any, bias: Any, units: Any, thresholds: Any,
    starts: Any, of_queries: Any, masks: Any,
) -> Any:  # fmt: skip
    """Bit j of masks[i]: whether bias[panel, j] + <queries[query + i], row j of the panel> >= thresholds[query + i].

    A sum that is not a number reaches every threshold. Returns int64: 0 where no bit is set.

    queries [n, K or more], contiguous; panels [P, K / V, PANEL * V]: V values of each row side by side, 1 of float32,
    2 of bfloat16 (their bits, uint16) or of int16, or 4 of int8; bias float32 [P, PANEL], thresholds float32 [n]; masks
    WORD [GROUP]. Accumulated in float32, in the order of the values. Of int16 and int8 the product is that of the
    integers, which is exact, times units[panel, j] * of_queries[query + i] (float32 [P, PANEL] and [n], read for them
    alone, as is starts int32 [n], which is what the sum begins with). Of int8 the processor takes one side's for
    unsigned, so those of the panels have 128 added, and starts is -128 times the sum of the query's; of int16 it is 0.
    Nothing is checked: query + GROUP <= n, and sums of integers below 2^31.
    """
    given = (queries, types.int64, panels, types.int64, bias, units, thresholds, starts, of_queries, masks)
    return types.int64(*given), _emit


@intrinsic
def lowest_bit(context: Any, bits: Any) -> Any:
    """The number of zeros below the lowest bit that is set; bits: not 0."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return bits(bits), emit


def _emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    arrays = {
        i: context.make_array(signature.args[i])(context, builder, arguments[i])
        for i in range(len(arguments))
        if isinstance(signature.args[i], types.Array)
    }
    queries, panels, bias, units, thresholds, starts, of_queries, masks = (
        builder.ptrtoint(array.data, _INT64) for array in arrays.values()
    )
    query, panel = arguments[1], arguments[3]
    dtype = signature.args[0].dtype
    kind, in_integers = _KINDS[dtype], dtype in (types.int8, types.int16)
    width = cgutils.unpack_tuple(builder, arrays[0].shape, 2)[1]
    steps = cgutils.unpack_tuple(builder, arrays[2].shape, 3)[1]
    row = builder.mul(width, _INT64(dtype.bitwidth // 8))
    first = builder.add(queries, builder.mul(query, row))
    rows = [builder.add(first, builder.mul(row, _INT64(i))) for i in range(GROUP)]
    step, of_panel = _INT64(4 * PANEL), builder.mul(panel, _INT64(4 * PANEL))
    values = builder.add(panels, builder.mul(panel, builder.mul(steps, step)))
    bias, units = builder.add(bias, of_panel), builder.add(units, of_panel)
    of_query = builder.mul(query, _INT64(4))
    thresholds, starts, of_queries = (builder.add(start, of_query) for start in (thresholds, starts, of_queries))
    biases = [_load(builder, bias, 4 * LANES * v, _FLOATS) for v in range(VECTORS)]
    begin = [biases] * GROUP
    if in_integers:
        begin = [[_spread(builder, _load(builder, starts, 4 * i, _INT32), _INTS)] * VECTORS for i in range(GROUP)]

    before, loop, after = builder.block, builder.append_basic_block("steps"), builder.append_basic_block("reached")
    builder.branch(loop)
    builder.position_at_end(loop)
    s = builder.phi(_INT64)
    s.add_incoming(_INT64(0), before)
    sums = [[builder.phi(_INTS if in_integers else _FLOATS) for _ in range(VECTORS)] for _ in range(GROUP)]
    there, place = builder.add(values, builder.mul(s, step)), builder.mul(s, _INT64(4))
    of_bank = [_load(builder, there, 4 * LANES * v, kind) for v in range(VECTORS)]
    multiply = _multiply(builder.module, kind)
    done = []
    for i in range(GROUP):
        of_query = _spread(builder, _load(builder, builder.add(rows[i], place), 0, _INT32), _INTS)
        of_query = builder.bitcast(of_query, kind)
        for v in range(VECTORS):
            total = multiply(builder, of_query, of_bank[v], sums[i][v])
            sums[i][v].add_incoming(begin[i][v], before)
            sums[i][v].add_incoming(total, loop)
            done.append(total)
    following = builder.add(s, _INT64(1))
    s.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, steps), loop, after)

    builder.position_at_end(after)
    some = _INT16(0)
    for i in range(GROUP):
        threshold = _spread(builder, _load(builder, thresholds, 4 * i, _FLOAT), _FLOATS)
        for v in range(VECTORS):
            total = done[i * VECTORS + v]
            if in_integers:
                unit = _spread(builder, _load(builder, of_queries, 4 * i, _FLOAT), _FLOATS)
                product = builder.fmul(builder.sitofp(total, _FLOATS), _load(builder, units, 4 * LANES * v, _FLOATS))
                total = builder.fadd(builder.fmul(product, unit), biases[v])
            bits = builder.bitcast(builder.fcmp_unordered(">=", total, threshold), _INT16)
            at = builder.add(masks, _INT64(2 * (i * VECTORS + v)))
            builder.store(bits, builder.inttoptr(at, _INT16.as_pointer()))
            some = builder.or_(some, bits)
    return builder.zext(some, _INT64)


def _multiply(module: Any, kind: Any) -> Any:
    """A vector of sums, each grown by as many products as values lie side by side."""
    if kind is _FLOATS:
        function = ir.FunctionType(_FLOATS, [_FLOATS, _FLOATS, _FLOATS])
        fma = cgutils.get_or_insert_function(module, function, f"llvm.fma.v{LANES}f32")
        return lambda builder, a, b, total: builder.call(fma, [a, b, total])
    if kind is _SHORTS:
        return _multiply_shorts(module)
    name = "avx512bf16.dpbf16ps" if kind is _PAIRS else "avx512.vpdpbusd"
    sums = _FLOATS if kind is _PAIRS else _INTS
    function = ir.FunctionType(sums, [sums, kind, kind])
    products = cgutils.get_or_insert_function(module, function, f"llvm.x86.{name}.512")
    # The integers of the bank come first: the processor takes them for unsigned ones.
    return lambda builder, a, b, total: builder.call(products, [total, b, a])


def _multiply_shorts(module: Any) -> Any:
    """Pairs of int16, with vectors as wide as the processor's: a whole one, or halves that are put together again."""
    name, lanes = ("avx512.pmaddw.d.512", LANES) if _WIDE else ("avx2.pmadd.wd", LANES // 2)
    shorts = ir.VectorType(_INT16, 2 * lanes)
    function = ir.FunctionType(ir.VectorType(_INT32, lanes), [shorts, shorts])
    products = cgutils.get_or_insert_function(module, function, f"llvm.x86.{name}")

    def places(first: int, n: int) -> Any:
        return ir.Constant(ir.VectorType(_INT32, n), list(range(first, first + n)))

    def multiply(builder: Any, a: Any, b: Any, total: Any) -> Any:
        if _WIDE:
            return builder.add(total, builder.call(products, [a, b]))
        halves = [
            builder.call(products, [builder.shuffle_vector(x, x, places(first, LANES)) for x in (a, b)])
            for first in (0, LANES)
        ]
        return builder.add(total, builder.shuffle_vector(*halves, places(0, LANES)))

    return multiply


def _load(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    value = builder.load(builder.inttoptr(builder.add(address, _INT64(offset)), kind.as_pointer()))
    value.align = 2  # numpy promises no more
    return value


def _spread(builder: Any, value: Any, kind: Any) -> Any:
    """A vector of one value, many times."""
    nothing = ir.Constant(kind, ir.Undefined)
    alone = builder.insert_element(nothing, value, _INT32(0))
    return builder.shuffle_vector(alone, nothing, ir.Constant(_INTS, [0] * LANES))
