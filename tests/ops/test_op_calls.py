"""The records of the ops' arguments follow the schemas, which are the only long lists."""

from __future__ import annotations

import inspect

import pytest
import torch

from slimkernels import ops
from slimkernels.ops.calls import CALLS
from slimkernels.ops.library import OPS


@pytest.mark.parametrize("name", CALLS)
def test_a_record_has_the_arguments_of_its_schema_in_their_order(name: str) -> None:
    arguments = getattr(OPS, name).default._schema.arguments
    record = CALLS[name]
    assert [argument.name for argument in arguments] == list(record._fields)
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    assert defaults == record._field_defaults


def test_every_op_has_a_record() -> None:
    found = {schema.name.split("::")[1] for schema in torch._C._jit_get_all_schemas() if "slimkernels" in schema.name}
    assert found == set(CALLS)


@pytest.mark.parametrize("name", [name for name in CALLS if hasattr(ops, name)])
def test_the_public_function_has_the_arguments_of_the_record(name: str) -> None:
    assert set(inspect.signature(getattr(ops, name)).parameters) == set(CALLS[name]._fields)
