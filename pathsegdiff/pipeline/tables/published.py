"""The tables as they were published: Danisetty et al. 2025, 'PathSegDiff'.

Standard library only: figures, where they cannot be right, and which of our rows stands for which.
"""

from dataclasses import dataclass

COLUMNS = ("accuracy", "dice", "miou", "f1")
TITLES = {"accuracy": "accuracy", "dice": "Dice", "miou": "mIoU", "f1": "F1"}


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """A line of a published table.

    Attributes:
        name: As printed.
        figures: By column; what was not printed is absent.
        ours: Our row that stands for it (``rows.ROWS``), None where only the figures exist.
        note: What a reader has to know.
    """

    name: str
    figures: dict[str, float]
    ours: str | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """A published table.

    Attributes:
        name: Of the command.
        title: For people.
        dataset: That it was made on.
        rows: In the order printed.
    """

    name: str
    title: str
    dataset: str
    rows: tuple[PublishedRow, ...]


def _figures(*values: float | None) -> dict[str, float]:
    return {
        column: value for column, value in zip(COLUMNS, values, strict=True) if value is not None
    }


_IMPOSSIBLE_F1 = "the F1 printed lies below the mIoU, which cannot be for the same classes"
_NULL = "null conditioning: no unconditional checkpoint was published"
TABLES = {
    "table2": PublishedTable(
        name="table2",
        title="Table 2: BCSS, five classes",
        dataset="bcss",
        rows=(
            PublishedRow(
                name="HIPT",
                figures=_figures(0.619, 0.353, 0.321, 0.170),
                ours="tokens",
                note=f"{_IMPOSSIBLE_F1}; the Dice is implausibly close to the mIoU",
            ),
            PublishedRow(
                name="Res-UNet",
                figures=_figures(0.751, 0.529, 0.524, 0.658),
                ours="res-unet",
                note="the Dice printed is implausibly close to the mIoU; the F1 behaves like it",
            ),
            PublishedRow(
                name="VGG16-FCN8",
                figures=_figures(0.786, 0.567, 0.577, 0.724),
                ours="vgg16-fcn8",
                note="the Dice printed lies below the mIoU, which cannot be",
            ),
            PublishedRow(
                name="PathSegDiff-uncond",
                figures=_figures(0.815, 0.757, 0.616, 0.757),
                ours="null",
                note=_NULL,
            ),
            PublishedRow(
                name="PathSegDiff",
                figures=_figures(0.826, 0.781, 0.647, 0.780),
                ours="conditioned",
                note="Table 5 prints 0.646 and 0.780 for the same setting",
            ),
        ),
    ),
    "table4": PublishedTable(
        name="table4",
        title="Table 4: GlaS, glands on testB",
        dataset="glas",
        rows=(
            PublishedRow(
                name="HIPT",
                figures=_figures(0.745, 0.742, 0.591, 0.374),
                ours="tokens",
                note=_IMPOSSIBLE_F1,
            ),
            PublishedRow(
                name="Res-UNet", figures=_figures(0.778, 0.771, 0.630, 0.765), ours="res-unet"
            ),
            PublishedRow(
                name="CUMedVision2",
                figures=_figures(None, 0.868, None, 0.887),
                note="object Dice and object F1 over testA and testB, no figures of pixels",
            ),
            PublishedRow(name="DDPMSeg", figures=_figures(None, None, 0.654, 0.759)),
            PublishedRow(name="CIMD", figures=_figures(None, None, 0.569, 0.692)),
            PublishedRow(name="MedSegDiff", figures=_figures(None, None, 0.778, 0.852)),
            PublishedRow(
                name="PathSegDiff-uncond",
                figures=_figures(0.896, 0.893, 0.807, 0.890),
                ours="null",
                note=_NULL,
            ),
            PublishedRow(
                name="PathSegDiff",
                figures=_figures(0.900, 0.896, 0.812, 0.894),
                ours="conditioned",
            ),
        ),
    ),
}
#: Parameters of the paper's networks (Table 1).
PARAMETERS = {"HIPT": 21_665_664, "SSL-guided LDM": 478_619_777, "FCN": 17_470_150}
