"""Words and numbers as the terminal and the report show them."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tpn.errors import plural, printable
from tpn.training.plan import PlanLine

if TYPE_CHECKING:
    from tpn.training.metrics import Evaluation

METRIC_NAMES = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_class": "mean class accuracy",
    "mAP": "mAP",
    "loss": "loss",
    "ece": "calibration error",
}


def setting(value: Any) -> str:
    """Return the value of a setting: "yes" and "no", numbers without rounding errors, "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple | list):
        return ", ".join(map(setting, value))
    return printable(value)


def metric(name: str, value: float) -> str:
    """Return a metric: the loss with three decimals, all others in percent; "not finite" for NaN and infinity."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.3f}" if name.endswith("loss") else f"{value:.1f}%"


def calibration_line(evaluation: "Evaluation") -> str:
    """Return what the temperature of `evaluation.calibrated` changed."""
    after: Any = evaluation.calibrated
    changes = (f"{METRIC_NAMES[k]} {metric(k, evaluation.metrics[k])} → {metric(k, after.metrics[k])}" for k in ("ece", "loss"))
    temperatures = f"temperature {evaluation.temperature:.3g} → {after.temperature:.3g}"
    return f"{temperatures}; on the videos it was fitted to, {', '.join(changes)}"


def duration(seconds: float) -> str:
    """Return a duration, such as "48 s", "12 min" or "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def class_counts(classes: Sequence[str], counts: Sequence[int], *, shown: int = 20) -> str:
    """Return class names with their number of videos; of long lists, the largest and the smallest classes."""
    order = sorted(range(len(classes)), key=lambda k: -counts[k])
    texts = [f"{printable(name)} {count:,}" for name, count in zip(classes, counts, strict=True)]
    if len(texts) <= shown:
        return ", ".join(texts)
    half = shown // 2
    most, fewest = ([texts[k] for k in some] for some in (order[:half], order[-half:]))
    return ", ".join([*most, f"… {len(texts) - 2 * half:,} more …", *fewest])


def weights_line(start: str, new_classifier: bool, num_classes: int) -> str:
    """Return where the weights of a run come from."""
    origin = {
        "pretrained": "the weights of the model",
        "backbone": "ImageNet weights of the backbone; all other weights are random",
        "random": "random weights",
    }.get(start, printable(start))
    return origin + (f"; the classifiers for {plural(num_classes, 'class')} are new" if new_classifier else "")


def plan_rows(plan: Sequence[PlanLine]) -> list[tuple[str, str, str]]:
    """Return (setting, value, reason) of each line of a plan."""
    return [(line.name.replace("_", "-"), setting(line.value), printable(line.reason)) for line in plan]
