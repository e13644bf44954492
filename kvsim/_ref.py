"""A named tuple by reference in compiled code: one pointer, where numba passes every array in it by value.

An array is seven machine words, so the engine's state is well over a hundred. To copy them at each call takes longer
than what is called, and to compile the copies longer than all the rest. `by_reference(s)` puts the tuple into the
caller's frame and gives its address; `.field` works as before. The address is good until the caller returns, so it
is only handed down. Without the JIT it is the tuple itself.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np
from numba.core import cgutils, types
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, intrinsic, lower_getattr_generic, models, register_model


class Reference(types.Type):
    """The address of a named tuple."""

    def __init__(self, target):
        self.target = target
        # A digest, because numba puts the names of a function's types into that of the function, wherever it is called.
        digest = hashlib.sha256(str(target).encode()).hexdigest()[:16]
        super().__init__(name=f"Reference({digest})")


@register_model(Reference)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, type_):
        super().__init__(manager, type_, manager.lookup(type_.target).get_value_type().as_pointer())


@infer_getattr
class _Attribute(AttributeTemplate):
    key = Reference

    def generic_resolve(self, reference, name):
        return reference.target.types[reference.target.fields.index(name)]


@lower_getattr_generic(Reference)
def _load(context, builder, reference, address, name):
    place = reference.target.fields.index(name)
    return builder.load(cgutils.gep_inbounds(builder, address, 0, place))


@intrinsic
def _refer(typing_context, value):
    if isinstance(value, Reference):
        return value(value), lambda context, builder, signature, arguments: arguments[0]

    def to_frame(context, builder, signature, arguments):
        return cgutils.alloca_once_value(builder, arguments[0])

    return Reference(value)(value), to_frame


def _address(context, builder, buffer_type, buffer, k, value_type):
    """The place of the k-th named tuple in a buffer of bytes."""
    pointer_type = context.get_value_type(value_type).as_pointer()
    data = context.make_array(buffer_type)(context, builder, buffer).data
    return builder.gep(builder.bitcast(data, pointer_type), [k])


@intrinsic
def _size_of(typing_context, value):
    def size(context, builder, signature, arguments):
        return context.get_constant(types.int64, context.get_abi_sizeof(context.get_value_type(value)))

    return types.int64(value), size


@intrinsic
def _put(typing_context, buffer, k, value):
    def store(context, builder, signature, arguments):
        builder.store(arguments[2], _address(context, builder, buffer, *arguments[:2], value))
        return context.get_dummy_value()

    return types.none(buffer, types.int64, value), store


@intrinsic
def _at(typing_context, buffer, k, like):
    def address(context, builder, signature, arguments):
        return _address(context, builder, buffer, *arguments[:2], like.target)

    return like(buffer, types.int64, like), address


def by_reference(s):
    """The named tuple `s` by its address, for compiled functions that this one calls; an address is left as it is."""
    return s


def size_of(s):
    """Bytes that a buffer needs for each named tuple like `s`."""
    return 1


def put(buffer, k, s):
    """Make `s` the k-th named tuple of a buffer. It holds addresses only: keep the arrays of `s` elsewhere."""
    buffer[k] = s


def at(buffer, k, like):
    """The k-th named tuple of a buffer by its address, if it is one like `like`, itself a reference."""
    return buffer[k]


def empty_buffer(num_bytes: int) -> np.ndarray:
    """For as many named tuples as fit into `num_bytes` bytes."""
    return np.zeros(num_bytes, np.uint8 if _IS_COMPILED else object)


_IS_COMPILED = os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0")
if _IS_COMPILED:
    by_reference, size_of, put, at = _refer, _size_of, _put, _at
