"""The tables as they were published: Danisetty et al. 2025, 'PathSegDiff'.

Standard library only: figures, where they cannot be right, and which of our rows stands for which.
"""

from dataclasses import dataclass, field

#: Of the tables of pooled metrics, as ``psd eval`` names them, with their titles.
COLUMNS = {"accuracy": "accuracy", "dice": "Dice", "miou": "mIoU", "f1": "F1"}
#: Of the table of single classes: the mean of its classes.
MEAN = "mean"


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """A line of a published table.

    Attributes:
        name: As printed.
        figures: By column; what was not printed is absent.
        ours: Our row that stands for it (``rows.ROWS``), None where only the figures exist.
        objects: Whether its Dice and F1 are those of objects, not of pixels.
        note: What a reader has to know.
    """

    name: str
    figures: dict[str, float]
    ours: str | None = None
    objects: bool = False
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """A published table.

    Attributes:
        name: Of the command.
        title: For people.
        dataset, split: That it was made on.
        rows: In the order printed.
        classes: Our class of each column whose figure is the IoU of one class; empty where the
            columns are those of ``COLUMNS``.
        note: What a reader has to know of the whole table.
    """

    name: str
    title: str
    dataset: str
    split: str
    rows: tuple[PublishedRow, ...]
    classes: dict[str, str] = field(default_factory=dict)
    note: str = ""


def _figures(*values: float | None) -> dict[str, float]:
    return {
        column: value for column, value in zip(COLUMNS, values, strict=True) if value is not None
    }


def _ious(*values: float) -> dict[str, float]:
    return dict(zip((*_CLASSES, MEAN), values, strict=True))


#: Columns of Table 3, and what the classes are called here.
_CLASSES = {"TUM": "tumor", "STR": "stroma", "LYM": "inflammatory", "NEC": "necrosis"}
_IMPOSSIBLE_F1 = "the F1 printed lies below the mIoU, which cannot be for the same classes"
_LIKE_MACRO_DICE = (
    "the F1 printed behaves like a macro Dice: it is what our Dice and F1 compare with"
)
_NULL = "null conditioning: no unconditional checkpoint was published"
TABLES = {
    "table2": PublishedTable(
        name="table2",
        title="Table 2: BCSS, five classes",
        dataset="bcss",
        split="test",
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
                note=f"the Dice printed is implausibly close to the mIoU; {_LIKE_MACRO_DICE}",
            ),
            PublishedRow(
                name="VGG16-FCN8",
                figures=_figures(0.786, 0.567, 0.577, 0.724),
                ours="vgg16-fcn8",
                note="the Dice printed lies below the mIoU, which cannot be for the same classes; "
                + _LIKE_MACRO_DICE,
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
    "table3": PublishedTable(
        name="table3",
        title="Table 3: BCSS, IoU of four classes",
        dataset="bcss",
        split="test",
        classes=_CLASSES,
        note="published rows but the last are weakly supervised, of image labels, and were scored "
        "on other patches (BCSS-WSSS); ours are the classes' IoU of the pixels of the evaluated "
        "split, all five classes in the confusion matrix",
        rows=(
            PublishedRow(name="HistoSegNet", figures=_ious(0.3314, 0.4646, 0.2905, 0.0191, 0.2764)),
            PublishedRow(name="SEAM", figures=_ious(0.7437, 0.6216, 0.5079, 0.4843, 0.5894)),
            PublishedRow(name="C-CAM", figures=_ious(0.7557, 0.6796, 0.31, 0.4943, 0.5599)),
            PublishedRow(name="WSSS-Tissue", figures=_ious(0.7798, 0.7295, 0.6098, 0.6687, 0.697)),
            PublishedRow(name="PistoSeg", figures=_ious(0.811, 0.7504, 0.6184, 0.6422, 0.7055)),
            PublishedRow(
                name="PathSegDiff",
                figures=_ious(0.822, 0.6998, 0.6205, 0.6976, 0.71),
                ours="conditioned",
            ),
        ),
    ),
    "table4": PublishedTable(
        name="table4",
        title="Table 4: GlaS, glands on testB",
        dataset="glas",
        split="testB",
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
                ours="dcan",
                objects=True,
                note="published: object Dice and object F1 over testA and testB, no figures of "
                "pixels; ours: the network that it is, DCAN",
            ),
            PublishedRow(
                name="DDPMSeg",
                figures=_figures(None, None, 0.654, 0.759),
                ours="ddpm-seg",
                note="ours: its pixel classifiers on the features of the same model",
            ),
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
