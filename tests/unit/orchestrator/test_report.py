import json
from html.parser import HTMLParser
from pathlib import Path

from orchestrator import report
from orchestrator.report import write_report


class Page(HTMLParser):
    """A report as a browser's parser sees it: the scripts, the rows of samples, and the text of the cards."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.cells: list[str] = []
        self.cards: dict[str, list[str]] = {}
        self._inside: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._inside.append(dict(attrs).get("class", ""))
        if tag == "script":
            self.scripts.append("")
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        if self._inside:
            self._inside.pop()

    def handle_data(self, text):
        if self.tags[-1:] == ["script"] and self.scripts:
            self.scripts[-1] += text
        if self.tags[-1:] == ["td"]:
            self.cells[-1] += text.rstrip("\n")
        match self._inside[-1:]:
            case ["label"]:
                self.cards[text] = []
            case ["value"] | ["note"]:
                self.cards[list(self.cards)[-1]].append(text)

    @property
    def data(self):
        return json.loads(self.scripts[0])


def write_lines(path: Path, objects: list, tail: str = "") -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in objects) + tail)


def span(who: str, name: str, step: int | None, start: float, end: float) -> dict:
    return {"event": "span", "who": who, "name": name, "step": step, "start": start, "end": end}


def curve(page: Page, title: str, label: str) -> list:
    chart = next(chart for chart in page.data["charts"] if chart["title"] == title)
    return next(series["points"] for series in chart["series"] if series["label"] == label)


def test_an_empty_folder_gives_a_page_that_says_so(tmp_path):
    page = Page(write_report(tmp_path))
    assert page.cards["Steps"] == ["0", "no rewards yet"]
    assert page.data == {
        "charts": [],
        "time_split": [],
        "timeline": {
            "lanes": [],
            "names": [],
            "step_marks": [],
            "end": 0.0,
            "note": "Seconds since the first span.",
        },
    }


def test_the_cards_carry_the_figures_of_the_run(tmp_path):
    write_lines(
        tmp_path / "metrics.jsonl",
        [
            {"step": 0, "eval/accuracy": 0.125},
            {"step": 1, "loss": 0.5, "time/step_s": 4.0, "logprob_diff/max": 1e-5, "refit/verified": 1},
            {"step": 2, "loss": 0.4, "time/step_s": 0.3, "logprob_diff/max": 2e-4, "refit/verified": 0}
            | {"samples/invalid": 3, "samples/invalid/timeout": 1, "samples/invalid/too long": 2},
            {"step": 3, "loss": 0.3, "time/step_s": 0.5, "refit/verified": 1, "eval/accuracy": 0.875}
            | {"samples/invalid": 1, "samples/invalid/timeout": 1},
        ],
    )
    write_lines(
        tmp_path / "events.jsonl",
        [
            span("orchestrator", "launch", None, 1750000000.0, 1750000009.0),
            span("train/0", "optim_step", 3, 1750000070.0, 1750000075.5),
        ],
    )
    cards = Page(write_report(tmp_path)).cards
    assert cards["Eval accuracy"] == ["0.875", "from 0.125"]
    assert cards["Steps"][0] == "3"
    assert cards["Wall time"][0] == "1 min 15 s"
    assert cards["Median step"][0] == "0.50 s"
    assert cards["Max logprob_diff"] == ["2.0e-04", "above 1e-04"]
    assert cards["Refits verified"] == ["2/3", "a refit was not verified"]
    assert cards["Samples dropped"] == ["4", "timeout 2, too long 2"]


def test_a_script_tag_in_a_sample_does_not_break_out(tmp_path):
    attack = "</td></script><script>alert(1)</script><img src=x onerror=alert(1)>{{config}}"
    run_dir = tmp_path / "<img>"
    run_dir.mkdir()
    write_lines(run_dir / "samples.jsonl", [{"step": 1, "prompt": attack, "completion": [attack], "reward": 1.0}])
    (run_dir / "config.yaml").write_text(f"name: {attack}")
    write_lines(run_dir / "metrics.jsonl", [{"step": 1, f"samples/invalid/{attack}": 1, "samples/invalid": 1}])
    write_lines(
        run_dir / "events.jsonl",
        [span(attack, attack, 1, 0.0, 1.0), {"event": "note", "text": attack, "time": 0.5}],
    )
    page = Page(write_report(run_dir))
    assert page.tags.count("script") == 2
    assert "img" not in page.tags
    assert page.cells == ["1", attack, json.dumps([attack]), "", "1"]
    assert page.data["timeline"]["lanes"][0]["who"] == attack


def test_the_page_asks_the_network_for_nothing(tmp_path):
    text = write_report(tmp_path).read_text()
    assert "default-src 'none'" in text
    assert "src=" not in text and "href=" not in text and "@import" not in text


def test_a_torn_line_is_skipped_and_counted(tmp_path):
    steps = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    write_lines(tmp_path / "metrics.jsonl", steps, tail='{"step": 3, "lo')
    write_lines(tmp_path / "events.jsonl", [], tail='{"event": "span"\n7\n\n')
    path = write_report(tmp_path)
    assert curve(Page(path), "Loss", "loss") == [[1, 0.5], [2, 0.25]]
    assert "3 unreadable lines skipped" in path.read_text()


def test_a_value_that_is_not_finite_is_a_gap_and_a_missing_one_is_not(tmp_path):
    write_lines(
        tmp_path / "metrics.jsonl",
        [
            {"step": 1, "loss": 1.0},
            {"step": 2, "loss": float("nan")},
            {"step": 3},
            {"step": 4, "loss": 2.0},
            {"step": 5, "loss": None},
            {"step": 6, "loss": float("inf"), "kl": float("nan")},
        ],
    )
    page = Page(write_report(tmp_path))
    assert curve(page, "Loss", "loss") == [[1, 1.0], [2, None], [4, 2.0], [5, None], [6, None]]
    assert [chart["title"] for chart in page.data["charts"]] == ["Loss"]


def test_a_step_that_a_resumed_run_repeats_is_drawn_once(tmp_path):
    write_lines(
        tmp_path / "metrics.jsonl",
        [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 3.0}],
    )
    assert curve(Page(write_report(tmp_path)), "Loss", "loss") == [[1, 1.0], [2, 2.0], [3, 3.0]]


def test_the_rest_of_a_step_is_what_no_part_accounts_for(tmp_path):
    part = {"time/rollout_wait_s": 0.5, "time/train_s": 0.25, "time/refit_s": 0.125}
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "time/step_s": 1.0} | part, {"step": 2} | part, {"step": 3}])
    assert Page(write_report(tmp_path)).data["time_split"] == [[1, 0.5, 0.25, 0.125, 0.125], [2, 0.5, 0.25, 0.125, 0]]


def test_spans_of_a_worker_that_overlap_lie_in_rows_of_their_own(tmp_path):
    write_lines(
        tmp_path / "events.jsonl",
        [
            span("rollout/10", "generate", 1, 100.0, 101.0),
            span("rollout/2", "generate", 1, 100.0, 101.0),
            span("rollout/2", "stage", 1, 100.5, 101.5),
            span("rollout/2", "generate", 2, 101.0, 102.0),
            span("orchestrator", "save", 2, 102.0, 103.0),
            {"event": "span", "who": "train/0", "name": "torn", "step": 1, "start": 100.0},
            {"event": "unknown"},
        ],
    )
    timeline = Page(write_report(tmp_path)).data["timeline"]
    assert [lane["who"] for lane in timeline["lanes"]] == ["orchestrator", "rollout/2", "rollout/10"]
    assert timeline["names"] == ["generate", "save", "stage"]
    assert timeline["lanes"][1]["spans"] == [[0, 0, 1, 0, 1000], [1, 2, 1, 500, 1500], [0, 0, 2, 1000, 2000]]


def test_thinning_a_curve_keeps_its_spike():
    points = [[step, 1.0] for step in range(5000)]
    points[3217] = [3217, 90.0]
    points[4001] = [4001, None]
    thinned = report.thin(points, 1000)
    assert len(thinned) <= 1000
    assert [3217, 90.0] in thinned
    assert thinned == sorted(thinned)


def test_a_hundred_thousand_events_stay_a_small_page_with_the_newest_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MAX_SPANS", 2000)
    spans = [
        span(f"train/{index % 4}", "forward_backward", index // 40, index * 0.01, index * 0.01 + 0.02)
        for index in range(20_000)
    ]
    spans[40]["end"] = 9.0
    write_lines(tmp_path / "events.jsonl", spans)
    timeline = Page(write_report(tmp_path)).data["timeline"]
    kept = [one for lane in timeline["lanes"] for one in lane["spans"]]
    assert len(kept) <= 2000
    assert sum(step >= 480 for _, _, step, _, _ in kept) == 800
    assert [400.0, 9000.0] in [one[3:] for one in kept]
    assert "of 20,000 spans are kept" in timeline["note"]


def test_a_very_long_completion_is_cut_and_the_cut_is_told(tmp_path):
    write_lines(tmp_path / "samples.jsonl", [{"step": 1, "completion": "x" * 5000}])
    assert Page(write_report(tmp_path)).cells[2] == "x" * 4000 + " … and 1,000 more characters"


def test_half_a_character_in_a_completion_does_not_stop_the_report(tmp_path):
    write_lines(tmp_path / "samples.jsonl", [{"step": 1, "completion": "half \ud83d"}])
    assert Page(write_report(tmp_path)).cells[2] == "half ?"
