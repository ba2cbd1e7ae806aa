"""What torch stores per thread: another thread that goes on with this one's work needs it too."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def thread_state() -> Callable[[ExitStack], None]:
    """Gives another thread this one's modes, autocast and stream."""
    graded, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    modes = _get_current_dispatch_mode_stack()
    functions: Sequence[TorchFunctionMode] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    cached = torch.is_autocast_cache_enabled()
    casts = [(on, torch.is_autocast_enabled(on), torch.get_autocast_dtype(on)) for on in ("cpu", "cuda")]
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def enter(stack: ExitStack) -> None:
        stack.enter_context(torch.inference_mode(inference))
        torch.set_grad_enabled(graded)
        torch.autocast_increment_nesting()  # or each context's end would clear the cache of casts
        for on, enabled, dtype in casts:
            torch.set_autocast_enabled(on, enabled)
            torch.set_autocast_dtype(on, dtype)
        torch.set_autocast_cache_enabled(cached)
        if stream is not None:
            torch.cuda.set_stream(stream)
        for function_mode in functions:
            stack.enter_context(function_mode)
        for mode in modes:
            stack.enter_context(mode)

    return enter
