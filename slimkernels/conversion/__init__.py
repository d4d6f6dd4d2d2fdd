"""Conversion: a compressed model's layers replaced by drop-in modules where that is faster, and the account of it.

In the order of the work: `wrappers` takes off what only runs a model; `analysis` finds patterns; `graph`, `layers` and
`factor_chains` see what feeds what, `calls` what example inputs do, `readers` which weights are their layer's own;
`units` groups each layer with what follows it; `candidates` builds the ways to run it, and `decide` takes one by the
times of `measure` and their `spread`; `convert_model` puts the modules in and compares by `outputs`, `output_layouts`
finds whose outputs the model takes in one layout alone, `finish` attaches what the result carries; `plan`, `report` and
`container` record, print and store what was done; `plain_model` is the way back.
"""

from slimkernels.conversion.convert_model import convert
from slimkernels.conversion.plain_model import to_dense
from slimkernels.conversion.report import explain

__all__ = ["convert", "explain", "to_dense"]
