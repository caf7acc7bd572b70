"""What an evaluation found, printed the same by every command that makes one."""

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:  # heavy imports stay inside the commands
    from pathsegdiff.segmentation.scoring import Evaluation


def show_evaluation(found: "Evaluation") -> None:
    """Notes, pooled metrics with their intervals, object metrics, and where the report is."""
    for note in found.notes:
        click.echo(f"note: {note}")
    click.echo(
        f"{found.part}, {found.samples} {found.sample_unit}, pooled, with 95 % intervals over "
        f"{found.interval_unit}:"
    )
    for name, shown in (("accuracy", "accuracy"), ("dice", "Dice"), ("miou", "mIoU"), ("f1", "F1")):
        interval = found.intervals[name]
        value = getattr(found.scores, name)
        click.echo(f"  {shown:18} {value:.4f}  ({interval.low:.4f} to {interval.high:.4f})")
    if found.objects is not None:
        click.echo(f"  {'object F1':18} {found.objects.f1:.4f}")
        click.echo(f"  {'object Dice':18} {found.objects.dice:.4f}")
        click.echo(f"  {'object Hausdorff':18} {found.objects.hausdorff:.1f} px")
    click.echo(f"report: {found.path / 'report.html'}")
