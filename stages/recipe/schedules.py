"""Settings of the loss that change while a student trains: their value at a share of all tokens."""

import math

from .fields import Schedule


def value_at(setting: float | Schedule, done: float) -> float:
    """The value at the share `done` of all tokens (0 to 1; beyond 1 as at 1). A number is its own value.

    A function of nothing but `done`, so a run that was stopped goes on with the values that it would have had.
    """
    if not isinstance(setting, Schedule):
        return setting
    done = min(done, 1.0)
    start, end = setting.start, setting.end
    match setting.shape:
        case "linear":
            return start + (end - start) * done
        case "cosine":
            return start + (end - start) * _half_wave(done)
        case "wsd":
            assert setting.peak is not None
            if done < setting.warmup_fraction:
                return start + (setting.peak - start) * (done / setting.warmup_fraction)
            left = max(0.0, done - (1 - setting.decay_fraction))
            return setting.peak + (end - setting.peak) * _half_wave(left / setting.decay_fraction)


def extremes(setting: float | Schedule) -> tuple[float, float]:
    """Least and greatest value that it takes."""
    if not isinstance(setting, Schedule):
        return setting, setting
    named = [value for value in (setting.start, setting.peak, setting.end) if value is not None]
    return min(named), max(named)


def _half_wave(share: float) -> float:
    """0 to 1 as its argument, level at both ends."""
    return (1 - math.cos(math.pi * share)) / 2
