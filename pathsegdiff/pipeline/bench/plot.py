"""The ratios of ``psd bench`` as one picture."""

from pathlib import Path
from typing import Any

#: Precision -> colour (Okabe and Ito, for the colour-blind).
_COLOURS = {"float32": "#0072B2", "bfloat16": "#D55E00", "float16": "#009E73"}
_HEAD = (
    ("first_layer", "head's first layer"),
    ("step", "head's step"),
    ("step_with_reading", "steps with reading"),
)


def draw(found: dict[str, Any], file: Path) -> None:
    """How many times better than the plain way, a bar per comparison and precision.

    Args:
        found: Of ``run_bench``, or read from the JSON that the command writes.
        file: PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars: list[tuple[str, str, dict[str, float]]] = [
        ("extraction (plain: float32)", precision, speed["to_plain"])
        for precision, speed in found["extraction"].items()
    ]
    for name, title in _HEAD:
        bars += [(title, precision, speed[name]["ratio"]) for precision, speed in
                 found["head"].items()]  # fmt: skip
    size = found["bytes_per_patch"]
    fewer = size["plain"] / size["features"]
    bars.append(("bytes of the features", "", {"median": fewer, "low": fewer, "high": fewer}))

    figure = Figure(figsize=(7, 0.42 * len(bars) + 1.3), layout="constrained")
    axes = figure.subplots()
    for place, (_, precision, ratio) in enumerate(bars):
        median = ratio["median"]
        axes.barh(
            place,
            median,
            color=_COLOURS.get(precision, "#666666"),
            xerr=[[median - ratio["low"]], [ratio["high"] - median]],
            capsize=3,
        )
        axes.text(ratio["high"] + 0.05, place, f" {median:.2f}", va="center")
    axes.set_yticks(
        range(len(bars)),
        [f"{title}, {precision}" if precision else title for title, precision, _ in bars],
    )
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.12)
    axes.set_xlabel("times better than the plain way (median, lowest to highest run)")
    axes.set_title(f"{found['model']['name']}, {found['device']}", fontsize=10)
    FigureCanvasAgg(figure).print_png(str(file))
