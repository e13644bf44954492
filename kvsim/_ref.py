"""A named tuple by reference in compiled code: one pointer, where numba passes every array in it by value.

An array is seven machine words, so the engine's state is well over a hundred. To copy them at each call takes longer
than what is called, and to compile the copies longer than all the rest. `by_reference(s)` puts the tuple into the
caller's frame and gives its address; `.field` works as before. The address is good until the caller returns, so it
is only handed down. Without the JIT it is the tuple itself.
"""

from __future__ import annotations

import os

from numba.core import cgutils, types
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, intrinsic, lower_getattr_generic, models, register_model


class Reference(types.Type):
    """The address of a named tuple."""

    def __init__(self, target):
        self.target = target
        super().__init__(name=f"Reference({target})")


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
    def to_frame(context, builder, signature, arguments):
        return cgutils.alloca_once_value(builder, arguments[0])

    return Reference(value)(value), to_frame


def by_reference(s):
    """The named tuple `s` by its address, for compiled functions that this one calls."""
    return s


if os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0"):
    by_reference = _refer
