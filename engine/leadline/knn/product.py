"""The product of a few queries with a panel of bank rows, and which of its entries reach a threshold, in one step.

The products live and die in the processor's registers: what comes out is one bit a pair. It is written in LLVM's own
terms through numba, because neither a matrix library, which writes its products to memory, nor a compiled loop, which
cannot name the instruction for pairs of bfloat16, does it. On two cores with AVX512-BF16 it multiplies faster than the
matrix library does (benchmarks/results).
"""

from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_FEATURES = llvm.get_host_cpu_features()
_WIDE = bool(_FEATURES.get("avx512f"))
HAS_BFLOAT16 = _WIDE and bool(_FEATURES.get("avx512bf16"))

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
_PAIRS = ir.VectorType(_BFloat(), 2 * LANES)


@intrinsic
def reach(
    context: Any, queries: Any, query: Any, panels: Any, panel: Any, bias: Any, thresholds: Any, masks: Any
) -> Any:
    """Bit j of masks[i]: whether bias[panel, j] + <queries[query + i], row j of the panel> >= thresholds[query + i].

    A sum that is not a number reaches every threshold. Returns int64: 0 where no bit is set.

    queries [n, K], contiguous; panels [P, S, PANEL * K / S]: float32, and then S = K, a value of each row in a step; or
    int16, the bits of bfloat16, and then S = K / 2, two values of each row side by side. bias float32 [P, PANEL],
    thresholds float32 [n]; masks WORD [GROUP]. Accumulated in float32, in the order of the values. Nothing is
    checked: query + GROUP <= n.
    """
    signature = types.int64(queries, types.int64, panels, types.int64, bias, thresholds, masks)
    return signature, _emit


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
    queries, panels, bias, thresholds, masks = (builder.ptrtoint(array.data, _INT64) for array in arrays.values())
    query, panel = arguments[1], arguments[3]
    in_pairs = signature.args[2].dtype == types.int16
    width = cgutils.unpack_tuple(builder, arrays[0].shape, 2)[1]
    steps = cgutils.unpack_tuple(builder, arrays[2].shape, 3)[1]
    row = builder.mul(width, _INT64(2 if in_pairs else 4))
    first = builder.add(queries, builder.mul(query, row))
    rows = [builder.add(first, builder.mul(row, _INT64(i))) for i in range(GROUP)]
    step = _INT64(4 * PANEL)
    values = builder.add(panels, builder.mul(panel, builder.mul(steps, step)))
    bias = builder.add(bias, builder.mul(panel, _INT64(4 * PANEL)))
    begin = [_load(builder, bias, 4 * LANES * v, _FLOATS) for v in range(VECTORS)]

    before, loop, after = builder.block, builder.append_basic_block("steps"), builder.append_basic_block("reached")
    builder.branch(loop)
    builder.position_at_end(loop)
    s = builder.phi(_INT64)
    s.add_incoming(_INT64(0), before)
    sums = [[builder.phi(_FLOATS) for _ in range(VECTORS)] for _ in range(GROUP)]
    there, place = builder.add(values, builder.mul(s, step)), builder.mul(s, _INT64(4))
    kind = _PAIRS if in_pairs else _FLOATS
    of_bank = [_load(builder, there, 4 * LANES * v, kind) for v in range(VECTORS)]
    multiply = _multiply(builder.module, in_pairs)
    done = []
    for i in range(GROUP):
        of_query = _spread(builder, _load(builder, builder.add(rows[i], place), 0, _INT32), _INTS)
        of_query = builder.bitcast(of_query, kind)
        for v in range(VECTORS):
            total = multiply(builder, of_query, of_bank[v], sums[i][v])
            sums[i][v].add_incoming(begin[v], before)
            sums[i][v].add_incoming(total, loop)
            done.append(total)
    following = builder.add(s, _INT64(1))
    s.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, steps), loop, after)

    builder.position_at_end(after)
    thresholds = builder.add(thresholds, builder.mul(query, _INT64(4)))
    some = _INT16(0)
    for i in range(GROUP):
        threshold = _spread(builder, _load(builder, thresholds, 4 * i, _FLOAT), _FLOATS)
        for v in range(VECTORS):
            bits = builder.bitcast(builder.fcmp_unordered(">=", done[i * VECTORS + v], threshold), _INT16)
            at = builder.add(masks, _INT64(2 * (i * VECTORS + v)))
            builder.store(bits, builder.inttoptr(at, _INT16.as_pointer()))
            some = builder.or_(some, bits)
    return builder.zext(some, _INT64)


def _multiply(module: Any, in_pairs: bool) -> Any:
    """A vector of sums, each grown by one product, or by two of bfloat16."""
    if in_pairs:
        kind = ir.FunctionType(_FLOATS, [_FLOATS, _PAIRS, _PAIRS])
        pairs = cgutils.get_or_insert_function(module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
        return lambda builder, a, b, total: builder.call(pairs, [total, a, b])
    kind = ir.FunctionType(_FLOATS, [_FLOATS, _FLOATS, _FLOATS])
    fma = cgutils.get_or_insert_function(module, kind, f"llvm.fma.v{LANES}f32")
    return lambda builder, a, b, total: builder.call(fma, [a, b, total])


def _load(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    value = builder.load(builder.inttoptr(builder.add(address, _INT64(offset)), kind.as_pointer()))
    value.align = 2  # numpy promises no more
    return value


def _spread(builder: Any, value: Any, kind: Any) -> Any:
    """A vector of one value, many times."""
    nothing = ir.Constant(kind, ir.Undefined)
    alone = builder.insert_element(nothing, value, _INT32(0))
    return builder.shuffle_vector(alone, nothing, ir.Constant(_INTS, [0] * LANES))
