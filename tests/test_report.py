"""The report is one valid, self-contained file; metrics.json and per_image.csv are complete."""

import base64
import csv
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from pathsegdiff.evaluation import report
from pathsegdiff.evaluation.confusion import confusion_matrix, image_means, scores
from pathsegdiff.evaluation.intervals import object_intervals, pixel_intervals
from pathsegdiff.evaluation.objects import image_object_scores, object_sums, pool_objects
from pathsegdiff.evaluation.report import (
    ReportContent,
    image_row,
    metrics_json,
    per_image_csv,
    render_report,
    write_report,
)

NAMES = ("background", "gland <b>&")
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Checks that every element is closed in order, and collects what a browser would fetch."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.sources, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        assert len(attributes) == len(attrs), f"an attribute twice in <{tag}>"
        self.sources += [attributes[key] for key in ("src", "href", "data") if key in attributes]
        if tag == "img":
            assert attributes.get("alt")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)


@pytest.fixture(scope="module")
def evaluated():
    rng = np.random.default_rng(0)
    confusions, objects, rows, panels = [], [], [], {}
    for number in range(8):
        target = np.zeros((24, 32), int)
        target[4:16, 4:20] = 1
        predicted = np.roll(target, number, axis=1)
        confusions.append(confusion_matrix(target, predicted, 2))
        objects.append(image_object_scores(target, predicted))
        name = f"image_{number}"
        rows.append(image_row(name, confusions[-1], NAMES, objects[-1], group=f"p{number // 2}"))
        panels[name] = rng.integers(0, 255, (60, 200, 3)).astype(np.uint8)
    confusions = np.stack(confusions)
    return {
        "confusions": confusions,
        "intervals": pixel_intervals(confusions, draws=100),
        "objects": pool_objects(objects),
        "object_intervals": object_intervals(object_sums(objects), draws=100),
        "rows": rows,
        "panels": panels,
    }


@pytest.fixture
def content(evaluated):
    return ReportContent(
        title="GlaS <script>alert(1)</script>",
        subtitle="runs/a & b",
        names=NAMES,
        colours=((225, 227, 230), (0, 180, 135)),
        scores=scores(evaluated["confusions"].sum(axis=0)),
        notes=["The model has random weights: this is a floor."],
        intervals=evaluated["intervals"],
        objects=evaluated["objects"],
        object_intervals=evaluated["object_intervals"],
        image_means=image_means(evaluated["confusions"]),
        images=evaluated["rows"],
        panels=evaluated["panels"],
        provenance={"store": {"fingerprint": "abc<i>", "taps": ["middle", "up_00"]}, "seed": 0},
    )


def test_the_report_is_well_formed_and_fetches_nothing(content):
    text = render_report(content)
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>\n<html lang=")
    assert page.tags[0] == "html" and "title" in page.tags
    assert "script" not in page.tags and "link" not in page.tags
    assert page.sources and all(source.startswith("data:image/") for source in page.sources)
    assert not re.search(r"https?://|@import|url\(", text)


def test_every_string_of_the_user_is_escaped(content):
    text = render_report(content)
    assert "<script>" not in text and "<i>" not in text and "gland <b>" not in text
    shown = " ".join(Page(text).text)
    for said in ("<script>alert(1)</script>", "runs/a & b", "gland <b>&", "abc<i>"):
        assert said in shown


def test_the_report_says_what_matters(content):
    shown = " ".join(Page(render_report(content)).text)
    assert "random weights" in shown
    assert f"{content.scores.dice:.3f}" in shown
    interval = content.intervals["dice"]
    assert f"{interval.low:.3f} to {interval.high:.3f}" in shown
    assert f"{content.objects.f1:.3f}" in shown
    assert "store / fingerprint" in shown and "middle, up_00" in shown and "seed" in shown
    for section in ("Result", "Objects", "Classes", "Confusion", "Worst images", "Best images"):
        assert section in shown


def test_worst_images_come_first_and_every_panel_is_embedded_once(content):
    text = render_report(content)
    order = re.findall(r"<figcaption><strong>(image_\d)</strong>", text)
    # Moved by 7 pixels is worst: the two worst, the two best (best first), the others.
    assert [int(name[-1]) for name in order] == [7, 6, 0, 1, 5, 4, 3, 2]
    assert text.count("data:image/jpeg") == 8


def test_embedded_pictures_can_be_decoded(content, tmp_path):
    saved = tmp_path / "panel.png"
    Image.fromarray(content.panels["image_0"]).save(saved)
    one = replace(content, images=content.images[:1], panels={"image_0": saved})
    page = Page(render_report(one))
    (source,) = page.sources
    picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    assert picture.size == (200, 60)


def test_many_panels_are_shrunk_to_the_budget(content, monkeypatch):
    large = np.random.default_rng(1).integers(0, 255, (400, 1700, 3)).astype(np.uint8)
    panels = dict.fromkeys(content.panels, large)
    monkeypatch.setattr(report, "PANEL_BUDGET_BYTES", 1_500_000)
    text = render_report(replace(content, panels=panels))
    assert len(text) < 1_500_000 * 4 / 3 + 60_000


def test_more_panels_than_fit_are_counted_not_hidden(content, monkeypatch):
    monkeypatch.setattr(report, "MAX_PANELS", 6)
    text = render_report(content)
    # Two of the eight stand at each end; those between are thinned out.
    assert text.count("<figcaption>") == 6
    assert "6 of 8 images are shown" in text


def test_a_report_without_extras_still_stands(content):
    bare = ReportContent(
        title="t", names=NAMES, colours=content.colours, scores=scores(np.zeros((2, 2), int))
    )
    shown = " ".join(Page(render_report(bare)).text)
    assert "n/a" in shown and "left out of the means: background, gland <b>&" in shown
    assert "Objects" not in shown and "Provenance" not in shown


def test_an_infinite_distance_and_missing_scores_are_shown_and_ranked_last(content, evaluated):
    target = np.zeros((9, 9), int)
    target[2:5, 2:5] = 1
    lost = image_object_scores(target, np.zeros_like(target))
    empty = image_row("nothing", np.zeros((2, 2), int), NAMES, lost)
    assert math.isnan(empty["dice"]) and empty["object_hausdorff"] == math.inf
    pooled = pool_objects([lost])
    panels = content.panels | {"nothing": content.panels["image_0"]}
    text = render_report(
        replace(content, images=[empty, *content.images], panels=panels, objects=pooled)
    )
    shown = " ".join(Page(text).text)
    assert "∞" in shown and "makes the Hausdorff distance infinite" in shown
    order = re.findall(r"<figcaption><strong>(\w+)</strong>", text)
    assert order[-1] == "nothing"


def test_training_curves_are_embedded(content, tmp_path):
    curves = tmp_path / "curves.png"
    Image.new("RGB", (8, 8)).save(curves)
    assert "data:image/png;base64," in render_report(replace(content, curves=curves))
    assert "Training" not in render_report(replace(content, curves=tmp_path / "missing.png"))


def test_classes_and_scores_must_fit(content, tmp_path):
    with pytest.raises(ValueError, match="1 names and 2 colours for 2 classes"):
        write_report(tmp_path / "report.html", replace(content, names=("one",)))
    assert not list(tmp_path.iterdir())


def test_writing_the_report_twice_gives_the_same_bytes(content, tmp_path):
    for name in ("a.html", "b.html"):
        write_report(tmp_path / name, content)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_metrics_json_has_the_agreed_top_level_and_is_strict(evaluated, tmp_path):
    path = tmp_path / "eval-test" / "metrics.json"
    document = metrics_json(
        path,
        names=NAMES,
        confusions=evaluated["confusions"],
        intervals=evaluated["intervals"],
        images=evaluated["rows"],
        objects=evaluated["objects"],
        object_intervals=evaluated["object_intervals"],
        notes=["random weights"],
        provenance={"seed": 0},
    )

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == document
    agreed = ["accuracy", "dice", "miou", "f1", "intervals", "per_class", "absent", "confusion"]
    agreed += ["variants", "objects", "images", "notes", "provenance"]
    assert list(document) == agreed
    pooled = scores(evaluated["confusions"].sum(axis=0))
    assert document["dice"] == document["f1"] == pooled.dice
    assert document["per_class"][1]["name"] == NAMES[1]
    assert document["per_class"][1]["image_mean"]["images"] == 8
    assert document["confusion"]["counts"] == evaluated["confusions"].sum(axis=0).tolist()
    assert document["variants"]["image_mean"] == image_means(evaluated["confusions"])
    assert document["objects"]["f1"] == evaluated["objects"].f1
    assert set(document["objects"]["intervals"]) == {
        "object_f1",
        "object_dice",
        "object_hausdorff",
    }
    assert len(document["images"]) == 8


def test_per_image_csv_keeps_all_columns_and_leaves_missing_cells_empty(tmp_path):
    path = tmp_path / "per_image.csv"
    per_image_csv(
        path,
        [
            {"sample_id": 'a,"b"', "dice": 0.123456789, "tp": 3},
            {"sample_id": "c", "dice": math.nan, "extra": math.inf},
        ],
    )
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert rows == [
        {"sample_id": 'a,"b"', "dice": "0.123457", "tp": "3", "extra": ""},
        {"sample_id": "c", "dice": "", "tp": "", "extra": "inf"},
    ]
