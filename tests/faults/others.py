"""What two well-known tools say about a fault: transformers' DebugUnderflowOverflow and torch's anomaly mode."""

import io
import re
import warnings
from contextlib import redirect_stdout

import torch
from transformers.debug_utils import DebugUnderflowOverflow

from tests.faults.form import Fault
from tests.faults.loops import Loop, Nobody

OTHERS = ("DebugUnderflowOverflow", "anomaly mode")


def ask_others(fault: Fault) -> dict[str, str]:
    """Return for each tool `silent`, `alarm` (it stops, and names another place or none) or `place`."""
    heard = {"DebugUnderflowOverflow": _underflow_overflow(fault), "anomaly mode": _anomaly(fault)}
    said = {True: "place", False: "alarm"}
    return {
        name: said[re.search(fault.mentions, text) is not None] if text else "silent" for name, text in heard.items()
    }


def _underflow_overflow(fault: Fault) -> str:
    """The last frame that it prints: the module in which it has stopped. Empty if it did not stop."""
    loop = fault.loop()
    DebugUnderflowOverflow(loop.model)
    with redirect_stdout(io.StringIO()) as printed:
        error = _error(loop, fault)
    if "DebugUnderflowOverflow" not in error:
        return ""
    frames = re.split(r"\n(?= {17}\S)", printed.getvalue().split("Last ")[-1].rstrip())
    return frames[-1]


def _anomaly(fault: Fault) -> str:
    """Its warning, with the line of the forward pass, and its error. Empty if it did not stop."""
    loop = fault.loop()
    with warnings.catch_warnings(record=True) as caught, torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("always")
        error = _error(loop, fault)
    if "returned nan values" not in error:
        return ""
    said = [str(warning.message).rstrip() for warning in caught if "Error detected" in str(warning.message)]
    return "\n".join("\n".join(text.splitlines()[-3:]) for text in said)


def _error(loop: Loop, fault: Fault) -> str:
    """Train with nobody watching; return the words of the error that ends it, or none."""
    expected = (ValueError, RuntimeError, fault.crash or RuntimeError)
    try:
        loop.train(Nobody())
    except expected as error:
        return str(error)
    return ""
