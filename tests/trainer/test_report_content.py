"""What report.html says about a made-up run; how it looks and behaves is test_report_page.py's."""

import html
import io
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from g4trainer import report, report_data, report_plots
from g4trainer.__main__ import main
from g4trainer.attempt import Attempt
from g4trainer.dataset import DataError, Example, Splits
from g4trainer.deadline import Deadline
from g4trainer.evaluate import Prediction
from g4trainer.metrics import MetricsLog, Publisher, Status
from g4trainer.rundir import file_entry, manifest, read_json, write_json
from g4trainer.train import Phases
from trainer.made_up_run import PRICES, TRAIN, MadeUp, make
from trainer.making import encoded, picture

LABELS = ("Abyssinian", "Bengal", "Birman")
HOSTILE = ("<script>alert(1)</script>", '$x_1$ & "q"', "\x07bell", "日本")


def samples(labels: tuple[str, ...], count: int = 60, *, width: int = 8, height: int = 8) -> list[Example]:
    return [
        Example(f"test/{n}", (encoded(picture(width, height, seed=n)),), "Which is it?", labels[n % len(labels)])
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeUp:
    """Tests must not write there."""
    return make(tmp_path_factory.mktemp("made"), samples(LABELS), LABELS, mistakes=0.3)


@pytest.fixture(scope="module")
def page(made: MadeUp) -> str:
    return page_of(made)


def page_of(made: MadeUp) -> str:
    return report.render(made.run, made.results, made.test)


def test_the_page_holds_everything_and_asks_for_nothing(made: MadeUp, page: str) -> None:
    told = html.unescape(page)
    accuracy = sum(prediction.correct for prediction in made.after) / 60
    for text in (
        f"{100 * accuracy:.1f}\N{NARROW NO-BREAK SPACE}%",
        "tiny-gemma4",
        "effective_batch_size",
        "killed, or lost",
    ):
        assert text in told
    assert page.count("<svg") == 6
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "https://" not in page
    assert "default-src 'none'" in page


def test_plots_are_coloured_by_the_page_alone(made: MadeUp) -> None:
    charts = report.charts(made.run, made.results, 8)
    assert [chart["title"] for chart in charts] == [
        "Loss",
        "Learning rate",
        "Throughput",
        "Gradient norm",
        "GPU memory",
    ]
    for chart in charts:
        assert "var(--accent)" in chart["svg"]
        assert "#0" not in chart["svg"].replace('href="#', ""), "a colour that no scheme can change"


def test_a_resumed_attempt_is_marked(made: MadeUp) -> None:
    assert report.resumed_steps(made.run) == [81]
    assert all("stroke-dasharray" in chart["svg"] for chart in report.charts(made.run, made.results, 8))
    first, second = report_data.attempt_rows(made.run, 140.0)
    assert (first.steps, first.outcome, first.seconds) == ("1 to 90", "ended without a word: killed, or lost", 65.0)
    assert (second.steps, second.outcome, second.seconds) == ("81 to 120", "finished the run", 75.0)


def test_the_change_is_counted_sample_by_sample() -> None:
    def answers(right: str) -> list[Prediction]:
        return [Prediction(f"test/{n}", "a", "a", "a", mark == "1") for n, mark in enumerate(right)]

    found = report_data.change(report_data.Evaluations({}, answers("1110100000"), {}, answers("1001000000")))
    assert found is not None
    assert (found.fixed, found.broken, found.still_right, found.still_wrong) == (3, 1, 1, 5)
    assert found.difference.value == pytest.approx(0.2)
    # By hand: half = 1.96 * sqrt(3 + 1 - (3 - 1)^2 / 10) / 10
    assert found.difference.low == pytest.approx(0.2 - 1.959964 * 3.6**0.5 / 10, abs=1e-6)


def test_the_gallery_shows_what_got_worse_first(made: MadeUp) -> None:
    shown = report_data.mistakes(report_data.read_evaluations(made.run), made.test)
    wrong = [prediction for prediction in made.after if not prediction.correct]
    assert len(shown) == len(wrong) > 3
    assert [mistake.was_right for mistake in shown] == sorted((m.was_right for m in shown), reverse=True)
    unnamed = [p.id for p in wrong if p.prediction is None]
    assert unnamed
    assert {m.after for m in shown if m.id in unnamed} == {"“I cannot tell.”"}


def test_small_images_are_kept_and_large_ones_shrunk() -> None:
    import base64

    for size, kind, expected in (((8, 8), "png", (8, 8)), ((400, 300), "webp", (192, 144))):
        url, pixel_art = report_data.thumbnail(encoded(picture(*size)), "test/0")
        assert url.startswith(f"data:image/{kind};base64,")
        assert Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size == expected
        assert pixel_art == (kind == "png")


def test_labels_are_text_wherever_they_stand(tmp_path: Path) -> None:
    made = make(tmp_path, samples(HOSTILE), HOSTILE, mistakes=0.5)
    page = page_of(made)
    assert "<script>alert" not in page
    assert page.count(html.escape(HOSTILE[0], quote=False).replace("'", "&#39;")) >= 3
    assert "mathdefault" not in page


def test_without_a_baseline(tmp_path: Path) -> None:
    page = page_of(make(tmp_path, samples(LABELS), LABELS, baseline=False))
    assert "The base model was not evaluated" in page
    assert "recall before" not in page
    assert "became right" not in page


def test_chat_has_no_classes(tmp_path: Path) -> None:
    page = page_of(make(tmp_path, samples(LABELS), ()))
    assert "Exact match on 60 test samples" in page
    assert "Confusion matrix" not in page
    assert "Answers that differ" in page


def test_without_a_mistake_and_without_a_step(tmp_path: Path) -> None:
    made = make(tmp_path, samples(LABELS), LABELS, mistakes=0.0)
    for segment in made.run.metrics.iterdir():
        segment.unlink()
    page = page_of(made)
    assert "every answer on the test samples was right" in page
    assert "No step was logged." in page


def test_the_cost_is_told_where_something_is_billed(tmp_path: Path, page: str) -> None:
    assert "estimated cost" not in page
    made = make(tmp_path, samples(LABELS), LABELS, prices=PRICES)
    assert "$0.07" in page_of(made)  # 140 s
    write_json(made.run.cost, {"usd": 1.23})
    assert "$1.23" in page_of(made)
    assert "$0.07" not in page_of(made)


def test_397_digits_of_which_a_quarter_are_wrong_stay_below_3_mb(tmp_path: Path) -> None:
    """As many as the demo has, at more mistakes than it makes."""
    page = page_of(make(tmp_path, samples(LABELS, 397, width=8, height=8), LABELS, mistakes=0.25))
    assert 50_000 < len(page.encode()) < 3_000_000


def test_3669_predictions_of_37_classes_stay_below_10_mb(tmp_path: Path) -> None:
    labels = tuple(f"breed number {n}" for n in range(37))
    photos = [encoded(picture(500, 375, seed=seed), "JPEG") for seed in range(3)]  # noise: nothing is larger
    test = [Example(f"test/{n}", (photos[n % 3],), "Which is it?", labels[n % 37]) for n in range(3669)]
    page = page_of(make(tmp_path, test, labels))
    assert 100_000 < len(page.encode()) < 10_000_000
    assert page.count("<img") == report_data.GALLERY_SIZE


def test_a_matrix_of_many_classes_shows_those_with_the_most_mistakes() -> None:
    labels = [f"class {n}" for n in range(60)]
    counts = [[9 if row == column else 0 for column in range(61)] for row in range(60)]
    counts[7][60] = counts[59][0] = 5
    svg, shown = report_plots.confusion_chart({"rows": labels, "columns": [*labels, "(unknown)"], "counts": counts})
    assert shown == report_plots.MATRIX_CLASSES
    assert ">class 7<" in svg
    assert ">class 59<" in svg
    assert ">(unknown)<" in svg


def test_long_curves_are_thinned() -> None:
    chance = random.Random(0)
    lines = [
        {"kind": "train", "step": step, "loss": 1 + chance.random(), "time": "2026-01-01T00:00:00+00:00"}
        for step in range(1, 50_001)
    ]
    svg = report_plots.loss_chart(lines, [], None)
    assert svg is not None
    assert 10_000 < len(svg) < 80_000


def test_the_verb_makes_the_page_again_and_notes_its_checksum(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(tmp_path, samples(LABELS), LABELS)
    monkeypatch.setattr(report, "load_splits", lambda folder, *_, **__: _splits(made, folder, tmp_path))
    before = manifest(made.run.path)
    assert main(["report", str(made.run.path)]) == 0
    page = made.run.report.read_bytes()
    assert capsys.readouterr().out.strip().endswith(str(made.run.report))
    assert read_json(made.run.results)["artifacts"]["report.html"] == file_entry(made.run.report)
    assert main(["report", str(made.run.path)]) == 0
    assert made.run.report.read_bytes() == page
    changed = {name for name, entry in manifest(made.run.path).items() if before.get(name) != entry}
    assert changed == {"report.html", "results.json"}


def _splits(made: MadeUp, folder: Path, root: Path) -> object:
    assert folder == root / "datasets" / "digits"
    return type("Splits", (), {"test": made.test})


def test_the_last_phase_writes_the_page_before_the_results(tmp_path: Path) -> None:
    made = make(tmp_path, samples(LABELS), LABELS)
    made.run.results.unlink()
    assert _finish(made) == file_entry(made.run.report)
    assert b"made-up" in made.run.report.read_bytes()
    made.run.report.write_bytes(b"an earlier attempt's")
    assert _finish(made) == file_entry(made.run.report)
    assert made.run.report.read_bytes() == b"an earlier attempt's"


def _finish(made: MadeUp) -> dict[str, Any]:
    """The report's entry in results.json after an attempt's last phase."""
    claim: Any = SimpleNamespace(attempt=2, check=lambda: None)
    publisher = Publisher(0.0)
    status = Status(made.run.status, publisher, attempt=2)
    metrics = MetricsLog(made.run, publisher, attempt=2)
    phases = Phases(Attempt(made.run, Deadline(None), claim, publisher, status, metrics))
    phases.splits = Splits(made.test[:4], made.test[:2], made.test, LABELS, 0)
    phases.training_summary = TRAIN
    phases.report()
    entry: dict[str, Any] = read_json(made.run.results)["artifacts"]["report.html"]
    return entry


def test_the_verb_refuses_what_it_cannot_report(
    made: MadeUp, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "has no results.json" in capsys.readouterr().err
    assert main(["report", str(made.run.path)]) == 2, "the data set is not staged"
    assert "no train split" in capsys.readouterr().err
    assert not made.run.report.exists()


def test_a_damaged_image_is_named() -> None:
    with pytest.raises(DataError, match="test/7"):
        report_data.thumbnail(b"no image", "test/7")


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (report.percent(0.9672), "96.7\N{NARROW NO-BREAK SPACE}%"),
        (report.points(-0.031), "\N{MINUS SIGN}3.1"),
        (report.number(1260), "1,260"),
        (report.number(48.27), "48.3"),
        (report.seconds(229.4), "3\N{NARROW NO-BREAK SPACE}min 49\N{NARROW NO-BREAK SPACE}s"),
        (report.seconds(7260), "2\N{NARROW NO-BREAK SPACE}h 1\N{NARROW NO-BREAK SPACE}min"),
        (report.seconds(2.11), "2.1\N{NARROW NO-BREAK SPACE}s"),
        (report.moment("2026-11-21T21:27:19.784+00:00"), "2026-11-21 21:27 UTC"),
    ],
)
def test_numbers_as_people_read_them(shown: str, text: str) -> None:
    assert shown == text
