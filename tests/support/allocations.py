"""How much memory a function takes on the CPU.

torch itself records every block that is allocated and freed.
"""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def allocated(function: Callable[[], object]) -> tuple[int, int]:
    """(most, left): bytes at once while it runs, and bytes that stay as long as its result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = function()
    events = [
        event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    del kept
    return most, live
