"""The activation that a YAML names in text, e.g. `nn.LeakyReLU(0.1)`: looked up in a table, its literal arguments parsed, nothing evaluated."""
from __future__ import annotations

import ast
import inspect

from torch import nn

from utils.errors import UserError
from utils.files import did_you_mean

_LARGEST = 1000
_KNOWN = {cls.__name__: cls for cls in (nn.SiLU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardswish, nn.Mish, nn.GELU, nn.ELU, nn.CELU, nn.SELU, nn.PReLU,
                                        nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Identity, nn.Softplus)}


def parse_activation(text: str, origin: str) -> nn.Module:
    """`nn.NAME(literals)` or `NAME` -> a module.

    Raises:
        UserError: not of that form, an unknown name (nearest names given) or arguments that the layer refuses.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else None
        name = ast.unparse(call.func if call else node).removeprefix("torch.").removeprefix("nn.")
        args = [ast.literal_eval(arg) for arg in call.args] if call else []
        kwargs = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords} if call else {}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError(f"{origin}: activation {text!r} is no layer name with plain values, such as nn.LeakyReLU(0.1)") from None
    for value in (*args, *kwargs.values()):
        if not (isinstance(value, str) or (isinstance(value, int | float) and abs(value) < _LARGEST)):
            raise UserError(f"{origin}: activation {text}: its arguments must be text, True, False or numbers below {_LARGEST}")
    if name not in _KNOWN:
        raise UserError(f"{origin}: unknown activation {name}{did_you_mean(name, _KNOWN)}; known: {', '.join(sorted(_KNOWN))}")
    cls = _KNOWN[name]
    if "inplace" in inspect.signature(cls).parameters:
        kwargs.setdefault("inplace", True)
    try:
        return cls(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(f"{origin}: activation {text}: {error}") from None
