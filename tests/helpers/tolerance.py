"""The one table of tolerances that the tests share; it imports nothing, which takes seconds in a process of its own."""

TOLERANCE = {
    "same": {"rtol": 0.0, "atol": 0.0},
    "fp32": {"rtol": 1e-4, "atol": 2e-6},
    "compiled": {"rtol": 1e-3, "atol": 1e-5},
    "fp64": {"rtol": 1e-9, "atol": 1e-11},
    "bf16": {"rtol": 2e-2, "atol": 2e-2},
}
"""rtol and atol by what two computations have in common; nothing else in the tests sets a tolerance."""
