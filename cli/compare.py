"""``psd compare``: is one run better than another on the same images?"""

from pathlib import Path

import click

from cli.options import PATH

_TITLES = {"accuracy": "accuracy", "dice": "Dice", "miou": "mIoU", "f1": "F1"}
#: Images named at either end.
_SHOWN = 3


@click.command()
@click.argument("first", type=PATH)
@click.argument("second", type=PATH)
@click.option("--split", "part", help="What was scored, where a run has several evaluations.")
@click.option("--draws", type=click.IntRange(100, 100_000), default=2000, show_default=True)
def compare(first: Path, second: Path, part: str | None, draws: int) -> None:
    """Compare two scored runs, image by image.

    FIRST and SECOND are runs of `psd train-head` or `psd baseline` that were scored on the same
    images. Printed is the first less the second with the 95 % interval of the difference over the
    images, each draw the same for both: an interval without 0 is a difference. It speaks of the
    images; how much another seed of the training changes, other runs tell.

    \b
    Example:
      psd compare runs/glas-tiny-t50 runs/glas-effnet-unet
      psd compare runs/a runs/b --split testB
    """
    from pathsegdiff.evaluation.compare import compare as compare_scored
    from pathsegdiff.evaluation.compare import read_scored

    one, other = read_scored(first, part), read_scored(second, part)
    found = compare_scored(one, other, draws=draws)
    click.echo(
        f"{one.part}, {len(one.sample_ids)} images: {first} less {second}, 95 % intervals over "
        f"{'images' if one.units == one.sample_ids else 'their sources'}"
    )
    lines = [
        (_TITLES[name], found.values[name], interval)
        for name, interval in found.differences.items()
    ]
    lines += [
        (f"IoU {name}", found.class_values[name], interval)
        for name, interval in found.class_iou.items()
    ]
    width = max(len(title) for title, _, _ in lines)
    for title, (mine, theirs), interval in lines:
        sure = "  differs" if interval.low > 0 or interval.high < 0 else ""
        click.echo(
            f"  {title:<{width}}  {mine:.4f} - {theirs:.4f} = {interval.value:+.4f}  "
            f"({interval.low:+.4f} to {interval.high:+.4f}){sure}"
        )
    ahead = sum(difference > 0 for _, difference in found.images)
    click.echo(f"mIoU is higher in the first on {ahead} of {len(found.images)} images")
    for title, images in (("most", found.images[:_SHOWN]), ("least", found.images[::-1][:_SHOWN])):
        named = ", ".join(f"{sample} {difference:+.3f}" for sample, difference in images)
        click.echo(f"  {title}: {named}")
