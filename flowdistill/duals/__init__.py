"""A function's value with a graph and its derivative along a direction without one, in a single pass.

Numbers y + e dy with e^2 = 0 follow the function's own operations: f(x + e dx) = f(x) + e f'(x) dx.
"""

from flowdistill.duals import attention, rules  # noqa: F401, which fill the table
from flowdistill.duals.engine import Dual, Refused, dual, is_foreign, parts, register_rule

__all__ = ["Dual", "Refused", "dual", "is_foreign", "parts", "register_rule"]
